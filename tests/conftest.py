"""Shared by every test: few threads, no network, a cache of its own, no judging of tests by their time."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the library caches (nano, text embeddings, SVD bases) goes to a folder of this session."""
    cache = tmp_path_factory.mktemp("cache")
    os.environ["SA3TRAIN_CACHE"] = str(cache)
    return cache
