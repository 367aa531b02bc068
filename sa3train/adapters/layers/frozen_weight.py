"""A frozen weight in training: products with it in fp32 whatever its dtype, and what depends on it alone.

Products are computed block by block of its rows, without an fp32 copy of the weight. A block stays in a core's cache,
so whatever else is computed from it costs no further pass over memory.
Shape suffixes: O rows (out), I columns (in, or in·taps), R rank, N rows of one block.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sa3train.adapters.apply.effective_weight import flatten_weight, iterate_row_blocks


def compute_product(W_OI: Tensor, M_IR: Tensor) -> Tensor:
    """Compute W·M, exact to fp32; for a bf16 weight on CUDA to about 2⁻¹⁷ of the largest value.

    Args:
        W_OI: The weight.
        M_IR: The factor, fp32.

    Returns:
        The product, (O, R) fp32.
    """
    if W_OI.dtype == torch.float32:
        return W_OI @ M_IR
    if W_OI.is_cuda and W_OI.dtype == torch.bfloat16:
        return compute_wide_product(W_OI, torch.cat(split_bf16(M_IR), dim=1)).unflatten(1, (2, -1)).sum(dim=1)
    out_OR = torch.empty(W_OI.shape[0], M_IR.shape[1], device=W_OI.device)
    for rows, block_NI, _ in iterate_row_blocks(W_OI):
        torch.mm(block_NI, M_IR, out=out_OR[rows])
    return out_OR


def compute_transposed_product(W_OI: Tensor, M_OR: Tensor) -> Tensor:
    """Compute Mᵀ·W, as exact as `compute_product`.

    Args:
        W_OI: The weight.
        M_OR: The factor, fp32.

    Returns:
        The product, (R, I) fp32.
    """
    if W_OI.dtype == torch.float32:
        return M_OR.T @ W_OI
    if W_OI.is_cuda and W_OI.dtype == torch.bfloat16:
        return compute_wide_product(torch.cat(split_bf16(M_OR.T)), W_OI).unflatten(0, (2, -1)).sum(dim=0)
    out_RI = torch.zeros(M_OR.shape[1], W_OI.shape[1], device=W_OI.device)
    for rows, block_NI, _ in iterate_row_blocks(W_OI):
        out_RI.addmm_(M_OR[rows].T, block_NI)
    return out_RI


def compute_wide_product(X: Tensor, Y: Tensor) -> Tensor:
    """Compute X·Y in fp32; on CUDA from the accumulator of the 16-bit product.

    Args:
        X: A matrix.
        Y: A matrix of the same dtype.

    Returns:
        The product, fp32.
    """
    if X.dtype == torch.float32:
        return X @ Y
    return torch.mm(X, Y, out_dtype=torch.float32) if X.is_cuda else X.float() @ Y.float()


def split_bf16(M: Tensor) -> tuple[Tensor, Tensor]:
    """Split a matrix into two bf16 terms, so that a product with a bf16 weight is two products of tensor cores.

    Args:
        M: The matrix, fp32.

    Returns:
        Two terms whose sum is M to 2⁻¹⁷.
    """
    high = M.to(torch.bfloat16)
    return high, (M - high).to(torch.bfloat16)


def _row_squares(W_OI: Tensor) -> Tensor:
    """Σ_j W_ij², (O,) fp32."""
    out_O = torch.empty(W_OI.shape[0], device=W_OI.device)
    for rows, block_NI, buffer_NI in iterate_row_blocks(W_OI):
        torch.sum(torch.mul(block_NI, block_NI, out=buffer_NI), dim=1, out=out_O[rows])
    return out_O


def _column_squares(W_OI: Tensor) -> Tensor:
    """Σ_i W_ij², (I,) fp32."""
    out_I = torch.zeros(W_OI.shape[1], device=W_OI.device)
    for _, block_NI, buffer_NI in iterate_row_blocks(W_OI):
        out_I += torch.mul(block_NI, block_NI, out=buffer_NI).sum(dim=0)
    return out_I


def compute_squares_and_product(W_OI: Tensor, weights_I: Tensor, M_IR: Tensor) -> tuple[Tensor, Tensor]:
    """Compute weighted sums of squares of the rows and W·M in one pass over W.

    Args:
        W_OI: The weight.
        weights_I: Weights w of the columns.
        M_IR: The factor, fp32.

    Returns:
        Σ_j w_j W_ij², (O,), and W·M, (O, R).
    """
    out_O, out_OR = (torch.empty(W_OI.shape[0], *rest, device=W_OI.device) for rest in ((), (M_IR.shape[1],)))
    for rows, block_NI, buffer_NI in iterate_row_blocks(W_OI):
        torch.mm(block_NI, M_IR, out=out_OR[rows])
        torch.mv(torch.mul(block_NI, block_NI, out=buffer_NI), weights_I, out=out_O[rows])
    return out_O, out_OR


def compute_squares_and_transposed_product(W_OI: Tensor, weights_O: Tensor, M_OR: Tensor) -> tuple[Tensor, Tensor]:
    """Compute weighted sums of squares of the columns and Mᵀ·W in one pass over W.

    Args:
        W_OI: The weight.
        weights_O: Weights w of the rows.
        M_OR: The factor, fp32.

    Returns:
        Σ_i w_i W_ij², (I,), and Mᵀ·W, (R, I).
    """
    out_I, out_RI = (torch.zeros(*rest, W_OI.shape[1], device=W_OI.device) for rest in ((), (M_OR.shape[1],)))
    for rows, block_NI, buffer_NI in iterate_row_blocks(W_OI):
        out_RI.addmm_(M_OR[rows].T, block_NI)
        out_I.addmv_(torch.mul(block_NI, block_NI, out=buffer_NI).T, weights_O[rows])
    return out_I, out_RI


@dataclass(eq=False)
class FrozenWeight:
    """A frozen weight. What depends on it alone is computed on first use, and again when the weight has changed.

    Attributes:
        weight: The weight.
        U_OR: Left frozen basis of -xs types, W's own singular vectors; None for others.
        V_IR: Right frozen basis of -xs types; None for others.
    """

    weight: Tensor
    U_OR: Tensor | None = None
    V_IR: Tensor | None = None
    _state: tuple[object, ...] = ()
    _cached: dict[str, Tensor] = field(default_factory=dict)

    @property
    def W_OI(self) -> Tensor:
        """The weight, flattened."""
        return flatten_weight(self.weight.detach())

    @property
    def bases(self) -> tuple[Tensor, Tensor]:
        """U and V; only -xs types have them."""
        if self.U_OR is None or self.V_IR is None:
            raise RuntimeError("This layer has no frozen bases.")
        return self.U_OR, self.V_IR

    def row_squares(self) -> Tensor:
        """Compute ‖W‖² of each row.

        Returns:
            The squares, (O,).
        """
        return self._get_cached("rows", lambda: _row_squares(self.W_OI))

    def column_squares(self) -> Tensor:
        """Compute ‖W‖² of each column.

        Returns:
            The squares, (I,).
        """
        return self._get_cached("columns", lambda: _column_squares(self.W_OI))

    def singular_values(self) -> Tensor:
        """Compute the singular values σ, with which WV = U·σ and WᵀU = V·σ.

        Returns:
            σ, (R,).
        """
        U_OR, V_IR = self.bases
        return self._get_cached("sigma", lambda: (compute_product(self.W_OI, V_IR) * U_OR).sum(dim=0))

    def gram_of_U(self) -> Tensor:
        """Compute UᵀU, the identity up to rounding.

        Returns:
            The Gram matrix, (R, R).
        """
        return self._get_cached("UU", lambda: self.bases[0].T @ self.bases[0])

    def gram_of_V(self) -> Tensor:
        """Compute VᵀV, the identity up to rounding.

        Returns:
            The Gram matrix, (R, R).
        """
        return self._get_cached("VV", lambda: self.bases[1].T @ self.bases[1])

    @property
    def nbytes(self) -> int:
        """Bytes of what is cached."""
        return sum(tensor.nbytes for tensor in self._cached.values())

    def _get_cached(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        weight = self.weight  # its storage may differ each time (quantized, sharded) with the same values
        state = (weight._version, weight.dtype, weight.device)
        if state != self._state:
            self._state, self._cached = state, {}
        if name not in self._cached:
            self._cached[name] = compute()
        return self._cached[name]
