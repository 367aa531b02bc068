"""Measurements against known values."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.audio import noise, tone
from sa3train.audio import metrics

RATE = 48000


def sine(frequency: float = 997.0, peak: float = 1.0, seconds: float = 3.0, rate: int = RATE) -> torch.Tensor:
    return torch.from_numpy(tone(seconds, frequency, rate, peak=peak).T.copy())


def test_a_full_scale_stereo_tone_at_1_khz_measures_0_lufs() -> None:
    """BS.1770: a 0 dBFS sine at 997 Hz in one channel is -3.01 LKFS, so in both it is 0."""
    assert metrics.measure_loudness_lufs(sine(), RATE) == pytest.approx(0.0, abs=0.1)
    left = sine()
    left[1] = 0
    assert metrics.measure_loudness_lufs(left, RATE) == pytest.approx(-3.01, abs=0.1)


def test_short_and_silent_audio_have_a_loudness() -> None:
    assert metrics.measure_loudness_lufs(sine(seconds=0.1), RATE) == pytest.approx(0.0, abs=0.5)
    assert metrics.measure_loudness_lufs(torch.zeros(2, RATE), RATE) == -math.inf


def test_true_peak_sees_between_the_samples() -> None:
    """A sine at a quarter of the rate, sampled 45 degrees off its crests, peaks 3 dB above its samples."""
    time = torch.arange(RATE)
    audio = torch.sin(2 * math.pi * (time % 4).double() / 4 + math.pi / 4).float()[None]
    assert metrics.measure_peak_db(audio) == pytest.approx(-3.01, abs=0.01)
    assert metrics.measure_true_peak_db(audio, RATE) == pytest.approx(0.0, abs=0.5)
    assert metrics.measure_true_peak_db(torch.zeros(1, 100), RATE) == -math.inf


def test_rms_of_a_sine_is_three_decibels_below_its_peak() -> None:
    assert metrics.measure_rms_db(sine()) == pytest.approx(-3.01, abs=0.01)


@pytest.mark.parametrize("frequency", [440.0, 5000.0])
def test_the_centroid_of_a_tone_is_its_frequency(frequency: float) -> None:
    assert metrics.compute_spectral_centroid(sine(frequency), RATE) == pytest.approx(frequency, rel=0.02)


def test_the_centroid_of_silence_is_zero() -> None:
    assert metrics.compute_spectral_centroid(torch.zeros(2, RATE), RATE) == 0.0


def test_width_goes_from_mono_to_opposite_phases() -> None:
    one = sine()[:1]
    assert metrics.compute_stereo_width(torch.cat((one, one))) == 0.0
    assert metrics.compute_stereo_width(torch.cat((one, -one))) == 1.0
    independent = torch.from_numpy(noise(1.0).T.copy())
    assert metrics.compute_stereo_width(independent) == pytest.approx(0.5, abs=0.05)
    assert metrics.compute_stereo_width(torch.zeros(2, 10)) == 0.0
    assert metrics.compute_stereo_width(one) == 0.0


def test_mel_spectrogram_peaks_at_the_tone() -> None:
    low, high = (
        metrics.compute_mel_spectrogram(sine(f, seconds=0.5), RATE).mean(dim=1).argmax() for f in (300.0, 6000.0)
    )
    assert low < high


def test_log_mel_distance_is_in_decibels() -> None:
    real = torch.from_numpy(noise(1.0).T)
    assert metrics.compute_log_mel_distance(real, real, 44100) == 0
    assert metrics.compute_log_mel_distance(real, 0.5 * real, 44100) == pytest.approx(6.02, abs=0.05)


def test_the_picture_is_a_png_and_repeats() -> None:
    picture = metrics.plot_mel_spectrogram(sine(seconds=0.3), RATE, "a tone")
    assert picture.startswith(b"\x89PNG")
    assert picture == metrics.plot_mel_spectrogram(sine(seconds=0.3), RATE, "a tone")


def test_measure_names_everything() -> None:
    measured = metrics.measure(sine(peak=0.5), RATE)
    assert set(measured) == {
        *("loudness_lufs", "true_peak_db", "rms_db", "spectral_centroid_hz", "stereo_width", "clipped_share")
    }
    assert measured["clipped_share"] == 0.0
    assert metrics.compute_clipped_share(torch.ones(2, 4)) == 1.0


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 30_000), st.sampled_from([2000, 8000, 44100, 192_000]))
@example(1, 44100)
@example(5551, 44100)
@example(17640, 44100)
def test_every_length_has_a_loudness(length: int, rate: int) -> None:
    noise_CN = torch.from_numpy(noise(1.0, 30_000, channels=1, seed=1).T[:, :length].copy())
    assert -60 < metrics.measure_loudness_lufs(noise_CN, rate) < 6


@pytest.mark.parametrize("samples", [18_000, 20_000, 26_000])
def test_sound_after_the_last_whole_block_has_a_loudness(samples: int) -> None:
    late_CN = torch.zeros(2, samples)
    late_CN[:, -300:] = 0.5
    assert -40 < metrics.measure_loudness_lufs(late_CN, RATE) < -10


@pytest.mark.parametrize("rate", [2000, 3000, 8000, 11025, 22050, 96000])
def test_loudness_hardly_depends_on_the_rate(rate: int) -> None:
    assert metrics.measure_loudness_lufs(sine(440.0, rate=rate), rate) == pytest.approx(-0.7, abs=0.1)
