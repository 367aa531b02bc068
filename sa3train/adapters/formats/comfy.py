"""Files that keep each layer's tensors below its path, as ComfyUI, kohya, LyCORIS and OneTrainer write them.

A layer has lora_up, lora_down and alpha, a full weight delta, or a LoHa or LoKr, which is read as the delta that it is;
diff_b changes its bias. ComfyUI multiplies by alpha / rank, and by 1 where alpha is absent. LoHa: (w1_a·w1_b) ⊙
(w2_a·w2_b). LoKr: w1 ⊗ w2, each either whole or a product of its own. Both times alpha / rank, where rank is that of
the last product, and the factor is 1 without alpha or without a product, as in ComfyUI and LyCORIS. ComfyUI can patch
only the DiT, though its own trainer also writes the duration embedder. Shape suffixes: O rows (out), I columns (in).
"""

import math
import os
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.formats.naming import DIT, collect_layers, is_flat_name, strip_adapter_name
from sa3train.adapters.formats.native import build_native_metadata, build_spec, check_tensors
from sa3train.adapters.formats.peft import CONVOLUTIONS
from sa3train.adapters.spec import BIAS_CHANGE, AdapterSpec
from sa3train.core.errors import AdapterError
from sa3train.core.safetensors_file import convert_for_saving, write_tensors

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
PREFIX = "diffusion_model."
ENDINGS = {
    "lora_up.weight": "lora_B",
    "lora_down.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_A.weight": "lora_A",
    "lora.up.weight": "lora_B",
    "lora.down.weight": "lora_A",
    "lora_linear_layer.up.weight": "lora_B",
    "lora_linear_layer.down.weight": "lora_A",
    "lora_B": "lora_B",
    "lora_A": "lora_A",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    BIAS_CHANGE: BIAS_CHANGE,
    "diff": "diff",
    **{name: name for name in (*LOHA, *LOKR)},
}
MAX_DELTA = 2**27
"""Largest number of values in a delta made from factors: a small file must not need all memory."""

MAX_DELTAS = 2**31
"""Largest number of values in all deltas together."""


def read_comfy(source: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """Read an adapter from a ComfyUI file.

    Its type is `comfy-dora` where a layer has dora_scale, `lora` where a layer has factors, else `diff`; single layers
    may be simpler (see `get_layer_type`). Where every layer has a dora_scale by column it is `dora-cols`, which is the
    same. By row, ComfyUI divides by the norms of W, but LyCORIS and OneTrainer, which write underscores for dots, by
    those of W + sBA: `dora-rows`.

    Args:
        source: The file's name, for messages.
        tensors: Its tensors by key.
        metadata: Its metadata.

    Returns:
        The adapter.

    Raises:
        AdapterError: If a tensor is none of these.
    """
    named = []
    for key, tensor in tensors.items():
        bare = strip_adapter_name(key)
        ending = next((ending for ending in ENDINGS if bare.endswith("." + ending)), None)
        if ending is None:
            raise AdapterError(
                f"{source}: {key} is not supported. Of the files of ComfyUI, kohya, LyCORIS and OneTrainer lora_up, "
                f"lora_down, alpha, dora_scale, diff, diff_b, hada_w… and lokr_w… are."
            )
        named.append((bare.removesuffix("." + ending), ENDINGS[ending], tensor))
    layers = collect_layers(source, named)
    alphas = {path: _pop_alpha(path, params) for path, params in layers.items()}
    by_row = "dora-rows" if any(is_flat_name(key) for key in tensors) else "comfy-dora"
    types = {path: _check_layer(path, params, by_row) for path, params in layers.items()}
    layers = _convert_products(layers, alphas)
    adapter_type = _choose_type(source, set(types.values()))
    if adapter_type in ("dora-cols", "dora-rows"):
        layers = {path: params | {"magnitude": params["magnitude"].reshape(-1)} for path, params in layers.items()}
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
        names = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}
        stored |= {f"{key}.{names.get(name, name)}": tensor for name, tensor in params.items()}
        if "lora_A" in params:
            alpha = torch.tensor(spec.get_scale(path) * spec.get_rank(path), dtype=torch.float32)
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


def _choose_type(source: str, types: set[str]) -> str:
    """Choose the type of a file from those of its layers."""
    if "dora-rows" in types and len(types) > 1:
        raise AdapterError(
            f"{source} has layers with a dora_scale by row beside {', '.join(sorted(types - {'dora-rows'}))}, which "
            f"cannot be read as one adapter. Merge it with the tool that made it, or save them as files of their own."
        )
    if "comfy-dora" in types or ("dora-cols" in types and len(types) > 1):
        return "comfy-dora"
    return next((name for name in ("dora-cols", "dora-rows", "lora") if name in types), "diff")


def _check_layer(path: str, params: dict[str, Tensor], by_row: str) -> str:
    """Detect the type of one layer after checking its tensors; flattens its factors in place."""
    names = set(params)
    if names and names <= {"diff", BIAS_CHANGE}:
        return "diff"
    if _is_product(params):
        return "diff"
    if not {"lora_A", "lora_B"} <= names or "diff" in names:
        raise AdapterError(f"{path} is incomplete or damaged: it has only {', '.join(sorted(names)) or 'alpha'}.")
    for name in ("lora_A", "lora_B"):
        params[name] = params[name].flatten(1) if params[name].ndim > 2 else params[name]
    up, down = params["lora_B"].shape, params["lora_A"].shape
    if len(up) != 2 or len(down) != 2 or up[1] != down[0] or 0 in (*up, *down):
        raise AdapterError(f"The factors of {path} do not fit together: {tuple(up)} and {tuple(down)}.")
    if "magnitude" not in names:
        return "lora"
    scale = params["magnitude"]
    is_by_row = scale.ndim > 0 and scale.shape[0] == up[0]
    if scale.ndim < 2 or scale.numel() != (up[0] if is_by_row else down[1]):
        raise AdapterError(f"The dora_scale of {path} has shape {tuple(scale.shape)}, which does not fit.")
    return by_row if is_by_row else "dora-cols"


def _pop_alpha(path: str, params: dict[str, Tensor]) -> float:
    """Take alpha out of a layer's tensors; without one the factor is 1."""
    alpha = params.pop("alpha", None)
    if alpha is None:
        return float(_get_rank(params) or 1)
    if alpha.numel() != 1:
        raise AdapterError(f"The alpha of {path} must be one number, not {tuple(alpha.shape)}.")
    return float(alpha)


def _convert_products(
    layers: Mapping[str, dict[str, Tensor]], alphas: Mapping[str, float]
) -> dict[str, dict[str, Tensor]]:
    """Compute the deltas of LoHa and LoKr layers, unless they would be larger than any model's weights."""
    products = {path: _find_product(path, params) for path, params in layers.items() if _is_product(params)}
    sizes = {path: math.prod(shape) for path, (_, _, shape) in products.items()}
    if max(sizes.values(), default=0) > MAX_DELTA or sum(sizes.values()) > MAX_DELTAS:
        path = max(sizes, key=lambda path: sizes[path])
        raise AdapterError(
            f"It would change {sum(sizes.values())} weights, {sizes[path]} of them at {path}; no model is as "
            f"large as that."
        )
    converted = dict(layers)
    for path, (first, second, (rows, columns)) in products.items():
        left, right = (factors[0] @ factors[1] if len(factors) == 2 else factors[0] for factors in (first, second))
        delta_OI = left.mul_(right) if left.shape == (rows, columns) == right.shape else torch.kron(left, right)
        rank = _get_rank(layers[path])
        delta_OI.mul_(1.0 if rank is None else alphas[path] / rank)
        bias = {name: tensor for name, tensor in layers[path].items() if name == BIAS_CHANGE}
        converted[path] = {"diff": delta_OI[:, :, None] if path.endswith(CONVOLUTIONS) else delta_OI, **bias}
    return converted


def _build_file_spec(
    adapter_type: str, layers: Mapping[str, Mapping[str, Tensor]], alphas: Mapping[str, float]
) -> AdapterSpec:
    include = sorted(layers)
    if adapter_type == "diff":
        return AdapterSpec("diff", include=include)
    ranks = {path: int(params["lora_A"].shape[0]) for path, params in layers.items() if "lora_A" in params}
    alpha = Counter(alphas[path] for path in ranks).most_common(1)[0][0]
    pattern = {path: alphas[path] for path in ranks if alphas[path] != alpha}
    return build_spec(adapter_type, ranks, alpha=alpha, alpha_pattern=pattern, include=include)


def _is_product(params: Mapping[str, Tensor]) -> bool:
    return any(name in LOHA or name in LOKR for name in params)


def _get_rank(params: Mapping[str, Tensor]) -> int | None:
    """Get the rank that alpha is divided by; None where there is no product."""
    inner = (params[name] for name in ("lora_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if name in params)
    return next((tensor.shape[0] for tensor in inner if tensor.ndim), None)


def _find_product(path: str, params: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor], tuple[int, int]]:
    """Find the two parts of a LoHa or LoKr layer, each a matrix or two factors, and the shape (O, I) of its delta."""
    names = params.keys() - {BIAS_CHANGE}
    is_loha = names <= set(LOHA)
    if not (is_loha or names <= set(LOKR)):
        raise AdapterError(
            f"{path} has {', '.join(sorted(names))}, which is not supported. A LoHa has {', '.join(LOHA)}, "
            f"a LoKr lokr_w1 and lokr_w2 or their factors."
        )
    first, second = (_find_factors(path, params, f"{'hada' if is_loha else 'lokr'}_w{i}") for i in "12")
    one, other = ((factors[0].shape[0], factors[-1].shape[1]) for factors in (first, second))
    if is_loha and one != other:
        raise AdapterError(f"The two products of {path} have the shapes {one} and {other}.")
    return first, second, one if is_loha else (one[0] * other[0], one[1] * other[1])


def _find_factors(path: str, params: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """Find a part of a LoHa or LoKr: the whole matrix, or the two factors of it, in fp32."""
    names = [name] if name in params else [f"{name}_a", f"{name}_b"]
    shapes = {key: tuple(tensor.shape) for key, tensor in params.items() if key.startswith(name)}
    if shapes.keys() == set(names) and all(len(shape) > 1 and 0 not in shape for shape in shapes.values()):
        factors = [params[key].flatten(1).float() for key in names]
        if len(factors) == 1 or factors[0].shape[1] == factors[1].shape[0]:
            return factors
    raise AdapterError(f"{name} of {path} must be a matrix, or two factors _a and _b that fit together, not {shapes}.")
