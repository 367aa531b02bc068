"""Shards, small runs and killable processes for everything that trains; the code is in `trials.py`."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# Test folders are not packages; the module needs a name under which runs can be sent to other processes.
_spec = importlib.util.spec_from_file_location("training_trials", Path(__file__).with_name("trials.py"))
assert _spec is not None and _spec.loader is not None
trials = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = trials
_spec.loader.exec_module(trials)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and four held-out clips of 8 to 16 frames."""
    folder: Path = trials.make_shards(tmp_path_factory.mktemp("data"), [8 + n % 9 for n in range(16)], heldout=4)
    return folder


@pytest.fixture
def shard_maker(tmp_path: Path) -> Callable[..., Path]:
    """`shard_maker("name", lengths, heldout=1)`."""
    return lambda name, *args, **kwargs: trials.make_shards(tmp_path / name, *args, **kwargs)


@pytest.fixture
def trial(shards: Path, tmp_path: Path) -> Callable[..., Any]:
    """`trial("name", max_steps=4, …)`."""
    return lambda name, **values: trials.Trial(values.pop("shards", shards), tmp_path / name, **values)


@pytest.fixture(scope="session")
def make_trial() -> Any:
    """`make_trial(shards, run_dir, max_steps=4, …)`, for fixtures of a wider scope."""
    return trials.Trial


@pytest.fixture(scope="session")
def children() -> Iterator[Any]:
    """Runs in processes of their own, which can be killed."""
    started = trials.Children()
    yield started
    started.close()


@pytest.fixture(scope="session")
def helpers() -> SimpleNamespace:
    """Functions that read what a run has left."""
    return SimpleNamespace(
        losses_of=trials.losses_of, adapter_of=trials.adapter_of, make_shards=trials.make_shards, GOLDEN=trials.GOLDEN
    )
