"""The golden checkpoints, loaded once, and generators that leave no adapter behind."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import pytest

from helpers.golden import DEVICE, GOLDEN
from sa3train.inference.generator import Generator
from sa3train.models.checkpoint import StableAudio3, load_checkpoint


@functools.cache
def loaded(which: str) -> StableAudio3:
    return load_checkpoint(GOLDEN / which, DEVICE)


@pytest.fixture
def make() -> Iterator[Callable[..., Generator]]:
    """`make("plain", objective="rf_denoiser")`: a generator on a golden checkpoint."""
    made: list[Generator] = []

    def build(which: str = "plain", objective: str = "rectified_flow") -> Generator:
        model = loaded(which)
        config = dataclasses.replace(model.config, objective=objective)
        made.append(Generator(dataclasses.replace(model, config=config)))
        return made[-1]

    yield build
    for generator in made:
        generator.stack.clear()


@pytest.fixture
def gen(make: Callable[..., Generator]) -> Generator:
    return make()
