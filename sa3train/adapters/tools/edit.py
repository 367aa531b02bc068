"""Adapters made from adapters: cut to another rank, scaled, merged, made plain, extracted from a fine-tuned model.

`weights` maps a module path to the base model's weight there. Kinds whose change depends on it (all but lora and diff)
need it wherever the change itself is wanted. Results are fp32 on the CPU; losses are in norms of the weight's change.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.effective_weight import flatten_weight
from sa3train.adapters.apply.layer_weight import layer_part
from sa3train.adapters.formats.native import spec_of_ranks
from sa3train.adapters.layer_filter import adaptable_layers
from sa3train.adapters.spec import KINDS, AdapterSpec
from sa3train.adapters.tools.history import HISTORY, cut_record, extended, history_of, recorded, source_record
from sa3train.adapters.tools.low_rank import Cut, Loss, LowRank, cut_matrix, cut_product
from sa3train.core.errors import AdapterError
from sa3train.core.log import progress

Weights = Mapping[str, Tensor]


@torch.no_grad()
def resized(adapter: Adapter, cut: Cut, weights: Weights | None = None) -> tuple[Adapter, Loss]:
    """`adapter` with its low-rank product cut (or padded with zeros), and what that loses.

    Magnitudes stay as they are, and the loss is then that of the product alone. -xs kinds become the kind with free
    factors; diff and PEFT's methods become lora. Raises `AdapterError` when `weights` are needed and absent.
    """
    kind = KINDS.get(adapter.spec.kind)
    if kind is not None and kind.xs:
        adapter = unfrozen(adapter, _needed(adapter, weights, "resizing"))
    elif kind is None and adapter.spec.kind != "comfy-dora":
        return merged([adapter], [1.0], cut, weights, tool="resize")
    loss, layers, ranks = Loss(), {}, {}
    for path, params in adapter.tensors.items():
        scale = adapter.spec.scale_of(path)
        part = cut_product(params["lora_B"] * scale, params["lora_A"], cut)
        kept = {name: tensor for name, tensor in params.items() if name not in ("lora_A", "lora_B")}
        layers[path] = {**_factors(part), **kept}
        ranks[path] = part.A_RI.shape[0]
        loss.layers[path] = (part.lost, part.total)
    spec = _respecified(adapter.spec, adapter.spec.kind, ranks)
    return Adapter(spec, layers, extended(adapter, "resize", **cut_record(cut)), adapter.source), loss


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """`adapter` so that strength 1 of it is strength `factor` of the original, exactly; tensors stay as they are.

    Raises `AdapterError` for a kind whose change is not in proportion to its scale: see `as_difference` and `merged`.
    """
    if factor == 0 or not torch.isfinite(torch.tensor(factor)):
        raise AdapterError(f"a scale must be a finite number other than 0, not {factor}.")
    spec, tensors = adapter.spec, adapter.tensors
    if spec.kind in ("lora", "lora-xs"):
        alphas = {path: spec.alpha_of(path) * factor for path in tensors}
        common = (spec.rank if spec.alpha is None else spec.alpha) * factor
        pattern = {path: alpha for path, alpha in alphas.items() if alpha != common}
        spec = replace(spec, alpha=common, alpha_pattern=pattern)
    elif spec.kind == "diff":
        tensors = {
            path: {name: tensor.float() * factor for name, tensor in params.items()} for path, params in tensors.items()
        }
    else:
        raise AdapterError(
            f"the change of a {spec.kind} adapter is not in proportion to its scale. With --model NAME it can be "
            f"scaled as a lora of --rank R, which states its error."
        )
    return Adapter(spec, tensors, extended(adapter, "scale", factor=factor), adapter.source)


@torch.no_grad()
def merged(
    adapters: Sequence[Adapter],
    strengths: Sequence[float],
    cut: Cut,
    weights: Weights | None = None,
    tool: str = "merge",
) -> tuple[Adapter, Loss]:
    """One lora adapter with the change Σ sᵢ (Wᵢ' − W) cut by SVD, and what that loses.

    Changes of biases have no place in it and are listed in the loss. Raises `AdapterError` when `weights` are needed
    and absent.
    """
    loss, parts = Loss(), {}
    paths = list(dict.fromkeys(path for adapter in adapters for path in adapter.tensors))
    for path in progress(paths, tool, unit="layer"):
        active = [(a, s) for a, s in zip(adapters, strengths, strict=True) if path in a.tensors]
        parts[path] = _cut_sum(path, active, cut, weights)
        loss.layers[path] = (parts[path].lost, parts[path].total)
        if any("diff_b" in a.tensors[path] for a, _ in active):
            loss.left_out.append(f"{path}: the change of its bias")
    ranks = {path: part.A_RI.shape[0] for path, part in parts.items()}
    spec = spec_of_ranks("lora", ranks, include=sorted(parts))
    first = adapters[0]
    if len(adapters) == 1:
        spec = replace(spec, include=first.spec.include, exclude=first.spec.exclude)
    shared = {
        key: value
        for key, value in first.metadata.items()
        if key not in ("lora_config", HISTORY) and all(a.metadata.get(key) == value for a in adapters)
    }
    sources = [source_record(a, s) for a, s in zip(adapters, strengths, strict=True)]
    metadata = recorded(shared, tool, history_of(first) if len(adapters) == 1 else [], **cut_record(cut), of=sources)
    layers = {path: _factors(part) for path, part in parts.items()}
    return Adapter(spec, layers, metadata, " + ".join(a.source for a in adapters)), loss


@torch.no_grad()
def unfrozen(adapter: Adapter, weights: Weights) -> Adapter:
    """An -xs adapter as the same kind with free factors, U·M and Vᵀ: the same change, as other tools can read it."""
    kind = adapter.spec.kind.removesuffix("-xs")
    layers = {}
    for path, params in adapter.tensors.items():
        basis = layer_part(adapter, path, _weight(adapter, weights, path)).params
        free = {"lora_B": (basis["U"] @ params["M_xs"].float()).cpu(), "lora_A": basis["V"].T.contiguous().cpu()}
        layers[path] = {**free, **{name: tensor for name, tensor in params.items() if name != "M_xs"}}
    metadata = extended(adapter, "unfreeze", kind=adapter.spec.kind)
    return Adapter(replace(adapter.spec, kind=kind), layers, metadata, adapter.source)


@torch.no_grad()
def as_difference(adapter: Adapter, weights: Weights) -> Adapter:
    """`adapter` as the whole differences W' − W (and of biases), fp32: any kind, exactly, at the size of the model."""
    layers = {}
    for path in adapter.tensors:
        W = _weight(adapter, weights, path)
        part = layer_part(adapter, path, W)
        layers[path] = {"diff": (part.weight(W) - W.float()).cpu()}
        if (bias := part.bias_change()) is not None:
            layers[path]["diff_b"] = bias.cpu()
    spec = AdapterSpec("diff", include=adapter.spec.include, exclude=adapter.spec.exclude)
    return Adapter(spec, layers, extended(adapter, "difference", kind=adapter.spec.kind), adapter.source)


@torch.no_grad()
def extracted(
    tuned: Weights, base: Weights, cut: Cut, metadata: Mapping[str, str] | None = None, source: str = "extracted"
) -> tuple[Adapter, Loss]:
    """The lora adapter of tuned − base, cut by SVD; layers that are equal are left out.

    Raises `AdapterError` when the two have other layers or shapes, or are equal.
    """
    strange = sorted(tuned.keys() ^ base.keys())
    strange += [path for path in tuned.keys() & base.keys() if tuned[path].shape != base[path].shape]
    if strange:
        raise AdapterError(
            f"the two models are of different architecture: {len(strange)} layers differ in name or shape, such as "
            f"{strange[0]}. Give the base that the fine-tuned model was started from."
        )
    loss, parts = Loss(), {}
    for path, W in progress(base.items(), "extract", len(base), unit="layer"):
        change = flatten_weight(tuned[path]).float() - flatten_weight(W).float()
        if change.any():
            parts[path] = cut_matrix(change, cut)
            loss.layers[path] = (parts[path].lost, parts[path].total)
    if not parts:
        raise AdapterError(f"the two models have equal weights in all {len(base)} layers; there is nothing to extract.")
    whole = len(parts) == len(base)
    ranks = {path: part.A_RI.shape[0] for path, part in parts.items()}
    spec = spec_of_ranks("lora", ranks, include=None if whole else sorted(parts))
    layers = {path: _factors(part) for path, part in parts.items()}
    return Adapter(spec, layers, recorded(dict(metadata or {}), "extract", [], **cut_record(cut)), source), loss


@torch.no_grad()
def unextracted(tuned: nn.Module, base: nn.Module) -> list[str]:
    """What differs between two models and is no weight of a Linear or Conv1d, so that a lora cannot hold it."""
    carried = {f"{path}.weight" for path in adaptable_layers(base)}
    one, other = tuned.state_dict(), base.state_dict()
    return [
        name for name in sorted(one.keys() & other.keys()) if name not in carried and not one[name].equal(other[name])
    ]


@torch.no_grad()
def differences(before: Adapter, after: Adapter, weights: Weights) -> Loss:
    """How far the weights made by `after` are from those made by `before`, relative to the change `before` makes.

    A layer that only one of them has counts with its whole change.
    """
    loss = Loss()
    for path in dict.fromkeys((*before.tensors, *after.tensors)):
        W = _weight(before if path in before.tensors else after, weights, path).float()
        one, other = (layer_part(a, path, W).weight(W) if path in a.tensors else W for a in (before, after))
        loss.layers[path] = (float((one - other).square().sum()), float((one - W).square().sum()))
    return loss


def _cut_sum(path: str, active: list[tuple[Adapter, float]], cut: Cut, weights: Weights | None) -> LowRank:
    """Σ sᵢ (Wᵢ' − W) at `path`, cut; by its factors when all have them, else as a whole matrix."""
    if all(adapter.spec.kind == "lora" for adapter, _ in active):
        B = [a.tensors[path]["lora_B"].double() * (s * a.spec.scale_of(path)) for a, s in active]
        return cut_product(torch.cat(B, 1), torch.cat([a.tensors[path]["lora_A"].double() for a, _ in active]), cut)
    return cut_matrix(sum(s * change for s, change in _changes(path, active, weights)), cut)  # type: ignore[arg-type]


def _changes(path: str, active: list[tuple[Adapter, float]], weights: Weights | None) -> Iterator[tuple[float, Tensor]]:
    for adapter, strength in active:
        params, scale = adapter.tensors[path], adapter.spec.scale_of(path)
        if adapter.spec.kind == "lora":
            yield strength, scale * (params["lora_B"].float() @ params["lora_A"].float())
        elif adapter.spec.kind == "diff":
            if "diff" in params:
                yield strength, flatten_weight(params["diff"].float())
        else:
            W = _weight(adapter, _needed(adapter, weights, "merging or approximating"), path)
            yield strength, flatten_weight(layer_part(adapter, path, W).weight(W) - W.float()).cpu()


def _needed(adapter: Adapter, weights: Weights | None, what: str) -> Weights:
    if weights is None:
        raise AdapterError(
            f"{what} a {adapter.spec.kind} adapter needs the weights it was trained on: give --model NAME "
            f"({adapter.metadata.get('base_model', 'its base model')})."
        )
    return weights


def _weight(adapter: Adapter, weights: Weights, path: str) -> Tensor:
    if path not in weights:
        raise AdapterError(f"{adapter.source}: the model has no layer {path}. Give the model it was trained on.")
    return weights[path].detach()


def _factors(part: LowRank) -> dict[str, Tensor]:
    return {"lora_A": part.A_RI.float().contiguous(), "lora_B": part.B_OR.float().contiguous()}


def _respecified(spec: AdapterSpec, kind: str, ranks: Mapping[str, int]) -> AdapterSpec:
    """A spec of other ranks and scale 1, with the same filters and dropout."""
    return spec_of_ranks(kind, ranks, dropout=spec.dropout, include=spec.include, exclude=spec.exclude)
