"""The adapted layer, forward and backward, without a weight-sized tensor.

y = g ⊙ (W(c ⊙ x) + sBA(c ⊙ x)) + bias, where g = magnitude / ‖V‖ by row and c = magnitude / ‖g ⊙ V‖ by column, for the
kinds that have them, and V = W + sBA. Gradients go through the norms. The -xs kinds have B = U·M and A = Vᵀ, both of U
and V frozen.
Shape suffixes: T tokens of all items, I columns (in), O rows (out), R rank.

Inputs that need not be kept: those that can be made again from what autograd keeps for the step before.

An adapter needs its layer's input in the backward pass. When that input is a product a·b or silu(a), the multiplication
before it keeps a and b anyway, so keeping them costs nothing and the input is multiplied again, to the same bits.
The step before may also say itself how: an autograd Function with a `remake` takes its own saved tensors, as the norms
of `models.norms` do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from sa3train.adapters.layers import weight_norms, weight_norms_xs
from sa3train.adapters.layers.frozen_weight import Frozen
from sa3train.adapters.layers.weight_norms import GainGradients, NormGradients, gain_gradients


@dataclass(frozen=True)
class Recipe:
    """How to make a tensor again: `make(sources)`."""

    make: Callable[[Sequence[Tensor]], Tensor]
    sources: tuple[Tensor, ...]


def recipe_of(x: Tensor, norms: bool = True) -> Recipe | None:
    """A recipe for `x` from tensors that its own autograd node keeps, or None when there is none.

    A norm takes several passes to make again, a product one; without `norms` only what takes one has a recipe.

    None too while saved tensors are packed by hooks (activation checkpointing, offloading): unpacking would undo that.
    """
    node: Any = x.grad_fn  # torch declares only what all nodes have
    if node is None or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    if norms and hasattr(node, "remake"):
        return Recipe(node.remake, tuple(source.detach() for source in node.saved_tensors))
    if node.name() == "MulBackward0":
        return _of(_product, node, "_saved_self", "_saved_other")
    if node.name() == "SiluBackward0":
        return _of(_silu, node, "_saved_self")
    return None


def _of(make: Callable[[Sequence[Tensor]], Tensor], node: object, *names: str) -> Recipe | None:
    sources = tuple(getattr(node, name) for name in names)
    if not all(isinstance(source, Tensor) for source in sources):
        return None
    return Recipe(make, tuple(source.detach() for source in sources))


def _product(sources: Sequence[Tensor]) -> Tensor:
    return sources[0] * sources[1]


def _silu(sources: Sequence[Tensor]) -> Tensor:
    return F.silu(sources[0])


SMALL_GAIN = 1e-2
"""Outputs whose gain is smaller (it is 1 at the start) are kept as they were before it, not recovered by a division."""


@dataclass(frozen=True, eq=False)
class Fixed:
    """What does not train: weight and bias, and the scale s."""

    frozen: Frozen
    bias_O: Tensor | None
    scale: float


class AdaptedProduct(Function):
    """See the top of the file. Differentiable in x, its dropped-out twin, A (None for -xs), B (M there), magnitudes."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        dropped_TI: Tensor | None,
        A_RI: Tensor | None,
        B: Tensor,
        magnitude_O: Tensor | None,
        magnitude_I: Tensor | None,
        recipe: Recipe | None,
        fixed: Fixed,
    ) -> Tensor:
        frozen, scale, dtype = fixed.frozen, fixed.scale, x_TI.dtype
        kind: Any = weight_norms_xs if A_RI is None else weight_norms
        norm_O = gain_O = product_OR = norm_I = gain_I = product_RI = None
        if magnitude_O is not None and magnitude_I is not None:
            both = kind.both_norms(frozen, A_RI, B, magnitude_O, scale)
            norm_O, norm_I, product_OR, product_RI = both.norm_O, both.norm_I, both.product_OR, both.product_RI
        elif magnitude_O is not None:
            norm_O, product_OR = kind.row_norms(frozen, A_RI, B, scale)
        elif magnitude_I is not None:
            norm_I, product_RI = kind.column_norms(frozen, A_RI, B, scale)
        if magnitude_O is not None and norm_O is not None:
            gain_O = magnitude_O / norm_O
        if magnitude_I is not None and norm_I is not None:
            gain_I = magnitude_I / norm_I
        scaled_TI = gained(x_TI, gain_I)
        low_TI = scaled_TI if dropped_TI is None else gained(dropped_TI, gain_I)
        bias_O = fixed.bias_O
        if bias_O is not None and gain_O is None:
            y_TO = torch.addmm(bias_O, scaled_TI, frozen.W_OI.T)
        else:
            y_TO = scaled_TI @ frozen.W_OI.T
        if A_RI is None:
            U_OR, V_IR = frozen.bases
            u_TR = low_TI @ V_IR.to(dtype)
            y_TO.addmm_(u_TR @ B.to(dtype).T, U_OR.to(dtype).T, alpha=scale)
        else:
            u_TR = low_TI @ A_RI.to(dtype).T
            y_TO.addmm_(u_TR, B.to(dtype).T, alpha=scale)
        _, _, wants_A, _, wants_rows, wants_cols, *_ = ctx.needs_input_grad
        keep_x = (wants_A and dropped_TI is None) or wants_cols
        small_O = small_TN = None
        if gain_O is not None:
            if wants_rows and not y_TO.is_cuda and bool((small_O := gain_O.abs() < SMALL_GAIN).any()):
                small_TN = y_TO[:, small_O]
            y_TO.addcmul_(y_TO, (gain_O - 1).to(dtype))
            if bias_O is not None:
                y_TO += bias_O
        ctx.save_for_backward(
            x_TI if keep_x and recipe is None else None, dropped_TI, A_RI, B, u_TR, y_TO if wants_rows else None,
            norm_O, gain_O, norm_I, gain_I, small_TN, small_O if small_TN is not None else None,
            None if product_OR is None else product_OR.to(dtype),  # only gradients read the products again
            None if product_RI is None else product_RI.to(dtype),
            *(recipe.sources if keep_x and recipe is not None else ()),
        )  # fmt: skip
        ctx.fixed, ctx.recipe, ctx.shape = fixed, recipe, x_TI.shape
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        return _Backward(ctx, dy_TO).gradients()


class _Backward:
    """One backward pass, in steps that read the saved tensors."""

    def __init__(self, ctx: Any, dy_TO: Tensor) -> None:
        (
            x_TI, self.dropped_TI, self.A_RI, self.B, self.u_TR, self.y_TO,
            self.norm_O, self.gain_O, self.norm_I, self.gain_I, self.small_TN, self.small_O,
            self.product_OR, self.product_RI, *sources,
        ) = ctx.saved_tensors  # fmt: skip
        self.x_TI = ctx.recipe.make(sources).reshape(ctx.shape) if sources else x_TI
        self.fixed: Fixed = ctx.fixed
        self.frozen, self.scale, self.W_OI = self.fixed.frozen, self.fixed.scale, self.fixed.frozen.W_OI
        self.wants_x, self.wants_dropped, self.wants_A, _, self.wants_rows, self.wants_cols, *_ = ctx.needs_input_grad
        self.dy_TO, self.dtype = dy_TO, dy_TO.dtype
        self.norms: Any = weight_norms_xs if self.A_RI is None else weight_norms
        self.gained_dy: Tensor | None = None  # room for dz, with R more rows; fresh memory for each use costs time
        if self.gain_O is not None:
            self.gained_dy = dy_TO.new_empty(dy_TO.shape[0] + self.B.shape[1], dy_TO.shape[1])

    def gradients(self) -> tuple[Tensor | None, ...]:
        grad_O = self._gradient_of_gain_O() if self.wants_rows else None
        dmagnitude_O = dsquare_O = dmagnitude_I = dsquare_I = None
        if grad_O is not None and not self.wants_cols:
            dmagnitude_O, dsquare_O = gain_gradients(grad_O, self.gain_O, self.norm_O)
        dz_TO, product_RI = self._gained_gradient(dsquare_O if self.wants_A else None)
        du_TR, dB = self._low_rank_gradients(dz_TO)
        dA = (du_TR.T @ self._low_rank_input()).float() if self.wants_A else None
        dx, dropped, grad_I = self._input_gradients(du_TR)
        if grad_I is not None:
            dmagnitude_I, dsquare_I = gain_gradients(grad_I, self.gain_I, self.norm_I)
        through = self._through_norms(grad_O, dsquare_O, dsquare_I, product_RI)
        if through is not None:
            dB += through.B
            if dA is not None and through.A_RI is not None:
                dA += through.A_RI
            if through.magnitude_O is not None:
                dmagnitude_O = through.magnitude_O
        return dx, dropped, dA, dB, dmagnitude_O, dmagnitude_I, None, None

    def _through_norms(
        self, grad_O: Tensor | None, dsquare_O: Tensor | None, dsquare_I: Tensor | None, product_RI: Tensor | None
    ) -> NormGradients | None:
        """What the norms add, given the gradients of the row gains and of the squared norms."""
        kind, of = self.norms, (self.A_RI, self.B)
        if grad_O is not None and dsquare_I is not None:
            given = GainGradients(self.norm_O, self.gain_O, grad_O, dsquare_I)
            return kind.both_gradients(self.frozen, self.product_OR, self.product_RI, *of, given, self.scale)
        if dsquare_O is not None:
            return kind.row_gradients(self.frozen, self.product_OR, *of, dsquare_O, self.scale, product_RI)
        if dsquare_I is not None:
            return kind.column_gradients(self.frozen, self.product_RI, *of, dsquare_I, self.scale)
        return None

    def _gained_gradient(self, dsquare_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """dz = g ⊙ dy; its product with W is left in `self.dx`.

        When the gradient of the row norms is known already, (2s·q ⊙ B)ᵀ is multiplied with W in the same go.
        """
        tokens, product_RI = self.dy_TO.shape[0], None
        wants_back = self.wants_x or self.wants_cols
        dz_TO = operand = self.dy_TO
        if self.gained_dy is not None:
            dz_TO = operand = self.gained_dy[:tokens]
            torch.addcmul(self.dy_TO, self.dy_TO, (self.gain_O - 1).to(self.dtype), out=dz_TO)
            if dsquare_O is not None and wants_back:
                operand = self.gained_dy
                torch.mul(self.B.T, 2 * self.scale * dsquare_O, out=operand[tokens:])
        self.dx = operand @ self.W_OI if wants_back else None
        if self.dx is not None and self.dx.shape[0] > tokens:
            product_RI, self.dx = self.dx[tokens:].float(), self.dx[:tokens]
        return dz_TO, product_RI

    def _low_rank_gradients(self, dz_TO: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of u, and of B or M, through the low-rank product."""
        scaled_u = self.u_TR * self.scale
        if self.A_RI is not None:
            return (self.B.to(self.dtype).T @ dz_TO.T).mul_(self.scale).T, (dz_TO.T @ scaled_u).float()
        v_RT = self.frozen.bases[0].to(self.dtype).T @ dz_TO.T
        return (v_RT.T @ self.B.to(self.dtype)).mul_(self.scale), v_RT.float() @ scaled_u.float()

    def _low_rank_input(self) -> Tensor:
        return gained(self.x_TI if self.dropped_TI is None else self.dropped_TI, self.gain_I)

    def _input_gradients(self, du_TR: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, of its dropped-out twin, and of c."""
        dx, dropped, grad_I = self.dx, None, None
        if dx is None:
            return None, None, None
        A_RI = (self.frozen.bases[1].T if self.A_RI is None else self.A_RI).to(self.dtype)
        if self.dropped_TI is None:
            dx.addmm_(du_TR, A_RI)
        else:
            dropped = du_TR @ A_RI
        if self.wants_cols:
            grad_I = (dx * self.x_TI).sum(dim=0).float()
            if dropped is not None:
                grad_I += (dropped * self.dropped_TI).sum(dim=0).float()
        if self.gain_I is not None:
            gain = (self.gain_I - 1).to(self.dtype)
            dx.addcmul_(dx, gain)
            if dropped is not None:
                dropped.addcmul_(dropped, gain)
        return dx if self.wants_x else None, dropped if self.wants_dropped else None, grad_I

    def _gradient_of_gain_O(self) -> Tensor:
        """Σ_t dy · z with z = V(c ⊙ x) = (y − bias) / g."""
        assert self.gained_dy is not None
        product_TO = torch.mul(self.dy_TO, self.y_TO, out=self.gained_dy[: self.dy_TO.shape[0]])
        grad_O = product_TO.sum(dim=0).float()
        if self.fixed.bias_O is not None:
            grad_O -= self.fixed.bias_O.float() * self.dy_TO.sum(dim=0).float()
        grad_O /= torch.where(self.gain_O == 0, 1.0, self.gain_O)
        if self.small_TN is not None:
            grad_O[self.small_O] = (self.dy_TO[:, self.small_O] * self.small_TN).sum(dim=0).float()
        return grad_O


def gained(x: Tensor, gain: Tensor | None) -> Tensor:
    """x · gain, as x + x · (gain − 1): a gain near 1 keeps its precision in 16 bits, and at 1 nothing changes."""
    return x if gain is None else torch.addcmul(x, x, (gain - 1).to(x.dtype))
