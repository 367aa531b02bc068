"""Level on request: true peaks never above the limit, nothing else changed, the loudness reached."""

import math
from types import SimpleNamespace

import pytest
import torch

from helpers.audio import noise, tone
from sa3train.audio.metrics import measure_loudness_lufs, measure_true_peak_db
from sa3train.inference import Generator, mastering
from sa3train.inference.mastering import finish_audio, limit_peaks, master
from sa3train.inference.outputs import describe_measured

RATE = 44100


def make_hits(level: float = 1.8) -> torch.Tensor:
    """A quiet bed with three bursts, one between the samples, one at the very end."""
    audio_CN = torch.from_numpy(tone(1.0, 220.0, RATE, peak=0.1).T.copy())
    audio_CN[:, 10_000:10_200] += level * torch.from_numpy(noise(200 / RATE, RATE).T.copy())
    audio_CN[:, 20_000:20_400] += level * torch.sin(math.pi / 2 * torch.arange(400) + math.pi / 4)
    audio_CN[0, -1] = level
    return audio_CN


@pytest.mark.parametrize(("peak", "level"), [(-0.1, 1.8), (-1.0, 1.8), (-1.0, 30.0), (-6.0, 1.8), (-20.0, 0.5)])
def test_no_true_peak_is_above_the_limit(peak: float, level: float) -> None:
    audio_CN = make_hits(level)
    limited_CN, reduction = limit_peaks(audio_CN, RATE, peak)
    assert measure_true_peak_db(limited_CN, RATE) <= peak
    assert measure_true_peak_db(limited_CN, RATE) > peak - 1.5
    assert reduction > 0


def test_away_from_peaks_not_a_bit_changes() -> None:
    audio_CN = make_hits()
    limited_CN, _ = limit_peaks(audio_CN, RATE, -1.0)
    for part in (slice(0, 9_400), slice(10_800, 19_400), slice(21_000, 43_500)):
        assert torch.equal(limited_CN[:, part], audio_CN[:, part])
    quiet_CN = audio_CN * 0.2
    assert limit_peaks(quiet_CN, RATE, -1.0) == (quiet_CN, 0.0)


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    whole_CN, _ = limit_peaks(make_hits(), RATE, -1.0)
    monkeypatch.setattr(mastering, "BLOCK", 5000)
    assert torch.allclose(limit_peaks(make_hits(), RATE, -1.0)[0], whole_CN, atol=1e-5)


def test_the_loudness_is_reached_and_what_was_done_is_said() -> None:
    audio_CN = torch.from_numpy(tone(2.0, 997.0, RATE, peak=0.05).T.copy())
    before = measure_loudness_lufs(audio_CN, RATE)
    mastered_CN, done = master(audio_CN, RATE, -14.0, -1.0)
    assert measure_loudness_lufs(mastered_CN, RATE) == pytest.approx(-14.0, abs=0.01)
    assert done["gain_db"] == pytest.approx(-14.0 - before, abs=0.001)
    assert done["limited_db"] == 0.0


def test_loudness_that_limited_peaks_do_not_allow_is_said() -> None:
    def measure(loudness: float) -> dict[str, float]:
        settings = SimpleNamespace(loudness=loudness, peak=-1.0, loop=False)
        return finish_audio(make_hits(), settings, RATE).measured  # type: ignore[arg-type]

    assert "missing_db" not in measure(-40.0)
    measured = measure(0.0)
    assert measured["missing_db"] == pytest.approx(-measured["loudness_lufs"], abs=0.01)
    assert "quieter than asked" in " ".join(describe_measured(measured))


def test_the_gain_of_a_loop_joins_too() -> None:
    audio_CN = torch.from_numpy(tone(1.0, 100.0, RATE, peak=0.8).T.copy())
    audio_CN[:, :400] *= 1.6
    loop_CN, _ = master(audio_CN.clone(), RATE, None, -1.0, is_loop=True)
    gain_N = (loop_CN / audio_CN)[0].nan_to_num(1.0)
    assert float((gain_N[-3:].mean() - gain_N[1:4].mean()).abs()) < 0.02
    assert measure_true_peak_db(loop_CN.roll(5000, dims=1), RATE) <= -1.0


def test_what_is_said_is_what_is_written(gen: Generator) -> None:
    output = gen.generate("hum", duration=2.0, steps=2, seed=4, cfg_scale=1.0, loudness=-1.0)
    assert output.clipped_shares[0] > 0
    assert output.measured[0]["loudness_lufs"] == pytest.approx(measure_loudness_lufs(output.audio[0], RATE), abs=1e-3)


@pytest.mark.parametrize("rate", [8000, RATE])
def test_long_audio_is_as_loud_as_its_parts(rate: int) -> None:
    audio_CN = torch.from_numpy(noise(125.0, rate).T.copy())
    part = measure_loudness_lufs(audio_CN[:, : 100 * rate], rate)
    assert measure_loudness_lufs(audio_CN, rate) == pytest.approx(part, abs=0.05)


def test_silence_stays_silent() -> None:
    silent_CN, done = master(torch.zeros(2, RATE), RATE, -14.0, -1.0)
    assert not silent_CN.any()
    assert done == {"gain_db": 0.0, "limited_db": 0.0}
