"""The functions of `norms` for the -xs kinds: V = W + sUMVᵀ with U and V the frozen singular vectors of W.

WV = U·σ and WᵀU = V·σ spare most products with W, and what is left is algebra of R × R matrices. Only bora-xs, whose
columns are weighted by g² row by row, has to go through W: g² = 1 + e, and WᵀU = V·σ leaves Wᵀ(e ⊙ U).
Shape suffixes: O rows (out), I columns (in), R rank. "A" is V's transpose, known to `Frozen`, and "B" is M.
"""

import torch
from torch import Tensor

from sa3train.adapters.frozen import Frozen
from sa3train.adapters.norms import NormGradients, root_of
from sa3train.adapters.products import column_squares, rounded_times, rounded_transposed_times, row_squares


def row_norms(frozen: Frozen, A_RI: None, M_RR: Tensor, scale: float) -> tuple[Tensor, None]:
    """Norm of each row of V plus 1e-12, (O,): ‖W‖² + uᵢ(2sΣ + s²M)Mᵀuᵢᵀ, with uᵢ the rows of U."""
    U_OR, _ = frozen.bases
    middle_RR = scale * scale * (M_RR @ frozen.gram_of_V())
    middle_RR.diagonal().add_(frozen.singular_values(), alpha=2 * scale)
    return root_of(frozen.row_squares(), (U_OR @ (middle_RR @ M_RR.T)).mul_(U_OR).sum(dim=1)), None


def row_gradients(
    frozen: Frozen,
    product: None,
    A_RI: None,
    M_RR: Tensor,
    grad_O: Tensor,
    scale: float,
    weighted_product: None,
) -> NormGradients:
    """Gradient of the squared row norms, given `grad_O`: 2s·C(Σ + sM) with C = Uᵀ(grad ⊙ U)."""
    U_OR, _ = frozen.bases
    middle_RR = scale * (M_RR @ frozen.gram_of_V())
    middle_RR.diagonal().add_(frozen.singular_values())
    return NormGradients(None, ((U_OR * grad_O[:, None]).T @ U_OR @ middle_RR).mul_(2 * scale))


def column_norms(
    frozen: Frozen, A_RI: None, M_RR: Tensor, gain_O: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Norm of each column of g ⊙ V plus 1e-12, (I,): ‖g ⊙ W‖² + (2s·yⱼM + s²·vⱼMᵀC M)vⱼᵀ, C = Uᵀ(g² ⊙ U), and vⱼ and
    yⱼ the rows of V and of Y = Wᵀ(g² ⊙ U). Y (I, R) is what the gradient needs."""
    V_IR = frozen.bases[1]
    if gain_O is None:
        base_I, gram_RR, Y_IR = frozen.column_squares(), frozen.gram_of_U(), None
        middle_RR = 2 * scale * (frozen.singular_values()[:, None] * M_RR)
        sum_IR = V_IR @ middle_RR.addmm_(M_RR.T @ gram_RR, M_RR, alpha=scale * scale)
    else:
        weights_O = gain_O.square()
        base_I = column_squares(frozen.W_OI, weights_O)
        Y_IR, gram_RR = _weighted_bases(frozen, weights_O)
        sum_IR = torch.addmm(V_IR @ (M_RR.T @ gram_RR @ M_RR), Y_IR, M_RR, beta=scale * scale, alpha=2 * scale)
    return root_of(base_I, sum_IR.mul_(V_IR).sum(dim=1)), Y_IR


def column_gradients(
    frozen: Frozen,
    Y_IR: Tensor | None,
    A_RI: None,
    M_RR: Tensor,
    gain_O: Tensor | None,
    grad_I: Tensor,
    scale: float,
) -> NormGradients:
    """Gradients of the squared column norms, given `grad_I`."""
    U_OR, V_IR = frozen.bases
    weighted_IR = V_IR * grad_I[:, None]
    gram_RR = weighted_IR.T @ V_IR
    if gain_O is None or Y_IR is None:
        cross_RR, middle_RR, grad_w = frozen.singular_values()[:, None] * gram_RR, frozen.gram_of_U(), None
    else:
        cross_RR = Y_IR.float().T @ weighted_IR
        middle_RR = (U_OR * gain_O.square()[:, None]).T @ U_OR
        product_OR = rounded_times(frozen.W_OI, weighted_IR)
        sum_OR = U_OR @ (M_RR @ gram_RR @ M_RR.T)
        sum_OR.addmm_(product_OR, M_RR.T, beta=scale * scale, alpha=2 * scale)
        grad_w = row_squares(frozen.W_OI, grad_I).add_(sum_OR.mul_(U_OR).sum(dim=1))
    return NormGradients(None, cross_RR.addmm_(middle_RR @ M_RR, gram_RR, alpha=scale).mul_(2 * scale), grad_w)


def _weighted_bases(frozen: Frozen, weights_O: Tensor) -> tuple[Tensor, Tensor]:
    """Wᵀ(w ⊙ U) (I, R), exact where w is 1, and Uᵀ(w ⊙ U) (R, R)."""
    U_OR, V_IR = frozen.bases
    excess_OR = U_OR * (weights_O - 1)[:, None]
    Y_IR = rounded_transposed_times(frozen.W_OI, excess_OR).addcmul_(V_IR, frozen.singular_values())
    return Y_IR, frozen.gram_of_U() + U_OR.T @ excess_OR
