"""What depends on the adapter alone, worked out for all layers at once: norms, gains, factors in the base's dtype.

On a GPU a step of many small layers takes as long as its launches are many, and the norms of one layer alone are two
dozen. Layers of one shape are therefore stacked: the formulas are those of `norms`, with N layers in front, and only
the products with each W are made layer by layer. Columns are the rows of Vᵀ = Wᵀ + s·AᵀBᵀ.
Shape suffixes: N layers, O rows (out), I columns (in), R rank; for columns O and I change places.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from sa3train.adapters.frozen import Frozen
from sa3train.adapters.norms import gain_gradients, root_of
from sa3train.adapters.products import times, wide_product


def few_launches(x: Tensor) -> bool:
    """Whether launches are what takes time: on a GPU."""
    return x.is_cuda


def has_values(weight: Tensor) -> bool:
    """Whether `weight` is at hand before its layer runs: not when it is in few bits or sharded over ranks."""
    return type(weight.data) is Tensor and weight.untyped_storage().nbytes() > 0


@dataclass(frozen=True, eq=False)
class Member:
    """One adapted layer: parameters, frozen weight, the scale s, and whether gains are of rows or of columns."""

    A_RI: nn.Parameter
    B_OR: nn.Parameter
    magnitude: nn.Parameter | None
    frozen: Frozen
    scale: float
    by_rows: bool = True

    @property
    def alike(self) -> tuple[object, ...]:
        """What layers must have in common to be stacked."""
        has_gain, weight = self.magnitude is not None, self.frozen.weight
        return (self.A_RI.shape, self.B_OR.shape, has_gain, self.by_rows, self.scale, weight.dtype, weight.device)

    @property
    def state(self) -> tuple[object, ...]:
        """Changes when a parameter does, in the ways that torch counts."""
        given = (self.A_RI, self.B_OR, self.magnitude)
        return tuple((each.data_ptr(), each._version) for each in given if each is not None)

    @property
    def W_OI(self) -> Tensor:
        """The weight whose rows are gained."""
        return self.frozen.W_OI if self.by_rows else self.frozen.W_OI.T

    def squares(self) -> Tensor:
        """‖W‖² of what is gained."""
        return self.frozen.row_squares() if self.by_rows else self.frozen.column_squares()


@dataclass(frozen=True, eq=False)
class Ready:
    """What a layer's product needs: A and s·B in the base's dtype, and the gain (differentiable) in three forms.

    `less_1` is gain − 1 in the base's dtype, `divisor` the gain with 1 for 0. None where the kind has no gain.
    """

    member: Member
    A_RI: Tensor
    B_OR: Tensor
    gain: Tensor | None = None
    less_1: Tensor | None = None
    divisor: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all of them, and of the product with W that the gain's gradient needs: as large as a factor."""
        gains = [each for each in (self.gain, self.less_1, self.divisor) if each is not None]
        product = (self.B_OR if self.member.by_rows else self.A_RI).nbytes if gains else 0
        return self.A_RI.nbytes + self.B_OR.nbytes + product + sum(each.nbytes for each in gains)


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
    first, dtype = members[0], members[0].frozen.weight.dtype
    with torch.no_grad():
        A = torch.stack([member.A_RI for member in members]).to(dtype).unbind()
        B = torch.stack([member.B_OR for member in members]).mul_(first.scale).to(dtype).unbind()
    if first.magnitude is None:
        return [Ready(*each) for each in zip(members, A, B, strict=True)]
    parameters = [each for member in members for each in (member.A_RI, member.B_OR, member.magnitude)]
    gain_NO = _Gains.apply(members, *parameters)
    with torch.no_grad():
        less_1 = (gain_NO - 1).to(dtype).unbind()
        divisor = torch.where(gain_NO == 0, 1.0, gain_NO).unbind()
    return [Ready(*each) for each in zip(members, A, B, gain_NO.unbind(), less_1, divisor, strict=True)]


class _Gains(Function):
    """magnitude / ‖V‖ of the rows of several layers of one shape, (N, O); differentiable in A, B and magnitude."""

    @staticmethod
    def forward(ctx: Any, members: Sequence[Member], *parameters: Tensor) -> Tensor:
        scale = members[0].scale
        left_NOR, right_NRI = _factors(members)
        product_NOR = torch.stack(_products([member.W_OI for member in members], right_NRI))
        gram_NRR = right_NRI @ right_NRI.mT
        sum_NOR = torch.baddbmm(product_NOR, left_NOR, gram_NRR, beta=2 * scale, alpha=scale * scale)
        base_NO = torch.stack([member.squares() for member in members])
        norm_NO = root_of(base_NO, sum_NOR.mul_(left_NOR).sum(dim=-1))
        gain_NO = _magnitudes(members) / norm_NO
        # Not by save_for_backward: the first layer that asks may be in a checkpointed block, which would drop them.
        ctx.product_NOR, ctx.norm_NO = product_NOR.to(members[0].frozen.weight.dtype), norm_NO
        ctx.members, ctx.states = members, [member.state for member in members]
        return gain_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        members, scale = ctx.members, ctx.members[0].scale
        if [member.state for member in members] != ctx.states:
            raise RuntimeError("an adapter was changed in place between a forward pass and its backward pass.")
        left_NOR, right_NRI = _factors(members)
        gain_NO = _magnitudes(members) / ctx.norm_NO
        magnitude_NO, square_NO = gain_gradients(grad_NO, gain_NO, ctx.norm_NO)
        weights_NO1 = square_NO[..., None].mul_(2 * scale)
        weighted_NOR = weights_NO1 * left_NOR
        rounded_NRO = weighted_NOR.mT.to(members[0].frozen.weight.dtype)
        back_NRI = torch.stack([wide_product(each, m.W_OI) for each, m in zip(rounded_NRO, members, strict=True)])
        right_NRI_ = torch.baddbmm(back_NRI, left_NOR.mT @ weighted_NOR, right_NRI, alpha=scale)
        gram_NRR = right_NRI @ right_NRI.mT
        left_NOR_ = torch.baddbmm(ctx.product_NOR.float(), left_NOR, gram_NRR, alpha=scale).mul_(weights_NO1)
        A, B = (right_NRI_, left_NOR_) if members[0].by_rows else (left_NOR_.mT, right_NRI_.mT)
        triples = zip(A.unbind(), B.unbind(), magnitude_NO.unbind(), strict=True)
        return None, *(gradient for triple in triples for gradient in triple)


def _magnitudes(members: Sequence[Member]) -> Tensor:
    return torch.stack([member.magnitude.detach() for member in members if member.magnitude is not None])


def _factors(members: Sequence[Member]) -> tuple[Tensor, Tensor]:
    """(N, O, R) and (N, R, I) whose product is the change of the weight whose rows are gained."""
    A_NRI = torch.stack([member.A_RI.detach() for member in members])
    B_NOR = torch.stack([member.B_OR.detach() for member in members])
    return (B_NOR, A_NRI) if members[0].by_rows else (A_NRI.mT, B_NOR.mT)


def _products(weights: Sequence[Tensor], right_NRI: Tensor) -> list[Tensor]:
    """W·rightᵀ of each layer, (O, R) fp32, as exact as `times`."""
    if weights[0].dtype == torch.float32:
        return [W_OI @ right_RI.T for W_OI, right_RI in zip(weights, right_NRI, strict=True)]
    if weights[0].dtype != torch.bfloat16:
        return [times(W_OI, right_RI.T) for W_OI, right_RI in zip(weights, right_NRI, strict=True)]
    high_NRI = right_NRI.to(torch.bfloat16)
    both_NSI = torch.cat((high_NRI, (right_NRI - high_NRI).to(torch.bfloat16)), dim=1)
    return list(
        torch.stack([wide_product(W_OI, both_SI.T) for W_OI, both_SI in zip(weights, both_NSI, strict=True)])
        .unflatten(-1, (2, -1))
        .sum(dim=-2)
    )
