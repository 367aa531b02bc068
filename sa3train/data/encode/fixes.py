"""Mends applied while encoding, never to the sources. Audio is float32 (C, N) at the autoencoder's rate, in stereo."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sa3train.audio.edit import gain
from sa3train.audio.metrics import loudness_lufs, peak_db
from sa3train.core.errors import ConfigError
from sa3train.data.audit.checks import SILENCE

TARGET_LUFS = -14.0
CEILING_DB = -1.0
MARGIN_SECONDS = 0.05


def remove_dc(audio_CN: torch.Tensor, rate: int) -> tuple[torch.Tensor, Any]:
    """Centre each channel; says by how much the farthest was off."""
    offset_C1 = audio_CN.double().mean(dim=1, keepdim=True)
    return (audio_CN - offset_C1).float(), round(float(offset_C1.abs().max()), 6)


def trim_silence(audio_CN: torch.Tensor, rate: int) -> tuple[torch.Tensor, Any]:
    """Cut leading and trailing stretches below -60 dBFS, but for 50 ms; says how many seconds went at either end."""
    loud = torch.nonzero((audio_CN - audio_CN.mean(dim=1, keepdim=True)).abs().amax(dim=0) > SILENCE)
    if not len(loud):
        return audio_CN, [0.0, 0.0]
    margin = round(MARGIN_SECONDS * rate)
    start = max(0, int(loud[0]) - margin)
    end = min(audio_CN.shape[1], int(loud[-1]) + 1 + margin)
    return audio_CN[:, start:end], [round(start / rate, 4), round((audio_CN.shape[1] - end) / rate, 4)]


def level(audio_CN: torch.Tensor, rate: int) -> tuple[torch.Tensor, Any]:
    """Bring the clip to -14 LUFS, or as near as a peak of -1 dBFS allows; says the gain in dB."""
    loudness = loudness_lufs(audio_CN, rate)
    if loudness == -torch.inf:
        return audio_CN, 0.0
    decibels = min(TARGET_LUFS - loudness, CEILING_DB - peak_db(audio_CN))
    return gain(audio_CN, decibels), round(decibels, 3)


FIXES: dict[str, Callable[[torch.Tensor, int], tuple[torch.Tensor, Any]]] = {
    "dc": remove_dc,
    "trim_silence": trim_silence,
    "loudness": level,
}
"""In the order in which they are applied."""


def chosen_fixes(names: Sequence[str]) -> tuple[str, ...]:
    """`names` in the order of application. Raises `ConfigError` for an unknown one."""
    unknown = [name for name in names if name not in FIXES]
    if unknown:
        raise ConfigError(f"there is no fix {', '.join(unknown)}; choose among {', '.join(FIXES)}.")
    return tuple(name for name in FIXES if name in names)


def apply_fixes(audio_CN: torch.Tensor, rate: int, names: Sequence[str]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The mended audio, and what each fix did."""
    applied = {}
    for name in chosen_fixes(names):
        audio_CN, applied[name] = FIXES[name](audio_CN, rate)
    return audio_CN, applied
