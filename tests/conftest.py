"""Shared by all tests: few threads, no network, a cache of its own, no deadlines; whole folders that are slow."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


SLOW_FOLDERS = {"integration", "standin_gpu", "standin_mps", "studio"}
"""Folders of tests that run whole commands, the stand-ins for GPUs, or a browser."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow folders."""
    tests = Path(__file__).parent
    for item in items:
        if item.path.relative_to(tests).parts[0] in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Let the library cache (nano, text embeddings, SVD bases) in a folder of this session."""
    cache = tmp_path_factory.mktemp("cache")
    os.environ["SA3TRAIN_CACHE"] = str(cache)
    return cache


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    """Start Debian's Chromium once for the session: playwright refuses a second one."""
    from helpers.chromium import launch_chromium

    with launch_chromium() as found:
        yield found
