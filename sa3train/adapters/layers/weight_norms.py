"""Norms of the rows and columns of V = W + sBA without building V, and their gradients, for trained A and B.

‖V‖² of a row is ‖W‖² + 2s·rowsum(B ⊙ WAᵀ) + s²·rowsum(B(AAᵀ) ⊙ B), and of a column likewise. Bora's columns are those
of H = g ⊙ V, g = magnitude / norm of the row, with squares Σ_i g_i² V_ij². All in fp32, but for a WAᵀ that is given.
`weight_norms_xs` has the same functions for -xs types. docs/model.md, section 7.

Bora reads W once forward and once backward for both norms: a row's norm and its gradient need that row alone, and so
does what the row adds to the columns, so both are computed for each block of rows while it is in the cache.
Shape suffixes: O rows (out), I columns (in), R rank, N rows of one block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sa3train.adapters.apply.effective_weight import EPSILON, iterate_row_blocks
from sa3train.adapters.layers.frozen_weight import (
    FrozenWeight,
    compute_product,
    compute_transposed_product,
)


@dataclass(frozen=True)
class NormGradients:
    """What the gradients of norms add to those of the parameters.

    Attributes:
        A_RI: Gradient of A; None for -xs types.
        B: Gradient of B, or of M for -xs types.
        magnitude_O: Gradient of bora's row magnitudes.
    """

    A_RI: Tensor | None
    B: Tensor
    magnitude_O: Tensor | None = None


@dataclass(frozen=True)
class BothNorms:
    """Bora's norms, and the products that their gradients need.

    Attributes:
        norm_O: Norms of V's rows.
        norm_I: Norms of H's columns.
        product_OR: WAᵀ; None for -xs types, which do not need it.
        product_RI: (g² ⊙ B)ᵀW, or (g² ⊙ U)ᵀW for -xs types.
    """

    norm_O: Tensor
    norm_I: Tensor
    product_OR: Tensor | None
    product_RI: Tensor


@dataclass(frozen=True)
class GainGradients:
    """Where the gradients of bora's norms start.

    Attributes:
        norm_O: Norms of V's rows.
        gain_O: Gains g of the rows.
        grad_O: Gradient of g in y = g ⊙ …, without what reaches g through the columns.
        grad_I: Gradient of the squared column norms.
    """

    norm_O: Tensor
    gain_O: Tensor
    grad_O: Tensor
    grad_I: Tensor


def compute_row_norms(
    frozen: FrozenWeight, A_RI: Tensor, B_OR: Tensor, scale: float, product_OR: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the norms of V's rows.

    Args:
        frozen: The frozen weight W.
        A_RI: A.
        B_OR: B.
        scale: The scale s.
        product_OR: WAᵀ, fp32, where it is known already.

    Returns:
        The norms plus 1e-12, (O,), and WAᵀ (O, R), which the gradient needs.
    """
    if product_OR is None:
        product_OR = compute_product(frozen.W_OI, A_RI.T)
    return _compute_norm(frozen.row_squares(), product_OR, B_OR, A_RI @ A_RI.T, scale), product_OR


def compute_row_gradients(
    frozen: FrozenWeight,
    product_OR: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    grad_O: Tensor,
    scale: float,
    weighted_product_RI: Tensor | None,
) -> NormGradients:
    """Compute the gradients through the squared row norms.

    Args:
        frozen: The frozen weight W.
        product_OR: WAᵀ.
        A_RI: A.
        B_OR: B.
        grad_O: Gradient of the squared row norms.
        scale: The scale s.
        weighted_product_RI: (2s·grad ⊙ B)ᵀW where it is known already.

    Returns:
        The gradients of A and B.
    """
    weights_O1 = (2 * scale * grad_O)[:, None]
    weighted_OR = weights_O1 * B_OR
    if weighted_product_RI is None:
        weighted_product_RI = compute_transposed_product(frozen.W_OI, weighted_OR)
    grad_A = torch.addmm(weighted_product_RI, B_OR.T @ weighted_OR, A_RI, alpha=scale)
    grad_B = torch.addmm(product_OR.float(), B_OR, A_RI @ A_RI.T, alpha=scale).mul_(weights_O1)
    return NormGradients(grad_A, grad_B)


def compute_column_norms(frozen: FrozenWeight, A_RI: Tensor, B_OR: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute the norms of V's columns.

    Args:
        frozen: The frozen weight W.
        A_RI: A.
        B_OR: B.
        scale: The scale s.

    Returns:
        The norms plus 1e-12, (I,), and BᵀW (R, I), which the gradient needs.
    """
    product_RI = compute_transposed_product(frozen.W_OI, B_OR)
    return _compute_norm(frozen.column_squares(), product_RI.T, A_RI.T, B_OR.T @ B_OR, scale), product_RI


def compute_column_gradients(
    frozen: FrozenWeight, product_RI: Tensor, A_RI: Tensor, B_OR: Tensor, grad_I: Tensor, scale: float
) -> NormGradients:
    """Compute the gradients through the squared column norms.

    Args:
        frozen: The frozen weight W.
        product_RI: BᵀW.
        A_RI: A.
        B_OR: B.
        grad_I: Gradient of the squared column norms.
        scale: The scale s.

    Returns:
        The gradients of A and B.
    """
    weighted_RI = A_RI * grad_I
    grad_B = compute_product(frozen.W_OI, weighted_RI.T).addmm_(B_OR, weighted_RI @ A_RI.T, alpha=scale)
    grad_A = torch.addmm(product_RI.float() * grad_I, B_OR.T @ B_OR, weighted_RI, alpha=scale)
    return NormGradients(grad_A.mul_(2 * scale), grad_B.mul_(2 * scale))


def compute_both_norms(
    frozen: FrozenWeight, A_RI: Tensor, B_OR: Tensor, magnitude_O: Tensor, scale: float
) -> BothNorms:
    """Compute bora's norms in one pass over W.

    Args:
        frozen: The frozen weight W.
        A_RI: A.
        B_OR: B.
        magnitude_O: Magnitudes of the rows.
        scale: The scale s.

    Returns:
        The norms, and the products that their gradients need.
    """
    product_OR, weighted_OR = torch.empty_like(B_OR), torch.empty_like(B_OR)
    product_RI, base_I = torch.zeros_like(A_RI), A_RI.new_zeros(A_RI.shape[1])
    known_O = frozen.row_squares() + (B_OR @ (A_RI @ A_RI.T)).mul_(B_OR).sum(dim=1).mul_(scale * scale)
    norm_O, doubled_OR = torch.empty_like(known_O), 2 * scale * B_OR
    for rows, block_NI, buffer_NI in iterate_row_blocks(frozen.W_OI):
        product_NR = torch.mm(block_NI, A_RI.T, out=product_OR[rows])
        norm_N = norm_O[rows].copy_(compute_root(known_O[rows], (product_NR * doubled_OR[rows]).sum(dim=1)))
        weights_N = (magnitude_O[rows] / norm_N).square_()
        weighted_NR = torch.mul(B_OR[rows], weights_N[:, None], out=weighted_OR[rows])
        product_RI.addmm_(weighted_NR.T, block_NI)
        base_I.addmv_(torch.mul(block_NI, block_NI, out=buffer_NI).T, weights_N)
    norm_I = _compute_norm(base_I, product_RI.T, A_RI.T, B_OR.T @ weighted_OR, scale)
    return BothNorms(norm_O, norm_I, product_OR, product_RI)


def compute_both_gradients(
    frozen: FrozenWeight,
    product_OR: Tensor,
    product_RI: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    given: GainGradients,
    scale: float,
) -> NormGradients:
    """Compute the gradients through bora's norms in one pass over W.

    With γ the gradient of the squared columns, P = W(A ⊙ γ)ᵀ and T = sB(A(A ⊙ γ)ᵀ), that of g² is
    Σ_j γ_j W_ij² + s·rowsum(B ⊙ (2P + T)) and that of B 2s·g² ⊙ (P + T). What reaches g then gives q, the gradient
    of the squared rows, and the rows' gradients as in `compute_row_gradients`.

    Args:
        frozen: The frozen weight W.
        product_OR: WAᵀ.
        product_RI: (g² ⊙ B)ᵀW.
        A_RI: A.
        B_OR: B.
        given: Norms, gains and incoming gradients.
        scale: The scale s.

    Returns:
        The gradients of A, B and the row magnitudes.
    """
    weighted_RI = A_RI * given.grad_I
    crossed_OR = (B_OR @ (weighted_RI @ A_RI.T)).mul_(scale)
    P_OR, doubled_gain_O, doubled_OR = torch.empty_like(B_OR), 2 * given.gain_O, 2 * scale * B_OR
    grad_O, square_O = torch.empty_like(given.grad_O), torch.empty_like(given.grad_O)
    weighted_OR, grad_A = torch.empty_like(B_OR), torch.zeros_like(A_RI)
    for rows, block_NI, buffer_NI in iterate_row_blocks(frozen.W_OI):
        P_NR = torch.mm(block_NI, weighted_RI.T, out=P_OR[rows])
        grad_w_N = torch.mv(torch.mul(block_NI, block_NI, out=buffer_NI), given.grad_I)
        grad_w_N += torch.add(P_NR, crossed_OR[rows], alpha=0.5).mul_(doubled_OR[rows]).sum(dim=1)
        grad_N = torch.addcmul(given.grad_O[rows], doubled_gain_O[rows], grad_w_N)
        grad_O[rows], square_O[rows] = compute_gain_gradients(grad_N, given.gain_O[rows], given.norm_O[rows])
        grad_A.addmm_(torch.mul(doubled_OR[rows], square_O[rows, None], out=weighted_OR[rows]).T, block_NI)
    weights_O1 = given.gain_O.square()[:, None]
    rows_ = compute_row_gradients(frozen, product_OR, A_RI, B_OR, square_O, scale, grad_A)
    assert rows_.A_RI is not None
    columns_RI = torch.addmm(product_RI.float() * given.grad_I, B_OR.T @ (weights_O1 * B_OR), weighted_RI, alpha=scale)
    grad_B = rows_.B.addcmul_(P_OR.add_(crossed_OR), weights_O1, value=2 * scale)
    return NormGradients(rows_.A_RI.add_(columns_RI, alpha=2 * scale), grad_B, grad_O)


def compute_gain_gradients(grad: Tensor, gain: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients through gain = magnitude / norm.

    Args:
        grad: Gradient of the gain.
        gain: The gain.
        norm: The norm.

    Returns:
        The gradients of the magnitude and of the squared norm.
    """
    grad_magnitude = grad / norm
    return grad_magnitude, (grad_magnitude * gain).div_(norm).mul_(-0.5)


def compute_row_gain_gradients(
    grad_O: Tensor, through_O: Tensor, gain_O: Tensor, norm_O: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the gradients through bora's row gains.

    Args:
        grad_O: Gradient of g in y = g ⊙ ….
        through_O: Gradient that reaches g² through the columns.
        gain_O: The gains g.
        norm_O: Norms of the rows.

    Returns:
        The gradients of the magnitude and of the squared norm.
    """
    return compute_gain_gradients(torch.addcmul(grad_O, gain_O, through_O, value=2), gain_O, norm_O)


def _compute_norm(base_O: Tensor, product_OR: Tensor, B_OR: Tensor, gram_RR: Tensor, scale: float) -> Tensor:
    """√(‖W‖² + 2s·rowsum(P ⊙ B) + s²·rowsum(BG ⊙ B)) + 1e-12, with P = WAᵀ and G = AAᵀ."""
    sum_OR = torch.addmm(product_OR, B_OR, gram_RR, beta=2 * scale, alpha=scale * scale)
    return compute_root(base_O, sum_OR.mul_(B_OR).sum(dim=1))


def compute_root(base: Tensor, change: Tensor) -> Tensor:
    """Compute √(base + change) + 1e-12; rounding may leave the sum of a vanishing row below 0.

    Args:
        base: ‖W‖².
        change: What the adapter adds to it; overwritten.

    Returns:
        The norms.
    """
    return change.add_(base).clamp_min_(0).sqrt_().add_(EPSILON)
