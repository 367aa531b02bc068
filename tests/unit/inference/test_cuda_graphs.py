"""Recorded steps give what steps give: with a stand-in for CUDA's graphs that computes on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.generation import generate_latents
from sa3train.core.errors import ConfigError
from sa3train.inference import Generator, cuda_graphs
from sa3train.inference.cuda_graphs import CUDAGraphRunner, Step

ASSETS = Path(cuda_graphs.__file__).parents[1] / "assets"
SETTINGS: dict[str, Any] = {"prompt": "koto", "duration": 1.0, "seed": 2}


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """What was recorded. As on a device, a replay reads and writes the same memory each time."""
    made: list[Step] = []

    def capture(function: Step, inputs: tuple[Tensor, Tensor]) -> tuple[Callable[[], object], Tensor]:
        made.append(function)
        output = torch.full_like(inputs[0], torch.nan)  # recording computes nothing
        return lambda: output.copy_(function(*inputs)), output

    monkeypatch.setattr(cuda_graphs, "capture_graph", capture)
    return made


@pytest.fixture(scope="module")
def base() -> Generator:
    return Generator.from_pretrained("nano-base", device="cpu", precision="fp32")


def generate_both_ways(gen: Generator, **settings: Any) -> tuple[Tensor, Tensor]:
    gen.cuda_graphs = True
    found = generate_latents(gen, **SETTINGS, **settings)
    gen.cuda_graphs = False
    return found, generate_latents(gen, **SETTINGS, **settings)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp", "rk4", "pingpong"])
def test_every_sampler_gives_the_same(base: Generator, sampler: str, recordings: list[Step]) -> None:
    found, expected = generate_both_ways(base, sampler_type=sampler, steps=4, cfg_scale=1.0)
    assert torch.equal(found, expected)
    assert len(recordings) == 1


def test_guidance_in_an_interval_records_both_batches(base: Generator, recordings: list[Step]) -> None:
    found, expected = generate_both_ways(base, steps=8, cfg_scale=4.0, cfg_interval=(0.0, 0.6))
    assert torch.equal(found, expected)
    assert len(recordings) == 2


def test_a_changed_weight_is_recorded_anew(base: Generator, recordings: list[Step]) -> None:
    base.load_adapter(ASSETS / "nano" / "learned" / "koto.safetensors", interval=(0.3, 0.8))
    try:
        found, expected = generate_both_ways(base, steps=24, cfg_scale=1.0)
    finally:
        base.remove_adapter(0)
    assert torch.equal(found, expected)
    assert len(recordings) == 3, "before the interval, in it, and behind it"


def test_what_cannot_be_recorded_is_run_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(cuda_graphs, "capture_graph", refuse)
    step = CUDAGraphRunner(lambda x, t: x * t)
    for number in range(4):
        assert step(torch.full((2,), 3.0), torch.tensor(float(number))).tolist() == [3.0 * number] * 2
    assert caplog.text.count("operation not permitted") == 1


def test_velocities_that_are_kept_do_not_change(recordings: list[Step]) -> None:
    step = CUDAGraphRunner(lambda x, t: x * t)
    kept = [step(torch.ones(2), torch.tensor(float(number))) for number in range(4)]
    assert [each[0].item() for each in kept] == [0.0, 1.0, 2.0, 3.0]


def test_they_are_refused_where_they_do_nothing() -> None:
    with pytest.raises(ConfigError, match="no effect on cpu"):
        Generator.from_pretrained("nano", device="cpu", cuda_graphs=True)
