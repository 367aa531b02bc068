"""Adapted layers on a GPU: norms, gains and factors are computed for all layers at once, then used layer by layer.

A step of many small layers is bound by kernel launches there, and the norms of one layer alone take two dozen. Layers
of one shape are therefore stacked (`batched_norms`), and only the products with each W run layer by layer. The layer
itself is y = g ⊙ (W(c ⊙ x) + sBA(c ⊙ x)) + bias as in `fused_linear`, with A, s·B and the gains prepared beforehand.
Shape suffixes: N layers, T tokens of all items, I columns (in), O rows (out), R rank.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from sa3train.adapters.layers.autograd_internals import is_in_backward
from sa3train.adapters.layers.batched_norms import BothGains, BothGainsXS, ChangesXS, Gains, GainsXS, LayerState
from sa3train.adapters.layers.frozen_weight import compute_wide_product
from sa3train.adapters.layers.fused_linear import Recomputation


def is_launch_bound(x: Tensor) -> bool:
    """Check whether a layer's time is bound by kernel launches.

    Args:
        x: The layer's input.

    Returns:
        Whether it is on a GPU.
    """
    return x.is_cuda


def has_values(weight: Tensor) -> bool:
    """Check whether a weight has its values before its layer runs.

    Args:
        weight: The weight.

    Returns:
        False for one that is quantized or sharded over ranks.
    """
    return type(weight.data) is Tensor and weight.untyped_storage().nbytes() > 0


@dataclass(frozen=True, eq=False)
class Gain:
    """A gain of rows or columns of one layer.

    Attributes:
        value: The gain, differentiable.
        less_1: The gain minus 1, in the base's dtype.
        divisor: The gain with 1 in place of 0, to divide by.
    """

    value: Tensor
    less_1: Tensor
    divisor: Tensor


@dataclass(frozen=True, eq=False)
class PreparedLayer:
    """What a layer's product needs.

    Attributes:
        layer: The layer's parameters and frozen weight.
        A_RI: A (Vᵀ for -xs types) in the base's dtype.
        B_OR: s·B (s·U·M for -xs types) in the base's dtype.
        rows: Gain of the rows, for types that have one.
        columns: Gain of the columns, for types that have one.
        change_OR: U·M of -xs types in fp32, differentiable.
    """

    layer: LayerState
    A_RI: Tensor
    B_OR: Tensor
    rows: Gain | None = None
    columns: Gain | None = None
    change_OR: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, and of the products with W that the gains' gradients need, each a factor's size."""
        known = [each for gain in (self.rows, self.columns) if gain is not None for each in vars(gain).values()]
        saved = (self.B_OR.nbytes if self.rows else 0) + (self.A_RI.nbytes if self.columns else 0)
        if self.change_OR is not None:  # an -xs type, of whose products with W only those of both gains are saved
            known.append(self.change_OR)
            saved = self.A_RI.nbytes if self.rows and self.columns else 0
        return self.A_RI.nbytes + self.B_OR.nbytes + saved + sum(each.nbytes for each in known)


class AdaptedLayer(Protocol):
    """What `BatchedAdapter` needs of an adapted layer."""

    def get_state(self, name: str) -> LayerState:
        """Get the parameters and frozen weight of this layer.

        Args:
            name: Name of the adapter.

        Returns:
            The layer's state.
        """

    def __hash__(self) -> int: ...


class BatchedAdapter:
    """All layers of an adapter. Each forward pass computes everything again, at the first layer that needs it.

    A new pass starts when a layer asks again. After a pass of some layers, one of the others continues it: change
    parameters without autograd's version counters (through `.data`) only between passes of the same layers.

    Args:
        layers: The adapted layers.
        name: Name of the adapter.
    """

    def __init__(self, layers: Sequence[AdaptedLayer], name: str) -> None:
        self.layers, self.name = layers, name
        self._ready: dict[AdaptedLayer, PreparedLayer] = {}
        self._states: dict[AdaptedLayer, tuple[object, ...]] = {}
        self._asked: set[AdaptedLayer] = set()
        self._with_gradients = False

    def prepare(self, layer: AdaptedLayer) -> PreparedLayer | None:
        """Prepare one layer's forward pass with its parameters as they are now.

        A layer that asks a second time starts a new forward pass, unless it runs again within a backward pass
        (activation checkpointing), where nothing has changed.

        Args:
            layer: The layer.

        Returns:
            What it needs; None when weights have no values before their layers run.
        """
        known = self._ready.get(layer)
        new_pass = not self._asked or (layer in self._asked and not is_in_backward())
        changed = known is not None and known.layer.state != self._states[layer]
        if new_pass or changed or (torch.is_grad_enabled() and not self._with_gradients):
            self._prepare_all()
        self._asked.add(layer)
        return self._ready.get(layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> "BatchedAdapter":
        return BatchedAdapter(copy.deepcopy(self.layers, memo), self.name)

    @property
    def nbytes(self) -> int:
        """Bytes of what was prepared last, which autograd does not count."""
        return sum(ready.nbytes for ready in self._ready.values())

    def _prepare_all(self) -> None:
        states = {layer: layer.get_state(self.name) for layer in self.layers}
        self._ready = {}
        if all(has_values(state.frozen.weight) for state in states.values()):
            groups: dict[tuple[object, ...], list[AdaptedLayer]] = {}
            for layer, state in states.items():
                groups.setdefault(state.stack_key, []).append(layer)
            for layers in groups.values():
                self._ready |= zip(layers, _prepare_group([states[layer] for layer in layers]), strict=True)
        self._states = {layer: ready.layer.state for layer, ready in self._ready.items()}
        self._asked, self._with_gradients = set(), torch.is_grad_enabled()


def _prepare_group(states: Sequence[LayerState]) -> list[PreparedLayer]:
    first, dtype, count = states[0], states[0].frozen.weight.dtype, len(states)
    parameters = [each for state in states for each in state.parameters]
    changes: Sequence[Tensor | None] = [None] * count
    if first.A_RI is None:
        changes = ChangesXS.apply(states, *(state.B for state in states)).unbind()
    with torch.no_grad():
        A = torch.stack([_get_right_factor(state) for state in states]).to(dtype).unbind()
        B_OR = [state.B if change is None else change for state, change in zip(states, changes, strict=True)]
        B = torch.stack(B_OR).mul_(first.scale).to(dtype).unbind()
    gains, both = (Gains, BothGains) if first.A_RI is not None else (GainsXS, BothGainsXS)
    rows: Sequence[Gain | None] = [None] * count
    columns: Sequence[Gain | None] = [None] * count
    if first.column_magnitude is not None:
        rows, columns = (_build_gains(gain, dtype) for gain in both.apply(states, *parameters))
    elif first.magnitude is not None and first.by_rows:
        rows = _build_gains(gains.apply(states, *parameters), dtype)
    elif first.magnitude is not None:
        columns = _build_gains(gains.apply(states, *parameters), dtype)
    return [PreparedLayer(*each) for each in zip(states, A, B, rows, columns, changes, strict=True)]


def _get_right_factor(state: LayerState) -> Tensor:
    return state.frozen.bases[1].T if state.A_RI is None else state.A_RI


def _build_gains(gain_NO: Tensor, dtype: torch.dtype) -> list[Gain]:
    with torch.no_grad():
        less_1, divisor = (gain_NO - 1).to(dtype), torch.where(gain_NO == 0, 1.0, gain_NO)
    return [Gain(*each) for each in zip(gain_NO.unbind(), less_1.unbind(), divisor.unbind(), strict=True)]


class BatchedProduct(Function):
    """The adapted layer (see the top of the file); differentiable in x, x after dropout, A, B and the gains."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        dropped_TI: Tensor | None,
        A_RI: Tensor,
        B_OR: Tensor,
        gain_O: Tensor | None,
        gain_I: Tensor | None,
        ready: PreparedLayer,
        recompute: Recomputation | None,
        bias_O: Tensor | None,
    ) -> Tensor:
        less_O, less_I = _get_gain_less_1(ready.rows), _get_gain_less_1(ready.columns)
        scaled_TI = _apply_gain(x_TI, less_I)
        low_TI = scaled_TI if dropped_TI is None else _apply_gain(dropped_TI, less_I)
        W_OI = ready.layer.frozen.W_OI
        early = bias_O is not None and less_O is None
        y_TO = torch.addmm(bias_O, scaled_TI, W_OI.T) if early else scaled_TI @ W_OI.T  # type: ignore[arg-type]
        u_TR = low_TI @ ready.A_RI.T
        y_TO.addmm_(u_TR, ready.B_OR.T)
        if less_O is not None:
            y_TO.addcmul_(y_TO, less_O)
            if bias_O is not None:
                y_TO += bias_O
        _, _, needs_A, _, needs_O, needs_I, *_ = ctx.needs_input_grad
        keep_x = (needs_A and dropped_TI is None) or needs_I
        ctx.save_for_backward(
            x_TI if keep_x and recompute is None else None, dropped_TI, u_TR,
            y_TO if needs_O else None,
            *(recompute.sources if keep_x and recompute is not None else ()),
        )  # fmt: skip
        ctx.ready, ctx.recompute, ctx.bias_O, ctx.shape = ready, recompute, bias_O, x_TI.shape
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, dropped_TI, u_TR, y_TO, *sources = ctx.saved_tensors
        if sources:
            x_TI = ctx.recompute.run(sources).reshape(ctx.shape)
        ready, state = ctx.ready, ctx.ready.layer
        needs_x, needs_dropped, needs_A, needs_B, needs_O, needs_I, *_ = ctx.needs_input_grad
        less_I = _get_gain_less_1(ready.columns)
        grad_O = _compute_row_gain_gradient(dy_TO, y_TO, ctx.bias_O, ready) if needs_O else None
        dz_TO = _apply_gain(dy_TO, _get_gain_less_1(ready.rows))
        du_TR = dz_TO @ ready.B_OR
        dB = compute_wide_product(dz_TO.T, u_TR) if needs_B else None
        if dB is not None and state.scale != 1:
            dB *= state.scale
        low_TI = _apply_gain(x_TI if dropped_TI is None else dropped_TI, less_I) if needs_A else None
        dA = None if low_TI is None else compute_wide_product(du_TR.T, low_TI)
        dx = dropped = None
        if needs_x or needs_I:
            dx = dz_TO @ state.frozen.W_OI
            if dropped_TI is None:
                dx.addmm_(du_TR, ready.A_RI)
        if dropped_TI is not None and (needs_dropped or needs_I):
            dropped = du_TR @ ready.A_RI
        grad_I = None
        if needs_I and dx is not None:
            grad_I = (dx * x_TI).sum(dim=0, dtype=torch.float32)
            if dropped is not None:
                grad_I += (dropped * dropped_TI).sum(dim=0, dtype=torch.float32)
        dx = None if dx is None else _apply_gain(dx, less_I)
        dropped = None if dropped is None else _apply_gain(dropped, less_I)
        dx, dropped = dx if needs_x else None, dropped if needs_dropped else None
        return dx, dropped, dA, dB, grad_O, grad_I, None, None, None


def _get_gain_less_1(gain: Gain | None) -> Tensor | None:
    return None if gain is None else gain.less_1


def _apply_gain(x: Tensor, less_1: Tensor | None) -> Tensor:
    """x · gain, as x + x · (gain − 1): a gain near 1 keeps its precision in 16 bits."""
    return x if less_1 is None else torch.addcmul(x, x, less_1)


def _compute_row_gain_gradient(dy_TO: Tensor, y_TO: Tensor, bias_O: Tensor | None, ready: PreparedLayer) -> Tensor:
    """Σ_t dy · z with z = V(c ⊙ x) = (y − bias) / g."""
    assert ready.rows is not None
    grad_O = (dy_TO * y_TO).sum(dim=0, dtype=torch.float32)
    if bias_O is not None:
        grad_O.addcmul_(bias_O.float(), dy_TO.sum(dim=0, dtype=torch.float32), value=-1)
    return grad_O.div_(ready.rows.divisor)
