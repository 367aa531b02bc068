"""Attention patterns brought to plain attention over rows, which torch's SDPA or blocks of matrix products compute.

Shape legend: B batch rows (1 for packed tokens), L query tokens, M key tokens, H heads, D head width, N window blocks.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sa3train.models.patterns import Packed, Padded, Pattern, Window
from sa3train.transfer import to_device

WINDOW_BLOCK = 64
Rows = Callable[..., Tensor]  # (q_BLHD, k_BMHD, v_BMHD, mask broadcastable to BHLM or None) -> BLHD
SCORES_PER_BLOCK = 2**20  # 2 MiB in bf16: stays in the cache, and long enough for the products to run at their rate


def sdpa_rows(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, mask: Tensor | None = None) -> Tensor:
    out_BHLD = F.scaled_dot_product_attention(
        q_BLHD.transpose(1, 2), k_BMHD.transpose(1, 2), v_BMHD.transpose(1, 2), attn_mask=mask
    )
    return out_BHLD.transpose(1, 2)


def blocked_rows(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, mask: Tensor | None = None) -> Tensor:
    """QKᵀ, softmax and the sum of values for as many rows, heads and queries at a time as fit a block of scores."""
    (rows, length, heads, width), keys = q_BLHD.shape, k_BMHD.shape[1]
    out_BLHD = torch.empty_like(q_BLHD, memory_format=torch.contiguous_format)
    row_step = max(1, SCORES_PER_BLOCK // (heads * length * keys))
    head_step = min(heads, max(1, SCORES_PER_BLOCK // (length * keys)))
    query_step = min(length, max(1, SCORES_PER_BLOCK // keys))
    q_BHLD, k_BHDM, v_BHMD = q_BLHD.transpose(1, 2), k_BMHD.permute(0, 2, 3, 1), v_BMHD.transpose(1, 2)
    for b, h, q in itertools.product(
        range(0, rows, row_step), range(0, heads, head_step), range(0, length, query_step)
    ):
        bs, hs, qs = slice(b, b + row_step), slice(h, h + head_step), slice(q, q + query_step)
        scores_BHLM = torch.matmul(q_BHLD[bs, hs, qs] * width**-0.5, k_BHDM[bs, hs])
        if mask is not None:
            seen = mask[bs] if mask.shape[2] == 1 else mask[bs, :, qs]
            scores_BHLM.masked_fill_(~seen, -torch.inf)
        out_BLHD[bs, qs, hs] = torch.matmul(scores_BHLM.softmax(dim=-1), v_BHMD[bs, hs]).transpose(1, 2)
    return out_BLHD


def dense(rows: Rows, q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, pattern: Pattern) -> Tensor:
    match pattern:
        case Padded(key_mask_BM):
            if q_BLHD.device.type == "cpu":
                return _dense_padded(rows, q_BLHD, k_BMHD, v_BMHD, pattern.lengths)
            return rows(q_BLHD, k_BMHD, v_BMHD, key_mask_BM[:, None, None, :])
        case Packed(query_lengths, key_lengths):
            return _dense_packed(rows, q_BLHD, k_BMHD, v_BMHD, query_lengths, key_lengths)
        case Window(lengths, radius):
            return _dense_window(rows, q_BLHD, k_BMHD, v_BMHD, lengths, radius)
    return rows(q_BLHD, k_BMHD, v_BMHD)


def _dense_padded(rows: Rows, q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, lengths: Sequence[int]) -> Tensor:
    """Rows of one length together, over their real keys alone: no mask, and neighbours' lengths change nothing."""
    parts, start = [], 0
    for length, run in itertools.groupby(lengths):
        span = slice(start, start := start + len(list(run)))
        parts.append(rows(q_BLHD[span], k_BMHD[span, :length], v_BMHD[span, :length]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _dense_packed(
    rows: Rows,
    q_1LHD: Tensor,
    k_1MHD: Tensor,
    v_1MHD: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
) -> Tensor:
    if len(set(query_lengths)) == 1 and len(set(key_lengths)) == 1:
        count = len(query_lengths)
        q, k, v = (x.reshape(count, -1, *x.shape[2:]) for x in (q_1LHD, k_1MHD, v_1MHD))
        return rows(q, k, v).reshape(q_1LHD.shape)
    parts = zip(q_1LHD.split(query_lengths, 1), k_1MHD.split(key_lengths, 1), v_1MHD.split(key_lengths, 1), strict=True)
    return torch.cat([rows(q, k, v) for q, k, v in parts], dim=1)


def _dense_window(
    rows: Rows, q_1LHD: Tensor, k_1LHD: Tensor, v_1LHD: Tensor, lengths: tuple[int, ...], radius: int
) -> Tensor:
    """Blocks of queries, each with its own stretch of keys: memory grows with L, never with L²."""
    queries_NL, keys_NM, visible_NLM, places_L = window_blocks(lengths, radius, q_1LHD.device)
    blocks_NLHD = rows(q_1LHD[0, queries_NL], k_1LHD[0, keys_NM], v_1LHD[0, keys_NM], visible_NLM[:, None])
    return blocks_NLHD.flatten(0, 1)[places_L][None]


@functools.lru_cache(maxsize=8)
@torch.inference_mode(mode=False)  # kept tensors must also serve a later call with gradients
def window_blocks(lengths: tuple[int, ...], radius: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query and key positions of each block, who sees whom, and where in the flattened blocks each token is."""
    size = WINDOW_BLOCK
    queries, keys, visible, places = [], [], [], []
    start = blocks = 0
    for length in lengths:
        count = -(-length // size)
        first_N = torch.arange(count) * size
        query_NL = first_N[:, None] + torch.arange(size)
        key_NM = first_N[:, None] - radius + torch.arange(size + 2 * radius)
        near_NLM = (query_NL[:, :, None] - key_NM[:, None, :]).abs() <= radius
        exists_NM = (key_NM >= 0) & (key_NM < length)
        # A query past the end is thrown away afterwards; it sees something so that its softmax stays finite.
        past_NL = query_NL >= length
        visible.append((near_NLM & exists_NM[:, None, :]) | past_NL[:, :, None])
        queries.append(query_NL.clamp(max=length - 1) + start)
        keys.append(key_NM.clamp(0, length - 1) + start)
        places.append(torch.arange(length) + blocks * size)
        start, blocks = start + length, blocks + count
    found = (torch.cat(queries), torch.cat(keys), torch.cat(visible), torch.cat(places))
    first, second, third, fourth = (to_device(tensor, device) for tensor in found)
    return first, second, third, fourth
