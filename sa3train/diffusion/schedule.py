"""Noise levels: how timesteps are warped for sampling and for training.

Convention: t = 1 is noise, t = 0 is data, x_t = (1 - t) * data + t * noise. Shapes: B items.
Lengths are counted in latent frames (4096 samples each in the released models).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Length = int | float | Tensor
Shift = Callable[[Tensor, Length], Tensor]

# Stable Audio 3, reference section 5: ends of the log-SNR line and the length it is anchored at.
LOGSNR_AT_DATA = 2.0
LOGSNR_AT_NOISE = -6.2
LOGSNR_ANCHOR_LENGTH = 2000
SHORTEST, LONGEST = 256, 4096
FULL_SHIFT_LOW, FULL_SHIFT_HIGH = 0.5, 1.15
FLUX_HIGHEST = 6.93


def logsnr_shift(t: Tensor, length: Length | None = None, rate: float = 0.0) -> Tensor:
    """Warp `t` so that the log-SNR falls in a line from 2 at the data to -6.2 - rate*log2(length/2000) at the noise.

    The released models sample with rate 0, where `length` plays no part. t <= 0 gives 0 and t >= 1 gives 1.
    """
    span = LOGSNR_AT_DATA - LOGSNR_AT_NOISE
    extra: float | Tensor = 0.0
    if rate != 0.0:
        if length is None:
            raise ValueError("logsnr_shift with a rate needs the length in latent frames")
        extra = rate * torch.log2(torch.as_tensor(length, dtype=t.dtype, device=t.device) / LOGSNR_ANCHOR_LENGTH)
    shifted = torch.sigmoid(-(LOGSNR_AT_DATA - t * (span + extra)))
    return torch.where(t <= 0, torch.zeros_like(t), torch.where(t >= 1, torch.ones_like(t), shifted))


def full_shift(t: Tensor, length: Length, shortest: int = SHORTEST, longest: int = LONGEST) -> Tensor:
    """The released models' training shift: longer items see more noise, by length clamped to [shortest, longest]."""
    clamped = _clamped(length, t, shortest, longest)
    mu = -(FULL_SHIFT_LOW + (FULL_SHIFT_HIGH - FULL_SHIFT_LOW) * (clamped - shortest) / (longest - shortest))
    strength = torch.exp(mu)
    return 1 - strength / (strength + (1 / (1 - t) - 1))


def full_sine_shift(t: Tensor, length: Length, shortest: int = SHORTEST, longest: int = LONGEST) -> Tensor:
    """`sin(pi/2 * full_shift(t))`."""
    return torch.sin(full_shift(t, length, shortest, longest) * math.pi / 2)


def flux_shift(t: Tensor, length: Length, shortest: int = SHORTEST, longest: int = LONGEST) -> Tensor:
    """`a*t / (1 + (a-1)*t)`, a growing from 1 at the shortest length to 6.93 at the longest (as the Flux models)."""
    clamped = _clamped(length, t, shortest, longest)
    a = torch.pow(FLUX_HIGHEST, torch.log(clamped / shortest) / math.log(longest / shortest))
    return a * t / (1 + (a - 1) * t)


def no_shift(t: Tensor, length: Length) -> Tensor:
    """`t` as it is."""
    return t


SHIFTS: dict[str, Shift] = {
    "none": no_shift,
    "logsnr": logsnr_shift,
    "full": full_shift,
    "full.sine": full_sine_shift,
    "flux": flux_shift,
}
"""By the names of `distribution_shift_options.type` in published configs."""


def sampling_schedule(
    steps: int,
    sigma_max: float = 1.0,
    shift: Callable[[Tensor], Tensor] = logsnr_shift,
) -> Tensor:
    """Noise levels from `sigma_max` to 0: float32 (steps + 1,), warped by `shift`, the first exactly `sigma_max`.

    Below sigma_max = 1 the warped levels may first rise (0.5 to 0.7455): so do the released models'.
    Raises `ValueError` when there is no step to take or sigma_max lies outside (0, 1].
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least one step, not {steps}")
    if not 0.0 < sigma_max <= 1.0:
        raise ValueError(f"sigma_max must lie in (0, 1], not {sigma_max}")
    sigmas = shift(torch.linspace(sigma_max, 0.0, steps + 1))
    sigmas[0] = sigma_max
    return sigmas


def _clamped(length: Length, like: Tensor, shortest: int, longest: int) -> Tensor:
    return torch.as_tensor(length, dtype=like.dtype, device=like.device).clamp(shortest, longest)
