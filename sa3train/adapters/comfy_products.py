"""LoHa and LoKr layers of ComfyUI's files, read as the differences of weights that they are.

LoHa: (w1_a·w1_b) ⊙ (w2_a·w2_b). LoKr: w1 ⊗ w2, each whole or a product of its own. Both times alpha / rank, where rank
is that of the last product and the factor is 1 without alpha or without a product (as ComfyUI and LyCORIS do it).
Shape suffixes: O rows (out), I columns (in).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sa3train.errors import AdapterError

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


def is_product(params: Mapping[str, Tensor]) -> bool:
    """Whether a layer's tensors are LoHa's or LoKr's."""
    return any(name in LOHA or name in LOKR for name in params)


def product_rank(params: Mapping[str, Tensor]) -> int | None:
    """The rank that alpha is divided by; None where both factors of a LoKr are whole."""
    for name in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if name in params and params[name].ndim:
            return int(params[name].shape[0])
    return None


def product_shape(source: str, path: str, params: Mapping[str, Tensor]) -> tuple[int, int]:
    """(O, I) of the difference, before it is made. Raises `AdapterError` for tensors that do not fit together."""
    names = {name for name in params if name != "diff_b"}
    if names == set(LOHA):
        first, second = (_pair(source, path, params, f"hada_w{which}") for which in "12")
        if first != second:
            raise AdapterError(f"{source}: the two products of {path} have the shapes {first} and {second}.")
        return first
    if not names <= set(LOKR):
        raise AdapterError(
            f"{source}: {path} has {', '.join(sorted(names))}; that cannot be read here (a LoHa has {', '.join(LOHA)}, "
            f"a LoKr lokr_w1 and lokr_w2 or their factors)."
        )
    (rows_1, columns_1), (rows_2, columns_2) = (_kronecker_shape(source, path, params, which) for which in "12")
    return rows_1 * rows_2, columns_1 * columns_2


def product_difference(params: Mapping[str, Tensor], scale: float) -> Tensor:
    """The difference (O, I), fp32. `product_shape` must have found the tensors fit."""
    if "hada_w1_a" in params:
        w = {name: _flat(params[name]) for name in LOHA}
        return (w["hada_w1_a"] @ w["hada_w1_b"]).mul_(w["hada_w2_a"] @ w["hada_w2_b"]).mul_(scale)
    return torch.kron(_kronecker_factor(params, "1"), _kronecker_factor(params, "2")).mul_(scale)


def _kronecker_factor(params: Mapping[str, Tensor], which: str) -> Tensor:
    whole = params.get(f"lokr_w{which}")
    if whole is not None:
        return _flat(whole)
    return _flat(params[f"lokr_w{which}_a"]) @ _flat(params[f"lokr_w{which}_b"])


def _kronecker_shape(source: str, path: str, params: Mapping[str, Tensor], which: str) -> tuple[int, int]:
    name = f"lokr_w{which}"
    if name not in params:
        return _pair(source, path, params, name)
    if f"{name}_a" in params or f"{name}_b" in params:
        raise AdapterError(f"{source}: {path} has {name} both whole and in factors.")
    return _matrix(source, path, name, params[name])


def _pair(source: str, path: str, params: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """(O, I) of a·b."""
    if f"{name}_a" not in params or f"{name}_b" not in params:
        raise AdapterError(f"{source}: {path} is incomplete: {name} is missing or has only one of its factors.")
    left, right = (_matrix(source, path, key, params[key]) for key in (f"{name}_a", f"{name}_b"))
    if left[1] != right[0]:
        raise AdapterError(f"{source}: the factors {name} of {path} do not fit together: {left} and {right}.")
    return left[0], right[1]


def _matrix(source: str, path: str, name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.ndim < 2 or 0 in tensor.shape or not tensor.is_floating_point():
        raise AdapterError(f"{source}: {name} of {path} must be a matrix of numbers, not {tuple(tensor.shape)}.")
    rows, columns = tensor.flatten(1).shape
    return rows, columns


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).float()
