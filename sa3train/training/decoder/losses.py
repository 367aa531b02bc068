"""Losses of an adapter on the autoencoder's decoder: how far decoded audio is from the audio that was encoded.

All are logarithmic, so that a clip counts by its decibels, whatever its level, and one that the decoder renders far too
loud does not outweigh the others.

Shape legend: B clips, C channels, N samples, F frequencies, T frames.
"""

import torch
from torch import Tensor

from sa3train.audio.spectrum import compute_stft

WINDOWS = (2048, 1024, 512, 256)
"""Window lengths of the STFTs; each hops by a quarter."""
RANGE_DB = 60.0
"""Range of magnitudes below a clip's loudest; what is fainter counts as silence, and silence in both does not count."""
SILENCE = 1e-4
"""Root mean square below which a clip's level is not compensated."""


def compute_stft_loss(real_BCN: Tensor, made_BCN: Tensor) -> Tensor:
    """Compute the mean difference of log magnitudes over several window lengths (Yamamoto et al. 2020), where heard.

    Args:
        real_BCN: The audio that was encoded.
        made_BCN: The audio that was decoded.

    Returns:
        Nepers: 1 is 8.7 dB.
    """
    batch, channels, _ = real_BCN.shape
    losses = []
    for size in WINDOWS:
        spectra = (compute_stft(audio_BCN.flatten(0, 1), size, size // 4) for audio_BCN in (real_BCN, made_BCN))
        powers = (spectrum.real.square() + spectrum.imag.square() for spectrum in spectra)
        real_BCFT, made_BCFT = ((power + 1e-12).sqrt().unflatten(0, (batch, channels)) for power in powers)
        loudest_B = real_BCFT.amax(dim=(1, 2, 3)).clamp_min(SILENCE * size)
        floor_B111 = (loudest_B * 10 ** (-RANGE_DB / 20))[:, None, None, None]
        difference_BCFT = ((real_BCFT + floor_B111).log() - (made_BCFT + floor_B111).log()).abs()
        heard_BCFT = torch.maximum(real_BCFT, made_BCFT.detach()) > floor_B111
        count_B = heard_BCFT.sum(dim=(1, 2, 3)).clamp_min(1)
        losses.append(((difference_BCFT * heard_BCFT).sum(dim=(1, 2, 3)) / count_B).mean())
    return torch.stack(losses).mean()


def compute_waveform_loss(real_BCN: Tensor, made_BCN: Tensor) -> Tensor:
    """Compute the mean of ln(1 + energy of the error / energy of the clip).

    Args:
        real_BCN: The audio that was encoded.
        made_BCN: The audio that was decoded.

    Returns:
        0 for equal audio, ln 2 for silence.
    """
    error_B, energy_B = ((real_BCN - made_BCN).square().mean(dim=(1, 2)), real_BCN.square().mean(dim=(1, 2)))
    return torch.log1p(error_B / (energy_B + SILENCE**2)).mean()


def split_mid_side(audio_BCN: Tensor) -> Tensor:
    """Split stereo into half the sum and half the difference of its channels.

    Args:
        audio_BCN: Stereo audio.

    Returns:
        (B, 2, N).
    """
    left_BN, right_BN = audio_BCN.unbind(dim=1)
    return torch.stack((left_BN + right_BN, left_BN - right_BN), dim=1) / 2
