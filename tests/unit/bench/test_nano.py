"""The measurements of `sa3-bench nano`, on audio whose answer is known."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from torch import Tensor

from sa3train.audio.metrics import compute_si_sdr
from sa3train.bench import nano
from sa3train.bench.figures import Options
from sa3train.core.errors import ConfigError
from sa3train.evaluation.attributes import ATTRIBUTES
from sa3train.evaluation.classifier import FEATURES, Classifier


def noise(seconds: float, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(2, int(seconds * nano.RATE), generator=torch.Generator().manual_seed(seed))


def test_si_sdr_ignores_scale_and_counts_noise() -> None:
    real, other = noise(1.0), noise(1.0, 1)
    assert compute_si_sdr(real, 0.3 * real) > 60
    assert compute_si_sdr(real, real + 0.1 * other) == pytest.approx(20, abs=0.3)


def test_attribute_prompts_cover_all_answers_of_all_attributes() -> None:
    answers = {(each.attribute, each.answer) for each in nano.ATTRIBUTE_PROMPTS}
    assert answers == {(name, answer) for name, each in ATTRIBUTES.items() for answer in (each.less, each.more)}


def test_a_missing_classifier_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nano, "ASSETS", tmp_path)
    with pytest.raises(ConfigError, match=r"classifier\.safetensors"):
        nano.run(Options())


KNOWN = [f"sound {number}" for number in range(53)]


@dataclass
class NoiseGenerator:
    """A generator that plays noise for as long as asked, then silence."""

    objective: str = "rectified_flow"
    late: float = 0.0

    @property
    def facts(self) -> SimpleNamespace:
        return SimpleNamespace(name="fake", objective=self.objective)

    @property
    def model(self) -> SimpleNamespace:
        return SimpleNamespace(autoencoder=SimpleNamespace(decode=lambda z_BCT, generator: z_BCT))

    device = "cpu"

    def generate(self, prompt: list[str], duration: float, seed: int, **settings: object) -> SimpleNamespace:
        clips = [noise(duration + self.late, index) for index in range(len(prompt))]
        whole = torch.stack([torch.cat([clip, torch.zeros(2, nano.RATE)], 1) for clip in clips])
        return SimpleNamespace(audio=clips, latents=whole)


@pytest.fixture
def constant_classifier() -> Classifier:
    """A classifier that always names its first class."""
    network = torch.nn.Sequential(torch.nn.Linear(FEATURES, 53))
    torch.nn.init.zeros_(network[0].weight)
    network[0].bias.data = -torch.arange(53.0)
    return Classifier(network.requires_grad_(False), torch.zeros(FEATURES), torch.ones(FEATURES), KNOWN)


def test_figures_of_a_generator_of_noise(constant_classifier: Classifier) -> None:
    figures = {
        each.name: each
        for each in nano._measure_prompt_following(NoiseGenerator(late=0.25), constant_classifier, KNOWN)
    }  # type: ignore[arg-type]
    assert figures["fake: class ranked first"].value == pytest.approx(100 / 53)
    assert figures["fake: class among the first five"].value == pytest.approx(500 / 53)
    assert figures["fake: error of the ending, median"].value == pytest.approx(0.25, abs=0.02)
    assert figures["fake: class ranked first"].target == 60
    assert 0 < figures["fake: requested attributes right"].value < 100


def test_targets_of_class_and_attributes_are_the_base_models(constant_classifier: Classifier) -> None:
    for figure in nano._measure_prompt_following(NoiseGenerator("rf_denoiser"), constant_classifier, KNOWN):  # type: ignore[arg-type]
        assert (figure.target is None) == ("ending" not in figure.name)


@dataclass
class AdaptedGenerator(NoiseGenerator):
    """Plays a tone that its adapters turn into noise, and remembers what was loaded."""

    loaded: tuple[str, ...] = ()
    strength: float = 1.0

    def load_adapter(self, path: Path, strength: float) -> None:
        self.loaded, self.strength = (*self.loaded, path.stem), strength

    def set_strength(self, strength: float, adapter: int) -> None:
        self.strength = strength

    def remove_adapter(self, index: int) -> None:
        self.loaded = self.loaded[:index] + self.loaded[index + 1 :]

    def generate(self, prompt: list[str], duration: float, seed: int, **settings: object) -> SimpleNamespace:
        tone = torch.sin(2 * torch.pi * 1000 * torch.arange(int(duration * nano.RATE)) / nano.RATE)
        share = self.strength if self.loaded else 0.0
        clips = [(1 - share) * 0.1 * tone + share * noise(duration, index) for index in range(len(prompt))]
        return SimpleNamespace(audio=clips)


def test_adapters_are_measured_at_three_strengths_and_together(
    constant_classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sound 1", "sound 2"):
        stem = name.replace(" ", "_")
        (tmp_path / f"{stem}.safetensors").touch()
        soundfile.write(tmp_path / f"{stem}_0.ogg", noise(1.0).T.numpy(), nano.RATE)
    probabilities = {0.0: 0.1, 0.5: 0.2, 1.0: 0.6}
    generator = AdaptedGenerator()
    monkeypatch.setattr(
        nano,
        "compute_mean_probability",
        lambda classifier, clips, name: probabilities[generator.strength] + 0.1 * (len(generator.loaded) == 2),
    )
    figures = {each.name: each for each in nano._measure_adapters(generator, constant_classifier, tmp_path)}  # type: ignore[arg-type]
    assert not generator.loaded
    rise = figures["fake with the sound 1 adapter: probability of sound 1, smallest rise"]
    assert rise.value == pytest.approx(0.1)
    assert rise.note == "0.10 at 0, 0.20 at 0.5, 0.60 at 1"
    fall = figures["fake with the sound 2 adapter: spectral distance to real clips, smallest fall"]
    assert fall.reached
    both = figures["fake with both adapters: probability of the requested one, smallest gain over none"]
    assert both.value == pytest.approx(0.6)


def test_the_post_trained_models_shortfall_is_a_figure() -> None:
    pair = [
        nano.Figure(f"{name}: requested attributes right", value, "%")
        for name, value in (("nano-base", 80.0), ("nano", 75.0))
    ]
    assert nano._add_difference(pair)[-1].value == 5


def test_classes_are_reported_one_by_one() -> None:
    assert nano._format_by_class({"piano": 5.04, "hi-hat": -1.0}) == "piano 5.0, hi-hat -1.0"
