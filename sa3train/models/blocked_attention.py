"""Attention as plain matrix products over blocks of scores, for bf16 on CPUs with instructions for it.

torch's fused kernels take twice the time there, forward and backward. A block of scores is computed, used and dropped
while it is in the cache. The backward pass computes it again, so nothing but queries, keys and values is saved; it
takes all queries of a head at once, so that beyond 1024 tokens a block is larger (64 MiB with its gradient at 4096).
Shape legend: B rows, L query tokens, M key tokens, H heads, D head width, N heads of one block (of one row, or of
whole rows).
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

SCORES_PER_BLOCK = 2**20
"""Scores of one block, 2 MiB in bf16: stays in the cache, and long enough for the products to run at their rate."""

_Block = tuple[slice, slice, slice]  # of rows, heads and queries


def attend_in_blocks(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute attention, differentiable in queries, keys and values.

    Args:
        q_BLHD: Queries.
        k_BMHD: Keys.
        v_BMHD: Values.
        mask: Broadcastable to (B, H, L, M), True = seen; None: all are.

    Returns:
        (B, L, H, D).
    """
    out_BLHD: Tensor = _BlockedAttention.apply(q_BLHD, k_BMHD, v_BMHD, mask)
    return out_BLHD


class _BlockedAttention(Function):
    @staticmethod
    def forward(ctx: Any, q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (_copy_head_major(x) for x in (q_BLHD, k_BMHD, v_BMHD))
        ctx.save_for_backward(q, k, v, mask)
        out_BHLD = torch.empty_like(q)
        query_step = max(1, SCORES_PER_BLOCK // max(1, k.shape[2]))
        for block, scores_NLM in _iterate_blocks(q, k, query_step):
            keys = block[:2]
            _compute_weights(q[block], k[keys], _select(mask, block), scores_NLM)
            if query_step < q.shape[2]:  # a slice of tokens is no contiguous block of the output
                out_BHLD[block] = (scores_NLM @ v[keys].flatten(0, 1)).view_as(out_BHLD[block])
            else:
                torch.bmm(scores_NLM, v[keys].flatten(0, 1), out=out_BHLD[block].flatten(0, 1))
        return out_BHLD.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BLHD: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        dout = _copy_head_major(dout_BLHD)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        room: Tensor | None = None
        for block, scores_NLM in _iterate_blocks(q, k, q.shape[2]):
            q_NLD, k_NMD, v_NMD, dout_NLD, dq_NLD, dk_NMD, dv_NMD = (
                x[block[:2]].flatten(0, 1) for x in (q, k, v, dout, dq, dk, dv)
            )
            _compute_weights(q[block], k[block[:2]], _select(mask, block), scores_NLM)
            torch.bmm(scores_NLM.mT, dout_NLD, out=dv_NMD)
            room = torch.empty_like(scores_NLM) if room is None else room
            gradient_NLM = torch.bmm(dout_NLD, v_NMD.mT, out=room[: len(scores_NLM)])
            torch._softmax_backward_data(gradient_NLM, scores_NLM, -1, scores_NLM.dtype, grad_input=gradient_NLM)
            torch.bmm(gradient_NLM, k_NMD, out=dq_NLD)
            torch.bmm(gradient_NLM.mT, q_NLD, out=dk_NMD)
        for gradient in (dq, dk):
            gradient *= q.shape[-1] ** -0.5
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None


def _copy_head_major(x_BLHD: Tensor) -> Tensor:
    """(B, H, L, D), head by head in memory, as the products read it."""
    return x_BLHD.transpose(1, 2).contiguous()


def _iterate_blocks(q_BHLD: Tensor, k_BHMD: Tensor, query_step: int) -> Iterator[tuple[_Block, Tensor]]:
    """Yield blocks, with room for their scores (N, L, M) that is valid until the next."""
    (rows, heads, length, _), keys = q_BHLD.shape, k_BHMD.shape[2]
    scores = max(1, length * keys)
    row_step = max(1, SCORES_PER_BLOCK // (heads * scores))
    head_step = min(heads, max(1, SCORES_PER_BLOCK // scores))
    room = q_BHLD.new_empty(min(rows, row_step) * head_step * min(length, query_step) * keys)
    for b, h, q in itertools.product(
        range(0, rows, row_step), range(0, heads, head_step), range(0, length, query_step)
    ):
        counts = min(row_step, rows - b), min(head_step, heads - h), min(query_step, length - q)
        block = slice(b, b + counts[0]), slice(h, h + counts[1]), slice(q, q + counts[2])
        shape = counts[0] * counts[1], counts[2], keys
        yield block, room[: shape[0] * shape[1] * keys].view(shape)


def _select(mask: Tensor | None, block: _Block) -> Tensor | None:
    """Select a block of a mask, whose rows, heads and queries may be broadcast."""
    if mask is None:
        return None
    return mask[tuple(part if size > 1 else slice(None) for part, size in zip(block, mask.shape[:3], strict=True))]


def _compute_weights(q_BHLD: Tensor, k_BHMD: Tensor, mask: Tensor | None, out_NLM: Tensor) -> None:
    """Compute softmax(qkᵀ / √D) of one block into `out_NLM`."""
    q_NLD, k_NMD = q_BHLD.flatten(0, 1), k_BHMD.flatten(0, 1)
    torch.baddbmm(out_NLM, q_NLD, k_NMD.mT, beta=0, alpha=q_NLD.shape[-1] ** -0.5, out=out_NLM)
    if mask is not None:
        out_NLM.view(*q_BHLD.shape[:3], -1).masked_fill_(~mask, -torch.inf)
    torch.softmax(out_NLM, -1, out=out_NLM)
