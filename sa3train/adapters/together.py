"""What depends on the adapter alone, worked out for all layers at once: norms, gains, factors in the base's dtype.

On a GPU a step of many small layers takes as long as its launches are many, and the norms of one layer alone are two
dozen. Layers of one shape are therefore stacked (`stacked`, `stacked_gains`), and only the products with each W are
made layer by layer. Shape suffixes: N layers, O rows (out), I columns (in), R rank.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sa3train.adapters.stacked import Member
from sa3train.adapters.stacked_gains import BothGains, Gains
from sa3train.adapters.stacked_gains_xs import BothGainsXS, ChangesXS, GainsXS


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
