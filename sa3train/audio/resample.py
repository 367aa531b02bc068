"""Resampling by a windowed sinc with torchaudio; by a polyphase filter where the rates share almost no factor."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sa3train.core.errors import AudioError
from sa3train.core.imports import explain_imports

with explain_imports():
    import torchaudio.functional


@dataclass(frozen=True)
class SincFilter:
    """A windowed sinc, in the terms of `torchaudio.functional.resample`.

    Attributes:
        width: Zero crossings to each side.
        rolloff: Cutoff, as a share of the lower Nyquist frequency.
        beta: Shape of the Kaiser window; None for a Hann window.
    """

    width: int
    rolloff: float
    beta: float | None = None


BEST = SincFilter(64, 0.9475937167399596, 14.769656459379492)
"""The "best" filter of resampy, as torchaudio documents it: passband to 0.948 of Nyquist, -150 dB beyond."""
RELEASED = SincFilter(6, 0.99)
"""torchaudio's default, with which the released project reads the audio of a generation."""

# torchaudio builds every phase of the filter: rates such as 44099 Hz would need gigabytes for it.
MAX_TAPS = 2**24


def resample(audio_CN: Tensor, source_rate: int, target_rate: int, sinc: SincFilter = BEST) -> Tensor:
    """Resample audio.

    Args:
        audio_CN: Audio at `source_rate`.
        source_rate: Its sample rate in Hz.
        target_rate: Sample rate of the result in Hz.
        sinc: The filter.

    Returns:
        Audio (C, ceil(N * target_rate / source_rate)); the input where the rates are equal.

    Raises:
        AudioError: A rate is not above 0.
    """
    if source_rate <= 0 or target_rate <= 0:
        raise AudioError(f"cannot resample from {source_rate} Hz to {target_rate} Hz: sample rates must be above 0.")
    if source_rate == target_rate:
        return audio_CN
    divisor = math.gcd(source_rate, target_rate)
    down, up = source_rate // divisor, target_rate // divisor
    if up * (down + 2 * sinc.width * max(1.0, down / up)) > MAX_TAPS:
        return _resample_polyphase(audio_CN, up, down, sinc)
    return torchaudio.functional.resample(
        audio_CN,
        source_rate,
        target_rate,
        lowpass_filter_width=sinc.width,
        rolloff=sinc.rolloff,
        resampling_method="sinc_interp_hann" if sinc.beta is None else "sinc_interp_kaiser",
        beta=sinc.beta,
    )


def _resample_polyphase(audio_CN: Tensor, up: int, down: int, sinc: SincFilter) -> Tensor:
    """Apply the same filter, built once at the common rate, by phases."""
    import scipy.signal  # takes a second that hardly any clip needs

    longest = max(up, down)
    window = "hann" if sinc.beta is None else ("kaiser", sinc.beta)
    taps = scipy.signal.firwin(2 * sinc.width * longest + 1, sinc.rolloff / longest, window=window)
    resampled = scipy.signal.resample_poly(audio_CN.cpu().double().numpy(), up, down, axis=1, window=taps)
    return torch.from_numpy(resampled).to(audio_CN)
