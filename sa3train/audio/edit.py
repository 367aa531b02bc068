"""Channels, lengths and levels of audio (C, N)."""

import math

import torch
from torch import Tensor

from sa3train.core.errors import AudioError

HALF_POWER = math.sqrt(0.5)

# Left and right gains of each channel in WAV order by ITU-R BS.775: center and surrounds at -3 dB, no LFE.
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


def mix_channels(audio_CN: Tensor, channels: int = 2) -> Tensor:
    """Mix audio to mono or stereo.

    Mono is duplicated to stereo, stereo averaged to mono. More channels are mixed to stereo first, by ITU-R BS.775
    without scaling the result, so that a loud mix may exceed ±1.

    Args:
        audio_CN: Audio in WAV channel order.
        channels: 1 or 2.

    Returns:
        Audio (channels, N); the input where it has that many channels.

    Raises:
        AudioError: `channels` is neither 1 nor 2, or there is no rule for the input's layout.
    """
    if channels not in (1, 2):
        raise AudioError(f"audio can be mixed to 1 or 2 channels, not {channels}.")
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
    """Truncate audio to a length, or pad it with silence.

    Args:
        audio_CN: Audio.
        samples: Length in samples.

    Returns:
        Audio (C, samples).
    """
    missing = samples - audio_CN.shape[-1]
    if missing > 0:
        return torch.nn.functional.pad(audio_CN, (0, missing))
    return audio_CN[..., :samples]


def apply_gain(audio_CN: Tensor, decibels: float) -> Tensor:
    """Apply a gain.

    Args:
        audio_CN: Audio.
        decibels: Gain in dB.

    Returns:
        Scaled audio.
    """
    return audio_CN * 10 ** (decibels / 20)


def clamp_and_count(audio_CN: Tensor) -> tuple[Tensor, Tensor]:
    """Clamp audio to ±1 and count what was clipped, without waiting for the device.

    Args:
        audio_CN: Audio.

    Returns:
        Clamped audio, and the share of samples outside ±1 as a scalar tensor on the audio's device.
    """
    return audio_CN.clamp(-1, 1), (audio_CN.abs() > 1).sum() / max(1, audio_CN.numel())
