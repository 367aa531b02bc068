"""What nano's decoder makes sound of: oscillators, pieces of noise, the curve of amplitudes, the place in a frame."""

from __future__ import annotations

import math

import numpy as np
import scipy.optimize
import torch
from channels import (
    AMPLITUDES,
    GAIN,
    HIGH,
    HIGHEST_NOISE,
    KNOTS,
    LEVELS,
    LOWEST_NOISE,
    PATCH,
    PLACE_REACH,
    PLACES,
    REGIONS,
    SHARES,
    STEEP,
)
from numpy.typing import NDArray
from targets import FRAME, POWER, RATE, turns
from torch import Tensor
from wiring import HEADS


def noise_centres(count: int) -> Tensor:
    """Compute the centers of the noise channels in Hz, denser at low frequencies."""
    low, high = LOWEST_NOISE / 6000, HIGHEST_NOISE / 6000
    return 6000 * torch.expm1(torch.linspace(math.log1p(low), math.log1p(high), count))


def noise_atoms(hertz: Tensor) -> Tensor:
    """Compute windowed noise of unit energy, each as wide as the distance to its neighbors: (count, 3 PATCH)."""
    width = torch.gradient(hertz)[0]
    draw = torch.randn(len(hertz), 8 * PATCH)
    bins = torch.fft.rfftfreq(8 * PATCH, 1 / RATE)
    band = torch.exp(-0.5 * ((bins - hertz[:, None]) / (0.5 * width[:, None])) ** 4)
    pieces = torch.fft.irfft(torch.fft.rfft(draw) * band)[:, : 3 * PATCH] * torch.hann_window(3 * PATCH)
    return pieces / pieces.norm(dim=1, keepdim=True)


def expansion() -> tuple[Tensor, Tensor]:
    """Thresholds and weights (none below 0: the curve is convex, and bf16 forgives no cancellation) of SiLUs whose sum
    is GAIN times the amplitude of a compressed level, level ** (1 / (2 POWER)).
    """
    thresholds = 0.02 + 0.98 * torch.linspace(0, 1, KNOTS) ** 1.5
    level = torch.linspace(0.0, 1.05, 800)
    wanted = GAIN * level ** (1 / (2 * POWER))
    weight = 1 / (wanted + GAIN * 1e-4)
    units = torch.nn.functional.silu(STEEP * (level[:, None] - thresholds)) * weight[:, None]
    weights, _ = scipy.optimize.nnls(units.numpy(), (wanted * weight).numpy())
    return thresholds, torch.from_numpy(weights).float()


def fit_place() -> tuple[Tensor, Tensor, float]:
    """Fit four windows on the frame's token whose weighted sum is a token's position in the frame, -7.5 to 7.5.

    Gives their logits' factors at the rotary frequencies (HEADS, 32: cosines, sines), the weights (HEADS,), and a
    constant. A chunk holds two frames: 16 or 17 tokens before or behind its own frame's token a token sees the other's.
    """
    theta = 10000.0 ** (-np.arange(16) / 16)

    def waves(back: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([np.cos(np.outer(back, theta)), np.sin(np.outer(back, theta))], 1)

    back, wanted = np.arange(1.0, PLACES + 1), np.tile(np.arange(PLACES) - 7.5, 2)
    own = np.concatenate([waves(back), waves(back)])
    other = np.concatenate([waves(back - 17), waves(back + 17)])

    def factors(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return PLACE_REACH * np.tanh(x[: 32 * HEADS].reshape(HEADS, 32))

    def misses(x: NDArray[np.float64]) -> NDArray[np.float64]:
        seen = np.exp(own @ factors(x).T) + np.exp(other @ factors(x).T)
        made = (seen / (seen + 2 * PLACES)) @ x[32 * HEADS : -1] + x[-1]
        return np.concatenate([made - wanted, 0.003 * x[: 32 * HEADS]])

    draw = np.random.default_rng(1)
    guess = np.concatenate([0.1 * draw.standard_normal(32 * HEADS), np.full(HEADS, 10 / HEADS), [0.0]])
    found = scipy.optimize.least_squares(misses, guess, max_nfev=400, x_scale="jac").x
    weights = torch.from_numpy(found[32 * HEADS : -1]).float()
    return torch.from_numpy(factors(found)).float(), weights, float(found[-1])


def regions_of(hertz: Tensor) -> list[int]:
    """Find the region of each frequency."""
    return (torch.bucketize(hertz, torch.tensor(REGIONS)) - 1).clamp(0, len(REGIONS) - 2).tolist()


def high_turns() -> Tensor:
    """Compute the whole turns per frame of the oscillators above the semitones, (HIGH,)."""
    return (torch.logspace(math.log10(1.06 * top()), math.log10(15000.0), HIGH) * FRAME / RATE).round()


def oscillators() -> list[tuple[float, int, int]]:
    """List the turns per frame of each oscillator, and the channels of its cosine and sine."""
    tones = [(turn, AMPLITUDES + tone, SHARES + tone) for tone, turn in enumerate(turns().tolist())]
    high = [(turn, LEVELS + index, LEVELS + HIGH + index) for index, turn in enumerate(high_turns().tolist())]
    return tones + high


def top() -> float:
    """Return the frequency in Hz where the semitones end and the fixed oscillators start."""
    return float(turns()[-1]) * RATE / FRAME * 2 ** (1 / 12)
