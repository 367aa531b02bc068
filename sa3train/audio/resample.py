"""Resampling by a windowed sinc with torchaudio; by a polyphase filter where the rates share almost no factor."""

import math

import torch
from torch import Tensor

from sa3train.core.errors import AudioError
from sa3train.core.imports import explain_imports

with explain_imports():
    import torchaudio.functional

# The "best" Kaiser filter of resampy, as torchaudio documents it: passband to 0.948 of Nyquist, -150 dB beyond.
WIDTH = 64
ROLLOFF = 0.9475937167399596
BETA = 14.769656459379492

# torchaudio builds every phase of the filter: rates such as 44099 Hz would need gigabytes for it.
MAX_TAPS = 2**24


def resample(audio_CN: Tensor, source_rate: int, target_rate: int) -> Tensor:
    """Resample audio.

    Args:
        audio_CN: Audio at `source_rate`.
        source_rate: Its sample rate in Hz.
        target_rate: Sample rate of the result in Hz.

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
    if up * (down + 2 * WIDTH * max(1.0, down / up)) > MAX_TAPS:
        return _resample_polyphase(audio_CN, up, down)
    return torchaudio.functional.resample(
        audio_CN,
        source_rate,
        target_rate,
        lowpass_filter_width=WIDTH,
        rolloff=ROLLOFF,
        resampling_method="sinc_interp_kaiser",
        beta=BETA,
    )


def _resample_polyphase(audio_CN: Tensor, up: int, down: int) -> Tensor:
    """Apply the same filter, built once at the common rate, by phases."""
    import scipy.signal  # takes a second that hardly any clip needs

    longest = max(up, down)
    taps = scipy.signal.firwin(2 * WIDTH * longest + 1, ROLLOFF / longest, window=("kaiser", BETA))
    resampled = scipy.signal.resample_poly(audio_CN.cpu().double().numpy(), up, down, axis=1, window=taps)
    return torch.from_numpy(resampled).to(audio_CN)
