"""Inspect an adapter file, with or without its model; compare two adapters; plot changes by layer."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa3train.adapters.adapter import BASE_SAMPLE, PROMPTS, TRAINING_CONFIG, Adapter
from sa3train.adapters.apply.effective_weight import flatten_weight
from sa3train.adapters.apply.layer_weight import get_layer_adapter
from sa3train.adapters.apply.load_report import LoadReport, check_fit, get_layer_group, list_non_finite
from sa3train.adapters.apply.products import OFT, expand_product, is_product, measure_product_norm
from sa3train.adapters.formats.io import load_adapter
from sa3train.adapters.spec import PEFT_METHODS, get_layer_type
from sa3train.adapters.tools.base_weights import LoadedModel, Weights, find_layers, get_base_weights, get_weights
from sa3train.adapters.tools.history import HISTORY, read_history
from sa3train.adapters.tools.low_rank import Product, compute_inner_product
from sa3train.core.errors import AdapterError
from sa3train.core.files import replace_file
from sa3train.core.overrides import flatten_settings
from sa3train.core.text import format_number, list_few, shorten

RELATIVE_CHANGE, PRODUCT_NORM = "‖W' − W‖ / ‖W‖", "norm of the scaled low-rank product"
WHOLE_CHANGES = ("lora", "lora-xs", "diff")
"""Types whose low-rank product or weight delta is the whole change of the weight."""
SHOWN_CHARACTERS = 160
"""Of a value in a terminal or on a page."""
COMPARED_SETTINGS = ("adapter_type", "rank", "alpha", "rslora", "dropout", "include", "exclude", "dtypes")


@dataclass(frozen=True)
class LayerSummary:
    """What an adapter holds for one layer.

    Attributes:
        rank: Its rank.
        alpha: Its alpha.
        tensors: Shapes by tensor name.
        norm: Frobenius norm of the scaled low-rank product or weight delta; None for types whose change depends on the
            base weight.
    """

    rank: int
    alpha: float
    tensors: dict[str, list[int]]
    norm: float | None


@dataclass(frozen=True)
class GroupSummary:
    """What an adapter holds for one group of layers.

    Attributes:
        layers: Number of layers.
        norm: Frobenius norm over all of them; None where that of a layer is unknown.
    """

    layers: int
    norm: float | None


@dataclass(frozen=True)
class Inspection:
    """What an adapter file holds, and how it fits a model.

    Attributes:
        source: The file.
        adapter_type: Its type.
        rank: Its rank, or the range of its ranks.
        alpha: Its alpha, or the range of its alphas.
        rslora: Whether it divides by √rank.
        dropout: Dropout it was trained with.
        include: Its `include` patterns.
        exclude: Its `exclude` patterns.
        parameters: Number of values in all tensors.
        dtypes: Dtypes of the tensors.
        fingerprint: SHA-256 over the adapter.
        not_finite: `<path> <name>` of tensors with NaN or infinity.
        all_zero: Whether every tensor is zero.
        metadata: Metadata of the file without `lora_config`.
        history: What the tools did to it.
        prompts: Prompts to try, if the file carries some.
        groups: Summaries by group of layers.
        layers: Summaries by module path.
        load_report: How it fits the model; None without a model.
    """

    source: str
    adapter_type: str
    rank: str
    alpha: str
    rslora: bool
    dropout: float
    include: list[str] | None
    exclude: list[str] | None
    parameters: int
    dtypes: list[str]
    fingerprint: str
    not_finite: list[str]
    all_zero: bool
    metadata: dict[str, str]
    history: list[Any]
    prompts: list[str]
    groups: dict[str, GroupSummary]
    layers: dict[str, LayerSummary]
    load_report: LoadReport | None = None

    @property
    def settings(self) -> dict[str, str]:
        """The settings in words, by name."""
        return {
            "adapter type": self.adapter_type,
            "rank, alpha": f"{self.rank}, {self.alpha}{' (rsLoRA)' if self.rslora else ''}",
            "layers": f"{len(self.layers)}, {self.parameters:,} parameters in {', '.join(self.dtypes)}",
            "include": list_few(self.include or ["every Linear and Conv1d"], 3),
            "exclude": list_few(self.exclude or ["nothing"], 3),
            "dropout": f"{self.dropout:g}" if self.dropout else "",
            "fingerprint": self.fingerprint[:16],
        }

    def list_provenance(self, limit: int = SHOWN_CHARACTERS) -> dict[str, str]:
        """List the metadata and the history in words.

        Args:
            limit: Most characters of a value.

        Returns:
            Values by name.
        """
        hidden = (HISTORY, PROMPTS, BASE_SAMPLE)
        metadata = {key: shorten(value, limit) for key, value in self.metadata.items() if key not in hidden}
        metadata["prompts to try"] = "\n".join(self.prompts)
        return metadata | {f"step {number}": shorten(str(entry), limit) for number, entry in enumerate(self.history, 1)}

    @property
    def problems(self) -> list[str]:
        """What is wrong with the file whatever the model."""
        damage = [f"{len(self.not_finite)} tensors hold NaN or infinity"] if self.not_finite else []
        return damage + (["every tensor is zero: it has no effect"] if self.all_zero else [])

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values for JSON.

        Returns:
            The fields by name; `load_report` only where there is one.
        """
        return {name: value for name, value in asdict(self).items() if name != "load_report" or value is not None}


@dataclass(frozen=True)
class LayerDifference:
    """How far one layer of two adapters differs.

    Attributes:
        relative_difference: ‖X − Y‖ / ‖X‖ of the two changes; None where they cannot be compared.
        cosine: Their cosine; None likewise.
    """

    relative_difference: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Where two adapters differ.

    Attributes:
        identical: Whether type, scales and tensors are equal bit for bit.
        settings: Differing settings by name: of the first and of the second.
        metadata: Differing metadata likewise, of what both record.
        only_in_first: Layers that only the first has.
        only_in_second: Layers that only the second has.
        compared: What was compared by layer.
        layers: Differences by module path.
        warnings: What is not compared, and warnings about the adapters' provenance.
    """

    identical: bool
    settings: dict[str, list[Any]]
    metadata: dict[str, list[Any]]
    only_in_first: list[str]
    only_in_second: list[str]
    compared: str
    layers: dict[str, LayerDifference]
    warnings: list[str]

    def list_changes(self, limit: int = SHOWN_CHARACTERS) -> list[list[str]]:
        """List settings and metadata that differ.

        Args:
            limit: Most characters of a value.

        Returns:
            Rows of name, first, second.
        """
        changed = {name: [_describe(value) for value in pair] for name, pair in (self.settings | self.metadata).items()}
        return [[name, *(shorten(text, limit) for text in pair)] for name, pair in changed.items()]

    def list_differences(self, count: int | None = None) -> list[list[str]]:
        """List the layers that can be compared, the most different first.

        Args:
            count: Number of layers at most; None lists all.

        Returns:
            Rows of path, relative difference, cosine.
        """
        known = [item for item in self.layers.items() if item[1] != LayerDifference()]
        rows = sorted(known, key=lambda item: -(item[1].relative_difference or 0.0))
        return [[path, format_number(row.relative_difference), format_number(row.cosine)] for path, row in rows[:count]]

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values for JSON.

        Returns:
            The fields by name.
        """
        return asdict(self)


def _describe(value: Any) -> str:
    if isinstance(value, list):
        return list_few(value, 3) or "none"
    return "not set" if value is None else str(value)


@torch.no_grad()
def inspect_adapter(source: str | os.PathLike[str] | Adapter, model: LoadedModel | None = None) -> Inspection:
    """Inspect an adapter. Raises `AdapterError` for a file that holds none, but not for one that the model refuses.

    Args:
        source: The file or PEFT folder, or the adapter itself.
        model: A model to check it against.

    Returns:
        What it holds, and how it fits the model.
    """
    adapter = source if isinstance(source, Adapter) else load_adapter(source)
    tensors = [tensor for params in adapter.tensors.values() for tensor in params.values()]
    layers = {path: _summarize_layer(adapter, path) for path in sorted(adapter.tensors)}
    norms: dict[str, list[float | None]] = {}
    for path, layer in layers.items():
        norms.setdefault(get_layer_group(path), []).append(layer.norm)
    spec, report = adapter.spec, None
    if model is not None:
        layers_of_model, weights = find_layers(model, adapter.part), get_weights(model, adapter.part)
        report, _ = check_fit(adapter, layers_of_model, model, weights=weights, refuse=False)
    return Inspection(
        source=adapter.source,
        adapter_type=spec.adapter_type,
        rank=spec.format_rank(layers),
        alpha=spec.format_alpha(layers),
        rslora=spec.rslora,
        dropout=spec.dropout,
        include=None if spec.include is None else list(spec.include),
        exclude=None if spec.exclude is None else list(spec.exclude),
        parameters=sum(tensor.numel() for tensor in tensors),
        dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        fingerprint=adapter.fingerprint,
        not_finite=list_non_finite(adapter),
        all_zero=not any(bool(tensor.any()) for tensor in tensors),
        metadata={key: value for key, value in adapter.metadata.items() if key != "lora_config"},
        history=read_history(adapter),
        prompts=adapter.prompts,
        groups={group: GroupSummary(len(found), _combine_norms(found)) for group, found in norms.items()},
        layers=layers,
        load_report=report,
    )


@torch.no_grad()
def compare_adapters(
    first: str | os.PathLike[str] | Adapter, second: str | os.PathLike[str] | Adapter, model: LoadedModel | None = None
) -> Comparison:
    """Compare two adapters. Raises `AdapterError` for one that does not fit the model.

    Args:
        first: The first file or PEFT folder, or the adapter itself.
        second: The second.
        model: Their base model. With it, changes W' − W are compared, whatever the types; without it, low-rank
            products and weight deltas, of layers where both mean the same.

    Returns:
        Where they differ.
    """
    one, other = (source if isinstance(source, Adapter) else load_adapter(source) for source in (first, second))
    weights, warnings = get_base_weights([one, other], model)
    shared = sorted(one.tensors.keys() & other.tensors.keys())
    layers = {path: _compare_layer(one, other, path, weights) for path in shared}
    unknown = sum(layer == LayerDifference() for layer in layers.values())
    if unknown and weights is None:
        warnings = [*warnings, f"{unknown} layers are not compared: {_explain_types(one, other)}"]
    settings = [vars(inspect_adapter(adapter)) for adapter in (one, other)]
    texts, more = _flatten_metadata(one), _flatten_metadata(other)
    for adapter, own, others in ((one, texts, more), (other, more, texts)):
        if names := _list_alone(own, others):
            warnings = [*warnings, f"only {adapter.source} records {list_few(names, 6)}, which cannot be compared."]
    return Comparison(
        identical=one.fingerprint == other.fingerprint,
        settings={name: pair for name, pair in _list_changed(*settings).items() if name in COMPARED_SETTINGS},
        metadata={name: pair for name, pair in _list_changed(texts, more).items() if name in texts and name in more},
        only_in_first=sorted(one.tensors.keys() - other.tensors.keys()),
        only_in_second=sorted(other.tensors.keys() - one.tensors.keys()),
        compared="weight changes" if weights is not None else "low-rank products",
        layers=layers,
        warnings=warnings,
    )


def plot_layers(inspection: Inspection, path: str | os.PathLike[str]) -> None:
    """Plot a bar per layer, colored by group: the measured effect, or the norm of the change without a model.

    Args:
        inspection: The inspected adapter.
        path: The PNG file to write.

    Raises:
        AdapterError: If the file's name does not end in .png, or the change depends on the base model and there is
            none.
    """
    from matplotlib.figure import Figure

    if Path(path).suffix.lower() != ".png":
        raise AdapterError(f"{path} is no name for a plot, which is a PNG image. End it in .png.")
    values: Mapping[str, float] = inspection.load_report.layer_effect if inspection.load_report else {}
    label = RELATIVE_CHANGE if values else PRODUCT_NORM
    values = values or {path: layer.norm for path, layer in inspection.layers.items() if layer.norm is not None}
    if not values:
        raise AdapterError(
            f"The change of a {inspection.adapter_type} adapter depends on its base model. Set model=NAME to plot it."
        )
    figure = Figure(figsize=(9, max(3.0, 0.17 * len(values) + 1.2)), layout="constrained")
    axes = figure.subplots()
    rows = {layer: row for row, layer in enumerate(values)}
    for group in dict.fromkeys(get_layer_group(layer) for layer in values):
        members = [layer for layer in values if get_layer_group(layer) == group]
        axes.barh([rows[layer] for layer in members], [values[layer] for layer in members], label=group)
    axes.set_yticks(range(len(values)), list(values), fontsize=6)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel(label)
    axes.set_title(f"{Path(inspection.source).name}: {inspection.adapter_type}", fontsize=9)
    axes.legend(fontsize=7)
    with replace_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _summarize_layer(adapter: Adapter, path: str) -> LayerSummary:
    params, spec = adapter.tensors[path], adapter.spec
    if spec.adapter_type == "comfy" and is_product(params):
        known = measure_product_norm(params)
        norm = None if known is None else known * abs(spec.get_scale(path))
    else:
        product = _get_product(adapter, path, None)
        norm = None if product is None else math.sqrt(max(compute_inner_product(product, product), 0.0))
    return LayerSummary(
        spec.get_rank(path),
        spec.get_alpha(path),
        {name: list(tensor.shape) for name, tensor in params.items()},
        norm,
    )


def _combine_norms(norms: list[float | None]) -> float | None:
    known = [norm for norm in norms if norm is not None]
    return math.hypot(*known) if len(known) == len(norms) else None


def _get_product(adapter: Adapter, path: str, weights: Weights | None) -> Product | None:
    """Factors (B, A) of the layer's change in float64; without weights those of the low-rank part alone, or None."""
    params, spec = adapter.tensors[path], adapter.spec
    if weights is not None:
        if path not in weights:
            return None
        W = weights[path].detach()
        return _flatten(get_layer_adapter(adapter, path, W).weight(W) - W.float())
    if spec.adapter_type in PEFT_METHODS:
        return None
    if "diff" in params:
        return _flatten(params["diff"])
    if is_product(params):
        return None if OFT in params else _flatten(expand_product(params) * spec.get_scale(path))
    if "U" in params and "M_xs" in params:
        return params["U"].double() @ params["M_xs"].double() * spec.get_scale(path), params["V"].double().T
    if "M_xs" in params:  # bases are orthonormal, so norms and angles are those of M
        return _flatten(params["M_xs"].double() * spec.get_scale(path))
    if "lora_A" in params and "lora_B" in params:
        return params["lora_B"].double() * spec.get_scale(path), params["lora_A"].double()
    return None


def _flatten(change: Tensor) -> Product:
    return flatten_weight(change).double().cpu(), None


def _is_same_measure(first: Adapter, second: Adapter, path: str) -> bool:
    """Whether the layers' products can be compared: both are the whole change, or both layers are of one type."""
    types = [get_layer_type(adapter.spec.adapter_type, adapter.tensors[path]) for adapter in (first, second)]
    frozen = ["M_xs" in params and "U" not in params for params in (first.tensors[path], second.tensors[path])]
    return frozen[0] == frozen[1] and (types[0] == types[1] or all(kind in WHOLE_CHANGES for kind in types))


def _explain_types(first: Adapter, second: Adapter) -> str:
    types = dict.fromkeys(adapter.spec.adapter_type for adapter in (first, second))
    base = first.metadata.get("base_model") or second.metadata.get("base_model", "NAME")
    return f"what {' and '.join(types)} change depends on the base model. Give model={base}."


def _compare_layer(first: Adapter, second: Adapter, path: str, weights: Weights | None) -> LayerDifference:
    if weights is None and not _is_same_measure(first, second, path):
        return LayerDifference()
    one, other = (_get_product(adapter, path, weights) for adapter in (first, second))
    if one is None or other is None:
        return LayerDifference()
    shape, other_shape = ((B.shape[0], (B if A is None else A).shape[1]) for B, A in (one, other))
    if shape != other_shape:
        return LayerDifference()
    cross, norm, other_norm = (compute_inner_product(*pair) for pair in ((one, other), (one, one), (other, other)))
    apart = max(norm + other_norm - 2 * cross, 0.0)
    if all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in zip(one, other, strict=True)):
        apart = 0.0  # exactly, where the sum of products leaves rounding
    both = math.sqrt(norm * other_norm)
    return LayerDifference(
        math.sqrt(apart / norm) if norm > 0 else (0.0 if apart == 0 else None), cross / both if both > 0 else None
    )


def _flatten_metadata(adapter: Adapter) -> dict[str, Any]:
    """An adapter's metadata, with an entry for each setting of its training."""
    texts = {key: text for key, text in adapter.metadata.items() if key != "lora_config"}
    if TRAINING_CONFIG not in texts:
        return texts
    config = texts.pop(TRAINING_CONFIG)
    try:
        return texts | flatten_settings({TRAINING_CONFIG: json.loads(config)})
    except ValueError:  # not ours
        return texts | {TRAINING_CONFIG: config}


def _list_alone(own: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """Names that one adapter records alone; a group such as the training settings counts as one."""
    groups = {name.partition(".")[0] for name in others}
    alone = (name for name in own if name not in others)
    return list(dict.fromkeys(name if (group := name.partition(".")[0]) in groups else group for name in alone))


def _list_changed(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    names = dict.fromkeys((*first, *second))
    return {name: [first.get(name), second.get(name)] for name in names if first.get(name) != second.get(name)}
