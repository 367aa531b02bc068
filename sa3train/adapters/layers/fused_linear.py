"""The adapted layer, forward and backward, without a weight-sized temporary tensor.

y = g ⊙ (W(c ⊙ x) + sBA(c ⊙ x)) + bias, where g = magnitude / ‖V‖ by row and c = magnitude / ‖g ⊙ V‖ by column, for the
types that have them, and V = W + sBA. Gradients go through the norms. -xs types have B = U·M and A = Vᵀ, with U and V
frozen. docs/model.md, section 7.

The backward pass needs the layer's input. It is not saved where it can be recomputed from what autograd saves for the
operation before it anyway: when the input is a product a·b or silu(a), that operation saves a and b, and the input is
computed again to the same bits. An autograd Function with a `recompute` method recomputes its own output from its saved
tensors, as the norms of `models.norms` do.
Shape suffixes: T tokens of all items, I columns (in), O rows (out), R rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from sa3train.adapters.layers import weight_norms, weight_norms_xs
from sa3train.adapters.layers.autograd_internals import packs_saved_tensors
from sa3train.adapters.layers.frozen_weight import FrozenWeight
from sa3train.adapters.layers.weight_norms import GainGradients, NormGradients, compute_gain_gradients


@dataclass(frozen=True)
class Recomputation:
    """How to recompute a tensor.

    Attributes:
        run: Function of `sources` that returns the tensor.
        sources: Tensors that autograd saves anyway.
    """

    run: Callable[[Sequence[Tensor]], Tensor]
    sources: tuple[Tensor, ...]


RECOMPUTABLE: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "MulBackward0": (torch.mul, ("_saved_self", "_saved_other")),
    "SiluBackward0": (F.silu, ("_saved_self",)),
}
"""Operations by the names of their autograd nodes, with what these save of their inputs."""


def find_recomputation(x: Tensor, norms: bool = True) -> Recomputation | None:
    """Find how to recompute a tensor from what its own autograd node saves.

    Args:
        x: The tensor.
        norms: Whether to recompute outputs of norms too, which takes several passes over memory instead of one.

    Returns:
        The recomputation. None if there is none, and while hooks pack saved tensors (activation checkpointing,
        offloading), since unpacking would defeat them.
    """
    node: Any = x.grad_fn  # torch declares only what all nodes have
    if node is None or packs_saved_tensors():
        return None
    if norms and hasattr(node, "recompute"):
        return Recomputation(node.recompute, tuple(source.detach() for source in node.saved_tensors))
    if node.name() not in RECOMPUTABLE:
        return None
    function, names = RECOMPUTABLE[node.name()]
    sources = [getattr(node, name) for name in names]
    if not all(isinstance(source, Tensor) for source in sources):
        return None
    return Recomputation(lambda tensors: function(*tensors), tuple(source.detach() for source in sources))


SMALL_GAIN = 1e-2
"""Outputs with a smaller gain (it starts at 1) are saved from before the gain, not recovered by a division."""


@dataclass(frozen=True, eq=False)
class FrozenInputs:
    """What does not train.

    Attributes:
        frozen: The frozen weight.
        bias_O: The bias.
        scale: The scale s.
    """

    frozen: FrozenWeight
    bias_O: Tensor | None
    scale: float


class AdaptedProduct(Function):
    """The adapted layer; differentiable in x, x after dropout, A (None for -xs types), B (M there) and magnitudes."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        dropped_TI: Tensor | None,
        A_RI: Tensor | None,
        B: Tensor,
        magnitude_O: Tensor | None,
        magnitude_I: Tensor | None,
        recompute: Recomputation | None,
        fixed: FrozenInputs,
    ) -> Tensor:
        frozen, scale, dtype = fixed.frozen, fixed.scale, x_TI.dtype
        norms: Any = weight_norms_xs if A_RI is None else weight_norms
        norm_O = gain_O = product_OR = norm_I = gain_I = product_RI = None
        if magnitude_O is not None and magnitude_I is not None:
            both = norms.compute_both_norms(frozen, A_RI, B, magnitude_O, scale)
            norm_O, norm_I, product_OR, product_RI = both.norm_O, both.norm_I, both.product_OR, both.product_RI
        elif magnitude_I is not None:
            norm_I, product_RI = norms.compute_column_norms(frozen, A_RI, B, scale)
        if magnitude_I is not None and norm_I is not None:
            gain_I = magnitude_I / norm_I
        scaled_TI = apply_gain(x_TI, gain_I)
        low_TI = scaled_TI if dropped_TI is None else apply_gain(dropped_TI, gain_I)
        bias_O, y_TO = fixed.bias_O, None
        if magnitude_O is not None and norm_O is None:
            if A_RI is not None and dtype != torch.float32 and x_TI.device.type == "cpu":
                # The low-rank product below rounds A alike, and the output is rounded by more.
                y_TO, product_OR = multiply_with_factor(scaled_TI, A_RI, frozen.W_OI)
            norm_O, product_OR = norms.compute_row_norms(frozen, A_RI, B, scale, product_OR)
        if magnitude_O is not None and norm_O is not None:
            gain_O = magnitude_O / norm_O
        if bias_O is not None and gain_O is None:
            y_TO = torch.addmm(bias_O, scaled_TI, frozen.W_OI.T)
        elif y_TO is None:
            y_TO = scaled_TI @ frozen.W_OI.T
        if A_RI is None:
            U_OR, V_IR = frozen.bases
            u_TR = low_TI @ V_IR.to(dtype)
            y_TO.addmm_(u_TR @ B.to(dtype).T, U_OR.to(dtype).T, alpha=scale)
        else:
            u_TR = low_TI @ A_RI.to(dtype).T
            y_TO.addmm_(u_TR, B.to(dtype).T, alpha=scale)
        _, _, needs_A, _, needs_rows, needs_cols, *_ = ctx.needs_input_grad
        keep_x = (needs_A and dropped_TI is None) or needs_cols
        small_O = small_TN = None
        if gain_O is not None:
            if needs_rows and not y_TO.is_cuda and bool((small_O := gain_O.abs() < SMALL_GAIN).any()):
                small_TN = y_TO[:, small_O]
            y_TO.addcmul_(y_TO, (gain_O - 1).to(dtype))
            if bias_O is not None:
                y_TO += bias_O
        ctx.save_for_backward(
            x_TI if keep_x and recompute is None else None, dropped_TI, A_RI, B, u_TR, y_TO if needs_rows else None,
            norm_O, gain_O, norm_I, gain_I, small_TN, small_O if small_TN is not None else None,
            None if product_OR is None else product_OR.to(dtype),  # only gradients read the products again
            None if product_RI is None else product_RI.to(dtype),
            *(recompute.sources if keep_x and recompute is not None else ()),
        )  # fmt: skip
        ctx.fixed, ctx.recompute, ctx.shape = fixed, recompute, x_TI.shape
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        return _Backward(ctx, dy_TO).compute_gradients()


class _Backward:
    """One backward pass, in steps that read the saved tensors."""

    def __init__(self, ctx: Any, dy_TO: Tensor) -> None:
        (
            x_TI, self.dropped_TI, self.A_RI, self.B, self.u_TR, self.y_TO,
            self.norm_O, self.gain_O, self.norm_I, self.gain_I, self.small_TN, self.small_O,
            self.product_OR, self.product_RI, *sources,
        ) = ctx.saved_tensors  # fmt: skip
        self.x_TI = ctx.recompute.run(sources).reshape(ctx.shape) if sources else x_TI
        self.fixed: FrozenInputs = ctx.fixed
        self.frozen, self.scale, self.W_OI = self.fixed.frozen, self.fixed.scale, self.fixed.frozen.W_OI
        self.needs_x, self.needs_dropped, self.needs_A, _, self.needs_rows, self.needs_cols, *_ = ctx.needs_input_grad
        self.dy_TO, self.dtype = dy_TO, dy_TO.dtype
        self.norms: Any = weight_norms_xs if self.A_RI is None else weight_norms
        self.gained_dy: Tensor | None = None  # room for dz, with R more rows; fresh memory for each use costs time
        if self.gain_O is not None:
            self.gained_dy = dy_TO.new_empty(dy_TO.shape[0] + self.B.shape[1], dy_TO.shape[1])

    def compute_gradients(self) -> tuple[Tensor | None, ...]:
        grad_O = self._compute_gain_gradient() if self.needs_rows else None
        dmagnitude_O = dsquare_O = dmagnitude_I = dsquare_I = None
        if grad_O is not None and not self.needs_cols:
            dmagnitude_O, dsquare_O = compute_gain_gradients(grad_O, self.gain_O, self.norm_O)
        dz_TO, product_RI = self._compute_gained_gradient(dsquare_O if self.needs_A else None)
        du_TR, dB = self._compute_low_rank_gradients(dz_TO)
        dA = (du_TR.T @ self._compute_low_rank_input()).float() if self.needs_A else None
        dx, dropped, grad_I = self._compute_input_gradients(du_TR)
        if grad_I is not None:
            dmagnitude_I, dsquare_I = compute_gain_gradients(grad_I, self.gain_I, self.norm_I)
        through = self._compute_norm_gradients(grad_O, dsquare_O, dsquare_I, product_RI)
        if through is not None:
            dB += through.B
            if dA is not None and through.A_RI is not None:
                dA += through.A_RI
            if through.magnitude_O is not None:
                dmagnitude_O = through.magnitude_O
        return dx, dropped, dA, dB, dmagnitude_O, dmagnitude_I, None, None

    def _compute_norm_gradients(
        self, grad_O: Tensor | None, dsquare_O: Tensor | None, dsquare_I: Tensor | None, product_RI: Tensor | None
    ) -> NormGradients | None:
        """Gradients that the norms add, given those of the row gains and of the squared norms."""
        norms, factors = self.norms, (self.A_RI, self.B)
        if grad_O is not None and dsquare_I is not None:
            given = GainGradients(self.norm_O, self.gain_O, grad_O, dsquare_I)
            return norms.compute_both_gradients(
                self.frozen, self.product_OR, self.product_RI, *factors, given, self.scale
            )
        if dsquare_O is not None:
            return norms.compute_row_gradients(
                self.frozen, self.product_OR, *factors, dsquare_O, self.scale, product_RI
            )
        if dsquare_I is not None:
            return norms.compute_column_gradients(self.frozen, self.product_RI, *factors, dsquare_I, self.scale)
        return None

    def _compute_gained_gradient(self, dsquare_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """dz = g ⊙ dy; stores its product with W in `self.dx`.

        When the gradient of the row norms is known already, (2s·q ⊙ B)ᵀ is multiplied with W at the same time.
        """
        tokens, product_RI = self.dy_TO.shape[0], None
        needs_back = self.needs_x or self.needs_cols
        dz_TO = operand = self.dy_TO
        if self.gained_dy is not None:
            dz_TO = operand = self.gained_dy[:tokens]
            torch.addcmul(self.dy_TO, self.dy_TO, (self.gain_O - 1).to(self.dtype), out=dz_TO)
            if dsquare_O is not None and needs_back:
                operand = self.gained_dy
                torch.mul(self.B.T, 2 * self.scale * dsquare_O, out=operand[tokens:])
        self.dx = operand @ self.W_OI if needs_back else None
        if self.dx is not None and self.dx.shape[0] > tokens:
            product_RI, self.dx = self.dx[tokens:].float(), self.dx[:tokens]
        return dz_TO, product_RI

    def _compute_low_rank_gradients(self, dz_TO: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of u, and of B or M, through the low-rank product."""
        scaled_u = self.u_TR * self.scale
        if self.A_RI is not None:
            return (self.B.to(self.dtype).T @ dz_TO.T).mul_(self.scale).T, (dz_TO.T @ scaled_u).float()
        v_RT = self.frozen.bases[0].to(self.dtype).T @ dz_TO.T
        return (v_RT.T @ self.B.to(self.dtype)).mul_(self.scale), v_RT.float() @ scaled_u.float()

    def _compute_low_rank_input(self) -> Tensor:
        return apply_gain(self.x_TI if self.dropped_TI is None else self.dropped_TI, self.gain_I)

    def _compute_input_gradients(self, du_TR: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, of x after dropout, and of c."""
        dx, dropped, grad_I = self.dx, None, None
        if dx is None:
            return None, None, None
        A_RI = (self.frozen.bases[1].T if self.A_RI is None else self.A_RI).to(self.dtype)
        if self.dropped_TI is None:
            dx.addmm_(du_TR, A_RI)
        else:
            dropped = du_TR @ A_RI
        if self.needs_cols:
            grad_I = (dx * self.x_TI).sum(dim=0).float()
            if dropped is not None:
                grad_I += (dropped * self.dropped_TI).sum(dim=0).float()
        if self.gain_I is not None:
            gain = (self.gain_I - 1).to(self.dtype)
            dx.addcmul_(dx, gain)
            if dropped is not None:
                dropped.addcmul_(dropped, gain)
        return dx if self.needs_x else None, dropped if self.needs_dropped else None, grad_I

    def _compute_gain_gradient(self) -> Tensor:
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


def multiply_with_factor(x_TI: Tensor, A_RI: Tensor, W_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply the input and A with W as one product, which reads W once.

    Args:
        x_TI: The input.
        A_RI: A.
        W_OI: The frozen weight.

    Returns:
        xWᵀ, and WAᵀ in fp32, exact to the rounding of A and of the product to the input's dtype.
    """
    both = torch.cat((x_TI, A_RI.to(x_TI.dtype))) @ W_OI.T
    # No view: autograd would refuse to change the layer's output in place.
    y_TO = both.new_empty(0).set_(both.untyped_storage(), 0, (len(x_TI), both.shape[1]), (both.shape[1], 1))
    return y_TO, both[len(x_TI) :].T.float()


def apply_gain(x: Tensor, gain: Tensor | None) -> Tensor:
    """Apply a gain as x + x · (gain − 1), so that a gain near 1 keeps its precision in 16 bits.

    Args:
        x: The input.
        gain: The gain of its last dimension; None leaves x as it is.

    Returns:
        x · gain; exactly x where the gain is 1.
    """
    return x if gain is None else torch.addcmul(x, x, (gain - 1).to(x.dtype))
