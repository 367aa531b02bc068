"""The functions of `norms` for the -xs kinds: V = W + sUMVᵀ with U and V the frozen singular vectors of W.

WV = U·σ and WᵀU = V·σ spare most products with W, and what is left is algebra of R × R matrices. Only bora-xs, whose
columns are weighted by g² row by row, has to read W, once forward and once backward: g² = 1 + e, and WᵀU = V·σ leaves
(e ⊙ U)ᵀW.
Shape suffixes: O rows (out), I columns (in), R rank. "A" is V's transpose, known to `Frozen`, and "B" is M.
"""

import torch
from torch import Tensor

from sa3train.adapters.layers.frozen_weight import Frozen, squares_and_times, squares_and_transposed_times
from sa3train.adapters.layers.weight_norms import BothNorms, GainGradients, NormGradients, root_of, row_gain_gradients


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


def column_norms(frozen: Frozen, A_RI: None, M_RR: Tensor, scale: float) -> tuple[Tensor, None]:
    """Norm of each column of V plus 1e-12, (I,): ‖W‖² + vⱼ(2sΣM + s²MᵀM)vⱼᵀ, with vⱼ the rows of V."""
    V_IR = frozen.bases[1]
    middle_RR = 2 * scale * (frozen.singular_values()[:, None] * M_RR)
    middle_RR.addmm_(M_RR.T @ frozen.gram_of_U(), M_RR, alpha=scale * scale)
    return root_of(frozen.column_squares(), (V_IR @ middle_RR).mul_(V_IR).sum(dim=1)), None


def column_gradients(
    frozen: Frozen, product: None, A_RI: None, M_RR: Tensor, grad_I: Tensor, scale: float
) -> NormGradients:
    """Gradient of the squared column norms, given `grad_I`: 2s(Σ + sM)C with C = Vᵀ(grad ⊙ V)."""
    V_IR = frozen.bases[1]
    gram_RR = (V_IR * grad_I[:, None]).T @ V_IR
    middle_RR = scale * (frozen.gram_of_U() @ M_RR)
    middle_RR.diagonal().add_(frozen.singular_values())
    return NormGradients(None, (middle_RR @ gram_RR).mul_(2 * scale))


def both_norms(frozen: Frozen, A_RI: None, M_RR: Tensor, magnitude_O: Tensor, scale: float) -> BothNorms:
    """The norms of bora-xs. A column's square is ‖g ⊙ W‖² + (2s·yⱼM + s²·vⱼMᵀC M)vⱼᵀ with C = Uᵀ(g² ⊙ U) and yⱼ the
    columns of Y = (g² ⊙ U)ᵀW, which is exact where g is 1."""
    U_OR, V_IR = frozen.bases
    norm_O, _ = row_norms(frozen, A_RI, M_RR, scale)
    weights_O = (magnitude_O / norm_O).square_()
    excess_OR = U_OR * (weights_O - 1)[:, None]
    base_I, Y_RI = squares_and_transposed_times(frozen.W_OI, weights_O, excess_OR)
    Y_RI.addcmul_(V_IR.T, frozen.singular_values()[:, None])
    middle_RR = M_RR.T @ (frozen.gram_of_U() + U_OR.T @ excess_OR) @ M_RR
    sum_IR = torch.addmm(V_IR @ middle_RR, Y_RI.T, M_RR, beta=scale * scale, alpha=2 * scale)
    return BothNorms(norm_O, root_of(base_I, sum_IR.mul_(V_IR).sum(dim=1)), None, Y_RI)


def both_gradients(
    frozen: Frozen,
    product: None,
    Y_RI: Tensor,
    A_RI: None,
    M_RR: Tensor,
    given: GainGradients,
    scale: float,
) -> NormGradients:
    """Gradients through the norms of bora-xs, as in `norms.both_gradients`."""
    U_OR, V_IR = frozen.bases
    weighted_IR = V_IR * given.grad_I[:, None]
    gram_RR = weighted_IR.T @ V_IR
    grad_w_O, P_OR = squares_and_times(frozen.W_OI, given.grad_I, weighted_IR)
    sum_OR = torch.addmm(U_OR @ (M_RR @ gram_RR @ M_RR.T), P_OR, M_RR.T, beta=scale * scale, alpha=2 * scale)
    grad_w_O += sum_OR.mul_(U_OR).sum(dim=1)
    magnitude_O, square_O = row_gain_gradients(given.grad_O, grad_w_O, given.gain_O, given.norm_O)
    weighted_gram_RR = (U_OR * given.gain_O.square()[:, None]).T @ U_OR
    grad_M = torch.addmm(Y_RI.float() @ weighted_IR, weighted_gram_RR @ M_RR, gram_RR, alpha=scale).mul_(2 * scale)
    rows = row_gradients(frozen, product, A_RI, M_RR, square_O, scale, None)
    return NormGradients(None, grad_M.add_(rows.B), magnitude_O)
