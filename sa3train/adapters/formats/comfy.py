"""ComfyUI's LoRA files: `diffusion_model.<path>` with lora_up, lora_down and alpha, or full weight deltas.

ComfyUI multiplies by alpha / rank, and by 1 where alpha is absent. It can patch only the DiT, no duration embedder.
LoHa and LoKr layers are read as the weight deltas that they are. LoHa: (w1_a·w1_b) ⊙ (w2_a·w2_b). LoKr: w1 ⊗ w2, each
either whole or a product of its own. Both times alpha / rank, where rank is that of the last product, and the factor is
1 without alpha or without a product, as in ComfyUI and LyCORIS. Shape suffixes: O rows (out), I columns (in).
"""

import os
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.formats.native import build_native_metadata, build_spec, check_tensors
from sa3train.adapters.formats.peft import CONVOLUTIONS
from sa3train.adapters.spec import AdapterSpec
from sa3train.core.errors import AdapterError
from sa3train.core.safetensors_file import convert_for_saving, write_tensors

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
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
"""Names of modules above the DiT's layers, to read paths whose dots were replaced by underscores."""

MAX_DELTA = 2**27
"""Largest number of values in a delta made from factors: a small file must not need all memory."""

MAX_DELTAS = 2**31
"""Largest number of values in all deltas together."""


def read_comfy(source: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """Read an adapter from a ComfyUI file: lora, `comfy-dora` with dora_scale, or `diff` with full weight deltas.

    A file with LoHa or LoKr layers, or one that mixes low-rank layers with deltas, becomes a `diff` as a whole, which
    is the same change.

    Args:
        source: The file's name, for messages.
        tensors: Its tensors by key.
        metadata: Its metadata.

    Returns:
        The adapter.

    Raises:
        AdapterError: If a tensor is none of these.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        ending = next((ending for ending in ENDINGS if key.endswith("." + ending)), None)
        if ending is None:
            raise AdapterError(
                f"{source}: {key} is not supported. Of ComfyUI's files lora_up, lora_down, alpha, dora_scale, diff, "
                f"diff_b, hada_w… and lokr_w… are."
            )
        layers.setdefault(_get_path(source, key.removesuffix("." + ending)), {})[ENDINGS[ending]] = tensor
    alphas = {path: _pop_alpha(source, path, params) for path, params in layers.items()}
    types = {_check_layer(source, path, params) for path, params in layers.items()}
    if "diff" in types and types <= {"lora", "diff"}:
        _refuse_huge(source, layers)
        layers = {path: _convert_to_delta(path, params, alphas[path]) for path, params in layers.items()}
        types = {"diff"}
    if len(types) != 1:
        raise AdapterError(
            f"{source} mixes layers of {' and '.join(sorted(types))}, so it cannot be read as one adapter."
        )
    adapter_type = types.pop()
    return check_tensors(Adapter(_build_file_spec(adapter_type, layers, alphas), layers, dict(metadata), source))


def _build_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Build the tensors of a ComfyUI file from the DiT's part of a lora or diff adapter, alphas included."""
    spec = adapter.spec
    if spec.adapter_type not in ("lora", "diff"):
        raise AdapterError(f"ComfyUI has no {spec.adapter_type}. Convert it to weight deltas or a lora first.")
    stored: dict[str, Tensor] = {}
    for path, params in adapter.tensors.items():
        if not path.startswith(DIT):
            continue
        key = PREFIX + path.removeprefix(DIT)
        if spec.adapter_type == "diff":
            stored |= {f"{key}.{name}": tensor for name, tensor in params.items()}
        else:
            alpha = torch.tensor(spec.get_scale(path) * spec.get_rank(path), dtype=torch.float32)
            stored |= {f"{key}.lora_up.weight": params["lora_B"], f"{key}.lora_down.weight": params["lora_A"]}
            stored[f"{key}.alpha"] = alpha
    if not stored:
        raise AdapterError(f"{adapter.source} changes only the duration embedder, which ComfyUI cannot patch.")
    return stored


def list_comfy_unsupported(adapter: Adapter) -> list[str]:
    """List the layers that ComfyUI cannot patch: those of the conditioner.

    Args:
        adapter: The adapter.

    Returns:
        Their module paths.
    """
    return [path for path in adapter.tensors if not path.startswith(DIT)]


def write_comfy(path: str | os.PathLike[str], adapter: Adapter, dtype: torch.dtype | None = torch.float16) -> None:
    """Write an adapter for ComfyUI, whole or not at all, without its conditioner layers and with its native metadata.

    Raises `AdapterError` for a type that ComfyUI does not have, and when nothing of it is in the DiT.

    Args:
        path: The file.
        adapter: A lora or diff adapter.
        dtype: Dtype to write fp32 tensors in, other than alphas; None keeps fp32.
    """
    tensors = _build_tensors(adapter)
    alphas = {key: tensor for key, tensor in tensors.items() if key.endswith(".alpha")}
    others = {key: tensor for key, tensor in tensors.items() if key not in alphas}
    write_tensors(path, convert_for_saving(others, dtype) | alphas, build_native_metadata(adapter))


def _get_path(source: str, name: str) -> str:
    if name.startswith(PREFIX):
        return DIT + name.removeprefix(PREFIX)
    if not name.startswith(FLAT_PREFIX):
        raise AdapterError(f"{source}: {name} is not a layer of the DiT; ComfyUI's keys start with {PREFIX}.")
    return DIT + ".".join(_split_name(source, name, name.removeprefix(FLAT_PREFIX)))


def _split_name(source: str, name: str, rest: str) -> list[str]:
    """Split `transformer_layers_0_self_attn_to_qkv` into its modules, longest known name first."""
    found = []
    while rest:
        number, _, behind = rest.partition("_")
        module = next(
            (module for module in sorted(MODULES, key=len, reverse=True) if f"{rest}_".startswith(f"{module}_")), None
        )
        if module is None and not number.isdigit():
            raise AdapterError(f"{source}: {name} is not a layer of Stable Audio 3.")
        found.append(number if module is None else module)
        rest = behind if module is None else rest[len(module) + 1 :]
    return found


def _check_layer(source: str, path: str, params: dict[str, Tensor]) -> str:
    """Detect the type of one layer after checking its tensors; flattens its factors in place."""
    names = set(params)
    if names and names <= {"diff", "diff_b"}:
        return "diff"
    if _is_product(params):
        _check_product(source, path, params)
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
            raise AdapterError(f"{source}: {path} has dora_scale and diff_b, so it cannot be read as one adapter.")
        scale = params["magnitude"]
        if scale.ndim < 2 or scale.numel() != (up[0] if scale.shape[0] == up[0] else down[1]):
            raise AdapterError(
                f"{source}: the dora_scale of {path} has shape {tuple(scale.shape)}, which does not fit."
            )
        return "comfy-dora"
    return "diff" if "diff_b" in names else "lora"


def _pop_alpha(source: str, path: str, params: dict[str, Tensor]) -> float:
    alpha = params.pop("alpha", None)
    if alpha is None:
        rank = params["lora_A"].shape[0] if "lora_A" in params and params["lora_A"].ndim else _get_product_rank(params)
        return float(rank or 1)
    if alpha.numel() != 1:
        raise AdapterError(f"{source}: the alpha of {path} must be one number, not {tuple(alpha.shape)}.")
    return float(alpha)


def _refuse_huge(source: str, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse deltas that would be larger than any model's weights, before they are computed."""
    total = 0
    for path, params in layers.items():
        if _is_product(params):
            rows, columns = _check_product(source, path, params)
        elif "lora_A" in params:
            rows, columns = params["lora_B"].shape[0], params["lora_A"].shape[1]
        else:
            continue
        total += rows * columns
        if rows * columns > MAX_DELTA:
            raise AdapterError(
                f"{source}: {path} would change {rows} × {columns} weights; no layer is as large as that."
            )
        if total > MAX_DELTAS:
            raise AdapterError(f"{source} would change more than {total} weights; no model is as large as that.")


def _convert_to_delta(path: str, params: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    if _is_product(params):
        rank = _get_product_rank(params)
        diff_OI = _compute_product(params, 1.0 if rank is None else alpha / rank)
    elif "lora_A" in params:
        A_RI, B_OR = params["lora_A"].float(), params["lora_B"].float()
        diff_OI = B_OR @ A_RI * (alpha / A_RI.shape[0])
    else:
        return dict(params)
    bias = {name: tensor for name, tensor in params.items() if name == "diff_b"}
    return {"diff": diff_OI[:, :, None] if path.endswith(CONVOLUTIONS) else diff_OI, **bias}


def _build_file_spec(
    adapter_type: str, layers: Mapping[str, Mapping[str, Tensor]], alphas: Mapping[str, float]
) -> AdapterSpec:
    include = sorted(layers)
    if adapter_type == "diff":
        return AdapterSpec("diff", include=include)
    ranks = {path: int(params["lora_A"].shape[0]) for path, params in layers.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    pattern = {path: value for path, value in alphas.items() if value != alpha}
    return build_spec(adapter_type, ranks, alpha=alpha, alpha_pattern=pattern, include=include)


def _is_product(params: Mapping[str, Tensor]) -> bool:
    return any(name in LOHA or name in LOKR for name in params)


def _get_product_rank(params: Mapping[str, Tensor]) -> int | None:
    """Get the rank that alpha is divided by; None where both factors of a LoKr are whole."""
    for name in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if name in params and params[name].ndim:
            return int(params[name].shape[0])
    return None


def _check_product(source: str, path: str, params: Mapping[str, Tensor]) -> tuple[int, int]:
    """Check that a layer's tensors fit together, and return the shape (O, I) of its delta."""
    names = {name for name in params if name != "diff_b"}
    if names == set(LOHA):
        first, second = (_check_pair(source, path, params, f"hada_w{which}") for which in "12")
        if first != second:
            raise AdapterError(f"{source}: the two products of {path} have the shapes {first} and {second}.")
        return first
    if not names <= set(LOKR):
        raise AdapterError(
            f"{source}: {path} has {', '.join(sorted(names))}, which is not supported. A LoHa has {', '.join(LOHA)}, "
            f"a LoKr lokr_w1 and lokr_w2 or their factors."
        )
    (rows_1, columns_1), (rows_2, columns_2) = (_check_kronecker_factor(source, path, params, which) for which in "12")
    return rows_1 * rows_2, columns_1 * columns_2


def _compute_product(params: Mapping[str, Tensor], scale: float) -> Tensor:
    """Compute a layer's delta (O, I), fp32, after `_check_product`."""
    if "hada_w1_a" in params:
        w = {name: _flatten(params[name]) for name in LOHA}
        return (w["hada_w1_a"] @ w["hada_w1_b"]).mul_(w["hada_w2_a"] @ w["hada_w2_b"]).mul_(scale)
    return torch.kron(_get_kronecker_factor(params, "1"), _get_kronecker_factor(params, "2")).mul_(scale)


def _get_kronecker_factor(params: Mapping[str, Tensor], which: str) -> Tensor:
    whole = params.get(f"lokr_w{which}")
    if whole is not None:
        return _flatten(whole)
    return _flatten(params[f"lokr_w{which}_a"]) @ _flatten(params[f"lokr_w{which}_b"])


def _check_kronecker_factor(source: str, path: str, params: Mapping[str, Tensor], which: str) -> tuple[int, int]:
    name = f"lokr_w{which}"
    if name not in params:
        return _check_pair(source, path, params, name)
    if f"{name}_a" in params or f"{name}_b" in params:
        raise AdapterError(f"{source}: {path} has {name} both whole and in factors.")
    return _check_matrix(source, path, name, params[name])


def _check_pair(source: str, path: str, params: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Check two factors, and return the shape (O, I) of their product."""
    if f"{name}_a" not in params or f"{name}_b" not in params:
        raise AdapterError(f"{source}: {path} is incomplete: {name} is missing or has only one of its factors.")
    left, right = (_check_matrix(source, path, key, params[key]) for key in (f"{name}_a", f"{name}_b"))
    if left[1] != right[0]:
        raise AdapterError(f"{source}: the factors {name} of {path} do not fit together: {left} and {right}.")
    return left[0], right[1]


def _check_matrix(source: str, path: str, name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.ndim < 2 or 0 in tensor.shape or not tensor.is_floating_point():
        raise AdapterError(f"{source}: {name} of {path} must be a matrix of numbers, not {tuple(tensor.shape)}.")
    rows, columns = tensor.flatten(1).shape
    return rows, columns


def _flatten(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).float()
