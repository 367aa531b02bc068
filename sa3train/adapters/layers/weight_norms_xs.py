"""Norms of V = W + sUMVᵀ with U and V the frozen singular vectors of W: the functions of `weight_norms` for -xs types.

WV = U·σ and WᵀU = V·σ replace most products with W, and the rest is algebra of R × R matrices. Only bora-xs, whose
columns are weighted by g² row by row, reads W, once forward and once backward: g² = 1 + e, and WᵀU = V·σ leaves
(e ⊙ U)ᵀW. docs/model.md, section 7.
Shape suffixes: O rows (out), I columns (in), R rank. "A" is V's transpose, known to `FrozenWeight`, and "B" is M.
"""

import torch
from torch import Tensor

from sa3train.adapters.layers.frozen_weight import (
    FrozenWeight,
    compute_squares_and_product,
    compute_squares_and_transposed_product,
)
from sa3train.adapters.layers.weight_norms import (
    BothNorms,
    GainGradients,
    NormGradients,
    compute_root,
    compute_row_gain_gradients,
)


def compute_row_norms(
    frozen: FrozenWeight, A_RI: None, M_RR: Tensor, scale: float, product: None = None
) -> tuple[Tensor, None]:
    """Compute the norms of V's rows, with squares ‖W‖² + uᵢ(2sΣ + s²M)Mᵀuᵢᵀ for the rows uᵢ of U.

    Args:
        frozen: The frozen weight W with its bases U and V.
        A_RI: None.
        M_RR: M.
        scale: The scale s.
        product: None.

    Returns:
        The norms plus 1e-12, (O,), and None in place of WAᵀ.
    """
    U_OR, _ = frozen.bases
    middle_RR = scale * scale * (M_RR @ frozen.gram_of_V())
    middle_RR.diagonal().add_(frozen.singular_values(), alpha=2 * scale)
    return compute_root(frozen.row_squares(), (U_OR @ (middle_RR @ M_RR.T)).mul_(U_OR).sum(dim=1)), None


def compute_row_gradients(
    frozen: FrozenWeight, product: None, A_RI: None, M_RR: Tensor, grad_O: Tensor, scale: float, weighted_product: None
) -> NormGradients:
    """Compute the gradient through the squared row norms, 2s·C(Σ + sM) with C = Uᵀ(grad ⊙ U).

    Args:
        frozen: The frozen weight W with its bases U and V.
        product: None.
        A_RI: None.
        M_RR: M.
        grad_O: Gradient of the squared row norms.
        scale: The scale s.
        weighted_product: None.

    Returns:
        The gradient of M.
    """
    U_OR, _ = frozen.bases
    middle_RR = scale * (M_RR @ frozen.gram_of_V())
    middle_RR.diagonal().add_(frozen.singular_values())
    return NormGradients(None, ((U_OR * grad_O[:, None]).T @ U_OR @ middle_RR).mul_(2 * scale))


def compute_column_norms(frozen: FrozenWeight, A_RI: None, M_RR: Tensor, scale: float) -> tuple[Tensor, None]:
    """Compute the norms of V's columns, with squares ‖W‖² + vⱼ(2sΣM + s²MᵀM)vⱼᵀ for the rows vⱼ of V.

    Args:
        frozen: The frozen weight W with its bases U and V.
        A_RI: None.
        M_RR: M.
        scale: The scale s.

    Returns:
        The norms plus 1e-12, (I,), and None in place of BᵀW.
    """
    V_IR = frozen.bases[1]
    middle_RR = 2 * scale * (frozen.singular_values()[:, None] * M_RR)
    middle_RR.addmm_(M_RR.T @ frozen.gram_of_U(), M_RR, alpha=scale * scale)
    return compute_root(frozen.column_squares(), (V_IR @ middle_RR).mul_(V_IR).sum(dim=1)), None


def compute_column_gradients(
    frozen: FrozenWeight, product: None, A_RI: None, M_RR: Tensor, grad_I: Tensor, scale: float
) -> NormGradients:
    """Compute the gradient through the squared column norms, 2s(Σ + sM)C with C = Vᵀ(grad ⊙ V).

    Args:
        frozen: The frozen weight W with its bases U and V.
        product: None.
        A_RI: None.
        M_RR: M.
        grad_I: Gradient of the squared column norms.
        scale: The scale s.

    Returns:
        The gradient of M.
    """
    V_IR = frozen.bases[1]
    gram_RR = (V_IR * grad_I[:, None]).T @ V_IR
    middle_RR = scale * (frozen.gram_of_U() @ M_RR)
    middle_RR.diagonal().add_(frozen.singular_values())
    return NormGradients(None, (middle_RR @ gram_RR).mul_(2 * scale))


def compute_both_norms(frozen: FrozenWeight, A_RI: None, M_RR: Tensor, magnitude_O: Tensor, scale: float) -> BothNorms:
    """Compute bora-xs's norms in one pass over W.

    A column's square is ‖g ⊙ W‖² + (2s·yⱼM + s²·vⱼMᵀC M)vⱼᵀ with C = Uᵀ(g² ⊙ U) and yⱼ the columns of Y = (g² ⊙ U)ᵀW,
    which is exact where g is 1.

    Args:
        frozen: The frozen weight W with its bases U and V.
        A_RI: None.
        M_RR: M.
        magnitude_O: Magnitudes of the rows.
        scale: The scale s.

    Returns:
        The norms, and Y, which their gradients need.
    """
    U_OR, V_IR = frozen.bases
    norm_O, _ = compute_row_norms(frozen, A_RI, M_RR, scale)
    weights_O = (magnitude_O / norm_O).square_()
    excess_OR = U_OR * (weights_O - 1)[:, None]
    base_I, Y_RI = compute_squares_and_transposed_product(frozen.W_OI, weights_O, excess_OR)
    Y_RI.addcmul_(V_IR.T, frozen.singular_values()[:, None])
    middle_RR = M_RR.T @ (frozen.gram_of_U() + U_OR.T @ excess_OR) @ M_RR
    sum_IR = torch.addmm(V_IR @ middle_RR, Y_RI.T, M_RR, beta=scale * scale, alpha=2 * scale)
    return BothNorms(norm_O, compute_root(base_I, sum_IR.mul_(V_IR).sum(dim=1)), None, Y_RI)


def compute_both_gradients(
    frozen: FrozenWeight, product: None, Y_RI: Tensor, A_RI: None, M_RR: Tensor, given: GainGradients, scale: float
) -> NormGradients:
    """Compute the gradients through bora-xs's norms, in the steps of `weight_norms.compute_both_gradients`.

    Args:
        frozen: The frozen weight W with its bases U and V.
        product: None.
        Y_RI: (g² ⊙ U)ᵀW.
        A_RI: None.
        M_RR: M.
        given: Norms, gains and incoming gradients.
        scale: The scale s.

    Returns:
        The gradients of M and the row magnitudes.
    """
    U_OR, V_IR = frozen.bases
    weighted_IR = V_IR * given.grad_I[:, None]
    gram_RR = weighted_IR.T @ V_IR
    grad_w_O, P_OR = compute_squares_and_product(frozen.W_OI, given.grad_I, weighted_IR)
    sum_OR = torch.addmm(U_OR @ (M_RR @ gram_RR @ M_RR.T), P_OR, M_RR.T, beta=scale * scale, alpha=2 * scale)
    grad_w_O += sum_OR.mul_(U_OR).sum(dim=1)
    magnitude_O, square_O = compute_row_gain_gradients(given.grad_O, grad_w_O, given.gain_O, given.norm_O)
    weighted_gram_RR = (U_OR * given.gain_O.square()[:, None]).T @ U_OR
    grad_M = torch.addmm(Y_RI.float() @ weighted_IR, weighted_gram_RR @ M_RR, gram_RR, alpha=scale).mul_(2 * scale)
    rows = compute_row_gradients(frozen, product, A_RI, M_RR, square_O, scale, None)
    return NormGradients(None, grad_M.add_(rows.B), magnitude_O)
