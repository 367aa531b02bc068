"""Products with a frozen weight, in fp32 whatever its dtype, without an fp32 copy of it: block by block of its rows.

Shape suffixes: O rows (out), I columns (in, or in·taps), R rank, N rows of one block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_VALUES = 2**18
"""Values of one fp32 block: 1 MiB, so that a block stays in a core's cache."""

SMALLEST_SHARE = 4
"""Into how many blocks a weight is cut at least, so that none is weight-sized."""


def row_blocks(W_OI: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, block (N, I) in fp32, valid until the next) from the first row on; an fp32 weight comes in one piece."""
    if W_OI.dtype == torch.float32:
        yield slice(0, W_OI.shape[0]), W_OI
        return
    yield from _fp32_blocks(W_OI)


def times(W_OI: Tensor, M_IR: Tensor) -> Tensor:
    """W·M, (O, R) fp32, exact to about 2⁻¹⁷ of its largest value for a bf16 weight and to fp32 for the others."""
    if W_OI.dtype == torch.bfloat16:
        both = torch.cat(_split(M_IR), dim=1)
        if W_OI.is_cuda:
            return torch.mm(W_OI, both, out_dtype=torch.float32).unflatten(1, (2, -1)).sum(dim=1)
        product = W_OI @ both
        rank = M_IR.shape[1]
        lost = torch.addmm(product[:, :rank], W_OI, both[:, :rank], beta=-1)
        return (product[:, :rank].float() + product[:, rank:]).add_(lost)
    out_OR = torch.empty(W_OI.shape[0], M_IR.shape[1], device=W_OI.device)
    for rows, block_NI in row_blocks(W_OI):
        torch.mm(block_NI, M_IR, out=out_OR[rows])
    return out_OR


def transposed_times(W_OI: Tensor, M_OR: Tensor) -> Tensor:
    """Wᵀ·M, (I, R) fp32, as exact as `times`."""
    if W_OI.dtype == torch.bfloat16:
        both = torch.cat(_split(M_OR.T))
        if W_OI.is_cuda:
            return torch.mm(both, W_OI, out_dtype=torch.float32).unflatten(0, (2, -1)).sum(dim=0).T
        product = both @ W_OI
        rank = M_OR.shape[1]
        lost = torch.addmm(product[:rank], both[:rank], W_OI, beta=-1)
        return (product[:rank].float() + product[rank:]).add_(lost).T
    out_IR = torch.zeros(W_OI.shape[1], M_OR.shape[1], device=W_OI.device)
    for rows, block_NI in row_blocks(W_OI):
        out_IR.addmm_(block_NI.T, M_OR[rows])
    return out_IR


def rounded_times(W_OI: Tensor, M_IR: Tensor) -> Tensor:
    """W·M, fp32, but rounded to bf16 on the way for a bf16 weight: for gradients, which are rounded so anyway."""
    return (W_OI @ M_IR.to(W_OI.dtype)).float() if W_OI.dtype == torch.bfloat16 else times(W_OI, M_IR)


def rounded_transposed_times(W_OI: Tensor, M_OR: Tensor) -> Tensor:
    """Wᵀ·M, as `rounded_times`."""
    return (M_OR.T.to(W_OI.dtype) @ W_OI).float().T if W_OI.dtype == torch.bfloat16 else transposed_times(W_OI, M_OR)


def _split(M: Tensor) -> tuple[Tensor, Tensor]:
    """Two bf16 terms whose sum is M to 2⁻¹⁷.

    A product with a bf16 weight is then two bf16 products; what rounding took from the large one is added back by a
    third. That is a few times cheaper than an fp32 copy of the weight, above all where bf16 has hardware of its own.
    """
    high = M.to(torch.bfloat16)
    return high, (M - high).to(torch.bfloat16)


def row_squares(W_OI: Tensor, weights_I: Tensor | None = None) -> Tensor:
    """Σ_j w_j W_ij², (O,) fp32."""
    out_O = torch.empty(W_OI.shape[0], device=W_OI.device)
    for rows, block_NI in _square_blocks(W_OI):
        if weights_I is None:
            torch.sum(block_NI, dim=1, out=out_O[rows])
        else:
            torch.mv(block_NI, weights_I, out=out_O[rows])
    return out_O


def column_squares(W_OI: Tensor, weights_O: Tensor | None = None) -> Tensor:
    """Σ_i w_i W_ij², (I,) fp32."""
    out_I = torch.zeros(W_OI.shape[1], device=W_OI.device)
    for rows, block_NI in _square_blocks(W_OI):
        if weights_O is None:
            out_I += block_NI.sum(dim=0)
        else:
            out_I.addmv_(block_NI.T, weights_O[rows])
    return out_I


def _square_blocks(W_OI: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for rows, block_NI in _fp32_blocks(W_OI):
        yield rows, block_NI.square_()


def _fp32_blocks(W_OI: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Copies of W's blocks in one and the same buffer: fresh memory for each would cost more than what is computed."""
    rows, columns = W_OI.shape
    values = rows * columns if W_OI.is_cuda else BLOCK_VALUES
    step = max(1, min(values // columns, rows // SMALLEST_SHARE))
    buffer_NI = torch.empty(step, columns, device=W_OI.device)
    for start in range(0, rows, step):
        block_NI = W_OI[start : start + step]
        yield slice(start, start + step), buffer_NI[: block_NI.shape[0]].copy_(block_NI)
