"""Stacked layers of the -xs kinds: the changes U·M, gains and their gradients: the formulas of `norms_xs`, N layers in
front.

Where columns are gained, U and V change places and M is transposed. Shape suffixes: N layers, O rows (out), I columns
(in), R rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from sa3train.adapters.norms import gain_gradients, root_of, row_gain_gradients
from sa3train.adapters.stacked import (
    Member,
    back_products,
    by_layer,
    magnitudes,
    products,
    second_magnitudes,
    unchanged,
    weighted_squares,
)


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
        norm_NO = _row_norms(members, *_gained(members))
        ctx.norm_NO, ctx.members, ctx.states = norm_NO, members, [member.state for member in members]
        return magnitudes(members) / norm_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        members = ctx.members
        unchanged(members, ctx.states)
        magnitude_NO, square_NO = gain_gradients(grad_NO, magnitudes(members) / ctx.norm_NO, ctx.norm_NO)
        M_NRR = _row_gradients(members, *_gained(members), square_NO)
        M_NRR = M_NRR if members[0].by_rows else M_NRR.mT
        return None, *by_layer(M_NRR, magnitude_NO)


class BothGainsXS(Function):
    """Gains of bora-xs, (N, O) of rows and (N, I) of columns of H = g ⊙ V; differentiable in all three parameters."""

    @staticmethod
    def forward(ctx: Any, members: Sequence[Member], *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """As `norms_xs.both_norms`, which names the steps."""
        scale, (U_NOR, M_NRR, _) = members[0].scale, _gained(members)
        V_NIR = _right_bases(members)
        norm_NO = _row_norms(members, *_gained(members))
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
        grad_M = _row_gradients(members, U_NOR, M_NRR, gram_of_V_NRR, square_NO)
        weighted_gram_NRR = (U_NOR * gain_NO.square()[..., None]).mT @ U_NOR
        columns_NRR = torch.baddbmm(ctx.Y_NRI.float() @ weighted_NIR, weighted_gram_NRR @ M_NRR, gram_NRR, alpha=scale)
        return None, *by_layer(grad_M.add_(columns_NRR, alpha=2 * scale), magnitude_NO, second_NI)


def _row_norms(members: Sequence[Member], U_NOR: Tensor, M_NRR: Tensor, gram_of_V_NRR: Tensor) -> Tensor:
    """Norms of the rows of V, (N, O), as `norms_xs.row_norms`."""
    scale, middle_NRR = members[0].scale, M_NRR @ gram_of_V_NRR
    middle_NRR.mul_(scale * scale).diagonal(dim1=1, dim2=2).add_(_singular_values(members), alpha=2 * scale)
    base_NO = torch.stack([member.squares() for member in members])
    return root_of(base_NO, (U_NOR @ (middle_NRR @ M_NRR.mT)).mul_(U_NOR).sum(dim=-1))


def _row_gradients(
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
