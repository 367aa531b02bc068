"""Shards and killable processes for everything that trains."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.training import Children, make_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and four held-out clips of 8 to 16 frames."""
    return make_shards(tmp_path_factory.mktemp("data"), [8 + n % 9 for n in range(16)], heldout=4)


@pytest.fixture(scope="session")
def children() -> Iterator[Children]:
    """Runs in processes of their own, which can be killed."""
    started = Children()
    yield started
    started.close()
