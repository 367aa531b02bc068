"""The helpers of `helpers.small_model` as the fixtures that the invariant matrix takes."""

from collections.abc import Callable

import pytest

from helpers.small_model import Small, train, train_adapter
from sa3train.adapters.adapter import Adapter
from sa3train.adapters.spec import AdapterSpec


@pytest.fixture(scope="session")
def small() -> type[Small]:
    return Small


@pytest.fixture(scope="session")
def trained() -> Callable[..., Adapter]:
    """`train_adapter`, once for each spec, seed and model."""
    found: dict[tuple[object, ...], Adapter] = {}

    def train_once(spec: AdapterSpec, model: Small, seed: int = 0) -> Adapter:
        first = next(model.parameters())
        key = (repr(spec), seed, model.conv, first.dtype, first.sum().item())
        if key not in found:
            found[key] = train_adapter(spec, model, seed)
        return found[key]

    return train_once


@pytest.fixture(scope="session")
def steps() -> Callable[..., list[float]]:
    return train
