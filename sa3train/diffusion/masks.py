"""Which frames are real, which are kept, which are generated (docs/model.md, section 6).

Attention masks (B, T): True = real. Inpainting masks (B, 1, T) float: 1 = keep, 0 = generate, 0 past the real length.
Inpainting masks are drawn from a Python `random.Random`, in the order of the released trainer; silence from a torch
generator.
"""

import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

MaskKind = Callable[[int, random.Random], Tensor]

DEFAULT_MIX = {"segments": 0.1, "full": 0.8, "continuation": 0.1}
"""Shares of the kinds of masks that the released models were trained with."""

MAX_SEGMENTS = 10
SPAN_COUNTS, SPAN_COUNT_WEIGHTS = (1, 2, 3, 4), (4, 2, 1, 1)
MIN_SPAN_SHARE = 0.2
SPAN_TRIES = 50


def build_attention_mask(lengths_B: Tensor, frames: int) -> Tensor:
    """Build an attention mask from lengths.

    Args:
        lengths_B: Real frames of each clip.
        frames: Frames of a row, T.

    Returns:
        (B, T) bool, True for the first `lengths_B` frames.
    """
    return torch.arange(frames, device=lengths_B.device)[None, :] < lengths_B[:, None]


def extend_into_silence(
    attention_mask_BT: Tensor,
    generator: torch.Generator | None = None,
    *,
    mean_seconds: float = 4.0,
    frames_per_second: float = 44100 / 4096,
) -> Tensor:
    """Extend the real part of each clip into the silence after it, so that the model learns to end.

    Args:
        attention_mask_BT: True = real; the real frames come first.
        generator: CPU generator of the lengths.
        mean_seconds: Mean of the exponential distribution of lengths in seconds.
        frames_per_second: Latent frames per second.

    Returns:
        Extended mask (B, T): longer by floor(Exp) frames, at most T.
    """
    batch, frames = attention_mask_BT.shape
    draw_B = torch.empty(batch).exponential_(1 / (mean_seconds * frames_per_second), generator=generator)
    lengths_B = attention_mask_BT.sum(dim=1) + draw_B.floor().to(attention_mask_BT.device, torch.int64)
    return build_attention_mask(lengths_B.clamp(max=frames), frames)


def _keep_around_segments(length: int, rng: random.Random) -> Tensor:
    """Keep all but up to ten random segments, which may overlap: (length,)."""
    kept_T = torch.ones(length)
    count = rng.randint(1, MAX_SEGMENTS)
    for _ in range(count):
        size = rng.randint(1, max(1, length // count))
        start = rng.randint(0, length - size)
        kept_T[start : start + size] = 0
    return kept_T


def _keep_nothing(length: int, rng: random.Random) -> Tensor:
    """Generate everything; draws nothing: (length,)."""
    return torch.zeros(length)


def _keep_beginning(length: int, rng: random.Random) -> Tensor:
    """Keep a random beginning and generate its continuation: (length,)."""
    kept_T = torch.zeros(length)
    kept_T[: rng.randint(0, length)] = 1
    return kept_T


def _keep_around_spans(length: int, rng: random.Random) -> Tensor:
    """Keep all but one to four spans that do not overlap and cover 20 to 100 % together: (length,)."""
    kept_T = torch.ones(length)
    for size in sorted(_draw_span_sizes(length, rng), reverse=True):
        start = _find_free_start(kept_T, size, rng)
        if start is not None:
            kept_T[start : start + size] = 0
    return kept_T


MASK_KINDS: dict[str, MaskKind] = {
    "segments": _keep_around_segments,
    "full": _keep_nothing,
    "continuation": _keep_beginning,
    "spans": _keep_around_spans,
}


def draw_inpainting_masks(
    attention_mask_BT: Tensor, rng: random.Random, mix: Mapping[str, float] = DEFAULT_MIX
) -> Tensor:
    """Draw an inpainting mask for each clip.

    Args:
        attention_mask_BT: True = real; the real frames come first.
        rng: Source of all draws.
        mix: Share of each of `MASK_KINDS`. A single kind needs no draw.

    Returns:
        (B, 1, T) float: 1 = keep, 0 = generate. An unknown kind raises `ValueError`.
    """
    unknown = sorted(set(mix) - set(MASK_KINDS))
    if unknown or not mix:
        raise ValueError(f"unknown inpainting kinds {unknown}; choose from {sorted(MASK_KINDS)}")
    names, weights = list(mix), list(mix.values())
    masks_BT = torch.zeros(attention_mask_BT.shape)
    for row, length in enumerate(attention_mask_BT.sum(dim=1).tolist()):
        name = names[0] if len(names) == 1 else names[rng.choices(range(len(names)), weights)[0]]
        if length > 0:
            masks_BT[row, :length] = MASK_KINDS[name](length, rng)
    return masks_BT[:, None, :].to(attention_mask_BT.device)


def build_region_mask(
    regions: Sequence[tuple[float, float]], seconds: float, sample_rate: int, samples: int, frames: int
) -> Tensor:
    """Build the inpainting mask of a generation: in samples, then resampled to the nearest, as in the released models.

    Args:
        regions: Start and end in seconds of what is generated.
        seconds: Duration; everything after it is generated.
        sample_rate: Sample rate in Hz.
        samples: Length in samples.
        frames: Length in latent frames, T.

    Returns:
        (T,) float: 1 = keep, 0 = generate.
    """
    kept_N = torch.ones(samples)
    for start, end in regions:
        kept_N[int(start * sample_rate) : int(end * sample_rate)] = 0
    kept_N[int(seconds * sample_rate) :] = 0
    return torch.nn.functional.interpolate(kept_N[None, None], size=frames, mode="nearest")[0, 0]


def _draw_span_sizes(length: int, rng: random.Random) -> list[int]:
    target = max(1, int(rng.uniform(MIN_SPAN_SHARE, 1.0) * length))
    count = min(rng.choices(SPAN_COUNTS, SPAN_COUNT_WEIGHTS)[0], length)
    weights = [rng.random() for _ in range(count)]
    sizes = [max(1, int(weight / sum(weights) * target)) for weight in weights]
    sizes[0] += max(0, target - sum(sizes))
    for index in range(count):
        excess = sum(sizes) - target
        sizes[index] -= min(max(0, excess), sizes[index] - 1)
    return sizes


def _find_free_start(kept_T: Tensor, size: int, rng: random.Random) -> int | None:
    length = len(kept_T)
    for _ in range(SPAN_TRIES):
        start = rng.randint(0, length - size)
        if bool(kept_T[start : start + size].all()):
            return start
    free = kept_T.unfold(0, size, 1).all(dim=1).nonzero()
    return int(free[0]) if len(free) else None
