"""Adapters through the generator: strength 0 and removal are exact, several add up, intervals and layers hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.generation import generate_latents
from helpers.golden import GOLDEN
from sa3train.adapters.formats.io import load_adapter
from sa3train.core.errors import AdapterError, GenerationError
from sa3train.inference import Generator
from sa3train.inference.checks import check_files
from sa3train.inference.settings import GenerationSettings

ADAPTERS = GOLDEN / "plain" / "adapters"
LORA, DORA = ADAPTERS / "lora.safetensors", ADAPTERS / "dora-rows.safetensors"
SETTINGS: dict[str, Any] = {"prompt": "low hum", "duration": 0.4, "steps": 3, "seed": 4, "cfg_scale": 2.0}
LATE = (0.1, 0.5)


def play(gen: Generator) -> torch.Tensor:
    return generate_latents(gen, **SETTINGS)


@pytest.mark.parametrize("which", ["plain", "diff"])
@pytest.mark.parametrize("kind", ["lora", "dora-rows"])
def test_at_strength_zero_the_audio_is_bit_identical_to_none(
    make: Callable[..., Generator], which: str, kind: str
) -> None:
    gen = make(which)
    output = gen.generate(**SETTINGS)
    without = output.audio[0]
    report = gen.load_adapter(ADAPTERS.parents[1] / which / "adapters" / f"{kind}.safetensors", strength=0.0)
    assert all(len(repr(each)) < 250 for each in (output, report, gen))
    assert torch.equal(gen.generate(**SETTINGS).audio[0], without)
    gen.set_strength(1.0)
    assert not torch.equal(gen.generate(**SETTINGS).audio[0], without)
    gen.set_strength(0.0, adapter=0)
    assert torch.equal(gen.generate(**SETTINGS).audio[0], without)
    gen.set_strength(1.0)
    gen.remove_adapter(0)
    assert torch.equal(gen.generate(**SETTINGS).audio[0], without)


def test_a_second_adapter_is_added_to_the_first_in_any_order(gen: Generator) -> None:
    gen.load_adapter(LORA, 0.8)
    one = play(gen)
    gen.load_adapter(DORA, 0.5)
    both = play(gen)
    assert not torch.equal(one, both)
    assert [entry["path"] for entry in gen.adapters] == [str(LORA), str(DORA)]
    gen.remove_adapter(0)
    gen.load_adapter(LORA, 0.8)
    assert torch.equal(play(gen), both)


def test_a_load_says_what_fitted(gen: Generator) -> None:
    report = gen.load_adapter(LORA)
    assert report.matched
    assert not report.unexpected
    assert report.effect["all"] > 0


def test_an_interval_acts_at_its_noise_levels_only(gen: Generator) -> None:
    """Three steps sample at levels 1, 0.97 and 0.67; the conditioner has no level and is off by its strength."""
    without = play(gen)
    gen.load_adapter(LORA, interval=LATE, conditioner_strength=0.0)
    with pytest.raises(GenerationError, match=r"interval=\(0\.1, 0\.5\) of .*lora.* no effect.*1, 0\.97, 0\.676"):
        play(gen)
    gen.set_strength(0.0)
    assert torch.equal(play(gen), without)
    check_files([GenerationSettings(**SETTINGS)], gen.facts, [{"adapter": LORA, "strength": (0, 0), "interval": LATE}])
    gen.remove_adapter(0)
    gen.load_adapter(LORA, interval=(0.6, 0.7), conditioner_strength=0.0)
    late = play(gen)
    gen.remove_adapter(0)
    gen.load_adapter(LORA, conditioner_strength=0.0)
    always = play(gen)
    assert not torch.equal(late, without)
    assert not torch.equal(late, always)


def test_the_conditioner_has_a_strength_of_its_own(gen: Generator) -> None:
    gen.load_adapter(LORA)
    same = play(gen)
    gen.set_strength(1.0, conditioner_strength=0.0)
    assert not torch.equal(play(gen), same)
    assert gen.adapters[0]["conditioner_strength"] == 0.0


def test_excluded_layers_are_left_alone(gen: Generator) -> None:
    whole = [path for path in load_adapter(LORA).tensors if path.startswith("model.")]
    without = play(gen)
    gen.load_adapter(LORA, exclude_layers="model.transformer.layers[0-0]")
    assert not torch.equal(play(gen), without)
    assert gen.adapters[0]["exclude_layers"] == ["model.transformer.layers[0-0]"]
    gen.remove_adapter(0)
    gen.load_adapter(LORA, exclude_layers=[*whole], conditioner_strength=0.0)
    assert torch.equal(play(gen), without)


def test_what_does_not_fit_is_refused_and_leaves_the_model_alone(
    gen: Generator, make: Callable[..., Generator], tmp_path: Path
) -> None:
    without = play(gen)
    pickled = tmp_path / "old.ckpt"
    torch.save({"lora_A": torch.zeros(2, 2)}, pickled)
    for bad, message in (
        (ADAPTERS.parents[1] / "diff" / "adapters" / "lora.safetensors", "only some of its layers fit"),
        (pickled, "pickle"),
        (tmp_path / "none.safetensors", "There is no adapter at"),
    ):
        with pytest.raises(AdapterError, match=message):
            gen.load_adapter(bad)
    with pytest.raises(AdapterError, match="strength must be a finite number"):
        gen.load_adapter(LORA, "loud")  # type: ignore[arg-type]
    for call in (lambda: gen.remove_adapter(0), lambda: gen.set_strength(1.0, 2)):
        with pytest.raises(AdapterError, match="No adapter has index|No adapter is loaded"):
            call()
    with pytest.raises(AdapterError, match="No adapter is loaded"):
        gen.set_strength(0.5)
    assert gen.adapters == []
    assert torch.equal(play(gen), without)
