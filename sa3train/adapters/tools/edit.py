"""Make adapters from adapters: resize, scale, merge, extract from a fine-tuned model.

`weights` are the base model's by module path. Types whose change depends on them (all but lora and diff) need them
wherever the change itself is needed. Results are fp32 on the CPU; errors are relative to the weights' change.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.effective_weight import flatten_weight
from sa3train.adapters.apply.layer_weight import get_layer_adapter
from sa3train.adapters.apply.products import OFT, check_product, expand_product, is_product
from sa3train.adapters.formats.native import build_spec
from sa3train.adapters.layer_filter import find_adaptable_layers
from sa3train.adapters.spec import (
    BASES,
    BIAS_CHANGE,
    KINDS,
    MAX_VALUE,
    AdapterSpec,
    get_layer_type,
    is_finite_number,
)
from sa3train.adapters.tools.base_weights import LazyTensors, Weights, get_weight, require_weights
from sa3train.adapters.tools.history import append_history, merge_metadata, write_history
from sa3train.adapters.tools.low_rank import ErrorByLayer, LowRankFactors, Truncation, truncate_matrix, truncate_product
from sa3train.core.errors import AdapterError
from sa3train.core.log import track_progress


@torch.no_grad()
def resize(adapter: Adapter, truncation: Truncation, weights: Weights | None = None) -> tuple[Adapter, ErrorByLayer]:
    """Resize an adapter by truncating (or zero-padding) its low-rank product.

    Magnitudes stay as they are, and the error is then that of the product alone. -xs types become the type with free
    factors; diff and PEFT's methods become lora. Raises `AdapterError` when `weights` are needed and missing.

    Args:
        adapter: The adapter.
        truncation: The new rank.
        weights: The base model's weights.

    Returns:
        The new adapter and its truncation error.
    """
    kind = KINDS.get(adapter.spec.adapter_type)
    if kind is not None and kind.is_xs:
        adapter = expand_bases(adapter, weights)
    elif kind is None and (adapter.spec.adapter_type != "comfy" or any(map(is_product, adapter.tensors.values()))):
        return merge([adapter], [1.0], truncation, weights, tool="resize")
    spec, error, layers, ranks = adapter.spec, ErrorByLayer(), {}, {}
    for path, params in adapter.tensors.items():
        layers[path] = {name: tensor for name, tensor in params.items() if name not in ("lora_A", "lora_B", "diff")}
        if "lora_A" in params:
            part = truncate_product(params["lora_B"] * spec.get_scale(path), params["lora_A"], truncation)
        elif "diff" in params:
            part = truncate_matrix(flatten_weight(params["diff"]), truncation)
        else:
            continue  # only its bias changes
        layers[path] |= _store_factors(part)
        ranks[path] = part.A_RI.shape[0]
        error.add(path, part)
    spec = build_spec(spec.adapter_type, ranks, dropout=spec.dropout, include=spec.include, exclude=spec.exclude)
    metadata = append_history(adapter, "resize", **truncation.describe())
    return Adapter(spec, layers, metadata, adapter.source), error


def check_factor(factor: float) -> None:
    """Check a factor to scale by.

    Args:
        factor: The factor.

    Raises:
        AdapterError: If it is 0 or not finite.
    """
    if factor == 0 or not is_finite_number(factor):
        raise AdapterError(f"factor must be a finite number other than 0, up to {MAX_VALUE:g}, not {factor}.")


def scale(adapter: Adapter, factor: float) -> Adapter:
    """Scale an adapter exactly, so that strength 1 of the result is strength `factor` of the original.

    Args:
        adapter: A lora, lora-xs or diff adapter, or one of ComfyUI's without dora_scale and OFT.
        factor: The factor; negative inverts the change.

    Returns:
        The new adapter; the tensors of low-rank types stay as they are.

    Raises:
        AdapterError: If the factor is 0 or not finite, or the change is not proportional to the scale (see `merge`).
    """
    check_factor(factor)
    spec, tensors = adapter.spec, adapter.tensors
    is_plain = not any({"magnitude", OFT} & params.keys() for params in tensors.values())
    if spec.adapter_type not in ("lora", "lora-xs", "diff") and not (spec.adapter_type == "comfy" and is_plain):
        raise AdapterError(
            f"The change of a {spec.adapter_type} adapter is not proportional to its scale. Set model=NAME, rank=R "
            f"and allow_loss=True to scale a lora approximation of it; the error is reported."
        )
    if spec.adapter_type != "diff":
        alphas = {path: spec.get_alpha(path) * factor for path in tensors}
        common = (spec.rank if spec.alpha is None else spec.alpha) * factor
        pattern = {path: alpha for path, alpha in alphas.items() if alpha != common}
        spec = replace(spec, alpha=common, alpha_pattern=pattern)
    tensors = {
        path: {name: x.float() * factor if name in ("diff", BIAS_CHANGE) else x for name, x in params.items()}
        for path, params in tensors.items()
    }
    return Adapter(spec, tensors, append_history(adapter, "scale", factor=factor), adapter.source)


@torch.no_grad()
def merge(
    adapters: Sequence[Adapter],
    strengths: Sequence[float],
    truncation: Truncation,
    weights: Weights | None = None,
    tool: str = "merge",
) -> tuple[Adapter, ErrorByLayer]:
    """Merge adapters into one lora adapter: the change Σ sᵢ (Wᵢ' − W), truncated by SVD, and that of biases.

    Args:
        adapters: The adapters.
        strengths: The strength of each.
        truncation: The rank of the result.
        weights: The base model's weights.
        tool: Name of the tool, for the history.

    Returns:
        The lora adapter and its truncation error.

    Raises:
        AdapterError: When `weights` are needed and missing, or the adapters are on two parts.
    """
    if len({adapter.part for adapter in adapters}) > 1:
        raise AdapterError(
            "The adapters are on two parts of the model, the DiT and the autoencoder's decoder, which one file cannot "
            "hold. Merge those of each part, and load both files."
        )
    error, layers = ErrorByLayer(), {}
    paths = list(dict.fromkeys(path for adapter in adapters for path in adapter.tensors))
    for path in track_progress(paths, tool, unit="layer"):
        active = [(a, s) for a, s in zip(adapters, strengths, strict=True) if path in a.tensors]
        layers[path] = add_bias_changes(path, active)
        active = [(a, s) for a, s in active if a.tensors[path].keys() != {BIAS_CHANGE}]
        if active:
            part = _truncate_sum(path, active, truncation, weights)
            layers[path] |= _store_factors(part)
            error.add(path, part)
    first, alone = adapters[0], len(adapters) == 1
    include, exclude = (first.spec.include, first.spec.exclude) if alone else (sorted(layers), None)
    metadata = merge_metadata(adapters, strengths, tool, **truncation.describe())
    return _build_lora(layers, metadata, " + ".join(a.source for a in adapters), include, exclude), error


def add_bias_changes(path: str, active: Sequence[tuple[Adapter, float]]) -> dict[str, Tensor]:
    """Add up how adapters change the bias of a layer.

    Args:
        path: Module path of the layer.
        active: The adapters that change the layer, each with its strength.

    Returns:
        The change under its name; empty where none of them changes the bias.
    """
    changed = [(adapter.tensors[path], strength) for adapter, strength in active]
    found = [strength * params[BIAS_CHANGE].float() for params, strength in changed if BIAS_CHANGE in params]
    return {BIAS_CHANGE: torch.stack(found).sum(0)} if found else {}


def drop_bias_changes(adapter: Adapter) -> tuple[Adapter, list[str]]:
    """Drop the changes of biases, for formats that cannot hold them.

    Args:
        adapter: The adapter.

    Returns:
        The adapter without them, and what was dropped, in words.

    Raises:
        AdapterError: If it changes nothing else.
    """
    dropped = [f"{path}: the change of its bias" for path, params in adapter.tensors.items() if BIAS_CHANGE in params]
    layers = {
        path: {name: tensor for name, tensor in params.items() if name != BIAS_CHANGE}
        for path, params in adapter.tensors.items()
        if params.keys() != {BIAS_CHANGE}
    }
    if not layers:
        raise AdapterError(f"{adapter.source} changes only biases, which this format cannot hold. Write to=native.")
    return replace(adapter, tensors=layers), dropped


@torch.no_grad()
def expand_bases(adapter: Adapter, weights: Weights | None) -> Adapter:
    """Expand the frozen bases of an -xs adapter into free factors U·M and Vᵀ, which make the same change.

    Args:
        adapter: An adapter of an -xs type.
        weights: The base model's weights; not needed where the adapter brings its own bases.

    Returns:
        The adapter as other tools can read it.
    """
    layers = {}
    for path, params in adapter.tensors.items():
        basis: Mapping[str, Tensor] = params
        if not has_own_bases(adapter):
            W = get_weight(adapter, require_weights(adapter, weights, "Expanding the bases of"), path)
            basis = get_layer_adapter(adapter, path, W).params
        U, V = basis["U"].float(), basis["V"].float()
        free = {"lora_B": (U @ params["M_xs"].to(U)).cpu(), "lora_A": V.T.contiguous().cpu()}
        layers[path] = {**free, **{name: tensor for name, tensor in params.items() if name not in ("M_xs", *BASES)}}
    xs_type = adapter.spec.adapter_type
    metadata = append_history(adapter, "expand_bases", adapter_type=xs_type)
    return Adapter(replace(adapter.spec, adapter_type=xs_type.removesuffix("-xs")), layers, metadata, adapter.source)


def has_own_bases(adapter: Adapter) -> bool:
    """Check whether an adapter of an -xs type brings the bases of every layer along.

    Args:
        adapter: The adapter.

    Returns:
        Whether it does.
    """
    return all(params.keys() >= set(BASES) for params in adapter.tensors.values())


def convert_to_diff(adapter: Adapter, weights: Weights) -> Adapter:
    """Convert an adapter of any type to full weight deltas W' − W (and those of biases), exactly.

    Args:
        adapter: The adapter.
        weights: The base model's weights.

    Returns:
        The diff adapter, fp32, as large as the layers it changes, of which each is made when it is asked for.
    """

    def make(path: str) -> Tensor:
        W = get_weight(adapter, weights, path)
        return (get_layer_adapter(adapter, path, W).weight(W) - W.float()).cpu()

    layers = {}
    for path, params in adapter.tensors.items():
        makers: dict[str, Callable[[], Tensor]] = {}
        if params.keys() != {BIAS_CHANGE}:
            makers["diff"] = partial(make, path)
        if BIAS_CHANGE in params:
            makers[BIAS_CHANGE] = partial(params[BIAS_CHANGE].float)
        layers[path] = LazyTensors(makers)
    spec = AdapterSpec("diff", include=adapter.spec.include, exclude=adapter.spec.exclude)
    metadata = append_history(adapter, "convert_to_diff", adapter_type=adapter.spec.adapter_type)
    return Adapter(spec, layers, metadata, adapter.source)


@torch.no_grad()
def extract(
    tuned: Weights,
    base: Weights,
    truncation: Truncation,
    metadata: Mapping[str, str] | None = None,
    source: str = "extracted",
) -> tuple[Adapter, ErrorByLayer]:
    """Extract the lora adapter of tuned − base, truncated by SVD; layers that are equal are left out.

    Args:
        tuned: Weights of the fine-tuned model.
        base: Weights of its base model.
        truncation: The rank of the adapter.
        metadata: Provenance to store.
        source: The adapter's name in messages.

    Returns:
        The adapter and its truncation error.

    Raises:
        AdapterError: If the two models differ in layers or shapes, or are equal.
    """
    different = sorted(tuned.keys() ^ base.keys())
    different += [path for path in tuned.keys() & base.keys() if tuned[path].shape != base[path].shape]
    if different:
        raise AdapterError(
            f"The two models have different architectures: {len(different)} layers differ in name or shape, such as "
            f"{different[0]}. Set base= to the model that was fine-tuned."
        )
    error, layers = ErrorByLayer(), {}
    for path, W in track_progress(base.items(), "extract", len(base), unit="layer"):
        change = flatten_weight(tuned[path]).float() - flatten_weight(W).float()
        if change.any():
            part = truncate_matrix(change, truncation)
            layers[path] = _store_factors(part)
            error.add(path, part)
    if not layers:
        raise AdapterError(f"The two models have equal weights in all {len(base)} layers: there is nothing to extract.")
    history = write_history(metadata or {}, [], "extract", **truncation.describe())
    return _build_lora(layers, history, source, None if len(layers) == len(base) else sorted(layers)), error


@torch.no_grad()
def list_not_extracted(tuned: nn.Module, base: nn.Module) -> list[str]:
    """List what differs between two models and is no weight of a Linear or Conv1d, so that a lora cannot hold it.

    Args:
        tuned: The fine-tuned model.
        base: Its base model.

    Returns:
        Names of parameters and buffers.
    """
    carried = {f"{path}.weight" for path in find_adaptable_layers(base)}
    one, other = tuned.state_dict(), base.state_dict()
    return [
        name for name in sorted(one.keys() & other.keys()) if name not in carried and not one[name].equal(other[name])
    ]


def _truncate_sum(
    path: str, active: list[tuple[Adapter, float]], truncation: Truncation, weights: Weights | None
) -> LowRankFactors:
    """Σ sᵢ (Wᵢ' − W) at `path`, truncated; by its factors when all have them, else as a full matrix."""
    shapes = {_get_shape(adapter.tensors[path]) for adapter, _ in active} - {None}
    if len(shapes) > 1:
        names = " and ".join(adapter.source for adapter, _ in active)
        raise AdapterError(f"{names} change a weight of another shape at {path}: they are made for different models.")
    if all(get_layer_type(a.spec.adapter_type, a.tensors[path]) == "lora" for a, _ in active):
        B = [a.tensors[path]["lora_B"].double() * (s * a.spec.get_scale(path)) for a, s in active]
        A = [a.tensors[path]["lora_A"].double() for a, _ in active]
        return truncate_product(torch.cat(B, 1), torch.cat(A), truncation)
    total = sum(strength * _compute_change(adapter, path, weights) for adapter, strength in active)
    return truncate_matrix(total, truncation)  # type: ignore[arg-type]


def _get_shape(params: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """Get the shape of the weight that a layer's tensors are for; None where they do not say."""
    if "lora_A" in params and "lora_B" in params:
        return params["lora_B"].shape[0], params["lora_A"].shape[1]
    if is_product(params) and OFT not in params:
        return check_product("", params)  # type: ignore[return-value]  # only an OFT fits any number of columns
    return tuple(flatten_weight(params["diff"]).shape) if "diff" in params else None


def _compute_change(adapter: Adapter, path: str, weights: Weights | None) -> Tensor:
    """W' − W at strength 1, flattened."""
    params = adapter.tensors[path]
    layer_type = get_layer_type(adapter.spec.adapter_type, params)
    if layer_type == "lora":
        return adapter.spec.get_scale(path) * (params["lora_B"].float() @ params["lora_A"].float())
    if layer_type == "diff":
        return flatten_weight(params["diff"].float())
    if is_product(params) and not {"magnitude", OFT} & params.keys():
        return adapter.spec.get_scale(path) * expand_product(params)
    W = get_weight(adapter, require_weights(adapter, weights, "Merging or approximating"), path)
    return flatten_weight(get_layer_adapter(adapter, path, W).weight(W) - W.float()).cpu()


def _build_lora(
    layers: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, str],
    source: str,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None = None,
) -> Adapter:
    """Build a lora adapter of scale 1 from tensors by module path."""
    ranks = {path: len(params["lora_A"]) for path, params in layers.items() if "lora_A" in params}
    return Adapter(build_spec("lora", ranks, include=include, exclude=exclude), layers, metadata, source)


def _store_factors(part: LowRankFactors) -> dict[str, Tensor]:
    return {"lora_A": part.A_RI.float().contiguous(), "lora_B": part.B_OR.float().contiguous()}
