"""Adapted layers of one shape, stacked: their factors, magnitudes and products with each weight, N layers in front.

Gains of columns are those of the rows of Vᵀ = Wᵀ + s·AᵀBᵀ; where it says rows below, columns are meant for such layers.
The -xs kinds train M (R, R) alone; their A is Vᵀ and their B is U·M, with U and V frozen.
Shape suffixes: N layers, O rows (out), I columns (in), R rank; where columns are gained, O and I change places.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sa3train.adapters.frozen import Frozen
from sa3train.adapters.products import times, two_terms, wide_product


@dataclass(frozen=True, eq=False)
class Member:
    """One adapted layer: parameters, frozen weight, the scale s, and whether gains are of rows or of columns.

    The -xs kinds have no `A_RI`, and M for `B`. `second` is the magnitude of the columns where rows are gained before
    them (bora).
    """

    A_RI: nn.Parameter | None
    B: nn.Parameter
    magnitude: nn.Parameter | None
    frozen: Frozen
    scale: float
    by_rows: bool = True
    second: nn.Parameter | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All there are, in the order of the fields."""
        given = (self.A_RI, self.B, self.magnitude, self.second)
        return [each for each in given if each is not None]

    @property
    def alike(self) -> tuple[object, ...]:
        """What layers must have in common to be stacked."""
        weight, shapes = self.frozen.weight, tuple(each.shape for each in self.parameters)
        return (self.frozen.W_OI.shape, shapes, self.by_rows, self.scale, weight.dtype, weight.device)

    @property
    def state(self) -> tuple[object, ...]:
        """Changes when a parameter does, in the ways that torch counts."""
        return tuple((each.data_ptr(), each._version) for each in self.parameters)

    @property
    def W_OI(self) -> Tensor:
        """The weight whose rows are gained."""
        return self.frozen.W_OI if self.by_rows else self.frozen.W_OI.T

    def squares(self) -> Tensor:
        """‖W‖² of what is gained."""
        return self.frozen.row_squares() if self.by_rows else self.frozen.column_squares()


def unchanged(members: Sequence[Member], states: Sequence[object]) -> None:
    """Raise `RuntimeError` when a parameter was changed since its layer's state was noted."""
    if [member.state for member in members] != list(states):
        raise RuntimeError("an adapter was changed in place between a forward pass and its backward pass.")


def by_layer(*stacked: Tensor) -> list[Tensor]:
    """Gradients of each kind of parameter, layers in front, in the order of all layers' parameters."""
    return [each for layer in zip(*(part.unbind() for part in stacked), strict=True) for each in layer]


def magnitudes(members: Sequence[Member]) -> Tensor:
    """(N, O)."""
    return torch.stack([member.magnitude.detach() for member in members if member.magnitude is not None])


def second_magnitudes(members: Sequence[Member]) -> Tensor:
    """(N, I)."""
    return torch.stack([member.second.detach() for member in members if member.second is not None])


def factors(members: Sequence[Member]) -> tuple[Tensor, Tensor]:
    """(N, O, R) and (N, R, I) whose product is the change of the weight whose rows are gained; not of the -xs kinds."""
    A_NRI = torch.stack([member.A_RI.detach() for member in members if member.A_RI is not None])
    B_NOR = torch.stack([member.B.detach() for member in members])
    return (B_NOR, A_NRI) if members[0].by_rows else (A_NRI.mT, B_NOR.mT)


def products(members: Sequence[Member], right_NRI: Tensor) -> Tensor:
    """W·rightᵀ of each layer, (N, O, R) fp32, as exact as `times`."""
    weights = [member.W_OI for member in members]
    if weights[0].dtype == torch.float32:
        return torch.stack([W_OI @ right_RI.T for W_OI, right_RI in zip(weights, right_NRI, strict=True)])
    if weights[0].dtype != torch.bfloat16:
        return torch.stack([times(W_OI, right_RI.T) for W_OI, right_RI in zip(weights, right_NRI, strict=True)])
    both_NSI = torch.cat(two_terms(right_NRI), dim=1)
    stacked = torch.stack([wide_product(W_OI, both_SI.T) for W_OI, both_SI in zip(weights, both_NSI, strict=True)])
    return stacked.unflatten(-1, (2, -1)).sum(dim=-2)


def back_products(members: Sequence[Member], left_NOR: Tensor, exact: bool = False) -> Tensor:
    """leftᵀ·W of each layer, (N, R, I) fp32; with `left` rounded to the weight's dtype unless `exact`."""
    dtype, left_NRO = members[0].frozen.weight.dtype, left_NOR.mT
    two = exact and dtype == torch.bfloat16
    given = torch.cat(two_terms(left_NRO), dim=1) if two else left_NRO.to(dtype)
    stacked = torch.stack([wide_product(each, member.W_OI) for each, member in zip(given, members, strict=True)])
    return stacked.unflatten(1, (2, -1)).sum(dim=1) if two else stacked


def weighted_squares(members: Sequence[Member], weights: Tensor, rows: bool = False) -> Tensor:
    """Σ_i w_i W_ij² of each layer, (N, I), or with `rows` Σ_j w_j W_ij², (N, O); squares one weight at a time."""
    found = []
    for member, weights_ in zip(members, weights, strict=True):
        squares_OI = member.W_OI.float().square()
        found.append(torch.mv(squares_OI if rows else squares_OI.T, weights_))
    return torch.stack(found)
