"""Channels, lengths and levels of audio (C, N)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sa3train.audio.layouts import DEFAULT_LAYOUTS, compute_downmix
from sa3train.core.errors import AudioError

FADE = 1024
"""Samples of a crossfade."""


def mix_channels(audio_CN: Tensor, channels: int = 2, speakers: Sequence[str] | None = None) -> Tensor:
    """Mix audio to mono or stereo.

    Mono is duplicated to stereo, stereo averaged to mono. More channels are mixed to stereo first, by the places of
    their speakers (`sa3train.audio.layouts.compute_downmix`); a loud mix may exceed ±1.

    Args:
        audio_CN: Audio.
        channels: 1 or 2.
        speakers: Speaker of each channel, as `sa3train.audio.layouts.read_speakers` returns; None for WAV's usual
            order.

    Returns:
        Audio (channels, N); the input where it has that many channels and they are left and right.

    Raises:
        AudioError: `channels` is neither 1 nor 2, or there is no rule for the input's channels.
    """
    if channels not in (1, 2):
        raise AudioError(f"audio can be mixed to 1 or 2 channels, not {channels}.")
    count = len(audio_CN)
    speakers = speakers or DEFAULT_LAYOUTS.get(count) or [str(channel + 1) for channel in range(count)]
    gains = compute_downmix(speakers)
    if count == 1:
        return audio_CN.expand(2, -1).clone() if channels == 2 else audio_CN
    if gains != [(1, 0), (0, 1)]:
        audio_CN = torch.tensor(gains, dtype=audio_CN.dtype, device=audio_CN.device).T @ audio_CN
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


def blend_region(audio_CN: Tensor, made_CN: Tensor, start: int, stop: int) -> Tensor:
    """Put a region of one audio into another, with crossfades outside of the region.

    A crossfade keeps the level whether the two agree there (as copies do) or not: the gains are those of a fade of
    signals with the correlation that they have.

    Args:
        audio_CN: Audio.
        made_CN: Audio of the same shape.
        start: First sample of the region.
        stop: Its end.

    Returns:
        Audio (C, N): `made_CN` in the region, `audio_CN` beyond the crossfades.
    """
    blended_CN, before, after = audio_CN.clone(), max(0, start - FADE), stop + FADE
    blended_CN[:, start:stop] = made_CN[:, start:stop]
    for where, falls in ((slice(before, start), False), (slice(stop, after), True)):
        old_CN, new_CN = audio_CN[:, where], made_CN[:, where]
        share_N = torch.linspace(0, 1, old_CN.shape[1] + 2)[1:-1]
        share_N = share_N.flip(0) if falls else share_N
        norm = (old_CN.square().sum() * new_CN.square().sum()).sqrt().clamp(min=1e-12)
        likeness = ((old_CN * new_CN).sum() / norm).clamp(0, 1)
        power_N = share_N.square() + (1 - share_N).square() + 2 * likeness * share_N * (1 - share_N)
        blended_CN[:, where] = ((1 - share_N) * old_CN + share_N * new_CN) / power_N.sqrt()
    return blended_CN
