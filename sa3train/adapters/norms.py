"""Norms of the rows and columns of V = W + sBA without making V, and their gradients, for trained A and B.

‖V‖² of a row is ‖W‖² + 2s·rowsum(B ⊙ WAᵀ) + s²·rowsum(B(AAᵀ) ⊙ B). Columns likewise, with each row weighted by g² for
bora, whose column norms are those of H = g ⊙ V. All in fp32; plain functions, for `adapted_product` to put together.
`norms_xs` has the same functions for the -xs kinds. Shape suffixes: O rows (out), I columns (in), R rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sa3train.adapters.frozen import Frozen
from sa3train.adapters.products import (
    column_squares,
    rounded_times,
    rounded_transposed_times,
    row_squares,
    times,
    transposed_times,
)
from sa3train.adapters.weights import EPSILON


@dataclass(frozen=True)
class NormGradients:
    """What the gradient of squared norms adds to those of A, of B (M for -xs) and, for columns, of the weights g²."""

    A_RI: Tensor | None
    B: Tensor
    weights_O: Tensor | None = None


def row_norms(frozen: Frozen, A_RI: Tensor, B_OR: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Norm of each row of V plus 1e-12, (O,), and the product WAᵀ (O, R) that its gradient needs."""
    product_OR = times(frozen.W_OI, A_RI.T)
    return norm_of(frozen.row_squares(), product_OR, B_OR, A_RI @ A_RI.T, scale), product_OR


def row_gradients(
    frozen: Frozen,
    product_OR: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    grad_O: Tensor,
    scale: float,
    weighted_product_RI: Tensor | None,
) -> NormGradients:
    """Gradients of the squared row norms, given `grad_O`; `weighted_product_RI` is (2s·grad ⊙ B)ᵀW, where known."""
    weights_O1 = (2 * scale * grad_O)[:, None]
    weighted_OR = weights_O1 * B_OR
    if weighted_product_RI is None:
        weighted_product_RI = rounded_transposed_times(frozen.W_OI, weighted_OR).T
    grad_A = torch.addmm(weighted_product_RI, B_OR.T @ weighted_OR, A_RI, alpha=scale)
    grad_B = torch.addmm(product_OR.float(), B_OR, A_RI @ A_RI.T, alpha=scale).mul_(weights_O1)
    return NormGradients(grad_A, grad_B)


def column_norms(
    frozen: Frozen, A_RI: Tensor, B_OR: Tensor, gain_O: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Norm of each column of g ⊙ V plus 1e-12, (I,), and the product Wᵀ(g² ⊙ B) (I, R) that its gradient needs."""
    if gain_O is None:
        base_I, weighted_OR = frozen.column_squares(), B_OR
    else:
        weights_O = gain_O.square()
        base_I, weighted_OR = column_squares(frozen.W_OI, weights_O), weights_O[:, None] * B_OR
    product_IR = transposed_times(frozen.W_OI, weighted_OR)
    return norm_of(base_I, product_IR, A_RI.T, B_OR.T @ weighted_OR, scale), product_IR


def column_gradients(
    frozen: Frozen,
    product_IR: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    gain_O: Tensor | None,
    grad_I: Tensor,
    scale: float,
) -> NormGradients:
    """Gradients of the squared column norms, given `grad_I`."""
    weighted_RI = A_RI * grad_I
    product_OR = rounded_times(frozen.W_OI, weighted_RI.T)
    grad_B = torch.addmm(product_OR, B_OR, weighted_RI @ A_RI.T, alpha=scale)
    weighted_OR, grad_w = B_OR, None
    if gain_O is not None:
        weights_O1 = gain_O.square()[:, None]
        weighted_OR = weights_O1 * B_OR
        cross_O = ((product_OR + grad_B) * B_OR).sum(dim=1)
        grad_w = row_squares(frozen.W_OI, grad_I).add_(cross_O, alpha=scale)
        grad_B *= weights_O1
    sum_RI = torch.addmm(product_IR.float().T * grad_I, B_OR.T @ weighted_OR, weighted_RI, alpha=scale)
    return NormGradients(sum_RI.mul_(2 * scale), grad_B.mul_(2 * scale), grad_w)


def gain_gradients(grad: Tensor, gain: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of gain = magnitude / norm: that of the magnitude, and that of the squared norm."""
    grad_magnitude = grad / norm
    return grad_magnitude, (grad_magnitude * gain).div_(norm).mul_(-0.5)


def norm_of(base_O: Tensor, product_OR: Tensor, B_OR: Tensor, gram_RR: Tensor, scale: float) -> Tensor:
    """√(‖W‖² + 2s·rowsum(P ⊙ B) + s²·rowsum(BG ⊙ B)) + 1e-12, with P = WAᵀ and G = AAᵀ."""
    sum_OR = torch.addmm(product_OR, B_OR, gram_RR, beta=2 * scale, alpha=scale * scale)
    return root_of(base_O, sum_OR.mul_(B_OR).sum(dim=1))


def root_of(base: Tensor, change: Tensor) -> Tensor:
    """√(base + change) + 1e-12; rounding may leave the sum of a vanishing row below 0. `change` is overwritten."""
    return change.add_(base).clamp_min_(0).sqrt_().add_(EPSILON)
