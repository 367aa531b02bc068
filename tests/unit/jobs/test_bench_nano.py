"""The rulers of `sa3-bench nano`, on audio whose answer is known."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sa3train.audio.attributes import ATTRIBUTES
from sa3train.audio.classify import FEATURES, Classifier
from sa3train.errors import ConfigError
from sa3train.jobs.benches import nano
from sa3train.jobs.benches.figures import Options


def noise(seconds: float, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(2, int(seconds * nano.RATE), generator=torch.Generator().manual_seed(seed))


def test_si_sdr_ignores_scale_and_counts_noise() -> None:
    real, other = noise(1.0), noise(1.0, 1)
    assert nano.si_sdr(real, 0.3 * real) > 60
    assert nano.si_sdr(real, real + 0.1 * other) == pytest.approx(20, abs=0.3)


def test_log_mel_distance_is_in_decibels() -> None:
    real = noise(1.0)
    assert nano.log_mel_distance(real, real) == 0
    assert nano.log_mel_distance(real, 0.5 * real) == pytest.approx(6.02, abs=0.05)


def test_every_wish_names_a_checker_and_one_of_its_answers() -> None:
    for wish in nano.WISHES:
        attribute = ATTRIBUTES[wish.attribute]
        assert wish.answer in (attribute.less, attribute.more)
    wanted = {(wish.attribute, wish.answer) for wish in nano.WISHES}
    assert wanted == {(name, answer) for name, each in ATTRIBUTES.items() for answer in (each.less, each.more)}


def test_missing_rulers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nano, "ASSETS", tmp_path)
    with pytest.raises(ConfigError, match=r"classifier\.safetensors"):
        nano.run(Options())


@dataclass
class Player:
    """A generator that plays noise for as long as asked, then silence."""

    objective: str = "rectified_flow"
    late: float = 0.0

    @property
    def facts(self) -> SimpleNamespace:
        return SimpleNamespace(name="fake", objective=self.objective)

    @property
    def model(self) -> SimpleNamespace:
        return SimpleNamespace(autoencoder=SimpleNamespace(decode=lambda z_BCT, noise: z_BCT))

    device = "cpu"

    def generate(self, prompt: list[str], duration: float, seed: int, **settings: object) -> SimpleNamespace:
        clips = [noise(duration + self.late, index) for index in range(len(prompt))]
        whole = torch.stack([torch.cat([clip, torch.zeros(2, nano.RATE)], 1) for clip in clips])
        return SimpleNamespace(audio=clips, latents=whole)


@pytest.fixture
def deaf() -> Classifier:
    """A classifier that always names its first class."""
    network = torch.nn.Sequential(torch.nn.Linear(FEATURES, 53))
    torch.nn.init.zeros_(network[0].weight)
    network[0].bias.data = -torch.arange(53.0)
    return Classifier(network.requires_grad_(False), torch.zeros(FEATURES), torch.ones(FEATURES), list("x" * 53))


def test_figures_of_a_player_of_noise(deaf: Classifier) -> None:
    figures = {each.name: each for each in nano.following(Player(late=0.25), deaf)}  # type: ignore[arg-type]
    assert figures["fake: class named first"].value == pytest.approx(100 / 53)
    assert figures["fake: class among the first five"].value == pytest.approx(500 / 53)
    assert figures["fake: ending off by, median"].value == pytest.approx(0.25, abs=0.02)
    assert figures["fake: class named first"].bar == 60
    assert 0 < figures["fake: requested attributes right"].value < 100


def test_bars_of_class_and_attributes_are_the_base_models(deaf: Classifier) -> None:
    for figure in nano.following(Player("rf_denoiser"), deaf):  # type: ignore[arg-type]
        assert (figure.bar is None) == ("ending" not in figure.name)


def test_without_weights_the_rows_say_so_and_miss_their_bars() -> None:
    rows = nano.untrained()
    assert {row.reached for row in rows} == {False}
    assert all("untrained" in row.note for row in rows)
    assert {row.value_text() for row in rows} == {"not measured"}


def test_classes_are_reported_one_by_one() -> None:
    assert nano._by_class({"piano": 5.04, "hi-hat": -1.0}) == "piano 5.0, hi-hat -1.0"
