"""The adapted layer where launches are what takes time: as `adapted_product`, with norms and factors made beforehand.

y = g ⊙ (W(c ⊙ x) + sBA(c ⊙ x)) + bias; `together` has made A, s·B and the gains, and takes their gradients back.
Shape suffixes: T tokens of all items, I columns (in), O rows (out), R rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from sa3train.adapters.products import wide_product
from sa3train.adapters.remake import Recipe
from sa3train.adapters.together import Gain, Ready


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
