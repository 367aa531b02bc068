"""Adapted layers of one shape, stacked: their factors, magnitudes and products with each weight, N layers in front.

Gains of columns are those of the rows of Vᵀ = Wᵀ + s·AᵀBᵀ; where it says rows below, columns are meant for such layers.
The -xs kinds train M (R, R) alone; their A is Vᵀ and their B is U·M, with U and V frozen.
Shape suffixes: N layers, O rows (out), I columns (in), R rank; where columns are gained, O and I change places.

Gains of stacked layers, and their gradients: the formulas of `norms`, with N layers in front.

Shape suffixes: N layers, O rows (out), I columns (in), R rank.

Stacked layers of the -xs kinds: the changes U·M, gains and their gradients: the formulas of `norms_xs`, N layers in
front.

Where columns are gained, U and V change places and M is transposed. Shape suffixes: N layers, O rows (out), I columns
(in), R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from sa3train.adapters.layers.frozen_weight import Frozen, times, two_terms, wide_product
from sa3train.adapters.layers.weight_norms import gain_gradients, root_of, row_gain_gradients


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


class Gains(Function):
    """magnitude / ‖V‖ of the rows of several layers of one shape, (N, O); differentiable in A, B and magnitude."""

    @staticmethod
    def forward(ctx: Any, members: Sequence[Member], *parameters: Tensor) -> Tensor:
        product_NOR, norm_NO = _row_norms(members, *factors(members))
        gain_NO = magnitudes(members) / norm_NO
        # Not by save_for_backward: the first layer that asks may be in a checkpointed block, which would drop them.
        ctx.product_NOR, ctx.norm_NO = product_NOR.to(members[0].frozen.weight.dtype), norm_NO
        ctx.members, ctx.states = members, [member.state for member in members]
        return gain_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        members = ctx.members
        unchanged(members, ctx.states)
        gain_NO = magnitudes(members) / ctx.norm_NO
        magnitude_NO, square_NO = gain_gradients(grad_NO, gain_NO, ctx.norm_NO)
        left, right = _row_gradients(members, ctx.product_NOR, *factors(members), square_NO)
        A, B = (right, left) if members[0].by_rows else (left.mT, right.mT)
        return None, *by_layer(A, B, magnitude_NO)


class BothGains(Function):
    """Bora's gains, (N, O) of rows and (N, I) of columns of H = g ⊙ V; differentiable in all four parameters."""

    @staticmethod
    def forward(ctx: Any, members: Sequence[Member], *parameters: Tensor) -> tuple[Tensor, Tensor]:
        scale, dtype = members[0].scale, members[0].frozen.weight.dtype
        B_NOR, A_NRI = factors(members)
        product_NOR, norm_NO = _row_norms(members, B_NOR, A_NRI)
        gain_NO = magnitudes(members) / norm_NO
        weights_NO = gain_NO.square()
        weighted_NOR = weights_NO[..., None] * B_NOR
        back_NRI = back_products(members, weighted_NOR, exact=True)
        sum_NRI = torch.baddbmm(back_NRI, B_NOR.mT @ weighted_NOR, A_NRI, beta=2 * scale, alpha=scale * scale)
        norm_NI = root_of(weighted_squares(members, weights_NO), sum_NRI.mul_(A_NRI).sum(dim=1))
        ctx.product_NOR, ctx.back_NRI = product_NOR.to(dtype), back_NRI.to(dtype)
        ctx.norm_NO, ctx.norm_NI = norm_NO, norm_NI
        ctx.members, ctx.states = members, [member.state for member in members]
        return gain_NO, second_magnitudes(members) / norm_NI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor, grad_NI: Tensor) -> tuple[Tensor | None, ...]:
        """As `norms.both_gradients`, which names the steps."""
        members, scale = ctx.members, ctx.members[0].scale
        unchanged(members, ctx.states)
        B_NOR, A_NRI = factors(members)
        gain_NO = magnitudes(members) / ctx.norm_NO
        second_NI, square_NI = gain_gradients(grad_NI, second_magnitudes(members) / ctx.norm_NI, ctx.norm_NI)
        weighted_NRI = A_NRI * square_NI[:, None]
        crossed_NOR = (B_NOR @ (weighted_NRI @ A_NRI.mT)).mul_(scale)
        P_NOR = products(members, weighted_NRI)
        through_NO = weighted_squares(members, square_NI, rows=True)
        through_NO += torch.add(P_NOR, crossed_NOR, alpha=0.5).mul_(B_NOR).sum(dim=-1).mul_(2 * scale)
        magnitude_NO, square_NO = row_gain_gradients(grad_NO, through_NO, gain_NO, ctx.norm_NO)
        grad_B, grad_A = _row_gradients(members, ctx.product_NOR, B_NOR, A_NRI, square_NO)
        columns_NO1 = gain_NO.square()[..., None]
        back_NRI = ctx.back_NRI.float().mul_(square_NI[:, None])
        grad_A.add_(
            torch.baddbmm(back_NRI, B_NOR.mT @ (columns_NO1 * B_NOR), weighted_NRI, alpha=scale), alpha=2 * scale
        )
        grad_B.addcmul_(P_NOR.add_(crossed_NOR), columns_NO1, value=2 * scale)
        return None, *by_layer(grad_A, grad_B, magnitude_NO, second_NI)


def _row_norms(members: Sequence[Member], left_NOR: Tensor, right_NRI: Tensor) -> tuple[Tensor, Tensor]:
    """W·rightᵀ (N, O, R) and the norms of the rows of V (N, O), as `norms.row_norms`."""
    scale, product_NOR = members[0].scale, products(members, right_NRI)
    gram_NRR = right_NRI @ right_NRI.mT
    sum_NOR = torch.baddbmm(product_NOR, left_NOR, gram_NRR, beta=2 * scale, alpha=scale * scale)
    base_NO = torch.stack([member.squares() for member in members])
    return product_NOR, root_of(base_NO, sum_NOR.mul_(left_NOR).sum(dim=-1))


def _row_gradients(
    members: Sequence[Member], product_NOR: Tensor, left_NOR: Tensor, right_NRI: Tensor, square_NO: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of both factors through the squared norms of the rows, given theirs, as `norms.row_gradients`."""
    scale, weights_NO1 = members[0].scale, square_NO[..., None] * (2 * members[0].scale)
    weighted_NOR = weights_NO1 * left_NOR
    back_NRI = back_products(members, weighted_NOR)
    of_right_NRI = torch.baddbmm(back_NRI, left_NOR.mT @ weighted_NOR, right_NRI, alpha=scale)
    gram_NRR = right_NRI @ right_NRI.mT
    of_left_NOR = torch.baddbmm(product_NOR.float(), left_NOR, gram_NRR, alpha=scale).mul_(weights_NO1)
    return of_left_NOR, of_right_NRI


class ChangesXS(Function):
    """U·M of several layers of one shape, (N, O, R); differentiable in M."""

    @staticmethod
    def forward(ctx: Any, members: Sequence[Member], *M_RR: Tensor) -> Tensor:
        ctx.members = members
        return _left_bases(members) @ torch.stack([each.detach() for each in M_RR])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NOR: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(_left_bases(ctx.members).mT @ grad_NOR).unbind()


class GainsXS(Function):
    """magnitude / ‖V‖ of the rows of several layers of one shape, (N, O); differentiable in M and magnitude."""

    @staticmethod
    def forward(ctx: Any, members: Sequence[Member], *parameters: Tensor) -> Tensor:
        norm_NO = _row_norms_xs(members, *_gained(members))
        ctx.norm_NO, ctx.members, ctx.states = norm_NO, members, [member.state for member in members]
        return magnitudes(members) / norm_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        members = ctx.members
        unchanged(members, ctx.states)
        magnitude_NO, square_NO = gain_gradients(grad_NO, magnitudes(members) / ctx.norm_NO, ctx.norm_NO)
        M_NRR = _row_gradients_xs(members, *_gained(members), square_NO)
        M_NRR = M_NRR if members[0].by_rows else M_NRR.mT
        return None, *by_layer(M_NRR, magnitude_NO)


class BothGainsXS(Function):
    """Gains of bora-xs, (N, O) of rows and (N, I) of columns of H = g ⊙ V; differentiable in all three parameters."""

    @staticmethod
    def forward(ctx: Any, members: Sequence[Member], *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """As `norms_xs.both_norms`, which names the steps."""
        scale, (U_NOR, M_NRR, _) = members[0].scale, _gained(members)
        V_NIR = _right_bases(members)
        norm_NO = _row_norms_xs(members, *_gained(members))
        gain_NO = magnitudes(members) / norm_NO
        weights_NO = gain_NO.square()
        excess_NOR = U_NOR * (weights_NO - 1)[..., None]
        Y_NRI = back_products(members, excess_NOR, exact=True)
        Y_NRI.addcmul_(V_NIR.mT, _singular_values(members)[..., None])
        middle_NRR = M_NRR.mT @ (_grams_of_U(members) + U_NOR.mT @ excess_NOR) @ M_NRR
        sum_NIR = torch.baddbmm(V_NIR @ middle_NRR, Y_NRI.mT, M_NRR, beta=scale * scale, alpha=2 * scale)
        norm_NI = root_of(weighted_squares(members, weights_NO), sum_NIR.mul_(V_NIR).sum(dim=-1))
        ctx.Y_NRI, ctx.norm_NO, ctx.norm_NI = Y_NRI.to(members[0].frozen.weight.dtype), norm_NO, norm_NI
        ctx.members, ctx.states = members, [member.state for member in members]
        return gain_NO, second_magnitudes(members) / norm_NI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor, grad_NI: Tensor) -> tuple[Tensor | None, ...]:
        """As `norms_xs.both_gradients`."""
        members, scale = ctx.members, ctx.members[0].scale
        unchanged(members, ctx.states)
        (U_NOR, M_NRR, gram_of_V_NRR), V_NIR = _gained(members), _right_bases(members)
        gain_NO = magnitudes(members) / ctx.norm_NO
        second_NI, square_NI = gain_gradients(grad_NI, second_magnitudes(members) / ctx.norm_NI, ctx.norm_NI)
        weighted_NIR = V_NIR * square_NI[..., None]
        gram_NRR = weighted_NIR.mT @ V_NIR
        P_NOR = products(members, weighted_NIR.mT)
        sum_NOR = torch.baddbmm(
            U_NOR @ (M_NRR @ gram_NRR @ M_NRR.mT), P_NOR, M_NRR.mT, beta=scale * scale, alpha=2 * scale
        )
        through_NO = weighted_squares(members, square_NI, rows=True).add_(sum_NOR.mul_(U_NOR).sum(dim=-1))
        magnitude_NO, square_NO = row_gain_gradients(grad_NO, through_NO, gain_NO, ctx.norm_NO)
        grad_M = _row_gradients_xs(members, U_NOR, M_NRR, gram_of_V_NRR, square_NO)
        weighted_gram_NRR = (U_NOR * gain_NO.square()[..., None]).mT @ U_NOR
        columns_NRR = torch.baddbmm(ctx.Y_NRI.float() @ weighted_NIR, weighted_gram_NRR @ M_NRR, gram_NRR, alpha=scale)
        return None, *by_layer(grad_M.add_(columns_NRR, alpha=2 * scale), magnitude_NO, second_NI)


def _row_norms_xs(members: Sequence[Member], U_NOR: Tensor, M_NRR: Tensor, gram_of_V_NRR: Tensor) -> Tensor:
    """Norms of the rows of V, (N, O), as `norms_xs.row_norms`."""
    scale, middle_NRR = members[0].scale, M_NRR @ gram_of_V_NRR
    middle_NRR.mul_(scale * scale).diagonal(dim1=1, dim2=2).add_(_singular_values(members), alpha=2 * scale)
    base_NO = torch.stack([member.squares() for member in members])
    return root_of(base_NO, (U_NOR @ (middle_NRR @ M_NRR.mT)).mul_(U_NOR).sum(dim=-1))


def _row_gradients_xs(
    members: Sequence[Member], U_NOR: Tensor, M_NRR: Tensor, gram_of_V_NRR: Tensor, square_NO: Tensor
) -> Tensor:
    """Gradient of M through the squared norms of the rows, given theirs, as `norms_xs.row_gradients`."""
    scale, middle_NRR = members[0].scale, M_NRR @ gram_of_V_NRR
    middle_NRR.mul_(scale).diagonal(dim1=1, dim2=2).add_(_singular_values(members))
    return ((U_NOR * square_NO[..., None]).mT @ U_NOR @ middle_NRR).mul_(2 * scale)


def _gained(members: Sequence[Member]) -> tuple[Tensor, Tensor, Tensor]:
    """U, M and VᵀV of the weight whose rows are gained."""
    M_NRR = torch.stack([member.B.detach() for member in members])
    if members[0].by_rows:
        return _left_bases(members), M_NRR, torch.stack([member.frozen.gram_of_V() for member in members])
    return _right_bases(members), M_NRR.mT, _grams_of_U(members)


def _left_bases(members: Sequence[Member]) -> Tensor:
    return torch.stack([member.frozen.bases[0] for member in members])


def _right_bases(members: Sequence[Member]) -> Tensor:
    return torch.stack([member.frozen.bases[1] for member in members])


def _singular_values(members: Sequence[Member]) -> Tensor:
    return torch.stack([member.frozen.singular_values() for member in members])


def _grams_of_U(members: Sequence[Member]) -> Tensor:
    return torch.stack([member.frozen.gram_of_U() for member in members])
