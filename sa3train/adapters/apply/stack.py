"""Adapters at play: their effective weights, baked into the model once per change, and taken out bit for bit.

Strength s means W + Σ sᵢ (Wᵢ' − W), each Wᵢ' an adapter at full strength on the untouched weight: continuous at 0,
free of order, exact at 0 and 1. `semantics="reference"` gives the public code's rule instead: each adapter acts on the
weight the one before it left, strength scales the low-rank product alone, and 0 is the adapter's absence.
"""

import itertools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from sa3train.adapters.adapter import Adapter, architecture_of
from sa3train.adapters.apply.layer_weight import LayerPart, layer_part
from sa3train.adapters.apply.load_report import (
    BaseModel,
    LoadReport,
    match,
    measured,
    refuse_unfit,
    refuse_without_effect,
    squared_norms,
)
from sa3train.adapters.layer_filter import Filter, adaptable_layers, split_patterns
from sa3train.adapters.spec import is_finite_number
from sa3train.core.errors import AdapterError
from sa3train.core.log import get_logger

logger = get_logger(__name__)

CONDITIONERS = "conditioners."


@dataclass(eq=False)
class Playing:
    """One adapter of the stack and how it is played."""

    adapter: Adapter
    parts: Mapping[str, LayerPart]
    report: LoadReport
    strength: float
    conditioner_strength: float | None
    interval: tuple[float, float]
    exclude_layers: tuple[str, ...]
    allow_partial: bool
    base: "BaseModel | str | None"
    serial: int = field(default_factory=itertools.count().__next__)

    def strengths(self, sigma: float | None) -> tuple[float, float]:
        """Strength in the DiT at noise level `sigma` (None: whatever the interval), and in the conditioner; 0 is off.

        The conditioner runs before there is a noise level, so an interval does not concern it.
        """
        low, high = self.interval
        open_ = sigma is None or _fp32(low) <= _fp32(sigma) <= _fp32(high)
        in_conditioner = self.strength if self.conditioner_strength is None else self.conditioner_strength
        return self.strength if open_ else 0.0, in_conditioner


class AdapterStack:
    """Any number of adapters on the model under `root`.

    Changes take effect at the next `apply`. Weights are changed in place, so references to them stay valid; the base
    weights of changed layers are kept beside them and put back bit for bit.
    """

    def __init__(self, root: nn.Module, semantics: Literal["sum", "reference"] = "sum") -> None:
        if semantics not in ("sum", "reference"):
            raise AdapterError(f"semantics must be 'sum' or 'reference', not {semantics!r}.")
        self.semantics = semantics
        self._layers = adaptable_layers(root)
        self._architecture = architecture_of(root)
        self._playing: list[Playing] = []
        self._base: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._baked: dict[str, tuple[tuple[int, float], ...]] = {}
        self._applied: tuple[tuple[int, tuple[float, float]], ...] = ()

    def __len__(self) -> int:
        return len(self._playing)

    @property
    def reports(self) -> list[LoadReport]:
        """The load report of each adapter, in order."""
        return [playing.report for playing in self._playing]

    def add(
        self,
        adapter: Adapter,
        strength: float = 1.0,
        conditioner_strength: float | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        exclude_layers: Sequence[str] | str = (),
        allow_partial: bool = False,
        base: "BaseModel | str | None" = None,
    ) -> LoadReport:
        """Put `adapter` on top of the stack and say what fitted.

        `conditioner_strength` None means `strength`. `interval` is of noise levels t, ends included. `exclude_layers`
        are filters (see `targets`) of layers it leaves alone. `base` is the model (or its hash) the layers belong to.
        Raises `AdapterError`, leaving the stack as it was, for an adapter that does not fit, holds NaN or infinity, or
        changes nothing, and for a setting out of range.
        """
        playing = self._examined(
            adapter,
            strength=_checked_strength("strength", strength),
            conditioner_strength=None
            if conditioner_strength is None
            else _checked_strength("conditioner_strength", conditioner_strength),
            interval=_checked_interval(interval),
            exclude_layers=split_patterns(exclude_layers),
            allow_partial=allow_partial,
            base=base,
        )
        self._playing.append(playing)
        return playing.report

    def set_strength(
        self, strength: float, index: int | None = None, conditioner_strength: float | None = None
    ) -> None:
        """Set the strength of the adapter at `index`, or of all. `conditioner_strength` None means `strength` again."""
        strength = _checked_strength("strength", strength)
        if conditioner_strength is not None:
            conditioner_strength = _checked_strength("conditioner_strength", conditioner_strength)
        for playing in self._playing if index is None else [self._playing[self._checked_index(index)]]:
            playing.strength, playing.conditioner_strength = strength, conditioner_strength

    def remove(self, index: int) -> None:
        """Take the adapter at `index` off the stack; those above it move down."""
        del self._playing[self._checked_index(index)]

    def replace(self, index: int, adapter: Adapter) -> LoadReport:
        """Put `adapter` in the place of the one at `index`, with that one's settings. Raises as `add` does."""
        old = self._playing[self._checked_index(index)]
        new = self._examined(
            adapter,
            strength=old.strength,
            conditioner_strength=old.conditioner_strength,
            interval=old.interval,
            exclude_layers=old.exclude_layers,
            allow_partial=old.allow_partial,
            base=old.base,
        )
        self._playing[index] = new
        return new.report

    def clear(self) -> None:
        """Take every adapter off and put the base weights back."""
        self._playing.clear()
        self.apply()

    @property
    def breakpoints(self) -> list[float]:
        """Noise levels between 0 and 1 at which an adapter's interval opens or closes, rising."""
        return sorted({end for playing in self._playing for end in playing.interval if 0.0 < end < 1.0})

    @torch.no_grad()
    def apply(self, sigma: float | None = None) -> bool:
        """Bake the effective weights for the noise level `sigma` (None: as if every interval were open).

        Only layers whose adapters or strengths changed since the last call are computed; with nothing changed this
        costs next to nothing. Returns whether any weight changed, so that what was derived from them can be renewed.
        """
        now = tuple((playing.serial, playing.strengths(sigma)) for playing in self._playing)
        if now == self._applied:
            return False
        wanted: dict[str, list[tuple[Playing, float]]] = {path: [] for path in self._baked}
        for playing, (_, (in_dit, in_conditioner)) in zip(self._playing, now, strict=True):
            for path in playing.parts:
                strength = in_conditioner if path.startswith(CONDITIONERS) else in_dit
                if strength != 0.0:
                    wanted.setdefault(path, []).append((playing, strength))
        changed = [path for path, active in wanted.items() if self._baked.get(path, ()) != _signature(active)]
        for path in changed:
            self._bake(path, wanted[path])
        self._applied = now
        return bool(changed)

    def _bake(self, path: str, active: list[tuple[Playing, float]]) -> None:
        layer = self._layers[path]
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        if path not in self._base:
            self._base[path] = (weight.detach().clone(), None if bias is None else bias.detach().clone())
        base_weight, base_bias = self._base[path]
        parts = [(playing.parts[path], strength) for playing, strength in active]
        combine = _chained if self.semantics == "reference" else _summed
        weight.copy_(combine(base_weight, parts) if parts else base_weight)
        if bias is not None and base_bias is not None:
            changes = [strength * change for part, strength in parts if (change := part.bias_change()) is not None]
            bias.copy_(base_bias.float() + sum(changes) if changes else base_bias)
        if parts:
            self._baked[path] = _signature(active)
        else:
            del self._base[path], self._baked[path]

    def _examined(self, adapter: Adapter, **settings: object) -> Playing:
        base, exclude = settings["base"], settings["exclude_layers"]
        report = match(adapter, self._layers, self._architecture, base)  # type: ignore[arg-type]
        refuse_unfit(report, bool(settings["allow_partial"]))
        kept = Filter(None, exclude).select(report.matched) if exclude else report.matched  # type: ignore[arg-type]
        parts, norms = {}, {}
        with torch.no_grad():
            for path in report.matched:
                W = self._base_weight(path)
                parts[path] = layer_part(adapter, path, W)
                norms[path] = squared_norms(W, parts[path].weight(W))
        report = measured(report, norms)
        refuse_without_effect(report, adapter)
        for warning in report.warnings:
            logger.warning("%s: %s", adapter.source, warning)
        logger.info("%s: %s", adapter.source, report.summary())
        return Playing(adapter, {path: parts[path] for path in kept}, report, **settings)  # type: ignore[arg-type]

    def _base_weight(self, path: str) -> Tensor:
        if path in self._base:
            return self._base[path][0]
        weight = self._layers[path].weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def _checked_index(self, index: int) -> int:
        if not 0 <= index < len(self._playing):
            raise AdapterError(f"there is no adapter {index}; {len(self._playing)} are loaded, numbered from 0.")
        return index


def _signature(active: list[tuple[Playing, float]]) -> tuple[tuple[int, float], ...]:
    return tuple((playing.serial, strength) for playing, strength in active)


def _summed(W: Tensor, parts: list[tuple[LayerPart, float]]) -> Tensor:
    """W + Σ sᵢ (Wᵢ' − W), added in an order that does not depend on the stack's."""
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0].weight(W)
    base = W.float()
    total = torch.zeros_like(base)
    for part, strength in sorted(parts, key=lambda item: (item[0].adapter.fingerprint, item[1])):
        total.add_(part.weight(W) - base, alpha=strength)
    return base + total


def _chained(W: Tensor, parts: list[tuple[LayerPart, float]]) -> Tensor:
    """Each adapter on the weight left by the one before it, its strength scaling the low-rank product alone."""
    effective = W.float()
    for part, strength in parts:
        effective = part.weight(effective, strength)
    return effective


def _fp32(value: float) -> float:
    """Noise levels come from fp32 schedules: ends must be compared in fp32 to be included."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _checked_strength(name: str, value: float) -> float:
    if not is_finite_number(value):
        raise AdapterError(f"{name} must be a finite number, not {value!r}.")
    return float(value)


def _checked_interval(interval: Sequence[float]) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in interval)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"an interval must be two noise levels such as (0.0, 0.5), not {interval!r}.") from error
    if not 0.0 <= low <= high <= 1.0:
        raise AdapterError(f"an interval must satisfy 0 ≤ start ≤ end ≤ 1, not {interval!r}.")
    return low, high
