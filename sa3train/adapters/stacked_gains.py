"""Gains of stacked layers, and their gradients: the formulas of `norms`, with N layers in front.

Shape suffixes: N layers, O rows (out), I columns (in), R rank.
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
    factors,
    magnitudes,
    products,
    second_magnitudes,
    unchanged,
    weighted_squares,
)


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
