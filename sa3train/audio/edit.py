"""Channels, lengths and levels of audio (C, N)."""

import math

import torch
from torch import Tensor

from sa3train.core.errors import AudioError

HALF_POWER = math.sqrt(0.5)

# Left and right shares of each channel in WAV order, after ITU-R BS.775: centre and surrounds at -3 dB, no LFE.
DOWNMIX: dict[int, tuple[tuple[float, float], ...]] = {
    3: ((1, 0), (0, 1), (HALF_POWER, HALF_POWER)),
    4: ((1, 0), (0, 1), (HALF_POWER, 0), (0, HALF_POWER)),
    5: ((1, 0), (0, 1), (HALF_POWER, HALF_POWER), (HALF_POWER, 0), (0, HALF_POWER)),
    6: ((1, 0), (0, 1), (HALF_POWER, HALF_POWER), (0, 0), (HALF_POWER, 0), (0, HALF_POWER)),
    7: ((1, 0), (0, 1), (HALF_POWER, HALF_POWER), (0, 0), (0.5, 0.5), (HALF_POWER, 0), (0, HALF_POWER)),
    8: (
        *((1, 0), (0, 1), (HALF_POWER, HALF_POWER), (0, 0)),
        *((HALF_POWER, 0), (0, HALF_POWER), (HALF_POWER, 0), (0, HALF_POWER)),
    ),
}


def to_channels(audio_CN: Tensor, channels: int = 2) -> Tensor:
    """(C, N) in WAV channel order to (channels, N), channels 1 or 2.

    Mono is doubled; more than two channels are mixed by ITU-R BS.775 (without turning the whole down, so a loud mix
    may pass ±1); to mono, left and right are averaged. Raises `AudioError` where there is no rule for C.
    """
    if channels not in (1, 2):
        raise AudioError(f"audio can be brought to 1 or 2 channels, not {channels}.")
    count = len(audio_CN)
    if count == channels:
        return audio_CN
    if count == 1:
        return audio_CN.expand(2, -1).clone()
    if count in DOWNMIX:
        audio_CN = torch.tensor(DOWNMIX[count], dtype=audio_CN.dtype, device=audio_CN.device).T @ audio_CN
    elif count != 2:
        raise AudioError(f"no rule to mix {count} channels down to {channels}; mix it to stereo first.")
    return audio_CN if channels == 2 else audio_CN.mean(dim=0, keepdim=True)


def fit(audio_CN: Tensor, samples: int) -> Tensor:
    """Cut (C, N) to `samples`, or fill it up with silence: (C, samples)."""
    missing = samples - audio_CN.shape[-1]
    if missing > 0:
        return torch.nn.functional.pad(audio_CN, (0, missing))
    return audio_CN[..., :samples]


def crop(audio_CN: Tensor, sample_rate: int, start: float, end: float) -> Tensor:
    """The part from `start` to `end` seconds. Raises `AudioError` when that is not inside the audio."""
    seconds = audio_CN.shape[-1] / sample_rate
    if not 0 <= start < end <= seconds + 1 / sample_rate:
        raise AudioError(f"cannot take {start:g} to {end:g} s from {seconds:g} s of audio.")
    return audio_CN[..., round(start * sample_rate) : round(end * sample_rate)]


def gain(audio_CN: Tensor, decibels: float) -> Tensor:
    """Louder or softer by `decibels`."""
    return audio_CN * 10 ** (decibels / 20)


def clamp_counted(audio_CN: Tensor) -> tuple[Tensor, Tensor]:
    """Audio clamped to ±1, and the share of samples that lay outside, a scalar on the audio's device."""
    return audio_CN.clamp(-1, 1), (audio_CN.abs() > 1).sum() / max(1, audio_CN.numel())
