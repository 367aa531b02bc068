"""Which frames are real, which are kept, which are generated.

Padding masks (B, T): True = real. Inpainting masks (B, 1, T) float: 1 = keep, 0 = generate, 0 past the real length.
Draws of inpainting masks come from a Python `random.Random`, as the released trainer's do, in its order
(reference section 6); draws of silence come from a torch generator.
"""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Kept = Callable[[int, random.Random], Tensor]

SHARES = (0.1, 0.8, 0.1)
MOST_SEGMENTS = 10
SPAN_COUNTS, SPAN_COUNT_WEIGHTS = (1, 2, 3, 4), (4, 2, 1, 1)
LEAST_SPAN_SHARE = 0.2
SPAN_TRIES = 50


def padding_mask(lengths_B: Tensor, frames: int) -> Tensor:
    """True for the first `lengths_B` of `frames` positions: (B, T) bool."""
    return torch.arange(frames, device=lengths_B.device)[None, :] < lengths_B[:, None]


def resize_padding_mask(lengths_B: Tensor, source_length: int, frames: int) -> Tensor:
    """Turn valid lengths in samples (of `source_length`) into a frame mask by ceil(valid * frames / source)."""
    lengths_B = lengths_B.to(torch.int64)
    return padding_mask(-((-lengths_B * frames) // source_length), frames)


def extend_into_silence(
    padding_mask_BT: Tensor,
    generator: torch.Generator | None = None,
    *,
    mean_seconds: float = 4.0,
    frames_per_second: float = 44100 / 4096,
) -> Tensor:
    """Lengthen each item's real part by floor(Exp(mean `mean_seconds`)) frames, at most to T.

    The model learns to end in silence this way. Real positions must be the first ones of each row.
    """
    batch, frames = padding_mask_BT.shape
    draw_B = torch.empty(batch).exponential_(1 / (mean_seconds * frames_per_second), generator=generator)
    lengths_B = padding_mask_BT.sum(dim=1) + draw_B.floor().to(padding_mask_BT.device, torch.int64)
    return padding_mask(lengths_B.clamp(max=frames), frames)


def keep_around_segments(length: int, rng: random.Random) -> Tensor:
    """Keep everything but up to ten random segments, which may overlap: (length,)."""
    kept_T = torch.ones(length)
    count = rng.randint(1, MOST_SEGMENTS)
    for _ in range(count):
        size = rng.randint(1, max(1, length // count))
        start = rng.randint(0, length - size)
        kept_T[start : start + size] = 0
    return kept_T


def keep_nothing(length: int, rng: random.Random) -> Tensor:
    """Generate everything; draws nothing: (length,)."""
    return torch.zeros(length)


def keep_the_start(length: int, rng: random.Random) -> Tensor:
    """Keep a random beginning and continue it: (length,)."""
    kept_T = torch.zeros(length)
    kept_T[: rng.randint(0, length)] = 1
    return kept_T


def keep_around_spans(length: int, rng: random.Random) -> Tensor:
    """Keep everything but one to four spans that do not overlap and together cover 20 to 100 %: (length,)."""
    kept_T = torch.ones(length)
    for size in sorted(_span_sizes(length, rng), reverse=True):
        start = _free_start(kept_T, size, rng)
        if start is not None:
            kept_T[start : start + size] = 0
    return kept_T


KEEPERS: dict[str, Kept] = {
    "segments": keep_around_segments,
    "full": keep_nothing,
    "continuation": keep_the_start,
    "spans": keep_around_spans,
}


def inpainting_masks(padding_mask_BT: Tensor, rng: random.Random, kind: str | None = None) -> Tensor:
    """An inpainting mask for each item: (B, 1, T), all of `kind`, or mixed as the released models were trained.

    The mix is 10 % "segments", 80 % "full", 10 % "continuation".
    """
    if kind is not None:
        return mixed_inpainting_masks(padding_mask_BT, rng, {kind: 1.0})
    return mixed_inpainting_masks(padding_mask_BT, rng, dict(zip(KEEPERS, SHARES, strict=False)))


def mixed_inpainting_masks(padding_mask_BT: Tensor, rng: random.Random, shares: dict[str, float]) -> Tensor:
    """An inpainting mask for each item, its kind drawn by `shares` (no draw when there is only one): (B, 1, T)."""
    unknown = sorted(set(shares) - set(KEEPERS))
    if unknown or not shares:
        raise ValueError(f"unknown inpainting kinds {unknown}; known are {sorted(KEEPERS)}")
    names, weights = list(shares), list(shares.values())
    masks_BT = torch.zeros(padding_mask_BT.shape)
    for row, length in enumerate(padding_mask_BT.sum(dim=1).tolist()):
        name = names[0] if len(names) == 1 else names[rng.choices(range(len(names)), weights)[0]]
        if length > 0:
            masks_BT[row, :length] = KEEPERS[name](length, rng)
    return masks_BT[:, None, :].to(padding_mask_BT.device)


def regions_mask(
    regions: Sequence[tuple[float, float]], seconds: float, sample_rate: int, samples: int, frames: int
) -> Tensor:
    """The inpainting mask of a request: (T,), 0 in the `regions` (start, end in seconds) and past `seconds`.

    Built in samples and resized to frames by the nearest sample, as the released generate() does.
    """
    kept_N = torch.ones(samples)
    for start, end in regions:
        kept_N[int(start * sample_rate) : int(end * sample_rate)] = 0
    kept_N[int(seconds * sample_rate) :] = 0
    return torch.nn.functional.interpolate(kept_N[None, None], size=frames, mode="nearest")[0, 0]


def _span_sizes(length: int, rng: random.Random) -> list[int]:
    target = max(1, int(rng.uniform(LEAST_SPAN_SHARE, 1.0) * length))
    count = min(rng.choices(SPAN_COUNTS, SPAN_COUNT_WEIGHTS)[0], length)
    weights = [rng.random() for _ in range(count)]
    sizes = [max(1, int(weight / sum(weights) * target)) for weight in weights]
    sizes[0] += max(0, target - sum(sizes))
    for index in range(count):
        excess = sum(sizes) - target
        sizes[index] -= min(max(0, excess), sizes[index] - 1)
    return sizes


def _free_start(kept_T: Tensor, size: int, rng: random.Random) -> int | None:
    length = len(kept_T)
    for _ in range(SPAN_TRIES):
        start = rng.randint(0, length - size)
        if bool(kept_T[start : start + size].all()):
            return start
    free = kept_T.unfold(0, size, 1).all(dim=1).nonzero()
    return int(free[0]) if len(free) else None
