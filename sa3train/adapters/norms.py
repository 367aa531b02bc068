"""Norms of the rows and columns of V = W + sBA without making V, and their gradients.

‖V‖² of a row is ‖W‖² + 2s·rowsum(B ⊙ WAᵀ) + s²·rowsum(B(AAᵀ) ⊙ B). Columns likewise, with each row weighted by g² for
bora, whose column norms are those of H = g ⊙ V. All in fp32; plain functions, for `adapted_product` to put together.
Shape suffixes: O rows (out), I columns (in), R rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sa3train.adapters.products import (
    column_squares,
    rounded_times,
    rounded_transposed_times,
    row_squares,
    times,
    transposed_times,
)
from sa3train.adapters.weights import EPSILON, flatten_weight


@dataclass(eq=False)
class Frozen:
    """A frozen weight, and what depends on it alone: computed on first use, and again when the weight has changed.

    `U_OR` and `V_IR` are the frozen bases of the -xs kinds, W's own singular vectors, or None.
    """

    weight: Tensor
    U_OR: Tensor | None = None
    V_IR: Tensor | None = None
    _state: tuple[object, ...] = ()
    _known: dict[str, Tensor] = field(default_factory=dict)

    @property
    def W_OI(self) -> Tensor:
        """The weight, flattened."""
        return flatten_weight(self.weight.detach())

    @property
    def bases(self) -> tuple[Tensor, Tensor]:
        """U and V; only the -xs kinds have them."""
        if self.U_OR is None or self.V_IR is None:
            raise RuntimeError("this layer has no frozen bases")
        return self.U_OR, self.V_IR

    def row_squares(self) -> Tensor:
        """‖W‖² of each row, (O,)."""
        return self._kept("rows", lambda: row_squares(self.W_OI))

    def column_squares(self) -> Tensor:
        """‖W‖² of each column, (I,)."""
        return self._kept("columns", lambda: column_squares(self.W_OI))

    def singular_values(self) -> Tensor:
        """(R,), with which WV = U·σ and WᵀU = V·σ: the products with W that the -xs kinds are spared."""
        U_OR, V_IR = self.bases
        return self._kept("sigma", lambda: (times(self.W_OI, V_IR) * U_OR).sum(dim=0))

    def gram(self, A_RI: Tensor) -> Tensor:
        """AAᵀ, (R, R); of the frozen A = Vᵀ it is kept."""
        return A_RI @ A_RI.T if self.V_IR is None else self._kept("gram", lambda: A_RI @ A_RI.T)

    @property
    def nbytes(self) -> int:
        """Memory of what is kept."""
        return sum(tensor.nbytes for tensor in self._known.values())

    def _kept(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        weight = self.weight
        state = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if state != self._state:
            self._state, self._known = state, {}
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]


def row_norms(frozen: Frozen, A_RI: Tensor, B_OR: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Norm of each row of V plus 1e-12, (O,), and the product WAᵀ (O, R) that its gradient needs."""
    if frozen.U_OR is None:
        product_OR = times(frozen.W_OI, A_RI.T)
    else:
        product_OR = frozen.U_OR * frozen.singular_values()
    return _norm(frozen.row_squares(), product_OR, B_OR, frozen.gram(A_RI), scale), product_OR


def column_norms(
    frozen: Frozen, A_RI: Tensor, B_OR: Tensor, gain_O: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Norm of each column of g ⊙ V plus 1e-12, (I,); and the product Wᵀ(g² ⊙ B) (I, R) that its gradient needs."""
    W_OI = frozen.W_OI
    if gain_O is None:
        base_I, weighted_OR = frozen.column_squares(), B_OR
    else:
        weights_O = gain_O.square()
        base_I, weighted_OR = column_squares(W_OI, weights_O), weights_O[:, None] * B_OR
    if frozen.U_OR is None:
        product_IR = transposed_times(W_OI, weighted_OR)
    else:  # WᵀB = V·σ·UᵀB, for B = U·M; what the gains add to it is small, and so is its rounding
        U_OR, V_IR = frozen.bases
        product_IR = (V_IR * frozen.singular_values()) @ (U_OR.T @ B_OR)
        if gain_O is not None:
            product_IR += rounded_transposed_times(W_OI, weighted_OR - B_OR)
    return _norm(base_I, product_IR, A_RI.T, B_OR.T @ weighted_OR, scale), product_IR


def row_gradient_of_B(product_OR: Tensor, gram_RR: Tensor, B_OR: Tensor, grad_O: Tensor, scale: float) -> Tensor:
    """(O, R): what the gradient `grad_O` of the squared row norms adds to that of B; `gram_RR` is AAᵀ."""
    sum_OR = torch.addmm(product_OR.float(), B_OR, gram_RR, alpha=scale)
    return sum_OR.mul_((2 * scale * grad_O)[:, None])


def row_gradient_of_A(product_RI: Tensor, A_RI: Tensor, B_OR: Tensor, weighted_OR: Tensor, scale: float) -> Tensor:
    """(R, I): the same for A, from (q ⊙ B)ᵀW with q the gradient times 2s."""
    return torch.addmm(product_RI, B_OR.T @ weighted_OR, A_RI, alpha=scale)


@dataclass(frozen=True)
class ColumnGradients:
    """What the gradient of the squared column norms adds to those of A, B and the row weights g²."""

    A_RI: Tensor | None
    B_OR: Tensor
    weights_O: Tensor | None


def column_gradients(
    frozen: Frozen,
    product_IR: Tensor | None,
    A_RI: Tensor,
    B_OR: Tensor,
    gain_O: Tensor | None,
    grad_I: Tensor,
    scale: float,
) -> ColumnGradients:
    """Gradients of the squared column norms, given `grad_I`. `product_IR` is None where A is frozen; then the gradient
    of B is right within U's span, which is all that reaches M."""
    weighted_RI = A_RI * grad_I
    if frozen.U_OR is None or gain_O is not None:
        product_OR = rounded_times(frozen.W_OI, weighted_RI.T)
    else:
        U_OR, V_IR = frozen.bases
        product_OR = U_OR @ ((V_IR * frozen.singular_values()).T @ weighted_RI.T)
    grad_B = torch.addmm(product_OR, B_OR, weighted_RI @ A_RI.T, alpha=scale)
    weights_O = grad_w = None
    if gain_O is not None:
        weights_O = gain_O.square()
        grad_w = row_squares(frozen.W_OI, grad_I).add_(((product_OR + grad_B) * B_OR).sum(dim=1), alpha=scale)
    weighted_OR = B_OR if weights_O is None else weights_O[:, None] * B_OR
    grad_A = None
    if product_IR is not None:
        sum_RI = torch.addmm(product_IR.float().T * grad_I, B_OR.T @ weighted_OR, weighted_RI, alpha=scale)
        grad_A = sum_RI.mul_(2 * scale)
    grad_B *= 2 * scale if weights_O is None else (2 * scale * weights_O)[:, None]
    return ColumnGradients(grad_A, grad_B, grad_w)


def gain_gradients(grad: Tensor, gain: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of gain = magnitude / norm: that of the magnitude, and that of the squared norm."""
    grad_magnitude = grad / norm
    return grad_magnitude, (grad_magnitude * gain).div_(norm).mul_(-0.5)


def _norm(base_O: Tensor, product_OR: Tensor, B_OR: Tensor, gram_RR: Tensor, scale: float) -> Tensor:
    sum_OR = torch.addmm(product_OR, B_OR, gram_RR, beta=2 * scale, alpha=scale * scale)
    return sum_OR.mul_(B_OR).sum(dim=1).add_(base_O).clamp_min_(0).sqrt_().add_(EPSILON)
