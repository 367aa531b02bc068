"""Check whether an adapter fits a model: which layers match, which base it was trained on, and how much it changes."""

import math
from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from sa3train.adapters.adapter import BASE_SAMPLE, DECODER, Adapter, Part, hash_architecture
from sa3train.adapters.apply.layer_weight import LayerAdapter, get_layer_adapter
from sa3train.adapters.apply.products import check_product, is_product
from sa3train.adapters.spec import BIAS_CHANGE, KINDS, PEFT_METHODS, get_layer_type
from sa3train.core.errors import AdapterError
from sa3train.core.text import compute_relative_norm, format_share
from sa3train.models.weight_files import are_rounded_alike

NO_EFFECT = 1e-3
"""‖W' − W‖ / ‖W‖ below which an adapter without low-rank products counts as untrained: F16 magnitudes round by less."""

DECISIVE = ("lora_B", "M_xs", "diff", BIAS_CHANGE)
"""Tensors that are zero before training; an adapter with another value in one of them changes something."""

GROUPS = (
    (DECODER, "autoencoder's decoder"),
    ("self_attn", "self-attention"),
    ("cross_attn", "cross-attention"),
    ("to_local_embed", "local condition"),
    (".ff.", "feed-forward"),
    ("conditioners.", "conditioner"),
    ("embed", "embedders"),
)
"""Groups of layers by a part of the path; the first that occurs counts, and the rest is input and output."""


class BaseModel(Protocol):
    """A loaded model, as far as an adapter's provenance is concerned."""

    @property
    def name(self) -> str:
        """Registry name or folder."""

    @property
    def sibling(self) -> str | None:
        """Registry name of the base of a post-trained model, or the other way round: adapters are for both."""

    def fingerprint(self) -> str:
        """Compute the hash of its weights without the autoencoder's.

        Returns:
            The hash.
        """

    def autoencoder_fingerprint(self) -> str:
        """Compute the hash of its autoencoder's weights, the base of adapters on the decoder.

        Returns:
            The hash.
        """

    def sample_weights(self, part: Part) -> str:
        """Sample the weights, for copies in other precisions; only asked for where hashes differ.

        Args:
            part: What adapters on them change.

        Returns:
            The sample.
        """


@dataclass(frozen=True)
class LoadReport:
    """How an adapter fits a model.

    Attributes:
        source: The adapter's file.
        adapter_type: Its type.
        rank: Its rank, or the range of its ranks.
        alpha: Its alpha, or the range of its alphas.
        include: Its `include` patterns.
        exclude: Its `exclude` patterns.
        matched: Layers that fit.
        missing: Layers that the spec includes and the file lacks.
        unexpected: Layers of the file that are not in the model.
        mismatched: Why a layer does not fit, by path.
        not_finite: `<path> <name>` of every tensor with NaN or infinity.
        base: Name, architecture and hash of the model it was trained on, where recorded.
        base_loaded: Name, architecture and hash of the loaded model, where known.
        part: What it changes: "dit" (with the conditioner), or "decoder" (the autoencoder's).
        effect: ‖W' − W‖ / ‖W‖ at strength 1 by group of layers, and over all as "all"; empty where not measured.
        layer_effect: The same by layer.
        warnings: What may make it sound different than intended.
        refusal: Why it must not be loaded; None when it can be.
    """

    source: str
    adapter_type: str
    rank: str
    alpha: str
    include: list[str] | None
    exclude: list[str] | None
    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, str]
    not_finite: list[str]
    base: dict[str, str]
    base_loaded: dict[str, str]
    part: Part = "dit"
    effect: dict[str, float] = field(default_factory=dict)
    layer_effect: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    refusal: str | None = None

    @property
    def is_partial(self) -> bool:
        """Whether only some of the file's layers fit."""
        return bool(self.unexpected or self.mismatched)

    @property
    def layer_count(self) -> int:
        """Number of layers in the file."""
        return len(self.matched) + len(self.unexpected) + len(self.mismatched)

    @property
    def summary(self) -> str:
        """One line: type, rank, how many layers fit, how much they change."""
        effect = (
            f", changes the weights by {format_share(self.effect['all'])} at strength 1" if "all" in self.effect else ""
        )
        wanted = len(self.missing) + len(self.matched) + len(self.mismatched)
        absent = f"; it lacks {len(self.missing)} of {wanted} layers that its settings include" if self.missing else ""
        where = " on the autoencoder's decoder" if self.part == "decoder" else ""
        counts = f"{len(self.matched)} of {self.layer_count} layers fit"
        return f"{self.adapter_type}{where}, rank {self.rank}, alpha {self.alpha}: {counts}{absent}{effect}"

    def __repr__(self) -> str:
        return f"LoadReport({self.source}: {self.summary})"

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values for JSON.

        Returns:
            The fields by name.
        """
        return asdict(self)


def check_fit(
    adapter: Adapter,
    layers: Mapping[str, nn.Module],
    base: "BaseModel | str | None" = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
    allow_partial: bool = False,
    measure: bool = True,
    refuse: bool = True,
) -> tuple[LoadReport, dict[str, LayerAdapter]]:
    """Match an adapter with a model, refuse it if it must not be loaded, and measure its effect.

    Args:
        adapter: The adapter.
        layers: The model's adaptable layers by module path, of the part that the adapter is for.
        base: The model, or its hash, to compare with the one that the adapter was trained on.
        weights: Untouched weights of layers whose weights are changed at the moment, by module path.
        allow_partial: Accept an adapter of which only some layers fit.
        measure: Also measure the effect, and refuse an adapter that has none or whose weights overflow.
        refuse: Raise for an adapter that must not be loaded; False records the reason in `LoadReport.refusal`.

    Returns:
        The report, and the adapter at each matched layer (empty where the effect is not measured).

    Raises:
        AdapterError: If `refuse` is set and the adapter does not fit, holds NaN or infinity, or changes nothing.
    """
    loaded: dict[str, Any] = {path: layer.weight for path, layer in layers.items()}
    originals: Mapping[str, Any] = ChainMap(cast(dict[str, Any], weights or {}), loaded)
    report = _match(adapter, layers, originals, base)
    report = replace(report, refusal=_find_refusal(report, allow_partial))
    parts: dict[str, LayerAdapter] = {}
    if measure and report.refusal is None:
        with torch.no_grad():
            for path in report.matched:
                parts[path] = get_layer_adapter(adapter, path, originals[path].detach())
            try:
                effect, by_layer = measure_effect((part, originals[path].detach()) for path, part in parts.items())
            except AdapterError as error:
                report = replace(report, refusal=str(error))
            else:
                report = replace(report, effect=effect, layer_effect=by_layer)
                report = replace(report, refusal=_find_lack_of_effect(report, adapter))
    if refuse and report.refusal is not None:
        raise AdapterError(report.refusal)
    return report, parts


@torch.no_grad()
def measure_effect(layers: Iterable[tuple[LayerAdapter, Tensor]]) -> tuple[dict[str, float], dict[str, float]]:
    """Measure how much an adapter changes weights at strength 1.

    Args:
        layers: The adapter at each layer, and the layer's untouched weight.

    Returns:
        ‖W' − W‖ / ‖W‖ by group of layers with "all" first, and by layer.
    """
    sums: dict[str, list[float]] = {"all": [0.0, 0.0]}
    by_layer = {}
    for part, W in layers:
        base = W.float()
        change, size = float((part.weight(W) - base).square().sum()), float(base.square().sum())
        by_layer[part.path] = compute_relative_norm(change, size)
        for group in (get_layer_group(part.path), "all"):
            total = sums.setdefault(group, [0.0, 0.0])
            total[0] += change
            total[1] += size
    return {group: compute_relative_norm(*total) for group, total in sums.items()}, by_layer


def get_layer_group(path: str) -> str:
    """Get the group of layers that a layer belongs to.

    Args:
        path: Module path of the layer.

    Returns:
        The group's name, such as "self-attention".
    """
    return next((group for part, group in GROUPS if part in path), "input and output")


def list_non_finite(adapter: Adapter) -> list[str]:
    """List the tensors that hold NaN or infinity.

    Args:
        adapter: The adapter.

    Returns:
        `<path> <name>` of each.
    """
    return [
        f"{path} {name}"
        for path, params in adapter.tensors.items()
        for name, tensor in params.items()
        if not torch.isfinite(tensor).all()
    ]


def _match(
    adapter: Adapter, layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor], base: "BaseModel | str | None"
) -> LoadReport:
    """Compare the adapter's layers and base with the model's."""
    spec, matched, unexpected, mismatched = adapter.spec, [], [], {}
    for path in adapter.tensors:
        if path not in layers:
            unexpected.append(path)
        elif reason := _find_mismatch(adapter, path, layers[path], weights):
            mismatched[path] = reason
        else:
            matched.append(path)
    recorded = {
        name: adapter.metadata[key]
        for name, key in (("name", "base_model"), ("architecture", "base_architecture"), ("hash", "base_hash"))
        if adapter.metadata.get(key)
    }
    loaded, is_sibling, rounded = {"architecture": hash_architecture(layers)}, False, dict[str, str]()
    if isinstance(base, str):
        loaded["hash"] = base
    elif base is not None:
        is_sibling = base.sibling is not None and recorded.get("name") == base.sibling
        in_decoder = adapter.part == "decoder"
        base_hash = base.autoencoder_fingerprint() if in_decoder else base.fingerprint()
        loaded |= {"name": str(base.name), "hash": base_hash}
        sample = "" if base_hash == recorded.get("hash") else adapter.metadata.get(BASE_SAMPLE, "")
        if sample and are_rounded_alike(sample, base.sample_weights(adapter.part)):
            rounded = {name: recorded[name] for name in ("name", "hash") if name in recorded}
    dtype: Any = next(iter(layers.values())).weight.dtype
    return LoadReport(
        source=adapter.source,
        adapter_type=spec.adapter_type,
        rank=spec.format_rank(adapter.tensors),
        alpha=spec.format_alpha(adapter.tensors),
        include=None if spec.include is None else list(spec.include),
        exclude=None if spec.exclude is None else list(spec.exclude),
        matched=matched,
        missing=[path for path in layers if spec.includes(path) and path not in adapter.tensors],
        unexpected=unexpected,
        mismatched=mismatched,
        not_finite=list_non_finite(adapter),
        base=recorded,
        base_loaded=loaded,
        part=adapter.part,
        warnings=_list_warnings(adapter, recorded, {} if is_sibling else loaded | rounded, dtype),
    )


def _find_mismatch(adapter: Adapter, path: str, layer: Any, weights: Mapping[str, Tensor]) -> str | None:
    """Say why the adapter's tensors do not fit a layer; None when they do."""
    spec, params = adapter.spec, adapter.tensors[path]
    rows, cols = layer.weight.flatten(1).shape
    found = {name: tuple(tensor.shape) for name, tensor in params.items()}
    layer_type = get_layer_type(spec.adapter_type, params)
    if BIAS_CHANGE in found and layer.bias is None:
        return "it changes a bias that this layer does not have"
    if layer_type == "diff":
        shapes = {"diff": tuple(layer.weight.shape), BIAS_CHANGE: (rows,)}
        expected: Mapping[str, tuple[int, ...]] = {name: shapes[name] for name in found}
    elif layer_type in KINDS:
        if KINDS[layer_type].is_xs and spec.get_rank(path) > min(rows, cols) and "U" not in found:
            return f"rank {spec.get_rank(path)} is above the {min(rows, cols)} singular vectors of the weight"
        expected = KINDS[layer_type].shapes(rows, cols, spec.get_rank(path), found)
    elif layer_type == "comfy":
        if is_product(found):
            shape = check_product(path, params)
            if shape not in ((rows, cols), (rows, None)):
                return f"its factors are for a weight of {list(shape)}, needs {[rows, cols]}"
        first, *rest = found.get("magnitude", (0, 1))
        expected = {"lora_A": (spec.get_rank(path), cols), "lora_B": (rows, spec.get_rank(path)), BIAS_CHANGE: (rows,)}
        expected |= {"magnitude": (rows, 1, *rest[1:]) if first == rows else (1, cols, *rest[1:])}
        expected = {name: expected[name] for name in found if name in expected}
    else:
        try:
            W = weights[path].detach()
            get_layer_adapter(adapter, path, W).weight(W)
        except AdapterError as error:
            return str(error)
        return None
    wrong = [
        f"{name} is {list(found[name])}, needs {list(expected[name])}"
        for name in expected
        if found[name] != expected[name]
    ]
    return "; ".join(wrong) or None


def _find_refusal(report: LoadReport, allow_partial: bool) -> str | None:
    """Say why an adapter must not be loaded, from what matched; None when it may be."""
    refused = f"The adapter {report.source} is refused"
    counts = (
        f"{len(report.matched)} of its {report.layer_count} layers fit, {len(report.mismatched)} have another shape, "
        f"{len(report.unexpected)} are not in the model"
    )
    if report.not_finite:
        return (
            f"{refused}: {len(report.not_finite)} of its tensors hold NaN or infinity ({report.not_finite[0]}). Its "
            f"training diverged. Use an earlier checkpoint."
        )
    recorded, loaded = report.base.get("architecture"), report.base_loaded["architecture"]
    example = next((f"{path}: {reason}" for path, reason in report.mismatched.items()), None)
    example = example or next(iter(report.unexpected), None)
    counts += f" (for example {example})" if example else ""
    if recorded not in (None, loaded) or 2 * len(report.mismatched) > report.layer_count:
        trained_on = report.base.get("name", "another model")
        return (
            f"{refused}: it was trained on another architecture ({trained_on}). {counts}. Load the model it was "
            f"trained on."
        )
    if not report.matched:
        return f"{refused}: no layer matches this model. {counts}."
    if report.is_partial and not allow_partial:
        return f"{refused}: only some of its layers fit. {counts}. To load it partially, set allow_partial=True."
    return None


def _find_lack_of_effect(report: LoadReport, adapter: Adapter) -> str | None:
    """Say why an adapter must not be loaded, from its effect; None when it may be."""
    if not math.isfinite(report.effect["all"]):
        return (
            f"The adapter {report.source} is refused: its weights overflow. Its training diverged. Use an earlier "
            f"checkpoint."
        )
    tensors = [tensor for path in report.matched for tensor in adapter.tensors[path].items()]
    erased = [tensor for name, tensor in tensors if name.startswith("magnitude") and not tensor.any()]
    if erased and any(tensor.any() for _, tensor in tensors):
        return (
            f"The adapter {report.source} is refused: {len(erased)} of its magnitudes are 0 throughout, which would "
            f"erase the weights there. It is damaged, as after a download that broke off. Download or save it again."
        )
    if any(tensor.any() for name, tensor in tensors if name in DECISIVE):
        return None
    is_peft = adapter.spec.adapter_type in PEFT_METHODS or any(map(is_product, adapter.tensors.values()))
    if report.effect["all"] > (0.0 if is_peft else NO_EFFECT) and any(tensor.any() for _, tensor in tensors):
        return None
    return (
        f"The adapter {report.source} is refused: it changes nothing. Its low-rank products are zero in all "
        f"{len(report.matched)} layers: it was saved before the first training step, or is damaged."
    )


def _list_warnings(adapter: Adapter, recorded: dict[str, str], loaded: dict[str, str], dtype: torch.dtype) -> list[str]:
    warnings = []
    empty = [path for path, params in adapter.tensors.items() if not any(tensor.any() for tensor in params.values())]
    if empty:
        warnings.append(
            f"{len(empty)} of its {len(adapter.tensors)} layers hold only zeros, such as {empty[0]}: they change "
            f"nothing, or the file is damaged, as after a download that broke off"
        )
    if recorded.get("hash") and loaded.get("hash") and recorded["hash"] != loaded["hash"]:
        warnings.append(
            f"it was trained on {recorded.get('name', 'a model')} (hash {recorded['hash'][:12]}), not on the loaded "
            f"weights ({loaded.get('name', 'hash')} {loaded['hash'][:12]}); it may not sound as intended"
        )
    kind = KINDS.get(adapter.spec.adapter_type)
    from_base = kind is not None and kind.is_xs and not any("U" in params for params in adapter.tensors.values())
    if from_base and adapter.metadata.get("base_dtype") == "float32" and dtype != torch.float32:
        warnings.append(f"its frozen bases are those of float32 weights, but the model is loaded in {dtype}")
    return warnings
