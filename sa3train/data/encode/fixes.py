"""Fixes applied while encoding, never to the sources. Audio is float32 (2, N) at the autoencoder's rate."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sa3train.audio.edit import apply_gain
from sa3train.audio.metrics import SILENCE_AMPLITUDE, measure_loudness_lufs, measure_offset, measure_peak_db
from sa3train.data.encode.settings import FIX_NAMES

_TARGET_LUFS = -14.0
_CEILING_DB = -1.0
_MARGIN_SECONDS = 0.05


def remove_dc(audio_CN: torch.Tensor, rate: int) -> tuple[torch.Tensor, Any]:
    """Remove the DC offset of each channel.

    Args:
        audio_CN: (C, N) samples.
        rate: Sample rate in Hz.

    Returns:
        The audio, and the largest offset that was removed.
    """
    offset_C1 = measure_offset(audio_CN)
    return (audio_CN - offset_C1).float(), round(float(offset_C1.abs().max()), 6)


def trim_silence(audio_CN: torch.Tensor, rate: int) -> tuple[torch.Tensor, Any]:
    """Trim leading and trailing silence (below -60 dBFS) to 50 ms.

    Args:
        audio_CN: (C, N) samples.
        rate: Sample rate in Hz.

    Returns:
        The audio, and the seconds removed at [start, end].
    """
    loud = torch.nonzero((audio_CN - measure_offset(audio_CN)).abs().amax(dim=0) > SILENCE_AMPLITUDE)
    if not len(loud):
        return audio_CN, [0.0, 0.0]
    margin = round(_MARGIN_SECONDS * rate)
    start = max(0, int(loud[0]) - margin)
    end = min(audio_CN.shape[1], int(loud[-1]) + 1 + margin)
    return audio_CN[:, start:end], [round(start / rate, 4), round((audio_CN.shape[1] - end) / rate, 4)]


def normalize_loudness(audio_CN: torch.Tensor, rate: int) -> tuple[torch.Tensor, Any]:
    """Normalize to -14 LUFS, or as near as a peak of -1 dBFS allows.

    Args:
        audio_CN: (C, N) samples.
        rate: Sample rate in Hz.

    Returns:
        The audio, and the gain in dB.
    """
    peak = measure_peak_db(audio_CN)
    if peak == -torch.inf:
        return audio_CN, 0.0
    decibels = min(_TARGET_LUFS - measure_loudness_lufs(audio_CN, rate), _CEILING_DB - peak)
    return apply_gain(audio_CN, decibels), round(decibels, 3)


FIXES: dict[str, Callable[[torch.Tensor, int], tuple[torch.Tensor, Any]]] = {
    "dc": remove_dc,
    "trim_silence": trim_silence,
    "loudness": normalize_loudness,
}


def order_fixes(names: Sequence[str]) -> list[str]:
    """Put fixes in the order in which they are applied.

    Args:
        names: Some of `FIX_NAMES`.

    Returns:
        The same names, ordered.
    """
    return [name for name in FIX_NAMES if name in names]


def apply_fixes(audio_CN: torch.Tensor, rate: int, names: Sequence[str]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Apply fixes to audio.

    Args:
        audio_CN: (C, N) samples.
        rate: Sample rate in Hz.
        names: Some of `FIX_NAMES`.

    Returns:
        The audio, and what each fix did.
    """
    applied = {}
    for name in order_fixes(names):
        audio_CN, applied[name] = FIXES[name](audio_CN, rate)
    return audio_CN, applied
