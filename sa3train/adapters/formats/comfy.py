"""Read files that keep each layer's tensors below its path, as ComfyUI, kohya, LyCORIS and OneTrainer write them.

A layer has lora_up, lora_down and alpha, a full weight delta, or the factors of a LoHa, LoKr or OFT (see
`apply.products`), which stay factors; diff_b changes its bias. ComfyUI multiplies by alpha / rank, and by 1 where alpha
is absent or there is no rank; the alpha of an OFT bounds ‖Q‖. ComfyUI can patch only the DiT, though its own trainer
also writes the duration embedder.
"""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.products import LOHA, LOKR, OFT, check_product, get_product_rank, is_product
from sa3train.adapters.formats.naming import FLAT_PREFIXES, collect_layers, split_names
from sa3train.adapters.formats.native import build_spec, check_tensors
from sa3train.adapters.spec import BIAS_CHANGE, AdapterSpec
from sa3train.core.errors import AdapterError

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
    **{name: name for name in (*LOHA, *LOKR, OFT)},
}

UNSUPPORTED = {
    "lora_mid.weight": "the middle factor of a LoCon, for convolutions of several taps (kohya, LyCORIS)",
    "hada_t1": "a Tucker factor, for convolutions of several taps (LyCORIS)",
    "hada_t2": "a Tucker factor, for convolutions of several taps (LyCORIS)",
    "lokr_t2": "a Tucker factor, for convolutions of several taps (LyCORIS)",
    **{f"{name}.weight": "a factor of a GLoRA (LyCORIS)" for name in ("a1", "a2", "b1", "b2")},
    "rescale": "the rescale of an OFT (LyCORIS), which ComfyUI ignores",
    "w_norm": "a change of a norm (LyCORIS)",
    "b_norm": "a change of a norm (LyCORIS)",
    "on_input": "a setting of (IA)³ (LyCORIS)",
    "set_weight": "a whole new weight (ComfyUI)",
    "reshape_weight": "a new shape of a weight (ComfyUI)",
}
"""What tensors of other types of these tools are, by the ends of their names."""


def read_comfy(source: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """Read an adapter from a ComfyUI file.

    Its type is `comfy` where a layer has a dora_scale or is a LoHa, LoKr or OFT, `lora` where a layer has factors, else
    `diff`; single layers may be simpler (see `get_layer_type`). Where every layer is a lora with a dora_scale by column
    it is `dora-cols`, which is the same. By row, ComfyUI divides by the norms of W, but LyCORIS and OneTrainer, which
    write underscores for dots, by those of W + sBA: `dora-rows`.

    Args:
        source: The file's name, for messages.
        tensors: Its tensors by key.
        metadata: Its metadata.

    Returns:
        The adapter.

    Raises:
        AdapterError: If a tensor is none of these.
    """
    layers = collect_layers(source, split_names(source, tensors, ENDINGS, _explain_unsupported))
    alphas = {path: _pop_alpha(path, params) for path, params in layers.items()}
    is_flat = any(key.startswith(tuple(FLAT_PREFIXES)) for key in tensors)
    types = {path: _check_layer(path, params, is_flat) for path, params in layers.items()}
    adapter_type = _choose_type(source, set(types.values()))
    if adapter_type in ("dora-cols", "dora-rows"):
        layers = {path: params | {"magnitude": params["magnitude"].reshape(-1)} for path, params in layers.items()}
    return check_tensors(Adapter(_build_file_spec(adapter_type, layers, alphas), layers, dict(metadata), source))


def _explain_unsupported(key: str) -> str:
    what = next((text for ending, text in UNSUPPORTED.items() if key.endswith(ending)), "a tensor of another tool")
    return (
        f"{key} is {what}, which is not supported. Of the files of ComfyUI, kohya, LyCORIS and OneTrainer lora_up, "
        f"lora_down, alpha, dora_scale, diff, diff_b, hada_w…, lokr_w… and oft_blocks are. Merge it into the model "
        f"with the tool that made it, and extract a lora: sa3-adapter extract."
    )


def _choose_type(source: str, types: set[str]) -> str:
    """Choose the type of a file from those of its layers."""
    if "dora-rows" in types and len(types) > 1:
        raise AdapterError(
            f"{source} has layers with a dora_scale by row beside {', '.join(sorted(types - {'dora-rows'}))}, which "
            f"cannot be read as one adapter. Merge it with the tool that made it, or save them as files of their own."
        )
    if "comfy" in types or ("dora-cols" in types and len(types) > 1):
        return "comfy"
    return next((name for name in ("dora-cols", "dora-rows", "lora") if name in types), "diff")


def _check_layer(path: str, params: dict[str, Tensor], is_flat: bool) -> str:
    """Detect the type of one layer after checking its tensors; makes its factors matrices in place."""
    names = set(params)
    if names and names <= {"diff", BIAS_CHANGE}:
        return "diff"
    for name in names - {"diff", "magnitude", BIAS_CHANGE, OFT}:
        params[name] = params[name].flatten(1) if params[name].ndim > 2 else params[name]
    if is_product(names):
        shape: tuple[int, int | None] = check_product(path, params)
        if is_flat and "magnitude" in names:
            raise AdapterError(
                f"{path} is a LoHa or LoKr with a dora_scale, which LyCORIS and ComfyUI apply differently. Merge it "
                f"with the tool that made it."
            )
    else:
        shape = _check_factors(path, params)
    if "magnitude" not in names:
        return "comfy" if is_product(names) else "lora"
    scale = params["magnitude"]
    is_by_row = scale.ndim > 0 and scale.shape[0] == shape[0]
    fits = scale.numel() == shape[0] if is_by_row else scale.shape[:1] == (1,) and scale.numel() == shape[1]
    if scale.ndim < 2 or not fits:
        raise AdapterError(f"The dora_scale of {path} has shape {tuple(scale.shape)}, which does not fit.")
    if is_product(names) or (is_by_row and not is_flat):
        return "comfy"
    return "dora-rows" if is_by_row else "dora-cols"


def _check_factors(path: str, params: Mapping[str, Tensor]) -> tuple[int, int]:
    """Check the two factors of a lora layer, and return the shape of their product."""
    if not {"lora_A", "lora_B"} <= params.keys() or "diff" in params:
        raise AdapterError(f"{path} is incomplete or damaged: it has only {', '.join(sorted(params)) or 'alpha'}.")
    up, down = params["lora_B"].shape, params["lora_A"].shape
    if len(up) != 2 or len(down) != 2 or up[1] != down[0] or 0 in (*up, *down):
        raise AdapterError(f"The factors of {path} do not fit together: {tuple(up)} and {tuple(down)}.")
    return up[0], down[1]


def _pop_alpha(path: str, params: dict[str, Tensor]) -> float:
    """Take alpha out of a layer's tensors; without one, or without a rank to divide it by, the factor is 1."""
    alpha, rank = params.pop("alpha", None), get_product_rank(params)
    if alpha is not None and alpha.numel() != 1:
        raise AdapterError(f"The alpha of {path} must be one number, not {tuple(alpha.shape)}.")
    if alpha is not None and OFT in params:
        params[OFT] = _bound_blocks(params[OFT], float(alpha))
    return float(rank or 1) if alpha is None or rank is None else float(alpha)


def _bound_blocks(blocks: Tensor, bound: float) -> Tensor:
    """Scale the blocks of an OFT so that the norm of Q is at most its alpha; 0 sets no bound."""
    if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2]:
        return blocks
    norm = float(torch.linalg.vector_norm(blocks.float() - blocks.float().transpose(1, 2)))
    return blocks.float() * (bound / norm) if 0 < bound < norm else blocks


def _build_file_spec(
    adapter_type: str, layers: Mapping[str, Mapping[str, Tensor]], alphas: Mapping[str, float]
) -> AdapterSpec:
    include = sorted(layers)
    if adapter_type == "diff":
        return AdapterSpec("diff", include=include)
    types = {path: params for path, params in layers.items() if not params.keys() <= {"diff", BIAS_CHANGE}}
    ranks = {path: int(get_product_rank(params) or 1) for path, params in types.items()}
    alpha = Counter(alphas[path] for path in ranks).most_common(1)[0][0]
    pattern = {path: alphas[path] for path in ranks if alphas[path] != alpha}
    return build_spec(adapter_type, ranks, alpha=alpha, alpha_pattern=pattern, include=include)
