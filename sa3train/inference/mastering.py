"""Level on request: gain to a loudness (ITU-R BS.1770-4) and a limiter of true peaks.

Both work on blocks, so that a long piece needs no more memory than a short one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sa3train.audio.metrics import OVERSAMPLING, measure_loudness_lufs, measure_seam, measure_true_peak_db
from sa3train.audio.resample import resample
from sa3train.core.mapped import iterate_parts, release_pages
from sa3train.inference.resolve import ResolvedSettings

BLOCK = 1 << 20
CONTEXT = 1 << 11
"""Samples of a block, and around it: more than the look-ahead and the filter that finds true peaks."""
LOOK_AHEAD = 0.005
"""Seconds in which the gain goes down before a peak, and up after it."""
TRIES = 6
AUDIBLE_DB = 0.5
"""Least lack of loudness that is reported."""


@dataclass(frozen=True, eq=False)
class FinishedAudio:
    """Audio within ±1.

    Attributes:
        audio_CN: The audio.
        clipped_share: Share of its samples that exceeded ±1 and were clipped.
        measured: What was done to its level on request (see `master`), the `loudness_lufs` and `true_peak_db` that
            came out (absent for silence), `missing_db` where limited peaks leave less loudness than asked for, and how
            a loop's end joins its start (see `measure_seam`).
    """

    audio_CN: Tensor
    clipped_share: float
    measured: dict[str, float]


def finish_audio(
    audio_CN: Tensor, settings: ResolvedSettings, sample_rate: int, out_CN: Tensor | None = None
) -> FinishedAudio:
    """Set the level of audio where that was asked for, clip what exceeds ±1, and measure the seam of a loop.

    Args:
        audio_CN: Audio (C, N) on the CPU, changed in place.
        settings: What was asked for.
        sample_rate: Samples per second.
        out_CN: Where the limiter writes; None for new memory.

    Returns:
        The audio and what there is to say about it.
    """
    measured = dict[str, float]()
    if settings.loudness is not None or settings.peak is not None:
        audio_CN, measured = master(audio_CN, sample_rate, settings.loudness, settings.peak, settings.loop, out_CN)
    clipped = 0
    for part_CN in iterate_parts(audio_CN, BLOCK):
        clipped += int((part_CN.abs() > 1).sum())
        part_CN.clamp_(-1, 1)
    if measured:
        reached = {
            "loudness_lufs": measure_loudness_lufs(audio_CN, sample_rate),
            "true_peak_db": measure_blocks(_wrap(audio_CN, CONTEXT if settings.loop else 0), sample_rate),
        }
        if settings.loudness is not None and settings.loudness - reached["loudness_lufs"] >= AUDIBLE_DB:
            reached["missing_db"] = settings.loudness - reached["loudness_lufs"]
        measured |= {name: round(value, 3) for name, value in reached.items() if math.isfinite(value)}
    if settings.loop:
        measured |= {name: round(value, 4) for name, value in measure_seam(audio_CN, sample_rate).items()}
    return FinishedAudio(audio_CN, clipped / max(1, audio_CN.numel()), measured)


def master(
    audio_CN: Tensor,
    sample_rate: int,
    loudness: float | None,
    peak: float | None,
    is_loop: bool = False,
    out_CN: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Set the level of audio as asked.

    Args:
        audio_CN: Audio (C, N) on the CPU, which may exceed ±1; the gain is applied in place.
        sample_rate: Samples per second.
        loudness: Integrated loudness to reach by gain, in LUFS; None leaves it.
        peak: Highest true peak, in dBTP; None for no limit.
        is_loop: Whether the end is followed by the start, so that the limiter's gain joins too.
        out_CN: Where the limiter writes; None for new memory.

    Returns:
        The audio, and what was done to it: `gain_db` and `limited_db` (largest reduction by the limiter).
    """
    done = dict[str, float]()
    if loudness is not None:
        before = measure_loudness_lufs(audio_CN, sample_rate)
        done["gain_db"] = loudness - before if math.isfinite(before) else 0.0
        for part_CN in iterate_parts(audio_CN, BLOCK):
            part_CN *= 10 ** (done["gain_db"] / 20)
    if peak is not None:
        reach = min(CONTEXT, audio_CN.shape[1]) if is_loop else 0
        limited_CN, done["limited_db"] = limit_peaks(_wrap(audio_CN, reach), sample_rate, peak, out_CN)
        audio_CN = limited_CN[:, reach : reach + audio_CN.shape[1]]
    return audio_CN, {name: round(value, 3) for name, value in done.items()}


def _wrap(audio_CN: Tensor, reach: int) -> Tensor:
    """Audio with samples of its end before it, and of its start behind it."""
    return torch.cat([audio_CN[:, -reach:], audio_CN, audio_CN[:, :reach]], dim=1) if reach else audio_CN


def limit_peaks(audio_CN: Tensor, sample_rate: int, peak: float, out_CN: Tensor | None = None) -> tuple[Tensor, float]:
    """Limit true peaks by a gain that looks ahead and is the same for all channels.

    The gain is the lowest that any peak within the look-ahead needs, smoothed over as long: so it is down in time, and
    exactly 1 away from peaks. Smooth gain moves peaks between samples a little; the ceiling is lowered by what remains.

    Args:
        audio_CN: Audio (C, N).
        sample_rate: Samples per second.
        peak: Highest true peak in dBTP.
        out_CN: Where to write; None for new memory.

    Returns:
        Audio with no true peak above `peak`, the input itself where there was none; the largest reduction in dB.
    """
    found = measure_blocks(audio_CN, sample_rate)
    if found <= peak:
        return audio_CN, 0.0
    ceiling, limited_CN, lowest = peak, torch.empty_like(audio_CN) if out_CN is None else out_CN, 1.0
    for _ in range(TRIES):
        lowest = 1.0
        for whole, inner, kept in _list_blocks(audio_CN, limited_CN):
            gain_N = _compute_gain(audio_CN[:, whole], sample_rate, 10 ** (ceiling / 20))[kept]
            limited_CN[:, inner] = audio_CN[:, inner] * gain_N
            lowest = min(lowest, float(gain_N.min()))
        if (excess := measure_blocks(limited_CN, sample_rate) - peak) <= 0:
            break
        ceiling -= excess + 1e-4
    else:
        for part_CN in iterate_parts(limited_CN, BLOCK):
            part_CN *= 10 ** (-excess / 20)
    return limited_CN, -20 * math.log10(max(lowest, 1e-12))


def measure_blocks(audio_CN: Tensor, sample_rate: int) -> float:
    """Measure the true peak block by block.

    Args:
        audio_CN: Audio (C, N).
        sample_rate: Samples per second.

    Returns:
        True peak in dBTP, as `measure_true_peak_db` gives it; -inf for silence.
    """
    return max(measure_true_peak_db(audio_CN[:, whole], sample_rate) for whole, _, _ in _list_blocks(audio_CN))


def _list_blocks(audio_CN: Tensor, *others: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Each block with what is around it, the block alone, and where the block lies in the first."""
    samples = audio_CN.shape[1]
    for start in range(0, samples, BLOCK):
        stop, first = min(start + BLOCK, samples), max(0, start - CONTEXT)
        yield slice(first, stop + CONTEXT), slice(start, stop), slice(start - first, stop - first)
        for each_CN in (audio_CN, *others):
            release_pages(each_CN)


def _compute_gain(audio_CN: Tensor, sample_rate: int, ceiling: float) -> Tensor:
    """The limiter's gain (N,)."""
    samples, reach = audio_CN.shape[1], max(1, round(LOOK_AHEAD * sample_rate))
    oversampled_CN = resample(audio_CN, sample_rate, OVERSAMPLING * sample_rate).abs()
    peaks_N = oversampled_CN.amax(dim=0)[: OVERSAMPLING * samples].unflatten(0, (samples, OVERSAMPLING)).amax(dim=1)
    peaks_N = torch.maximum(peaks_N, audio_CN.abs().amax(dim=0))
    needed_11N = (ceiling / peaks_N.clamp(min=1e-12)).clamp(max=1.0)[None, None]
    pool = torch.nn.functional.max_pool1d
    held_11N = -pool(-needed_11N, 2 * reach + 3, stride=1, padding=reach + 1)  # a peak lies between two samples
    weights_K = torch.hann_window(2 * reach + 3, periodic=False, dtype=held_11N.dtype)[1:-1]
    padded_11N = torch.nn.functional.pad(held_11N, (reach, reach), mode="replicate" if samples > 1 else "constant")
    smooth_N = torch.nn.functional.conv1d(padded_11N, (weights_K / weights_K.sum())[None, None])[0, 0]
    is_idle_N = -pool(-held_11N, 2 * reach + 1, stride=1, padding=reach)[0, 0] == 1.0
    return torch.where(is_idle_N, 1.0, smooth_N)
