"""Checkpoints: whole or refused, exact, and without code in them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.training import Trial
from sa3train.adapters.adapter import Adapter
from sa3train.adapters.formats.io import load_adapter
from sa3train.core.errors import AdapterError
from sa3train.training.callbacks.checkpoint import (
    RunCheckpointError,
    pack,
    read_run_checkpoint,
    unpack,
    write_run_checkpoint,
)

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.builds(lambda n: torch.arange(n, dtype=torch.float32), st.integers(0, 4))
)  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers() | st.tuples(st.integers()), inner, max_size=3)
    ),
    max_leaves=12,
)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@settings(max_examples=60, deadline=None)
@given(TREES)
def test_any_tree_comes_back_as_it_was(tree: Any) -> None:
    tensors, skeleton = pack(tree)
    assert equal(unpack(tensors, skeleton), tree)


def test_a_file_comes_back_as_it_was_whatever_its_dtypes(tmp_path: Path) -> None:
    shared = torch.randn(4)
    tree = {
        "a": [shared, shared[:2], torch.tensor(1), torch.empty(0)],
        7: (torch.ones(2, 3).T, torch.arange(3, dtype=torch.uint8), torch.ones(2, dtype=torch.bfloat16)),
        "__kind__": {"x": math.inf, "y": True},
    }
    write_run_checkpoint(tmp_path / "s.safetensors", tree)
    assert equal(read_run_checkpoint(tmp_path / "s.safetensors"), tree)


def test_what_would_need_code_is_refused_by_its_place() -> None:
    with pytest.raises(TypeError, match=r"cannot hold PosixPath \(at /a/0\)"):
        pack({"a": [Path("x")]})


@pytest.mark.parametrize("damage", ["short", "altered", "empty", "gone", "other", "pickle"])
def test_a_damaged_state_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "s.safetensors"
    write_run_checkpoint(path, {"weights": torch.randn(100)})
    content = bytearray(path.read_bytes())
    if damage == "short":
        path.write_bytes(content[:-40])
    elif damage == "altered":
        content[-10] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "gone":
        path.unlink()
    elif damage == "other":
        from safetensors.torch import save_file

        save_file({"x": torch.ones(1)}, path)
    else:
        torch.save({"x": 1}, path)
    with pytest.raises(RunCheckpointError):
        read_run_checkpoint(path)


def flatten(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {f"{path}.{name}": tensor for path, named in adapter.tensors.items() for name, tensor in named.items()}


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.slow
def test_a_run_folder_and_its_checkpoints_are_adapters(shards: Path, tmp_path: Path, ema: float | None) -> None:
    """The adapter of step 2 of a run of four is that of a run of two."""
    runs = {steps: tmp_path / f"run{steps}" for steps in (2, 4)}
    for steps, run_dir in runs.items():
        Trial(shards, run_dir, steps, trainer={"ema_decay": ema}).run()
    long = runs[4]
    expected = {
        "": long / "adapter.safetensors",
        "@4": long / "adapter.safetensors",
        "@2": runs[2] / "adapter.safetensors",
        "/checkpoints/step-00000002.safetensors": runs[2] / "adapter.safetensors",
    }
    for suffix, file in expected.items():
        adapter, reference = load_adapter(f"{long}{suffix}"), load_adapter(file)
        assert adapter.spec == reference.spec
        assert adapter.metadata["step"] == reference.metadata["step"]
        assert equal(flatten(adapter), flatten(reference)), suffix
    assert not equal(flatten(load_adapter(f"{long}@2")), flatten(load_adapter(f"{long}@4")))
    with pytest.raises(AdapterError, match="no checkpoint of step 3.*it has: 2, 4"):
        load_adapter(f"{long}@3")
    (long / "adapter.safetensors").unlink()
    with pytest.raises(AdapterError, match="no adapter yet"):
        load_adapter(long)


def test_a_state_without_an_adapter_is_named(tmp_path: Path) -> None:
    write_run_checkpoint(tmp_path / "s.safetensors", {"weights": torch.randn(3)})
    with pytest.raises(AdapterError, match="checkpoint without an adapter"):
        load_adapter(tmp_path / "s.safetensors")
