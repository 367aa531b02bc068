"""Noise levels: how timesteps are warped for sampling and for training (docs/model.md, section 5).

Convention: t = 1 is noise, t = 0 is data, x_t = (1 - t) * data + t * noise. Shapes: B clips.
Lengths are in latent frames (4096 samples each in the released models).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Length = int | float | Tensor
Shift = Callable[[Tensor, Length], Tensor]

# Ends of the log-SNR line, and the length at which it is anchored.
LOGSNR_AT_DATA = 2.0
LOGSNR_AT_NOISE = -6.2
LOGSNR_ANCHOR_LENGTH = 2000
SHORTEST, LONGEST = 256, 4096
FULL_SHIFT_LOW, FULL_SHIFT_HIGH = 0.5, 1.15
FLUX_HIGHEST = 6.93


def shift_logsnr(t: Tensor, length: Length | None = None, rate: float = 0.0) -> Tensor:
    """Shift timesteps so that the log-SNR is linear in them.

    It falls from 2 at the data to -6.2 - rate * log2(length / 2000) at the noise.

    Args:
        t: Timesteps.
        length: Length in latent frames; not needed with rate 0.
        rate: Dependence on the length. The released models sample with 0.

    Returns:
        Shifted timesteps; t <= 0 gives 0, t >= 1 gives 1.
    """
    span = LOGSNR_AT_DATA - LOGSNR_AT_NOISE
    extra: float | Tensor = 0.0
    if rate != 0.0:
        if length is None:
            raise ValueError("shift_logsnr with a rate needs the length in latent frames")
        extra = rate * torch.log2(torch.as_tensor(length, dtype=t.dtype, device=t.device) / LOGSNR_ANCHOR_LENGTH)
    shifted = torch.sigmoid(-(LOGSNR_AT_DATA - t * (span + extra)))
    return torch.where(t <= 0, torch.zeros_like(t), torch.where(t >= 1, torch.ones_like(t), shifted))


def shift_full(t: Tensor, length: Length, shortest: int = SHORTEST, longest: int = LONGEST) -> Tensor:
    """Shift timesteps as the released models are trained: longer clips see more noise.

    Args:
        t: Timesteps.
        length: Length in latent frames, one or per clip.
        shortest: Lower bound of the length.
        longest: Upper bound of the length.

    Returns:
        Shifted timesteps.
    """
    clamped = _clamp_length(length, t, shortest, longest)
    mu = -(FULL_SHIFT_LOW + (FULL_SHIFT_HIGH - FULL_SHIFT_LOW) * (clamped - shortest) / (longest - shortest))
    strength = torch.exp(mu)
    return 1 - strength / (strength + (1 / (1 - t) - 1))


def shift_full_sine(t: Tensor, length: Length, shortest: int = SHORTEST, longest: int = LONGEST) -> Tensor:
    """Shift timesteps by `sin(pi/2 * shift_full(t))`.

    Args:
        t: Timesteps.
        length: Length in latent frames, one or per clip.
        shortest: Lower bound of the length.
        longest: Upper bound of the length.

    Returns:
        Shifted timesteps.
    """
    return torch.sin(shift_full(t, length, shortest, longest) * math.pi / 2)


def shift_flux(t: Tensor, length: Length, shortest: int = SHORTEST, longest: int = LONGEST) -> Tensor:
    """Shift timesteps by `a*t / (1 + (a-1)*t)`, a from 1 (shortest) to 6.93 (longest) (Esser et al. 2024).

    Args:
        t: Timesteps.
        length: Length in latent frames, one or per clip.
        shortest: Lower bound of the length.
        longest: Upper bound of the length.

    Returns:
        Shifted timesteps.
    """
    clamped = _clamp_length(length, t, shortest, longest)
    a = torch.pow(FLUX_HIGHEST, torch.log(clamped / shortest) / math.log(longest / shortest))
    return a * t / (1 + (a - 1) * t)


def shift_none(t: Tensor, length: Length) -> Tensor:
    """Shift nothing.

    Args:
        t: Timesteps.
        length: Not used.

    Returns:
        The same timesteps.
    """
    return t


SHIFTS: dict[str, Shift] = {
    "none": shift_none,
    "logsnr": shift_logsnr,
    "full": shift_full,
    "full.sine": shift_full_sine,
    "flux": shift_flux,
}
"""Shifts by the names that `distribution_shift_options.type` has in published configs."""


def build_schedule(steps: int, sigma_max: float = 1.0, shift: Callable[[Tensor], Tensor] = shift_logsnr) -> Tensor:
    """Build the noise levels of a sampler.

    Below sigma_max = 1 the shifted levels may first rise (0.5 to 0.7455), as in the released models.

    Args:
        steps: Steps, at least 1; otherwise `ValueError`.
        sigma_max: First noise level, in (0, 1]; otherwise `ValueError`.
        shift: Warp of the evenly spaced levels.

    Returns:
        Float32 (steps + 1,) from exactly `sigma_max` to 0.
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least one step, not {steps}")
    if not 0.0 < sigma_max <= 1.0:
        raise ValueError(f"sigma_max must lie in (0, 1], not {sigma_max}")
    sigmas = shift(torch.linspace(sigma_max, 0.0, steps + 1))
    sigmas[0] = sigma_max
    return sigmas


def _clamp_length(length: Length, like: Tensor, shortest: int, longest: int) -> Tensor:
    return torch.as_tensor(length, dtype=like.dtype, device=like.device).clamp(shortest, longest)
