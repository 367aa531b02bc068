"""Two ranks train what one does; ranks that do not see each other are an error."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.training import Children, Trial, assert_same_results, make_shards, read_adapter, read_losses
from sa3train.adapters.spec import AdapterSpec
from sa3train.core.errors import ConfigError
from sa3train.training.distributed import check_world_size, count_started_ranks
from sa3train.training.settings import ValidationSettings

LENGTHS = [12, 9, 7, 14, 10, 8, 12, 11]
"""Six training clips of unequal lengths: with four to a batch some batches hold a clip twice."""


@pytest.mark.slow
def test_two_ranks_with_half_the_batch_equal_one(tmp_path: Path, children: Children) -> None:
    shards = make_shards(tmp_path / "unequal", LENGTHS, heldout=2)
    values: dict[str, Any] = {"max_steps": 5, "trainer": {"accumulate": 2}, "spec": AdapterSpec("bora", rank=4)}
    values["validation"] = ValidationSettings(every=5, clips=3)
    one, two = (
        Trial(shards, tmp_path / "one", batch_size=4, **values),
        Trial(shards, tmp_path / "two", batch_size=2, **values),
    )
    assert children.outcome(children.start(one)) == 0
    assert [children.outcome(pid) for pid in children.two_ranks(two)] == [0, 0]
    expected, found = read_adapter(one.run_dir), read_adapter(two.run_dir)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), atol=1e-5, rtol=1e-3)
    for step, loss in read_losses(one.run_dir).items():
        assert float(read_losses(two.run_dir)[step]) == pytest.approx(float(loss), abs=1e-5)


@pytest.mark.slow
def test_a_sharded_base_on_two_ranks_trains_what_one_rank_does(tmp_path: Path, children: Children) -> None:
    shards = make_shards(tmp_path / "unequal", LENGTHS, heldout=2)
    values: dict[str, Any] = {"max_steps": 4, "validation": ValidationSettings(every=4, clips=3)}
    one = Trial(shards, tmp_path / "one", batch_size=4, trainer={"accumulate": 2}, **values)
    two = Trial(shards, tmp_path / "two", batch_size=2, trainer={"accumulate": 2, "strategy": "fsdp"}, **values)
    assert children.outcome(children.start(one)) == 0
    assert [children.outcome(pid) for pid in children.two_ranks(two)] == [0, 0]
    expected, found = read_adapter(one.run_dir), read_adapter(two.run_dir)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), atol=1e-5, rtol=1e-3)
    summaries = [json.loads((run.run_dir / "validation.json").read_text()) for run in (one, two)]
    assert summaries[1]["base"]["val"]["loss"] == pytest.approx(summaries[0]["base"]["val"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path: Path, children: Children) -> None:
    shards = make_shards(tmp_path / "unequal", LENGTHS, heldout=2)
    whole, part = (Trial(shards, tmp_path / name, batch_size=2, max_steps=5) for name in ("whole", "part"))
    assert [children.outcome(pid) for pid in children.two_ranks(whole)] == [0, 0]
    part.stop_after, part.stop_by = 3, signal.SIGINT
    assert [children.outcome(pid) for pid in children.two_ranks(part)] == [0, 0]
    record = json.loads((part.run_dir / "run.json").read_text())
    assert (record["status"], record["steps"]) == ("interrupted", 3)
    part.stop_after = None
    assert [children.outcome(pid) for pid in children.two_ranks(part, resume=True)] == [0, 0]
    assert_same_results(part, whole)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_")) or name == "WORLD_SIZE":
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "started"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "8"}, 8),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "sa3-train"}, 4),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2),
    ],
)
def test_ranks_that_were_started_are_counted(
    alone: pytest.MonkeyPatch, environment: dict[str, str], started: int
) -> None:
    for name, value in environment.items():
        alone.setenv(name, value)
    assert count_started_ranks() == started


def test_ranks_that_do_not_see_each_other_are_an_error(alone: pytest.MonkeyPatch) -> None:
    check_world_size(1)
    alone.setenv("WORLD_SIZE", "4")
    check_world_size(4)
    with pytest.raises(ConfigError, match=r"4 ranks were started but 1 would train together.*devices x num_nodes = 4"):
        check_world_size(1)
    alone.delenv("WORLD_SIZE")
    with pytest.raises(ConfigError, match=r"asks for 2 ranks, but 1.*torchrun"):
        check_world_size(2)
