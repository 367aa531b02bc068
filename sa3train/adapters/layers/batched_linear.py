"""What depends on the adapter alone, worked out for all layers at once: norms, gains, factors in the base's dtype.

On a GPU a step of many small layers takes as long as its launches are many, and the norms of one layer alone are two
dozen. Layers of one shape are therefore stacked (`stacked`, `stacked_gains`), and only the products with each W are
made layer by layer. Shape suffixes: N layers, O rows (out), I columns (in), R rank.

The adapted layer where launches are what takes time: as `adapted_product`, with norms and factors made beforehand.

y = g ⊙ (W(c ⊙ x) + sBA(c ⊙ x)) + bias; `together` has made A, s·B and the gains, and takes their gradients back.
Shape suffixes: T tokens of all items, I columns (in), O rows (out), R rank.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from sa3train.adapters.layers.batched_norms import BothGains, BothGainsXS, ChangesXS, Gains, GainsXS, Member
from sa3train.adapters.layers.frozen_weight import wide_product
from sa3train.adapters.layers.fused_linear import Recipe


def few_launches(x: Tensor) -> bool:
    """Whether launches are what takes time: on a GPU."""
    return x.is_cuda


def has_values(weight: Tensor) -> bool:
    """Whether `weight` is at hand before its layer runs: not when it is in few bits or sharded over ranks."""
    return type(weight.data) is Tensor and weight.untyped_storage().nbytes() > 0


@dataclass(frozen=True, eq=False)
class Gain:
    """A gain (differentiable), it minus 1 in the base's dtype, and it with 1 for 0, to divide by."""

    value: Tensor
    less_1: Tensor
    divisor: Tensor


@dataclass(frozen=True, eq=False)
class Ready:
    """What a layer's product needs: A and s·B in the base's dtype, and the gains of its kind.

    For the -xs kinds, A is Vᵀ and B is U·M, which is also here in fp32, differentiable, as `change_OR`.
    """

    member: Member
    A_RI: Tensor
    B_OR: Tensor
    rows: Gain | None = None
    columns: Gain | None = None
    change_OR: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all of them, and of the products with W that the gains' gradients need, each a factor's size."""
        known = [each for gain in (self.rows, self.columns) if gain is not None for each in vars(gain).values()]
        kept = (self.B_OR.nbytes if self.rows else 0) + (self.A_RI.nbytes if self.columns else 0)
        if self.change_OR is not None:  # an -xs kind, of whose products with W only those of both gains are kept
            known.append(self.change_OR)
            kept = self.A_RI.nbytes if self.rows and self.columns else 0
        return self.A_RI.nbytes + self.B_OR.nbytes + kept + sum(each.nbytes for each in known)


class Layer(Protocol):
    """What is asked of an adapted layer."""

    def member(self, name: str) -> Member:
        """This layer with its adapter `name`."""

    def __hash__(self) -> int: ...


class Together:
    """All layers of an adapter. Each forward pass works everything out anew, at the first layer that asks.

    A pass is known by a layer that asks again. After a pass of some layers, one of the others goes on with it: change
    parameters behind torch's back (through `.data`) only between passes of the same layers.
    """

    def __init__(self, layers: Sequence[Layer], name: str) -> None:
        self.layers, self.name = layers, name
        self._ready: dict[Layer, Ready] = {}
        self._states: dict[Layer, tuple[object, ...]] = {}
        self._asked: set[Layer] = set()
        self._with_gradients = False

    def of(self, layer: Layer) -> Ready | None:
        """What `layer` needs, as of its parameters now; None when weights are not at hand before their layers run.

        A layer that asks a second time begins a new forward pass, unless it is run again within a backward pass
        (activation checkpointing), where nothing has changed.
        """
        known = self._ready.get(layer)
        new_pass = not self._asked or (layer in self._asked and torch._C._current_graph_task_id() == -1)
        changed = known is not None and known.member.state != self._states[layer]
        if new_pass or changed or (torch.is_grad_enabled() and not self._with_gradients):
            self._work_out()
        self._asked.add(layer)
        return self._ready.get(layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Together":
        """For copies of the layers, with nothing worked out."""
        return Together(copy.deepcopy(self.layers, memo), self.name)

    @property
    def nbytes(self) -> int:
        """Bytes of what was worked out last, which autograd does not count."""
        return sum(ready.nbytes for ready in self._ready.values())

    def _work_out(self) -> None:
        members = {layer: layer.member(self.name) for layer in self.layers}
        self._ready = {}
        if all(has_values(member.frozen.weight) for member in members.values()):
            groups: dict[tuple[object, ...], list[Layer]] = {}
            for layer, member in members.items():
                groups.setdefault(member.alike, []).append(layer)
            for layers in groups.values():
                self._ready |= zip(layers, _group([members[layer] for layer in layers]), strict=True)
        self._states = {layer: ready.member.state for layer, ready in self._ready.items()}
        self._asked, self._with_gradients = set(), torch.is_grad_enabled()


def _group(members: Sequence[Member]) -> list[Ready]:
    first, dtype, count = members[0], members[0].frozen.weight.dtype, len(members)
    parameters = [each for member in members for each in member.parameters]
    changes: Sequence[Tensor | None] = [None] * count
    if first.A_RI is None:
        changes = ChangesXS.apply(members, *(member.B for member in members)).unbind()
    with torch.no_grad():
        A = torch.stack([_right(member) for member in members]).to(dtype).unbind()
        B_OR = [member.B if change is None else change for member, change in zip(members, changes, strict=True)]
        B = torch.stack(B_OR).mul_(first.scale).to(dtype).unbind()
    gains, both = (Gains, BothGains) if first.A_RI is not None else (GainsXS, BothGainsXS)
    rows: Sequence[Gain | None] = [None] * count
    columns: Sequence[Gain | None] = [None] * count
    if first.second is not None:
        rows, columns = (_forms(gain, dtype) for gain in both.apply(members, *parameters))
    elif first.magnitude is not None and first.by_rows:
        rows = _forms(gains.apply(members, *parameters), dtype)
    elif first.magnitude is not None:
        columns = _forms(gains.apply(members, *parameters), dtype)
    return [Ready(*each) for each in zip(members, A, B, rows, columns, changes, strict=True)]


def _right(member: Member) -> Tensor:
    return member.frozen.bases[1].T if member.A_RI is None else member.A_RI


def _forms(gain_NO: Tensor, dtype: torch.dtype) -> list[Gain]:
    with torch.no_grad():
        less_1, divisor = (gain_NO - 1).to(dtype), torch.where(gain_NO == 0, 1.0, gain_NO)
    return [Gain(*each) for each in zip(gain_NO.unbind(), less_1.unbind(), divisor.unbind(), strict=True)]


class GainedProduct(Function):
    """See the top of the file. Differentiable in x, its dropped-out twin, A, B and the gains."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        dropped_TI: Tensor | None,
        A_RI: Tensor,
        B_OR: Tensor,
        gain_O: Tensor | None,
        gain_I: Tensor | None,
        ready: Ready,
        recipe: Recipe | None,
        bias_O: Tensor | None,
    ) -> Tensor:
        less_O, less_I = _less_1(ready.rows), _less_1(ready.columns)
        scaled_TI = _gained(x_TI, less_I)
        low_TI = scaled_TI if dropped_TI is None else _gained(dropped_TI, less_I)
        W_OI = ready.member.frozen.W_OI
        early = bias_O is not None and less_O is None
        y_TO = torch.addmm(bias_O, scaled_TI, W_OI.T) if early else scaled_TI @ W_OI.T  # type: ignore[arg-type]
        u_TR = low_TI @ ready.A_RI.T
        y_TO.addmm_(u_TR, ready.B_OR.T)
        if less_O is not None:
            y_TO.addcmul_(y_TO, less_O)
            if bias_O is not None:
                y_TO += bias_O
        _, _, wants_A, _, wants_O, wants_I, *_ = ctx.needs_input_grad
        keep_x = (wants_A and dropped_TI is None) or wants_I
        ctx.save_for_backward(
            x_TI if keep_x and recipe is None else None, dropped_TI, u_TR,
            y_TO if wants_O else None,
            *(recipe.sources if keep_x and recipe is not None else ()),
        )  # fmt: skip
        ctx.ready, ctx.recipe, ctx.bias_O, ctx.shape = ready, recipe, bias_O, x_TI.shape
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, dropped_TI, u_TR, y_TO, *sources = ctx.saved_tensors
        if sources:
            x_TI = ctx.recipe.make(sources).reshape(ctx.shape)
        ready, member = ctx.ready, ctx.ready.member
        wants_x, wants_dropped, wants_A, wants_B, wants_O, wants_I, *_ = ctx.needs_input_grad
        less_I = _less_1(ready.columns)
        grad_O = _gradient_of_rows(dy_TO, y_TO, ctx.bias_O, ready) if wants_O else None
        dz_TO = _gained(dy_TO, _less_1(ready.rows))
        du_TR = dz_TO @ ready.B_OR
        dB = wide_product(dz_TO.T, u_TR) if wants_B else None
        if dB is not None and member.scale != 1:
            dB *= member.scale
        low_TI = _gained(x_TI if dropped_TI is None else dropped_TI, less_I) if wants_A else None
        dA = None if low_TI is None else wide_product(du_TR.T, low_TI)
        dx = dropped = None
        if wants_x or wants_I:
            dx = dz_TO @ member.frozen.W_OI
            if dropped_TI is None:
                dx.addmm_(du_TR, ready.A_RI)
        if dropped_TI is not None and (wants_dropped or wants_I):
            dropped = du_TR @ ready.A_RI
        grad_I = None
        if wants_I and dx is not None:
            grad_I = (dx * x_TI).sum(dim=0, dtype=torch.float32)
            if dropped is not None:
                grad_I += (dropped * dropped_TI).sum(dim=0, dtype=torch.float32)
        dx = None if dx is None else _gained(dx, less_I)
        dropped = None if dropped is None else _gained(dropped, less_I)
        dx, dropped = dx if wants_x else None, dropped if wants_dropped else None
        return dx, dropped, dA, dB, grad_O, grad_I, None, None, None


def _less_1(gain: Gain | None) -> Tensor | None:
    return None if gain is None else gain.less_1


def _gained(x: Tensor, less_1: Tensor | None) -> Tensor:
    """x · gain, as x + x · (gain − 1): a gain near 1 keeps its precision in 16 bits."""
    return x if less_1 is None else torch.addcmul(x, x, less_1)


def _gradient_of_rows(dy_TO: Tensor, y_TO: Tensor, bias_O: Tensor | None, ready: Ready) -> Tensor:
    """Σ_t dy · z with z = V(c ⊙ x) = (y − bias) / g."""
    assert ready.rows is not None
    grad_O = (dy_TO * y_TO).sum(dim=0, dtype=torch.float32)
    if bias_O is not None:
        grad_O.addcmul_(bias_O.float(), dy_TO.sum(dim=0, dtype=torch.float32), value=-1)
    return grad_O.div_(ready.rows.divisor)
