"""ComfyUI's LoRA files: `diffusion_model.<path>` with lora_up, lora_down and alpha, or whole differences of weights.

ComfyUI multiplies by alpha / rank, and by 1 where alpha is absent. LoHa and LoKr layers are read as
differences. Only the DiT can be patched there: its models have no place for a change of the duration embedder.

LoHa and LoKr layers of ComfyUI's files, read as the differences of weights that they are.

LoHa: (w1_a·w1_b) ⊙ (w2_a·w2_b). LoKr: w1 ⊗ w2, each whole or a product of its own. Both times alpha / rank, where rank
is that of the last product and the factor is 1 without alpha or without a product (as ComfyUI and LyCORIS do it).
Shape suffixes: O rows (out), I columns (in).
"""

import os
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.formats.native import checked, native_metadata, spec_of_ranks
from sa3train.adapters.formats.peft import CONVOLUTIONS
from sa3train.adapters.spec import AdapterSpec
from sa3train.core.errors import AdapterError
from sa3train.core.files import write_tensors

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


PREFIX = "diffusion_model."
FLAT_PREFIX = "lora_unet_"
DIT = "model."
ENDINGS = {
    "lora_up.weight": "lora_B",
    "lora_down.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_A.weight": "lora_A",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "diff_b": "diff_b",
    "diff": "diff",
    **{name: name for name in (*LOHA, *LOKR)},
}
MODULES = (
    "transformer", "layers", "self_attn", "cross_attn", "to_qkv", "to_kv", "to_q", "to_out", "ff", "proj",
    "to_local_embed", "to_cond_embed", "to_global_embed", "to_timestep_embed", "global_cond_embedder",
    "preprocess_conv", "postprocess_conv", "project_in", "project_out",
)  # fmt: skip
"""Names of modules on the way to the DiT's layers, to read paths whose dots were made underscores."""

MAX_DIFFERENCE = 2**27
"""Values of the largest difference made from factors: a small file must not ask for all memory."""

MAX_DIFFERENCES = 2**31
"""Values of all of them together."""


def read_comfy(source: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """An adapter from a ComfyUI file: lora, `comfy-dora` where it has dora_scale, `diff` where it has differences.

    A file with LoHa or LoKr layers, or one that mixes low-rank layers with differences, becomes a `diff` as a whole,
    which is the same change. Raises `AdapterError` for tensors that are none of these.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        ending = next((ending for ending in ENDINGS if key.endswith("." + ending)), None)
        if ending is None:
            raise AdapterError(
                f"{source}: {key} cannot be played here; of ComfyUI's files lora_up, lora_down, alpha, dora_scale, "
                f"diff, diff_b, hada_w… and lokr_w… are known."
            )
        layers.setdefault(_native_path(source, key.removesuffix("." + ending)), {})[ENDINGS[ending]] = tensor
    alphas = {path: _alpha(source, path, params) for path, params in layers.items()}
    kinds = {_kind(source, path, params) for path, params in layers.items()}
    if "diff" in kinds and kinds <= {"lora", "diff"}:
        _refuse_huge(source, layers)
        layers = {path: _as_difference(path, params, alphas[path]) for path, params in layers.items()}
        kinds = {"diff"}
    if len(kinds) != 1:
        raise AdapterError(f"{source} mixes layers of {' and '.join(sorted(kinds))}; it cannot be read as one adapter.")
    kind = kinds.pop()
    return checked(Adapter(_spec(kind, layers, alphas), layers, dict(metadata), source))


def comfy_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The DiT's part of a lora or diff adapter by its keys in a ComfyUI file, alphas included.

    Raises `AdapterError` for another kind, and when nothing of it is in the DiT.
    """
    spec = adapter.spec
    if spec.kind not in ("lora", "diff"):
        raise AdapterError(f"ComfyUI has no {spec.kind}; it can go out as differences or as an approximation by lora.")
    stored: dict[str, Tensor] = {}
    for path, params in adapter.tensors.items():
        if not path.startswith(DIT):
            continue
        key = PREFIX + path.removeprefix(DIT)
        if spec.kind == "diff":
            stored |= {f"{key}.{name}": tensor for name, tensor in params.items()}
        else:
            alpha = torch.tensor(spec.scale_of(path) * spec.rank_of(path), dtype=torch.float32)
            stored |= {f"{key}.lora_up.weight": params["lora_B"], f"{key}.lora_down.weight": params["lora_A"]}
            stored[f"{key}.alpha"] = alpha
    if not stored:
        raise AdapterError(f"{adapter.source} changes only the duration embedder, which ComfyUI cannot patch.")
    return stored


def left_out_of_comfy(adapter: Adapter) -> list[str]:
    """The layers that ComfyUI cannot patch: those of the conditioner."""
    return [path for path in adapter.tensors if not path.startswith(DIT)]


def write_comfy(path: str | os.PathLike[str], adapter: Adapter, dtype: torch.dtype | None = torch.float16) -> None:
    """Write `adapter` for ComfyUI, whole or not at all; fp32 tensors in `dtype`, alphas always in fp32.

    Conditioner layers are left out (see `left_out_of_comfy`); the native metadata is kept.
    """
    from sa3train.core.safetensors_file import storable

    tensors = comfy_tensors(adapter)
    alphas = {key: tensor for key, tensor in tensors.items() if key.endswith(".alpha")}
    others = {key: tensor for key, tensor in tensors.items() if key not in alphas}
    write_tensors(path, storable(others, dtype) | alphas, native_metadata(adapter))


def _native_path(source: str, name: str) -> str:
    if name.startswith(PREFIX):
        return DIT + name.removeprefix(PREFIX)
    if not name.startswith(FLAT_PREFIX):
        raise AdapterError(f"{source}: {name} is not a layer of the DiT; ComfyUI's keys start with {PREFIX}.")
    return DIT + ".".join(_with_dots(source, name, name.removeprefix(FLAT_PREFIX)))


def _with_dots(source: str, name: str, rest: str) -> list[str]:
    """`transformer_layers_0_self_attn_to_qkv` as its modules, longest known name first."""
    found = []
    while rest:
        number, _, behind = rest.partition("_")
        module = next(
            (module for module in sorted(MODULES, key=len, reverse=True) if f"{rest}_".startswith(f"{module}_")), None
        )
        if module is None and not number.isdigit():
            raise AdapterError(f"{source}: no layer of Stable Audio 3 is called {name}.")
        found.append(number if module is None else module)
        rest = behind if module is None else rest[len(module) + 1 :]
    return found


def _kind(source: str, path: str, params: dict[str, Tensor]) -> str:
    """The kind of one layer, whose factors are flattened in place."""
    names = set(params)
    if names and names <= {"diff", "diff_b"}:
        return "diff"
    if is_product(params):
        product_shape(source, path, params)
        return "diff"
    if not {"lora_A", "lora_B"} <= names or "diff" in names:
        raise AdapterError(
            f"{source}: {path} is incomplete or damaged: it has only {', '.join(sorted(names)) or 'alpha'}."
        )
    for name in ("lora_A", "lora_B"):
        params[name] = params[name].flatten(1) if params[name].ndim > 2 else params[name]
    up, down = params["lora_B"].shape, params["lora_A"].shape
    if len(up) != 2 or len(down) != 2 or up[1] != down[0] or 0 in (*up, *down):
        raise AdapterError(f"{source}: the factors of {path} do not fit together: {tuple(up)} and {tuple(down)}.")
    if "magnitude" in names:
        if "diff_b" in names:
            raise AdapterError(f"{source}: {path} has dora_scale and diff_b; that cannot be read as one adapter.")
        scale = params["magnitude"]
        if scale.ndim < 2 or scale.numel() != (up[0] if scale.shape[0] == up[0] else down[1]):
            raise AdapterError(
                f"{source}: the dora_scale of {path} has shape {tuple(scale.shape)}, which does not fit."
            )
        return "comfy-dora"
    return "diff" if "diff_b" in names else "lora"


def _alpha(source: str, path: str, params: dict[str, Tensor]) -> float:
    alpha = params.pop("alpha", None)
    if alpha is None:
        rank = params["lora_A"].shape[0] if "lora_A" in params and params["lora_A"].ndim else product_rank(params)
        return float(rank or 1)
    if alpha.numel() != 1:
        raise AdapterError(f"{source}: the alpha of {path} must be one number, not {tuple(alpha.shape)}.")
    return float(alpha)


def _refuse_huge(source: str, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse differences that would be larger than any model's weights, before they are made."""
    total = 0
    for path, params in layers.items():
        if is_product(params):
            rows, columns = product_shape(source, path, params)
        elif "lora_A" in params:
            rows, columns = params["lora_B"].shape[0], params["lora_A"].shape[1]
        else:
            continue
        total += rows * columns
        if rows * columns > MAX_DIFFERENCE:
            raise AdapterError(
                f"{source}: {path} would change {rows} × {columns} weights; no layer is as large as that."
            )
        if total > MAX_DIFFERENCES:
            raise AdapterError(f"{source} would change more than {total} weights; no model is as large as that.")


def _as_difference(path: str, params: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    if is_product(params):
        rank = product_rank(params)
        diff_OI = product_difference(params, 1.0 if rank is None else alpha / rank)
    elif "lora_A" in params:
        A_RI, B_OR = params["lora_A"].float(), params["lora_B"].float()
        diff_OI = B_OR @ A_RI * (alpha / A_RI.shape[0])
    else:
        return dict(params)
    kept = {name: tensor for name, tensor in params.items() if name == "diff_b"}
    return {"diff": diff_OI[:, :, None] if path.endswith(CONVOLUTIONS) else diff_OI, **kept}


def _spec(kind: str, layers: Mapping[str, Mapping[str, Tensor]], alphas: Mapping[str, float]) -> AdapterSpec:
    include = sorted(layers)
    if kind == "diff":
        return AdapterSpec("diff", include=include)
    ranks = {path: int(params["lora_A"].shape[0]) for path, params in layers.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    pattern = {path: value for path, value in alphas.items() if value != alpha}
    return spec_of_ranks(kind, ranks, alpha=alpha, alpha_pattern=pattern, include=include)
