"""What an adapter file holds, with or without the model it is for; two adapters side by side; a plot by layer."""

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sa3train.adapters.adapter import Adapter, architecture_of
from sa3train.adapters.apply.effective_weight import flatten_weight
from sa3train.adapters.apply.layer_weight import layer_part
from sa3train.adapters.apply.load_report import (
    BaseModel,
    LoadReport,
    group_of,
    match,
    measured,
    not_finite,
    refuse_unfit,
    refuse_without_effect,
    squared_norms,
)
from sa3train.adapters.layer_filter import adaptable_layers
from sa3train.adapters.spec import KINDS
from sa3train.adapters.tools.edit import Weights
from sa3train.adapters.tools.history import history_of
from sa3train.adapters.tools.low_rank import Product, inner_product, shape_of
from sa3train.core.errors import AdapterError
from sa3train.core.files import atomic_path


@torch.no_grad()
def inspected(adapter: Adapter) -> dict[str, Any]:
    """What can be told from the file alone, as plain values.

    `norm` of a layer is the Frobenius norm of its scaled low-rank product or difference; None for other methods, whose
    change depends on the base weight.
    """
    tensors = [tensor for params in adapter.tensors.values() for tensor in params.values()]
    layers = {path: _layer(adapter, path) for path in sorted(adapter.tensors)}
    groups: dict[str, dict[str, Any]] = {}
    for path, layer in layers.items():
        group = groups.setdefault(group_of(path), {"layers": 0, "norm": 0.0})
        group["layers"] += 1
        group["norm"] = None if None in (group["norm"], layer["norm"]) else math.hypot(group["norm"], layer["norm"])
    spec = adapter.spec
    return {
        "source": adapter.source,
        "kind": spec.kind,
        "rank": "full" if spec.kind == "diff" else _span([layer["rank"] for layer in layers.values()]),
        "alpha": _span([layer["alpha"] for layer in layers.values()]) if spec.kind in KINDS else "-",
        "rslora": spec.rslora,
        "dropout": spec.dropout,
        "include": None if spec.include is None else list(spec.include),
        "exclude": None if spec.exclude is None else list(spec.exclude),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "fingerprint": adapter.fingerprint,
        "not_finite": not_finite(adapter),
        "all_zero": not any(bool(tensor.any()) for tensor in tensors),
        "metadata": {key: value for key, value in adapter.metadata.items() if key != "lora_config"},
        "history": history_of(adapter),
        "groups": groups,
        "layers": layers,
    }


@torch.no_grad()
def examined(adapter: Adapter, root: nn.Module, base: "BaseModel | None" = None) -> tuple[LoadReport, str | None]:
    """The load report of `adapter` on the model under `root`, and why it would be refused (None: it would not)."""
    layers = adaptable_layers(root)
    report = match(adapter, layers, architecture_of(root), base)
    try:
        refuse_unfit(report, allow_partial=False)
        norms = {}
        for path in report.matched:
            W = layers[path].weight
            assert isinstance(W, Tensor)
            norms[path] = squared_norms(W, layer_part(adapter, path, W).weight(W))
        report = measured(report, norms)
        refuse_without_effect(report, adapter)
    except AdapterError as error:
        return report, str(error)
    return report, None


@torch.no_grad()
def compared(first: Adapter, second: Adapter, weights: Weights | None = None) -> dict[str, Any]:
    """Where two adapters differ: settings, metadata, layers, and by layer the relative difference and the cosine.

    With the base's `weights` whole changes W' − W are compared, whatever the kinds; without, low-rank products and
    differences, and layers of which that cannot be had count as not comparable.
    """
    shared = sorted(first.tensors.keys() & second.tensors.keys())
    layers = {path: _comparison(first, second, path, weights) for path in shared}
    return {
        "identical": first.fingerprint == second.fingerprint,
        "settings": _changed(_settings(first), _settings(second)),
        "metadata": _changed(_plain(first), _plain(second)),
        "only_in_first": sorted(first.tensors.keys() - second.tensors.keys()),
        "only_in_second": sorted(second.tensors.keys() - first.tensors.keys()),
        "compared": "changes of weights" if weights is not None else "low-rank products",
        "layers": layers,
    }


def plot_layers(values: Mapping[str, float], what: str, title: str, path: str | os.PathLike[str]) -> None:
    """A bar per layer, coloured by group, as a PNG at `path`, whole or not at all."""
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(group_of(layer) for layer in values))
    figure = Figure(figsize=(9, max(3.0, 0.17 * len(values) + 1.2)), layout="constrained")
    axes = figure.subplots()
    places = {layer: place for place, layer in enumerate(values)}
    for group in groups:
        members = [layer for layer in values if group_of(layer) == group]
        axes.barh([places[layer] for layer in members], [values[layer] for layer in members], label=group)
    axes.set_yticks(range(len(values)), list(values), fontsize=6)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel(what)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _layer(adapter: Adapter, path: str) -> dict[str, Any]:
    product = _product(adapter, path, None)
    return {
        "rank": adapter.spec.rank_of(path),
        "alpha": adapter.spec.alpha_of(path),
        "tensors": {name: list(tensor.shape) for name, tensor in adapter.tensors[path].items()},
        "norm": None if product is None else math.sqrt(max(inner_product(product, product), 0.0)),
    }


def _product(adapter: Adapter, path: str, weights: Weights | None) -> Product | None:
    """Factors (B, A) of the layer's change in float64; without weights those of the low-rank part alone, or None."""
    params, spec = adapter.tensors[path], adapter.spec
    if weights is not None:
        if path not in weights:
            return None
        W = weights[path].detach()
        return _whole(layer_part(adapter, path, W).weight(W) - W.float())
    if spec.kind == "diff":
        return _whole(params["diff"]) if "diff" in params else None
    if "M_xs" in params:  # bases are orthonormal, so norms and angles are those of M
        return _whole(params["M_xs"].double() * spec.scale_of(path))
    if "lora_A" in params and "lora_B" in params:
        return params["lora_B"].double() * spec.scale_of(path), params["lora_A"].double()
    return None


def _whole(change: Tensor) -> Product:
    return flatten_weight(change).double().cpu(), None


def _comparison(first: Adapter, second: Adapter, path: str, weights: Weights | None) -> dict[str, Any]:
    one, other = (_product(adapter, path, weights) for adapter in (first, second))
    frozen = ["M_xs" in adapter.tensors[path] for adapter in (first, second)]
    if one is None or other is None or (weights is None and frozen[0] != frozen[1]):
        return {"relative_difference": None, "cosine": None}
    if shape_of(one) != shape_of(other):
        return {"relative_difference": None, "cosine": None}
    cross, norm, other_norm = (inner_product(*pair) for pair in ((one, other), (one, one), (other, other)))
    apart = max(norm + other_norm - 2 * cross, 0.0)
    if torch.equal(one[0], other[0]) and (one[1] is other[1] or _equal(one[1], other[1])):
        apart = 0.0  # exactly, where the sum of products leaves rounding
    both = math.sqrt(norm * other_norm)
    return {
        "relative_difference": math.sqrt(apart / norm) if norm > 0 else (0.0 if apart == 0 else None),
        "cosine": cross / both if both > 0 else None,
    }


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    return first is not None and second is not None and torch.equal(first, second)


def _settings(adapter: Adapter) -> dict[str, Any]:
    shown = inspected(adapter)
    return {
        name: shown[name] for name in ("kind", "rank", "alpha", "rslora", "dropout", "include", "exclude", "dtypes")
    }


def _plain(adapter: Adapter) -> dict[str, Any]:
    return {key: value for key, value in adapter.metadata.items() if key != "lora_config"}


def _changed(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    names = dict.fromkeys((*first, *second))
    return {name: [first.get(name), second.get(name)] for name in names if first.get(name) != second.get(name)}


def _span(values: list[Any]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
