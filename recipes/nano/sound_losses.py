"""Losses of nano's decoder. Shapes: B items, C channels, N samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torchaudio.functional import melscale_fbanks

from sa3train.audio.spectrum import compute_stft

RANGE_DB = 70.0  # under the peak; what is fainter is silence
TEXTURE_BANDS = 64


def spectral_loss(real_BN: Tensor, made_BN: Tensor, window: int, level_B: Tensor, mel: bool) -> Tensor:
    """Compute the mean difference of log magnitudes in nats, floored below the item's peak, plus spectral convergence.

    `level_B` is the item's RMS over both channels, so that an empty side signal is not normalized by itself.
    """
    device = real_BN.device
    taper = torch.hann_window(window, device=device)
    both = torch.cat([real_BN, made_BN])
    spectrum = compute_stft(both, window, window // 4)
    power = spectrum.real.square() + spectrum.imag.square()
    if mel:
        bands = min(64, window // 16)
        filters = melscale_fbanks(window // 2 + 1, 0.0, 22050.0, bands, 44100).to(device)
        power = (power.transpose(1, 2) @ filters).transpose(1, 2)
    magnitude = (power + 1e-10).sqrt()
    real, made = magnitude.chunk(2)
    top_B = torch.maximum(real.amax((1, 2)), level_B * taper.sum() * 0.05)
    floor = top_B[:, None, None] * 10 ** (-RANGE_DB / 20)
    logs = ((real + floor).log() - (made + floor).log()).abs().mean((1, 2))
    scale_B = torch.maximum(real.norm(dim=(1, 2)), top_B * real[0].numel() ** 0.5 / 4)
    return (logs + 0.5 * (real - made).norm(dim=(1, 2)) / scale_B).mean()


def texture_loss(real_BN: Tensor, made_BN: Tensor, window: int, level_B: Tensor) -> Tensor:
    """Compute the distance in mean, spread, and mean step up and down of each mel band's level over time, in nats.

    Noise cannot be matched sample by sample, and a loss that tries makes it too even; its statistics can (McDermott and
    Simoncelli 2011).
    """
    device = real_BN.device
    taper = torch.hann_window(window, device=device)
    spectrum = compute_stft(torch.cat([real_BN, made_BN]), window, 512)
    filters = melscale_fbanks(window // 2 + 1, 0.0, 22050.0, TEXTURE_BANDS, 44100).to(device)
    power = ((spectrum.real.square() + spectrum.imag.square()).transpose(1, 2) @ filters).transpose(1, 2)
    real, made = (power + 1e-10).sqrt().chunk(2)
    top_B = torch.maximum(real.amax((1, 2)), level_B * taper.sum() * 0.05)
    floor = top_B[:, None, None] * 10 ** (-RANGE_DB / 20)
    differences = []
    for level in ((real + floor).log(), (made + floor).log()):
        step = level.diff(dim=2)
        steps = [4 * step.clamp_min(0).mean(2), 4 * step.clamp_max(0).mean(2)]
        differences.append(torch.stack([level.mean(2), level.std(2), *steps]))
    return (differences[0] - differences[1]).abs().sum(0).mean()


def wave_loss(real_BCN: Tensor, made_BCN: Tensor) -> Tensor:
    """Compute the log of the error's energy relative to the signal's: each item counts by its decibels."""
    error, energy = (real_BCN - made_BCN).pow(2).sum((1, 2)), real_BCN.pow(2).sum((1, 2))
    return (error / (energy + 1e-2) + 1e-2).log().mean()
