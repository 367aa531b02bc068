"""Changes that files of LyCORIS and ComfyUI hold as small factors: LoHa, LoKr and OFT, computed a layer at a time.

LoHa: (w1_a·w1_b) ⊙ (w2_a·w2_b). LoKr: w1 ⊗ w2, each either whole or a product of its own. OFT: with the Cayley
transform R = (I + Q)(I − Q)⁻¹ of Q = b − bᵀ for each block b, the rows of a block become Rᵀ W. Sources: LyCORIS 3 and
ComfyUI 0.33.0 (`comfy/weight_adapter`), which squares the strength of an OFT; here it is that of every other type.
Shape suffixes: O rows (out), I columns (in), K blocks, N rows of a block.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sa3train.adapters.spec import BIAS_CHANGE
from sa3train.core.errors import AdapterError

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
OFT = "oft_blocks"
MAX_CHANGE = 2**27
"""Largest number of values in a change made from factors: a small file must not need all memory."""

_ROWS = 256  # of a LoHa that are computed at once for its norm


def is_product(names: Iterable[str]) -> bool:
    """Check whether a layer is stored as a LoHa, LoKr or OFT.

    Args:
        names: Names of its tensors.

    Returns:
        Whether one of them is a factor of these.
    """
    return not {*LOHA, *LOKR, OFT}.isdisjoint(names)


def get_product_rank(params: Mapping[str, Tensor]) -> int | None:
    """Get the rank that alpha is divided by, that of the last inner product.

    Args:
        params: The layer's tensors by name.

    Returns:
        The rank; None where there is no product inside, so that alpha has no effect.
    """
    inner = (params[name] for name in ("lora_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if name in params)
    return next((tensor.shape[0] for tensor in inner if tensor.ndim), None)


def check_product(path: str, params: Mapping[str, Tensor]) -> tuple[int, int | None]:
    """Check the factors of a LoHa, LoKr or OFT, and compute the shape of the weight that they are for.

    Args:
        path: Module path of the layer, for messages.
        params: Its tensors by name.

    Returns:
        Rows and columns; None for the columns of an OFT, which fits any.

    Raises:
        AdapterError: If factors are missing or do not fit together, or the change would be larger than any model's.
    """
    if OFT in params:
        return _check_blocks(path, params), None
    is_loha = not set(LOHA).isdisjoint(params)
    known = {*(LOHA if is_loha else LOKR), "magnitude", BIAS_CHANGE}
    if not params.keys() <= known:
        raise AdapterError(
            f"{path} has {', '.join(sorted(params))}, which is not supported. A LoHa has {', '.join(LOHA)}, a LoKr "
            f"lokr_w1 and lokr_w2 or their factors."
        )
    one, other = (_get_shape(path, params, f"{'hada' if is_loha else 'lokr'}_w{i}") for i in "12")
    if is_loha and one != other:
        raise AdapterError(f"The two products of {path} have the shapes {one} and {other}.")
    rows, columns = one if is_loha else (one[0] * other[0], one[1] * other[1])
    if rows * columns > MAX_CHANGE:
        raise AdapterError(f"{path} would change {rows} × {columns} weights; no model is as large as that.")
    return rows, columns


def expand_product(params: Mapping[str, Tensor]) -> Tensor:
    """Compute the change of a LoHa or LoKr.

    Args:
        params: The layer's tensors by name, checked.

    Returns:
        The change before alpha / rank, (out, in) in fp32.
    """
    if not set(LOHA).isdisjoint(params):
        return _expand_factors(params, "hada_w1").mul_(_expand_factors(params, "hada_w2"))
    return torch.kron(_expand_factors(params, "lokr_w1"), _expand_factors(params, "lokr_w2"))


def rotate_rows(W_OI: Tensor, blocks_KNN: Tensor) -> Tensor:
    """Rotate the rows of a weight by the blocks of an OFT.

    Args:
        W_OI: The weight.
        blocks_KNN: The blocks, K · N = O.

    Returns:
        The rotated weight.
    """
    Q_KNN = blocks_KNN - blocks_KNN.transpose(1, 2)
    eye = torch.eye(Q_KNN.shape[1], device=Q_KNN.device, dtype=Q_KNN.dtype)
    R_KNN = torch.linalg.solve(eye - Q_KNN, eye + Q_KNN)  # the two factors commute
    return (R_KNN.transpose(1, 2) @ W_OI.unflatten(0, Q_KNN.shape[:2])).flatten(0, 1)


def measure_product_norm(params: Mapping[str, Tensor]) -> float | None:
    """Measure the norm of a LoHa or LoKr without computing the whole change.

    Args:
        params: The layer's tensors by name, checked.

    Returns:
        The Frobenius norm before alpha / rank; None for an OFT, whose change depends on the weight.
    """
    if OFT in params:
        return None
    if set(LOHA).isdisjoint(params):
        return math.prod(
            float(torch.linalg.vector_norm(_expand_factors(params, name))) for name in ("lokr_w1", "lokr_w2")
        )
    parts = [
        {**params, **{name: params[name][i : i + _ROWS] for name in ("hada_w1_a", "hada_w2_a")}}
        for i in range(0, params["hada_w1_a"].shape[0], _ROWS)
    ]
    return math.hypot(*(float(torch.linalg.vector_norm(expand_product(part))) for part in parts))


def _check_blocks(path: str, params: Mapping[str, Tensor]) -> int:
    if not params.keys() <= {OFT, BIAS_CHANGE}:
        raise AdapterError(
            f"{path} has {', '.join(sorted(params))}. An OFT is read with {OFT} alone, since ComfyUI and "
            f"LyCORIS disagree on its rescale and dora_scale. Merge it with the tool that made it."
        )
    shape = tuple(params[OFT].shape)
    if len(shape) != 3 or shape[1] != shape[2] or 0 in shape:
        raise AdapterError(f"{OFT} of {path} must be blocks of square matrices, not {shape} (a BOFT is not supported).")
    return shape[0] * shape[1]


def _get_shape(path: str, params: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Get the shape of a part of a LoHa or LoKr: that of the matrix, or of the product of its two factors."""
    names = [name] if name in params else [f"{name}_a", f"{name}_b"]
    shapes = {key: tuple(tensor.shape) for key, tensor in params.items() if key.startswith(name)}
    if shapes.keys() == set(names) and all(len(shape) == 2 and 0 not in shape for shape in shapes.values()):
        first, last = shapes[names[0]], shapes[names[-1]]
        if len(names) == 1 or first[1] == last[0]:
            return first[0], last[1]
    raise AdapterError(f"{name} of {path} must be a matrix, or two factors _a and _b that fit together, not {shapes}.")


def _expand_factors(params: Mapping[str, Tensor], name: str) -> Tensor:
    if name in params:
        return params[name].float()
    return params[f"{name}_a"].float() @ params[f"{name}_b"].float()
