"""Scaled dot-product attention over four token patterns, by whichever backend the machine has.

Shape legend: B batch (or 1 for packed tokens), L query tokens, M key tokens, H heads, D head width.
Patterns say who sees whom; backends say how it is computed: `BACKENDS` is the table, and `force_backend` pins one.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from sa3train.models.attention_dense import blocked_rows, dense, sdpa_rows
from sa3train.models.attention_varlen import varlen_attention
from sa3train.models.patterns import Packed, Padded, Pattern, Window

__all__ = ["BACKENDS", "Packed", "Padded", "Pattern", "Window", "attend", "force_backend", "preferred_backend"]

Backend = Callable[[Tensor, Tensor, Tensor, Pattern], Tensor]

_FORCED: ContextVar[str | None] = ContextVar("forced_attention_backend", default=None)


def attend(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, pattern: Pattern = None) -> Tensor:
    """softmax(q kᵀ / √D) v over the keys that `pattern` lets each query see; (B, L, H, D).

    Packed and windowed patterns take B = 1 and raise `ValueError` when the lengths do not add up.
    """
    _check(q_BLHD, k_BMHD, pattern)
    name = _FORCED.get() or preferred_backend(q_BLHD, pattern)
    return BACKENDS[name](q_BLHD, k_BMHD, v_BMHD, pattern)


@contextlib.contextmanager
def force_backend(name: str) -> Iterator[None]:
    """Use one backend ("reference", "sdpa", "blocked", "varlen" or "flash") for everything inside the block."""
    if name not in BACKENDS:
        raise ValueError(f"no attention backend {name!r}; there are {', '.join(BACKENDS)}")
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)


def preferred_backend(q_BLHD: Tensor, pattern: Pattern) -> str:
    """Varlen kernels where they exist (CUDA, 16-bit) and the pattern needs them; SDPA otherwise.

    Except for bf16 without gradients on a CPU that has instructions for it: there plain products are twice as fast.
    """
    if q_BLHD.dtype == torch.bfloat16 and q_BLHD.device.type == "cpu":
        return "blocked" if _has_cpu_bf16() and not torch.is_grad_enabled() else "sdpa"
    if pattern is None or not q_BLHD.is_cuda or q_BLHD.dtype not in (torch.float16, torch.bfloat16):
        return "sdpa"
    if _has_torch_varlen():
        return "varlen"
    return "flash" if importlib.util.find_spec("flash_attn") else "sdpa"


@functools.cache
def _has_cpu_bf16() -> bool:
    """Whether torch multiplies bf16 matrices by instructions made for it (AVX512-BF16, AMX)."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def _has_torch_varlen() -> bool:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _check(q_BLHD: Tensor, k_BMHD: Tensor, pattern: Pattern) -> None:
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


# reference: the definition, with every mask written out. Quadratic; for tests.


def _visible(q_BLHD: Tensor, k_BMHD: Tensor, pattern: Pattern) -> Tensor | None:
    """Boolean mask broadcastable to (B, H, L, M), True = seen."""
    device = q_BLHD.device
    match pattern:
        case Padded(key_mask_BM):
            return key_mask_BM[:, None, None, :]
        case Packed(query_lengths, key_lengths):
            queries, keys = _owners(query_lengths, device), _owners(key_lengths, device)
            return (queries[:, None] == keys[None, :])[None, None]
        case Window(lengths, radius):
            owners, places = _owners(lengths, device), torch.arange(sum(lengths), device=device)
            near = (places[:, None] - places[None, :]).abs() <= radius
            return (near & (owners[:, None] == owners[None, :]))[None, None]
    return None


def _owners(lengths: Sequence[int], device: torch.device) -> Tensor:
    counts = torch.tensor(lengths, device=device)
    return torch.repeat_interleave(torch.arange(len(lengths), device=device), counts)


def _reference(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, pattern: Pattern) -> Tensor:
    scores_BHLM = torch.einsum("blhd,bmhd->bhlm", q_BLHD.float(), k_BMHD.float()) * q_BLHD.shape[-1] ** -0.5
    visible = _visible(q_BLHD, k_BMHD, pattern)
    if visible is not None:
        scores_BHLM = scores_BHLM.masked_fill(~visible, -torch.inf)
    out_BLHD = torch.einsum("bhlm,bmhd->blhd", scores_BHLM.softmax(dim=-1), v_BMHD.float())
    return out_BLHD.to(q_BLHD.dtype)


BACKENDS: dict[str, Backend] = {
    "reference": _reference,
    "sdpa": functools.partial(dense, sdpa_rows),
    "blocked": functools.partial(dense, blocked_rows),
    "varlen": functools.partial(varlen_attention, "varlen"),
    "flash": functools.partial(varlen_attention, "flash"),
}
