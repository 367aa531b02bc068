"""The checkers say of plain signals what a listener would."""

import math

import pytest
import torch
from torch import Tensor

from sa3train.evaluation.attributes import ATTRIBUTES, find_end_of_sound, find_onsets, measure_pitch

RATE = 44100


def partials(hertz: float, seconds: float = 2.0, decay: float = 0.0) -> Tensor:
    time = torch.arange(round(seconds * RATE)) / RATE
    tone = sum(torch.sin(2 * math.pi * hertz * k * time) / k for k in range(1, 6))
    return 0.2 * (tone * torch.exp(-decay * time)).repeat(2, 1)


def noise(seconds: float = 2.0, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(2, round(seconds * RATE), generator=torch.Generator().manual_seed(seed))


def notes(per_second: float, seconds: float = 3.0) -> Tensor:
    note = partials(440, 1 / per_second, decay=12)
    return note.repeat(1, round(seconds * per_second))


@pytest.mark.parametrize("hertz", [55.0, 110.0, 261.6, 440.0, 1046.5])
def test_pitch(hertz: float) -> None:
    assert measure_pitch(partials(hertz), RATE) == pytest.approx(hertz, rel=0.02)


@pytest.mark.parametrize("per_second", [1.0, 2.0, 5.0])
def test_onsets(per_second: float) -> None:
    times = find_onsets(notes(per_second), RATE)
    assert len(times) == round(3 * per_second)
    assert torch.allclose(times, torch.arange(len(times)) / per_second, atol=0.05)


def test_end_of_sound() -> None:
    audio = torch.cat([partials(300, 1.5), torch.zeros(2, RATE)], 1)
    assert find_end_of_sound(audio, RATE) == pytest.approx(1.5, abs=0.03)
    assert find_end_of_sound(torch.zeros(2, RATE), RATE) == 0


CASES = [
    ("register", partials(110), "low"),
    ("register", partials(880), "high"),
    ("brightness", partials(110), "dark"),
    ("brightness", noise(), "bright"),
    ("pace", notes(1), "slow"),
    ("pace", notes(5), "fast"),
    ("texture", partials(300), "tonal"),
    ("texture", noise(), "noisy"),
    ("decay", partials(300), "held"),
    ("decay", partials(300, decay=4), "dying"),
    ("width", partials(300), "mono"),
    ("width", noise(), "stereo"),
]


@pytest.mark.parametrize(("name", "audio", "answer"), CASES, ids=[f"{name}-{answer}" for name, _, answer in CASES])
def test_answers(name: str, audio: Tensor, answer: str) -> None:
    assert ATTRIBUTES[name].answer(audio, RATE) == answer


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_odd_audio_has_an_answer(name: str) -> None:
    attribute = ATTRIBUTES[name]
    for audio in (torch.zeros(2, RATE), torch.zeros(2, 100), noise(0.01), torch.ones(1, RATE)):
        assert attribute.answer(audio, RATE) in (attribute.less, attribute.more)
