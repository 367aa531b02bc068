"""Resampling keeps pitch, level and length, at any rate."""

import math

import pytest
import torch

from helpers.audio import tone
from sa3train.audio import resample as module
from sa3train.audio.resample import BEST, RELEASED, SincFilter, resample
from sa3train.core.errors import AudioError


def sine(rate: int, seconds: float = 0.4, frequency: float = 997.0) -> torch.Tensor:
    return torch.from_numpy(tone(seconds, frequency, rate).T.copy())


def test_equal_rates_change_nothing() -> None:
    audio = sine(44100)
    assert resample(audio, 44100, 44100) is audio


@pytest.mark.parametrize(
    "rate", [8000, 11025, 44056, 44099, 48000, 88200, pytest.param(96001, marks=pytest.mark.slow), 192000]
)
def test_a_tone_stays_the_same_tone(rate: int) -> None:
    audio = sine(rate)
    result = resample(audio, rate, 44100)
    assert result.dtype == torch.float32
    assert result.shape == (2, math.ceil(audio.shape[1] * 44100 / rate))
    expected = sine(44100)
    inside = slice(1500, min(result.shape[1], expected.shape[1]) - 1500)
    assert (result[:, inside] - expected[:, inside]).abs().max() < 1e-3


@pytest.mark.parametrize("sinc", [BEST, RELEASED])
def test_both_ways_agree(monkeypatch: pytest.MonkeyPatch, sinc: SincFilter) -> None:
    audio = torch.randn(2, 9600, generator=torch.Generator().manual_seed(0))
    one = resample(audio, 48000, 44100, sinc)
    monkeypatch.setattr(module, "MAX_TAPS", 0)
    other = resample(audio, 48000, 44100, sinc)
    assert one.shape == other.shape
    assert (one - other)[:, 200:-200].abs().max() < 2e-2


def test_what_lies_above_the_new_band_is_removed() -> None:
    assert resample(sine(96000, frequency=30000.0), 96000, 44100)[:, 500:-500].abs().max() < 1e-4


@pytest.mark.parametrize(("source", "target"), [(0, 44100), (44100, 0), (-1, 44100)])
def test_rates_must_be_above_zero(source: int, target: int) -> None:
    with pytest.raises(AudioError, match="above 0"):
        resample(torch.zeros(2, 10), source, target)
