"""Channels, lengths and levels."""

import pytest
import torch

from sa3train.audio.edit import apply_gain, fit, mix_channels
from sa3train.audio.layouts import DEFAULT_LAYOUTS
from sa3train.core.errors import AudioError


@pytest.mark.parametrize("count", sorted(set(DEFAULT_LAYOUTS) - {1}))
def test_the_fronts_keep_their_level_in_every_downmix(count: int) -> None:
    audio = torch.zeros(count, 3)
    audio[0], audio[1] = 0.25, 0.5
    assert mix_channels(audio).tolist() == [[0.25] * 3, [0.5] * 3]


def test_to_mono_averages_left_and_right() -> None:
    assert mix_channels(torch.tensor([[1.0, 0.0], [0.0, 0.5]]), 1).tolist() == [[0.5, 0.25]]


def test_only_mono_and_stereo_can_be_asked_for() -> None:
    with pytest.raises(AudioError, match="1 or 2 channels"):
        mix_channels(torch.zeros(2, 4), 6)


def test_fit_cuts_or_fills_with_silence() -> None:
    audio = torch.ones(2, 5)
    assert fit(audio, 3).shape == (2, 3)
    filled = fit(audio, 8)
    assert filled[:, :5].eq(1).all()
    assert filled[:, 5:].eq(0).all()


def test_gain_is_in_decibels() -> None:
    assert apply_gain(torch.ones(1, 1), -20.0).item() == pytest.approx(0.1)
