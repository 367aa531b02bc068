"""A frozen weight in training, and what depends on it alone. Shape suffixes: O rows (out), I columns (in), R rank.

Products with a frozen weight, in fp32 whatever its dtype, without an fp32 copy of it: block by block of its rows.

A block stays in a core's cache, so whatever is asked of it besides costs no further reading of W from memory.
Shape suffixes: O rows (out), I columns (in, or in·taps), R rank, N rows of one block.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sa3train.adapters.apply.effective_weight import flatten_weight

BLOCK_VALUES = 2**18
"""Values of one fp32 block: 1 MiB."""

SMALLEST_SHARE = 4
"""Into how many blocks a weight is cut at least, so that none is weight-sized."""


def row_blocks(W_OI: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, block (N, I) in fp32, room of its size) from the first row on; both are valid until the next.

    Block and room are the same two buffers each time: fresh memory would cost more than what is computed. On a GPU all
    of the weight is one block, gone again after its layer: launches cost more there than passes.
    """
    rows, columns = W_OI.shape
    step = rows if W_OI.is_cuda else max(1, min(BLOCK_VALUES // columns, rows // SMALLEST_SHARE))
    exact = W_OI.dtype == torch.float32
    room_NI = torch.empty(step, columns, device=W_OI.device)
    copy_NI = None if exact else torch.empty_like(room_NI)
    for start in range(0, rows, step):
        block_NI = W_OI[start : start + step]
        size = block_NI.shape[0]
        if copy_NI is not None:
            block_NI = copy_NI[:size].copy_(block_NI)
        yield slice(start, start + size), block_NI, room_NI[:size]


def times(W_OI: Tensor, M_IR: Tensor) -> Tensor:
    """W·M, (O, R) fp32, exact to fp32; on CUDA to about 2⁻¹⁷ of its largest value for a bf16 weight."""
    if W_OI.dtype == torch.float32:
        return W_OI @ M_IR
    if W_OI.is_cuda and W_OI.dtype == torch.bfloat16:
        return wide_product(W_OI, torch.cat(two_terms(M_IR), dim=1)).unflatten(1, (2, -1)).sum(dim=1)
    out_OR = torch.empty(W_OI.shape[0], M_IR.shape[1], device=W_OI.device)
    for rows, block_NI, _ in row_blocks(W_OI):
        torch.mm(block_NI, M_IR, out=out_OR[rows])
    return out_OR


def transposed_times(W_OI: Tensor, M_OR: Tensor) -> Tensor:
    """Mᵀ·W, (R, I) fp32, as exact as `times`."""
    if W_OI.dtype == torch.float32:
        return M_OR.T @ W_OI
    if W_OI.is_cuda and W_OI.dtype == torch.bfloat16:
        return wide_product(torch.cat(two_terms(M_OR.T)), W_OI).unflatten(0, (2, -1)).sum(dim=0)
    out_RI = torch.zeros(M_OR.shape[1], W_OI.shape[1], device=W_OI.device)
    for rows, block_NI, _ in row_blocks(W_OI):
        out_RI.addmm_(M_OR[rows].T, block_NI)
    return out_RI


def wide_product(X: Tensor, Y: Tensor) -> Tensor:
    """X·Y in fp32, whatever their common dtype: on CUDA out of the accumulator of the 16-bit product."""
    if X.dtype == torch.float32:
        return X @ Y
    return torch.mm(X, Y, out_dtype=torch.float32) if X.is_cuda else X.float() @ Y.float()


def two_terms(M: Tensor) -> tuple[Tensor, Tensor]:
    """Two bf16 terms whose sum is M to 2⁻¹⁷: a product with a bf16 weight is then two products of tensor cores."""
    high = M.to(torch.bfloat16)
    return high, (M - high).to(torch.bfloat16)


def row_squares(W_OI: Tensor) -> Tensor:
    """Σ_j W_ij², (O,) fp32."""
    out_O = torch.empty(W_OI.shape[0], device=W_OI.device)
    for rows, block_NI, room_NI in row_blocks(W_OI):
        torch.sum(torch.mul(block_NI, block_NI, out=room_NI), dim=1, out=out_O[rows])
    return out_O


def column_squares(W_OI: Tensor) -> Tensor:
    """Σ_i W_ij², (I,) fp32."""
    out_I = torch.zeros(W_OI.shape[1], device=W_OI.device)
    for _, block_NI, room_NI in row_blocks(W_OI):
        out_I += torch.mul(block_NI, block_NI, out=room_NI).sum(dim=0)
    return out_I


def squares_and_times(W_OI: Tensor, weights_I: Tensor, M_IR: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_j w_j W_ij², (O,), and W·M, (O, R), in one reading of W."""
    out_O, out_OR = (torch.empty(W_OI.shape[0], *rest, device=W_OI.device) for rest in ((), (M_IR.shape[1],)))
    for rows, block_NI, room_NI in row_blocks(W_OI):
        torch.mm(block_NI, M_IR, out=out_OR[rows])
        torch.mv(torch.mul(block_NI, block_NI, out=room_NI), weights_I, out=out_O[rows])
    return out_O, out_OR


def squares_and_transposed_times(W_OI: Tensor, weights_O: Tensor, M_OR: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_i w_i W_ij², (I,), and Mᵀ·W, (R, I), in one reading of W."""
    out_I, out_RI = (torch.zeros(*rest, W_OI.shape[1], device=W_OI.device) for rest in ((), (M_OR.shape[1],)))
    for rows, block_NI, room_NI in row_blocks(W_OI):
        out_RI.addmm_(M_OR[rows].T, block_NI)
        out_I.addmv_(torch.mul(block_NI, block_NI, out=room_NI).T, weights_O[rows])
    return out_I, out_RI


@dataclass(eq=False)
class Frozen:
    """A frozen weight. What depends on it alone is computed on first use, and again when the weight has changed.

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
        """σ (R,), with which WV = U·σ and WᵀU = V·σ."""
        U_OR, V_IR = self.bases
        return self._kept("sigma", lambda: (times(self.W_OI, V_IR) * U_OR).sum(dim=0))

    def gram_of_U(self) -> Tensor:
        """UᵀU, (R, R): the identity, but for rounding."""
        return self._kept("UU", lambda: self.bases[0].T @ self.bases[0])

    def gram_of_V(self) -> Tensor:
        """VᵀV, (R, R)."""
        return self._kept("VV", lambda: self.bases[1].T @ self.bases[1])

    @property
    def nbytes(self) -> int:
        """Memory of what is kept."""
        return sum(tensor.nbytes for tensor in self._known.values())

    def _kept(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        weight = self.weight  # its storage may be elsewhere each time (quantised, sharded), with the same values
        state = (weight._version, weight.dtype, weight.device)
        if state != self._state:
            self._state, self._known = state, {}
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]
