"""The helpers of `helpers.small_model` as the fixtures that the invariant matrix takes."""

from collections.abc import Callable

import pytest

from helpers.small_model import Small, train, train_adapter
from sa3train.adapters.adapter import Adapter


@pytest.fixture(scope="session")
def small() -> type[Small]:
    return Small


@pytest.fixture(scope="session")
def trained() -> Callable[..., Adapter]:
    return train_adapter


@pytest.fixture(scope="session")
def steps() -> Callable[..., list[float]]:
    return train
