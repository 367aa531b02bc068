"""Lengths: bars exact to the sample at any tempo, and windows that cover a piece."""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa3train.inference.lengths import count_bar_samples, plan_windows, to_seconds
from sa3train.inference.resolve import ModelFacts, count_samples

FACTS = ModelFacts("nano", "rf_denoiser", 44100, 4096, 1292)


@pytest.mark.parametrize(
    ("bars", "bpm", "meter", "samples"),
    [(4, 120, "4/4", 352800), (4, 97.3, "4/4", 435108), (8, 174, "3/4", 364966), (1, 90, "7/8", 102900)],
)
def test_bars_have_the_samples_of_their_tempo(bars: int, bpm: float, meter: str, samples: int) -> None:
    assert count_bar_samples(bars, bpm, meter, 44100) == samples


@given(
    bars=st.integers(1, 64),
    bpm=st.one_of(st.integers(40, 240), st.decimals(40, 240, places=2).map(float), st.floats(40, 240)),
    beats=st.integers(1, 15),
    value=st.sampled_from([1, 2, 4, 8, 16]),
)
def test_bars_are_rounded_once_and_survive_as_seconds(bars: int, bpm: float, beats: int, value: int) -> None:
    samples = count_bar_samples(bars, bpm, f"{beats}/{value}", 44100)
    exact = Fraction(bars * beats * 4 * 60 * 44100, value) / Fraction(repr(float(bpm)))
    assert abs(samples - exact) <= Fraction(1, 2)
    assert count_samples(FACTS, to_seconds(samples, 44100)) == samples


@given(
    frames=st.integers(8, 5000),
    longest=st.integers(8, 1200),
    cuts=st.lists(st.integers(1, 5000), max_size=4),
)
def test_windows_cover_the_piece_and_begin_at_every_cut(frames: int, longest: int, cuts: list[int]) -> None:
    windows = plan_windows(frames, longest, longest // 4, cuts)
    assert windows[0][:2] == (0, 0)
    assert windows[-1].stop == frames
    assert all(before.stop == after.new for before, after in pairwise(windows))
    assert {cut for cut in cuts if cut < frames} <= {window.new for window in windows}
    for window in windows:
        assert window.start == max(0, window.new - longest // 4)
        assert 0 < window.stop - window.new <= window.stop - window.start <= longest
