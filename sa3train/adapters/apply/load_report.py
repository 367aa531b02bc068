"""What happened when an adapter met a model: which layers fit, which base it wants, and how much it changes."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.spec import KINDS, AdapterSpec
from sa3train.core.errors import AdapterError

NO_EFFECT = 1e-3
"""‖W' − W‖ / ‖W‖ below which an adapter without low-rank products counts as untrained: F16 magnitudes round by less."""

GROUPS = (
    ("self_attn", "self-attention"),
    ("cross_attn", "cross-attention"),
    ("to_local_embed", "local condition"),
    (".ff.", "feed-forward"),
    ("conditioners.", "conditioner"),
    ("embed", "embedders"),
)
"""Groups of layers by a part of the path; the first that occurs counts, and the rest is input and output."""


class BaseModel(Protocol):
    """A loaded model, as far as an adapter's provenance goes."""

    @property
    def name(self) -> str:
        """Its registry name or folder."""

    def fingerprint(self) -> str:
        """The hash of its weights."""


@dataclass(frozen=True)
class LoadReport:
    """The outcome of matching an adapter to a model.

    `matched`, `missing` (the spec names them, the file lacks them) and `unexpected` (not in the model) are paths;
    `shape_wrong` says for each why it does not fit. `effect` is ‖W' − W‖ / ‖W‖ at full strength by group of layers, and
    over all as "all". `base` and `base_loaded` give name, architecture and hash of the model it was trained on and of
    the one loaded, where known.
    """

    source: str
    kind: str
    rank: str
    alpha: str
    targets: dict[str, list[str] | None]
    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    shape_wrong: dict[str, str]
    not_finite: list[str]
    base: dict[str, str]
    base_loaded: dict[str, str]
    effect: dict[str, float] = field(default_factory=dict)
    layer_effect: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def partial(self) -> bool:
        """Whether only some of the file's layers fit."""
        return bool(self.unexpected or self.shape_wrong)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """One line: kind, rank, how many layers fit, how much they change."""
        effect = f", changes the weights by {self.effect['all']:.1%}" if "all" in self.effect else ""
        counts = f"{len(self.matched)} of {len(self.matched) + len(self.unexpected) + len(self.shape_wrong)} layers fit"
        absent = f", {len(self.missing)} it names are missing" if self.missing else ""
        return f"{self.kind}, rank {self.rank}, alpha {self.alpha}: {counts}{absent}{effect}"


def group_of(path: str) -> str:
    """The group of layers that the module `path` belongs to."""
    return next((group for part, group in GROUPS if part in path), "input and output")


def match(
    adapter: Adapter,
    layers: Mapping[str, nn.Module],
    architecture: str,
    base: "BaseModel | str | None" = None,
) -> LoadReport:
    """Compare `adapter` with the model's adaptable `layers`. Nothing is refused here; effects are not measured yet."""
    matched, unexpected, shape_wrong = [], [], {}
    for path in adapter.tensors:
        if path not in layers:
            unexpected.append(path)
        elif reason := misfit(adapter, path, layers[path]):
            shape_wrong[path] = reason
        else:
            matched.append(path)
    named = [path for path in layers if adapter.spec.filter.matches(path) and path not in adapter.tensors]
    recorded = {
        name: adapter.metadata[key]
        for name, key in (("name", "base_model"), ("architecture", "base_architecture"), ("hash", "base_hash"))
        if adapter.metadata.get(key)
    }
    loaded = {"architecture": architecture}
    if isinstance(base, str):
        loaded["hash"] = base
    elif base is not None:
        loaded |= {"name": str(base.name), "hash": base.fingerprint()}
    return LoadReport(
        source=adapter.source,
        kind=adapter.spec.kind,
        rank=_span([adapter.spec.rank_of(path) for path in adapter.tensors]) if adapter.spec.kind != "diff" else "full",
        alpha=_span([adapter.spec.alpha_of(path) for path in adapter.tensors]) if adapter.spec.kind in KINDS else "-",
        targets={"include": _list(adapter.spec.include), "exclude": _list(adapter.spec.exclude)},
        matched=matched,
        missing=named,
        unexpected=unexpected,
        shape_wrong=shape_wrong,
        not_finite=not_finite(adapter),
        base=recorded,
        base_loaded=loaded,
        warnings=_base_warnings(adapter, recorded, loaded, layers),
    )


def misfit(adapter: Adapter, path: str, layer: nn.Module) -> str | None:
    """Why the adapter's tensors for `path` do not fit `layer`, or None when they do."""
    weight, spec, params = layer.weight, adapter.spec, adapter.tensors[path]
    assert isinstance(weight, Tensor)
    rows, cols = weight.flatten(1).shape
    if spec.kind == "diff":
        expected = {"diff": tuple(weight.shape), "diff_b": (rows,)}
        if "diff_b" in params and layer.bias is None:
            return "it changes a bias that this layer does not have"
        found = {name: tuple(tensor.shape) for name, tensor in params.items()}
        expected = {name: shape for name, shape in expected.items() if name in found}
    elif spec.kind in KINDS:
        expected = dict(KINDS[spec.kind].shapes(rows, cols, spec.rank_of(path)))
        found = {name: tuple(tensor.shape) for name, tensor in params.items()}
        if KINDS[spec.kind].xs and spec.rank_of(path) > min(rows, cols):
            return f"rank {spec.rank_of(path)} is above the {min(rows, cols)} singular vectors of the weight"
    else:
        return _method_misfit(adapter, path, weight)
    wrong = [
        f"{name} is {list(found[name])}, needs {list(expected[name])}"
        for name in expected
        if found[name] != expected[name]
    ]
    return "; ".join(wrong) or None


def refuse_unfit(report: LoadReport, allow_partial: bool) -> None:
    """Raise `AdapterError` for an adapter that must not be played: see the issue's list in each message."""
    what = f"the adapter {report.source} is refused"
    total = len(report.matched) + len(report.unexpected) + len(report.shape_wrong)
    counts = (
        f"{len(report.matched)} of its {total} layers fit, {len(report.shape_wrong)} have another shape, "
        f"{len(report.unexpected)} are not in the model"
    )
    if report.not_finite:
        raise AdapterError(
            f"{what}: {len(report.not_finite)} of its tensors hold NaN or infinity ({report.not_finite[0]}). Its "
            f"training diverged; take an earlier checkpoint."
        )
    recorded, loaded = report.base.get("architecture"), report.base_loaded["architecture"]
    if recorded not in (None, loaded) or 2 * len(report.shape_wrong) > total:
        trained_on = report.base.get("name", "another model")
        raise AdapterError(
            f"{what}: it was made for another architecture ({trained_on}). {counts}{_example(report)}. Load the model "
            f"it was trained on."
        )
    if not report.matched:
        raise AdapterError(f"{what}: nothing matches this model. {counts}{_example(report)}.")
    if report.partial and not allow_partial:
        raise AdapterError(
            f"{what}: only part of it fits. {counts}{_example(report)}. Allow a partial load (allow_partial, "
            f"--allow-partial) if that is meant."
        )


def refuse_without_effect(report: LoadReport, adapter: Adapter) -> None:
    """Raise `AdapterError` for an adapter that is all zero, one never trained, and for one whose weights overflow."""
    if not math.isfinite(report.effect["all"]):
        raise AdapterError(
            f"the adapter {report.source} is refused: its tensors are so large that the weights it makes overflow. Its "
            f"training diverged; take an earlier checkpoint."
        )
    all_zero = all(not tensor.any() for path in report.matched for tensor in adapter.tensors[path].values())
    if all_zero or (_no_low_rank_product(report, adapter) and report.effect["all"] < NO_EFFECT):
        raise AdapterError(
            f"the adapter {report.source} is refused: it changes nothing. All its low-rank products are zero in "
            f"{len(report.matched)} layers, so it was saved before its first training step, or damaged."
        )


def measured(report: LoadReport, norms: Mapping[str, tuple[float, float]]) -> LoadReport:
    """The report with its effects, from (‖W' − W‖², ‖W‖²) of each matched layer."""
    sums: dict[str, list[float]] = {}
    for path, (change, weight) in norms.items():
        for group in (group_of(path), "all"):
            total = sums.setdefault(group, [0.0, 0.0])
            total[0] += change
            total[1] += weight
    effect = {group: _ratio(*total) for group, total in sums.items()}
    values = {**asdict(report), "effect": dict(sorted(effect.items(), key=lambda item: item[0] != "all"))}
    values["layer_effect"] = {path: _ratio(*pair) for path, pair in norms.items()}
    return LoadReport(**values)


def squared_norms(W: Tensor, changed: Tensor) -> tuple[float, float]:
    """(‖W' − W‖², ‖W‖²)."""
    base = W.float()
    return float((changed - base).square().sum()), float(base.square().sum())


def not_finite(adapter: Adapter) -> list[str]:
    """`<path> <name>` of every tensor with NaN or infinity."""
    return [
        f"{path} {name}"
        for path, params in adapter.tensors.items()
        for name, tensor in params.items()
        if not torch.isfinite(tensor).all()
    ]


def _method_misfit(adapter: Adapter, path: str, weight: Tensor) -> str | None:
    from sa3train.adapters.apply.layer_weight import layer_part

    if adapter.spec.kind == "comfy-dora":
        params = adapter.tensors[path]
        found = (params["lora_B"].shape[0], params["lora_A"].shape[1])
        needed = (weight.shape[0], weight[0].numel())
        return None if found == needed else f"its product is {list(found)}, needs {list(needed)}"
    try:
        layer_part(adapter, path, weight.detach()).weight(weight.detach())
    except AdapterError as error:
        return str(error)
    return None


def _no_low_rank_product(report: LoadReport, adapter: Adapter) -> bool:
    kind = KINDS.get(adapter.spec.kind)
    if kind is None:
        return report.effect["all"] == 0.0
    decisive = "M_xs" if kind.xs else "lora_B"
    return all(not adapter.tensors[path][decisive].any() for path in report.matched)


def _base_warnings(
    adapter: Adapter, recorded: dict[str, str], loaded: dict[str, str], layers: Mapping[str, nn.Module]
) -> list[str]:
    found = []
    if recorded.get("hash") and loaded.get("hash") and recorded["hash"] != loaded["hash"]:
        found.append(
            f"it was trained on {recorded.get('name', 'a model')} (hash {recorded['hash'][:12]}), not on the weights "
            f"loaded ({loaded.get('name', 'hash')} {loaded['hash'][:12]}); it may not sound as intended"
        )
    kind = KINDS.get(adapter.spec.kind)
    trained, here = adapter.metadata.get("base_dtype"), next(iter(layers.values())).weight.dtype
    if kind is not None and kind.xs and trained == "float32" and here != torch.float32:
        found.append(f"its frozen bases are those of float32 weights, and the model is loaded in {here}")
    return found


def _example(report: LoadReport) -> str:
    if report.shape_wrong:
        path, reason = next(iter(report.shape_wrong.items()))
        return f" (for example {path}: {reason})"
    return f" (for example {report.unexpected[0]})" if report.unexpected else ""


def _ratio(change: float, weight: float) -> float:
    if weight == 0.0:
        return 0.0 if change == 0.0 else math.inf
    return math.sqrt(change / weight)


def _span(values: list[Any]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _list(patterns: Any) -> list[str] | None:
    return None if patterns is None else list(patterns)


def spec_summary(spec: AdapterSpec) -> str:
    """Kind, rank and alpha in a few words."""
    return f"{spec.kind}, rank {spec.rank}, alpha {spec.rank if spec.alpha is None else spec.alpha:g}"
