"""Several adapters on a loaded model: effective weights computed once per change, the base restored bit for bit.

Strength s means W + Σ sᵢ (Wᵢ' − W), where Wᵢ' is adapter i at full strength on the untouched weight: continuous at 0,
independent of order, exact at 0 and 1. `semantics="reference"` is the released code's rule instead: each adapter acts
on the weight that the one before it left, strength scales the low-rank product alone, and 0 disables the adapter.
"""

import itertools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.effective_weight import flatten_weight, iterate_row_blocks
from sa3train.adapters.apply.layer_weight import LayerAdapter
from sa3train.adapters.apply.load_report import BaseModel, LoadReport, check_fit
from sa3train.adapters.layer_filter import find_adaptable_layers, select_layers, split_patterns
from sa3train.adapters.spec import is_finite_number
from sa3train.core.errors import AdapterError
from sa3train.core.log import get_logger
from sa3train.core.text import format_share

logger = get_logger(__name__)

CONDITIONERS = "conditioners."
_HALF_WRITTEN = ((-1, 0.0),)
"""Signature of no adapters that there can be."""
SETTINGS = ("strength", "conditioner_strength", "interval", "exclude_layers", "allow_partial")
"""What can be set for each adapter of a stack."""


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter in a stack, with its settings.

    Attributes:
        adapter: The adapter.
        parts: The adapter at each layer that it changes.
        report: Its load report.
        strength: Strength in the DiT, or in the autoencoder's decoder; (start, end) of one that changes over a piece.
        conditioner_strength: Strength in the conditioner; None means `strength`.
        interval: Noise levels at which it is on, ends included.
        exclude_layers: Patterns of layers that it leaves unchanged.
        allow_partial: Whether only some of its layers need to fit.
        base: The model it was loaded on, or its hash.
        serial: Number that tells loaded adapters apart.
    """

    adapter: Adapter
    parts: Mapping[str, LayerAdapter]
    report: LoadReport
    strength: float | tuple[float, float]
    conditioner_strength: float | None
    interval: tuple[float, float]
    exclude_layers: tuple[str, ...]
    allow_partial: bool
    base: "BaseModel | str | None"
    serial: int = field(default_factory=itertools.count().__next__)

    def strengths(self, sigma: float | None, position: float = 0.0) -> tuple[float, float]:
        """Return the strengths at a noise level.

        Args:
            sigma: Noise level t in [0, 1]; None ignores the interval.
            position: Where in the piece, from 0 to 1.

        Returns:
            Strength in the DiT (0 outside the interval) and in the conditioner, which runs before there is a noise
            level, so that the interval has no effect on it.
        """
        strength = self.strength
        if isinstance(strength, tuple):
            strength = strength[0] + position * (strength[1] - strength[0])
        is_on = sigma is None or is_within(sigma, self.interval)
        in_conditioner = strength if self.conditioner_strength is None else self.conditioner_strength
        return strength if is_on else 0.0, in_conditioner


class AdapterStack:
    """Any number of adapters on a model.

    Changes take effect at the next `apply`. Weights are changed in place, so references to them stay valid; copies of
    the untouched weights of changed layers restore them bit for bit.

    Args:
        root: The model, with the DiT at `model.` and the conditioner at `conditioners.`.
        semantics: "sum", or "reference" for the released code's rule.
        decoder: A module with the autoencoder's decoder at `pretransform.model.decoder.`; None refuses adapters on it.

    Attributes:
        position: Where in a piece of several windows it is, from 0 to 1 by time, for strengths that change.
    """

    def __init__(
        self,
        root: nn.Module,
        semantics: Literal["sum", "reference"] = "sum",
        decoder: nn.Module | None = None,
    ) -> None:
        if semantics not in ("sum", "reference"):
            raise AdapterError(f"semantics must be 'sum' or 'reference', not {semantics!r}.")
        self.semantics = semantics
        self.position = 0.0
        self._parts = {
            "dit": find_adaptable_layers(root),
            "decoder": {} if decoder is None else find_adaptable_layers(decoder),
        }
        self._layers = self._parts["dit"] | self._parts["decoder"]
        self._loaded: list[LoadedAdapter] = []
        self._base: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._baked: dict[str, tuple[tuple[int, float], ...]] = {}
        self._applied: tuple[tuple[int, tuple[float, float]], ...] | None = ()
        self._is_final = False

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def reports(self) -> list[LoadReport]:
        """The load report of each adapter, in order."""
        return [loaded.report for loaded in self._loaded]

    @property
    def settings(self) -> list[dict[str, Any]]:
        """The settings of each adapter by name, in order, with lists for tuples."""
        found = [{name: getattr(loaded, name) for name in SETTINGS} for loaded in self._loaded]
        return [{name: list(v) if isinstance(v, tuple) else v for name, v in each.items()} for each in found]

    def list_excesses(self) -> list[str]:
        """List the adapters whose strengths change the weights by more than the weights are.

        Returns:
            A warning for each.
        """
        found = []
        for loaded in self._loaded:
            strengths = loaded.strength if isinstance(loaded.strength, tuple) else (loaded.strength,)
            strength = max(strengths, key=abs)
            change = abs(strength) * loaded.report.effect.get("all", 0.0)
            if change > 1:
                found.append(
                    f"{loaded.adapter.source or 'the adapter'} at strength {strength:g} changes the weights by "
                    f"{format_share(change)}, so that little of the model is left. Lower the strength."
                )
        return found

    def add(
        self,
        adapter: Adapter,
        strength: float | tuple[float, float] = 1.0,
        conditioner_strength: float | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        exclude_layers: Sequence[str] | str = (),
        allow_partial: bool = False,
        base: "BaseModel | str | None" = None,
    ) -> LoadReport:
        """Add an adapter to the stack. A refused adapter raises `AdapterError` and leaves the stack unchanged.

        Args:
            adapter: The adapter.
            strength: Its strength, 0 is off; (start, end) changes it over a piece, see `position`.
            conditioner_strength: Its strength in the conditioner; None means `strength`.
            interval: Noise levels t at which it is on, ends included. The autoencoder's decoder has none.
            exclude_layers: Patterns of layers that it leaves unchanged (see `layer_filter`).
            allow_partial: Accept an adapter of which only some layers fit.
            base: The model (or its hash) that the layers belong to, to compare with the adapter's.

        Returns:
            How it fits.
        """
        loaded = self._load(
            adapter,
            strength=_check_strengths(strength),
            conditioner_strength=_check_conditioner_strength(conditioner_strength),
            interval=check_interval(interval),
            exclude_layers=split_patterns(exclude_layers),
            allow_partial=allow_partial,
            base=base,
        )
        self._loaded.append(loaded)
        return loaded.report

    def set_strength(
        self,
        strength: float | tuple[float, float],
        index: int | None = None,
        conditioner_strength: float | None = None,
    ) -> None:
        """Set the strength of one adapter or of all.

        Args:
            strength: The strength, 0 is off; (start, end) changes it over a piece.
            index: Index of the adapter; None sets all.
            conditioner_strength: The strength in the conditioner; None means `strength`.

        Raises:
            AdapterError: If there is no such adapter.
        """
        if not self._loaded:
            raise AdapterError("No adapter is loaded, so that its strength has no effect. Load one with load_adapter.")
        strength = _check_strengths(strength)
        conditioner_strength = _check_conditioner_strength(conditioner_strength)
        for loaded in self._loaded if index is None else [self._get(index)]:
            loaded.strength, loaded.conditioner_strength = strength, conditioner_strength

    def remove(self, index: int) -> None:
        """Remove an adapter; those after it move up.

        Args:
            index: Index of the adapter.
        """
        self._loaded.remove(self._get(index))

    def clear(self) -> None:
        """Remove every adapter and restore the base weights."""
        self._loaded.clear()
        self.apply()

    @torch.no_grad()
    def apply(self, sigma: float | None = None, final: bool = False) -> bool:
        """Write the effective weights for a noise level into the model.

        Only layers whose adapters or strengths changed since the last call are computed; with nothing changed this
        costs next to nothing.

        Args:
            sigma: Noise level t in [0, 1]; None ignores the intervals.
            final: Whether to keep no copies of the untouched weights, after which nothing can be changed.

        Returns:
            Whether any weight changed, so that what was derived from the weights can be updated.

        Raises:
            AdapterError: Adapters changed after untouched weights were not kept.
        """
        now = tuple((loaded.serial, loaded.strengths(sigma, self.position)) for loaded in self._loaded)
        if now != self._applied and self._is_final:
            raise AdapterError("The untouched weights were not kept: load the model again to change adapters.")
        self._is_final = self._is_final or final
        if now == self._applied:
            if final:
                self._base.clear()
            return False
        wanted: dict[str, list[tuple[LoadedAdapter, float]]] = {path: [] for path in self._baked}
        for loaded, (_, (in_dit, in_conditioner)) in zip(self._loaded, now, strict=True):
            for path in loaded.parts:
                strength = in_conditioner if path.startswith(CONDITIONERS) else in_dit
                if strength != 0.0:
                    wanted.setdefault(path, []).append((loaded, strength))
        changed = [path for path, active in wanted.items() if self._baked.get(path, ()) != _get_signature(active)]
        self._applied = None  # until all is written: an interrupt leaves layers of both
        for path in changed:
            self._bake(path, wanted[path])
            if final:
                self._base.pop(path, None)
        self._applied = now
        return bool(changed)

    def _bake(self, path: str, active: list[tuple[LoadedAdapter, float]]) -> None:
        layer = self._layers[path]
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        if path not in self._base:
            copy = Tensor.detach if self._is_final else Tensor.clone  # each value is read before it is written
            self._base[path] = (copy(weight), None if bias is None else copy(bias))
        base_weight, base_bias = self._base[path]
        parts = [(loaded.parts[path], strength) for loaded, strength in active]
        self._baked[path] = _HALF_WRITTEN
        if not parts:
            weight.copy_(base_weight)
        elif self.semantics == "reference":
            weight.copy_(_chain(base_weight, parts))
        else:
            _write_sum(weight, base_weight, parts)
        if bias is not None and base_bias is not None:
            changes = [strength * change for part, strength in parts if (change := part.bias_change()) is not None]
            bias.copy_(base_bias.float() + sum(changes) if changes else base_bias)
        if parts:
            self._baked[path] = _get_signature(active)
        else:
            del self._base[path], self._baked[path]

    def _load(self, adapter: Adapter, **settings: Any) -> LoadedAdapter:
        layers = self._parts[adapter.part]
        if not layers:
            raise AdapterError(f"{adapter.source} is on the autoencoder's decoder, which is not loaded here.")
        check_use(adapter, settings["strength"], settings["interval"])
        report, parts = check_fit(
            adapter,
            layers,
            settings["base"],
            weights={path: weight for path, (weight, _) in self._base.items()},
            allow_partial=settings["allow_partial"],
        )
        exclude = settings["exclude_layers"]
        included = select_layers(parts, None, exclude) if exclude else parts
        for warning in report.warnings:
            logger.warning("%s: %s", adapter.source, warning)
        logger.info("%s: %s", adapter.source, report.summary)
        return LoadedAdapter(adapter, {path: parts[path] for path in included}, report, **settings)

    def _get(self, index: int) -> LoadedAdapter:
        if not 0 <= index < len(self._loaded):
            raise AdapterError(f"No adapter has index {index}; {len(self._loaded)} are loaded, counted from 0.")
        return self._loaded[index]


def _get_signature(active: list[tuple[LoadedAdapter, float]]) -> tuple[tuple[int, float], ...]:
    return tuple((loaded.serial, strength) for loaded, strength in active)


def _write_sum(target: Tensor, W: Tensor, parts: list[tuple[LayerAdapter, float]]) -> None:
    """Write W + Σ sᵢ (Wᵢ' − W), added in an order that does not depend on the stack's.

    Where every Wᵢ' has factors, it is (1 + Σ sᵢ (gain_O ⊗ gain_I − 1)) ⊙ W + Σ sᵢ B·A, in one pass over W.
    """
    if len(parts) == 1 and parts[0][1] == 1.0:
        target.copy_(parts[0][0].weight(W))
        return
    parts = sorted(parts, key=lambda item: (item[0].adapter.fingerprint, item[1]))
    factored = [(strength, each) for part, strength in parts if (each := part.factor(W)) is not None]
    if len(factored) < len(parts) or not target.is_contiguous():
        base = W.float()
        total = torch.zeros_like(base)
        for part, strength in parts:
            total.add_(part.weight(W) - base, alpha=strength)
        target.copy_(base + total)
        return
    B_OR = torch.cat([strength * each.B_OR for strength, each in factored], dim=1)
    A_RI = torch.cat([each.A_RI for _, each in factored])
    gain_O, gains = torch.ones_like(B_OR[:, 0]), []  # not as a product, which may be rounded to 16 bits on a GPU
    for (part, strength), (_, each) in zip(parts, factored, strict=True):
        if part.kind is not None and part.kind.scales_columns:
            gain_O -= strength
            gains.append((strength * each.gain_O, each.gain_I))
        else:
            gain_O += strength * (each.gain_O - 1)
    target_OI = flatten_weight(target)
    for rows, block_NI, sum_NI in iterate_row_blocks(flatten_weight(W)):
        if gains:
            sum_NI.copy_(gain_O[rows, None].expand_as(sum_NI))
            for one_O, one_I in gains:
                sum_NI.addcmul_(one_O[rows, None], one_I)
            sum_NI.mul_(block_NI)
        else:
            torch.mul(block_NI, gain_O[rows, None], out=sum_NI)
        target_OI[rows] = sum_NI.addmm_(B_OR[rows], A_RI)


def _chain(W: Tensor, parts: list[tuple[LayerAdapter, float]]) -> Tensor:
    """Each adapter on the weight left by the one before it, its strength scaling the low-rank product alone."""
    effective = W.float()
    for part, strength in parts:
        effective = part.weight(effective, strength)
    return effective


def _round_to_fp32(value: float) -> float:
    """Noise levels come from fp32 schedules: ends must be compared in fp32 to be included."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _check_strength(name: str, value: float) -> float:
    if not is_finite_number(value):
        raise AdapterError(f"{name} must be a finite number, not {value!r}.")
    return float(value)


def _check_strengths(value: Any) -> float | tuple[float, float]:
    if not isinstance(value, tuple | list):
        return _check_strength("strength", value)
    if len(value) != 2:
        raise AdapterError(f"strength must be a number, or its (start, end) over a piece, not {value!r}.")
    start, end = (_check_strength("strength", each) for each in value)
    return (start, end) if start != end else start


def _check_conditioner_strength(value: float | None) -> float | None:
    return None if value is None else _check_strength("conditioner_strength", value)


def is_within(sigma: float, interval: tuple[float, float]) -> bool:
    """Check whether a noise level lies in an interval, ends included.

    Args:
        sigma: The noise level.
        interval: Its ends.

    Returns:
        Whether it does.
    """
    low, high = map(_round_to_fp32, interval)
    return low <= _round_to_fp32(sigma) <= high


def check_use(adapter: Adapter, strength: float | tuple[float, float], interval: tuple[float, float]) -> None:
    """Check that an adapter can be used as asked, whatever the model.

    Args:
        adapter: The adapter.
        strength: Its strength, or (start, end).
        interval: Noise levels at which it is on.

    Raises:
        AdapterError: If the strength is not a number, the interval no interval, or the adapter is on the autoencoder's
            decoder, which has neither noise levels nor windows.
    """
    strength, interval = _check_strengths(strength), check_interval(interval)
    if adapter.part == "decoder" and interval != (0.0, 1.0):
        raise AdapterError(
            f"interval={interval} has no effect: {adapter.source} is on the autoencoder's decoder, which runs after "
            f"the last noise level. Remove it."
        )
    if adapter.part == "decoder" and isinstance(strength, tuple):
        raise AdapterError(
            f"{adapter.source} is on the autoencoder's decoder, which runs once for the whole piece, so its strength "
            f"cannot change from {strength[0]:g} to {strength[1]:g}. Give one."
        )


def check_interval(interval: Sequence[float]) -> tuple[float, float]:
    """Check an interval of noise levels.

    Args:
        interval: Its ends.

    Returns:
        The ends as numbers.

    Raises:
        AdapterError: When they are not numbers, or not in order within 0 and 1.
    """
    try:
        low, high = (float(end) for end in interval)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"interval={interval!r} must be two noise levels such as (0.0, 0.5).") from error
    if not 0.0 <= low <= high <= 1.0:
        raise AdapterError(f"interval={interval!r} must be two numbers from 0 to 1, the lower one first.")
    return low, high
