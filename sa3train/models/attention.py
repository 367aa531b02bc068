"""Scaled dot-product attention over four token patterns, by whichever backend the machine has.

Shape legend: B batch rows (1 for packed tokens), L query tokens, M key tokens, H heads, D head width, N window blocks.

Patterns say who sees whom:

- `None`: every query sees every key of its batch row.
- `Padded`: keys past a clip's real length are never seen.
- `Packed`: one row of several sequences laid end to end; none sees another.
- `Window`: as `Packed`, and only keys at distance <= radius. Linear in memory and time.

Backends say how it is computed. `BACKENDS` is the table, and `force_backend` pins one:

- "reference": the definition with every mask written out. Quadratic; for tests.
- "sdpa": torch's SDPA over rows that the patterns are brought to.
- "blocked": the same rows by matrix products in blocks, on CPUs with bf16 instructions (SDPA is half as fast there).
- "varlen", "flash": fused kernels over flat tokens and cumulative lengths (CUDA, 16-bit), torch's or flash-attn's.
"""

import contextlib
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sa3train.core.device import move_to_device
from sa3train.models.blocked_attention import attend_in_blocks
from sa3train.models.cpu_kernels import has_bf16_instructions


@dataclass(frozen=True, eq=False)
class Padded:
    """Rows with padding at their ends.

    Attributes:
        key_mask_BM: True = real. Real tokens come first in every row, as the fused kernels need it.
    """

    key_mask_BM: Tensor

    @functools.cached_property
    def bounds(self) -> Tensor:
        """Cumulative token counts (2B + 1,) int32 that make each row's real part and its rest two sequences."""
        rows, length = self.key_mask_BM.shape
        real_B = self.key_mask_BM.sum(dim=1)
        starts_B = torch.arange(rows, device=real_B.device) * length
        bounds = torch.stack((starts_B, starts_B + real_B), dim=1).flatten()
        return torch.cat((bounds, bounds.new_full((1,), rows * length))).to(torch.int32)

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Real tokens of each row. Waits for the device."""
        return self.key_mask_BM.sum(dim=1).tolist()


@dataclass(frozen=True)
class Packed:
    """Sequences laid end to end.

    Attributes:
        query_lengths: Lengths of the sequences in the query row.
        key_lengths: Lengths of those in the key row.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """Sequences laid end to end, with attention to near tokens only.

    Attributes:
        lengths: Lengths of the sequences.
        radius: How many tokens each sees to both sides.
    """

    lengths: tuple[int, ...]
    radius: int


Pattern = Padded | Packed | Window | None
Backend = Callable[[Tensor, Tensor, Tensor, Pattern], Tensor]


WINDOW_BLOCK = 64
Rows = Callable[..., Tensor]  # (q_BLHD, k_BMHD, v_BMHD, mask broadcastable to BHLM or None) -> BLHD
_FORCED: ContextVar[str | None] = ContextVar("forced_attention_backend", default=None)


def _attend_by_sdpa(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, mask: Tensor | None = None) -> Tensor:
    out_BHLD = F.scaled_dot_product_attention(
        q_BLHD.transpose(1, 2), k_BMHD.transpose(1, 2), v_BMHD.transpose(1, 2), attn_mask=mask
    )
    return out_BHLD.transpose(1, 2)


def _attend_densely(rows: Rows, q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, pattern: Pattern) -> Tensor:
    match pattern:
        case Padded(key_mask_BM):
            if q_BLHD.device.type == "cpu":
                return _attend_padded(rows, q_BLHD, k_BMHD, v_BMHD, pattern.lengths)
            return rows(q_BLHD, k_BMHD, v_BMHD, key_mask_BM[:, None, None, :])
        case Packed(query_lengths, key_lengths):
            return _attend_packed(rows, q_BLHD, k_BMHD, v_BMHD, query_lengths, key_lengths)
        case Window(lengths, radius):
            return _attend_in_windows(rows, q_BLHD, k_BMHD, v_BMHD, lengths, radius)
    return rows(q_BLHD, k_BMHD, v_BMHD)


def _attend_padded(rows: Rows, q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attend in rows of one length together over their real keys alone, so neighbors' lengths change nothing."""
    parts, start = [], 0
    for length, run in itertools.groupby(lengths):
        span = slice(start, start := start + len(list(run)))
        parts.append(rows(q_BLHD[span], k_BMHD[span, :length], v_BMHD[span, :length]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_packed(
    rows: Rows, q_1LHD: Tensor, k_1MHD: Tensor, v_1MHD: Tensor, query_lengths: Sequence[int], key_lengths: Sequence[int]
) -> Tensor:
    if len(set(query_lengths)) == 1 and len(set(key_lengths)) == 1:
        count = len(query_lengths)
        q, k, v = (x.reshape(count, -1, *x.shape[2:]) for x in (q_1LHD, k_1MHD, v_1MHD))
        return rows(q, k, v).reshape(q_1LHD.shape)
    parts = zip(q_1LHD.split(query_lengths, 1), k_1MHD.split(key_lengths, 1), v_1MHD.split(key_lengths, 1), strict=True)
    return torch.cat([rows(q, k, v) for q, k, v in parts], dim=1)


def _attend_in_windows(
    rows: Rows, q_1LHD: Tensor, k_1LHD: Tensor, v_1LHD: Tensor, lengths: tuple[int, ...], radius: int
) -> Tensor:
    """Attend in blocks of queries, each with its own stretch of keys: memory grows with L, not with L²."""
    queries_NL, keys_NM, visible_NLM, positions_L = _build_window_blocks(lengths, radius, q_1LHD.device)
    blocks_NLHD = rows(q_1LHD[0, queries_NL], k_1LHD[0, keys_NM], v_1LHD[0, keys_NM], visible_NLM[:, None])
    return blocks_NLHD.flatten(0, 1)[positions_L][None]


@functools.lru_cache(maxsize=8)
@torch.inference_mode(mode=False)  # cached tensors must also serve a later call with gradients
def _build_window_blocks(lengths: tuple[int, ...], radius: int, device: torch.device) -> tuple[Tensor, ...]:
    """Build query and key positions of each block, who sees whom, and where in the flattened blocks each token is."""
    size = WINDOW_BLOCK
    queries, keys, visible, positions = [], [], [], []
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
        positions.append(torch.arange(length) + blocks * size)
        start, blocks = start + length, blocks + count
    parts = (queries, keys, visible, positions)
    return tuple(move_to_device(torch.cat(part), device) for part in parts)


def _load_kernel(name: str) -> Callable[..., Any]:
    """Load the fused kernel of a backend; both take the same arguments."""
    if name == "flash":
        from flash_attn import flash_attn_varlen_func as kernel
    else:
        from torch.nn.attention.varlen import varlen_attn as kernel
    return kernel


# Entries are evicted, so nothing that CUDA graphs record may read them (see inference/cuda_graphs.py).
@functools.lru_cache(maxsize=32)
@torch.inference_mode(mode=False)
def _compute_bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return move_to_device(torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32), device)


def _attend_by_kernel(name: str, q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, pattern: Pattern) -> Tensor:
    (rows, length), keys, device = q_BLHD.shape[:2], k_BMHD.shape[1], q_BLHD.device
    radius, longest_q, longest_k = -1, length, keys
    match pattern:
        case Padded():
            if length != keys:
                raise ValueError(f"a padded pattern is for self-attention, not {length} queries over {keys} keys")
            bounds_q = bounds_k = pattern.bounds
        case Packed(query_lengths, key_lengths):
            bounds_q, bounds_k = _compute_bounds(query_lengths, device), _compute_bounds(key_lengths, device)
            longest_q, longest_k = max(query_lengths), max(key_lengths)
        case Window(lengths, radius):
            bounds_q = bounds_k = _compute_bounds(lengths, device)
            longest_q = longest_k = max(lengths)
        case _:
            bounds_q, bounds_k = _compute_bounds((length,) * rows, device), _compute_bounds((keys,) * rows, device)
    q_LHD, k_MHD, v_MHD = (x.flatten(0, 1).contiguous() for x in (q_BLHD, k_BMHD, v_BMHD))
    out = _load_kernel(name)(
        q_LHD, k_MHD, v_MHD, bounds_q, bounds_k, longest_q, longest_k, window_size=(radius, radius)
    )
    out_LHD: Tensor = out if isinstance(out, Tensor) else out[0]
    return out_LHD.view(q_BLHD.shape)


def attend(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, pattern: Pattern = None) -> Tensor:
    """Compute softmax(q kᵀ / √D) v over the keys that each query sees.

    Args:
        q_BLHD: Queries.
        k_BMHD: Keys.
        v_BMHD: Values.
        pattern: Who sees whom. Packed and windowed patterns need B = 1 and lengths that add up; otherwise `ValueError`.

    Returns:
        (B, L, H, D).
    """
    _check_lengths(q_BLHD, k_BMHD, pattern)
    name = _FORCED.get() or choose_backend(q_BLHD, pattern)
    return BACKENDS[name](q_BLHD, k_BMHD, v_BMHD, pattern)


@contextlib.contextmanager
def force_backend(name: str) -> Iterator[None]:
    """Force one backend for everything inside the block.

    Args:
        name: Key of `BACKENDS`; another is a `ValueError`.

    Yields:
        Nothing.
    """
    if name not in BACKENDS:
        raise ValueError(f"no attention backend {name!r}; there are {', '.join(BACKENDS)}")
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)


def choose_backend(q_BLHD: Tensor, pattern: Pattern) -> str:
    """Choose the fastest backend.

    Fused kernels where they exist (CUDA, 16-bit) and the pattern needs them, SDPA otherwise. For bf16 on a CPU with
    bf16 instructions "blocked", which is twice as fast there.

    Args:
        q_BLHD: Queries.
        pattern: Who sees whom.

    Returns:
        Key of `BACKENDS`.
    """
    if q_BLHD.dtype == torch.bfloat16 and q_BLHD.device.type == "cpu":
        return "blocked" if has_bf16_instructions() and not torch.compiler.is_compiling() else "sdpa"
    if pattern is None or not q_BLHD.is_cuda or q_BLHD.dtype not in (torch.float16, torch.bfloat16):
        return "sdpa"
    if _has_torch_varlen():
        return "varlen"
    return "flash" if importlib.util.find_spec("flash_attn") else "sdpa"


@functools.cache
def _has_torch_varlen() -> bool:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _check_lengths(q_BLHD: Tensor, k_BMHD: Tensor, pattern: Pattern) -> None:
    match pattern:
        case Packed(query_lengths, key_lengths):
            lengths: tuple[tuple[int, Sequence[int]], ...] = (
                (q_BLHD.shape[1], query_lengths),
                (k_BMHD.shape[1], key_lengths),
            )
        case Window(window_lengths, _):
            lengths = ((q_BLHD.shape[1], window_lengths), (k_BMHD.shape[1], window_lengths))
        case _:
            return
    if q_BLHD.shape[0] != 1 or any(total != sum(parts) for total, parts in lengths):
        raise ValueError(f"{pattern} does not describe queries {tuple(q_BLHD.shape)} and keys {tuple(k_BMHD.shape)}")


def _build_visibility_mask(q_BLHD: Tensor, k_BMHD: Tensor, pattern: Pattern) -> Tensor | None:
    """Build a boolean mask broadcastable to (B, H, L, M), True = seen."""
    device = q_BLHD.device
    match pattern:
        case Padded(key_mask_BM):
            return key_mask_BM[:, None, None, :]
        case Packed(query_lengths, key_lengths):
            queries, keys = _index_sequences(query_lengths, device), _index_sequences(key_lengths, device)
            return (queries[:, None] == keys[None, :])[None, None]
        case Window(lengths, radius):
            owners, positions = _index_sequences(lengths, device), torch.arange(sum(lengths), device=device)
            near = (positions[:, None] - positions[None, :]).abs() <= radius
            return (near & (owners[:, None] == owners[None, :]))[None, None]
    return None


def _index_sequences(lengths: Sequence[int], device: torch.device) -> Tensor:
    counts = torch.tensor(lengths, device=device)
    return torch.repeat_interleave(torch.arange(len(lengths), device=device), counts)


def _attend_by_definition(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, pattern: Pattern) -> Tensor:
    scores_BHLM = torch.einsum("blhd,bmhd->bhlm", q_BLHD.float(), k_BMHD.float()) * q_BLHD.shape[-1] ** -0.5
    visible = _build_visibility_mask(q_BLHD, k_BMHD, pattern)
    if visible is not None:
        scores_BHLM = scores_BHLM.masked_fill(~visible, -torch.inf)
    out_BLHD = torch.einsum("bhlm,bmhd->blhd", scores_BHLM.softmax(dim=-1), v_BMHD.float())
    return out_BLHD.to(q_BLHD.dtype)


BACKENDS: dict[str, Backend] = {
    "reference": _attend_by_definition,
    "sdpa": functools.partial(_attend_densely, _attend_by_sdpa),
    "blocked": functools.partial(_attend_densely, attend_in_blocks),
    "varlen": functools.partial(_attend_by_kernel, "varlen"),
    "flash": functools.partial(_attend_by_kernel, "flash"),
}
