"""Two ranks train what one does; ranks that do not see each other are an error."""

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sa3train.adapters.spec import AdapterSpec
from sa3train.core.errors import ConfigError
from sa3train.training.distributed import check_world, started_ranks
from sa3train.training.settings import JudgeSettings

Make = Callable[..., Any]


LENGTHS = [12, 9, 7, 14, 10, 8, 12, 11]
"""Six training clips of unequal lengths: with four to a batch some batches hold a clip twice."""


def test_two_ranks_with_half_the_batch_equal_one(trial: Make, shard_maker: Make, helpers: Any, children: Any) -> None:
    shards = shard_maker("unequal", LENGTHS, heldout=2)
    values = {"shards": shards, "max_steps": 5, "loop": {"accumulate": 2}, "spec": AdapterSpec("bora", rank=4)}
    values["judge"] = JudgeSettings(every=5, clips=3)
    one, two = trial("one", batch_size=4, **values), trial("two", batch_size=2, **values)
    assert children.outcome(children.start(one)) == 0
    assert [children.outcome(pid) for pid in children.two_ranks(two)] == [0, 0]
    expected, found = helpers.adapter_of(one.run_dir), helpers.adapter_of(two.run_dir)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), atol=1e-5, rtol=1e-3)
    for step, loss in helpers.losses_of(one.run_dir).items():
        assert float(helpers.losses_of(two.run_dir)[step]) == pytest.approx(float(loss), abs=1e-5)


def test_a_sharded_base_on_two_ranks_trains_what_one_rank_does(
    trial: Make, shard_maker: Make, helpers: Any, children: Any
) -> None:
    shards = shard_maker("unequal", LENGTHS, heldout=2)
    values = {"shards": shards, "max_steps": 4, "judge": JudgeSettings(every=4, clips=3)}
    one = trial("one", batch_size=4, loop={"accumulate": 2}, **values)
    two = trial("two", batch_size=2, loop={"accumulate": 2, "strategy": "fsdp"}, **values)
    assert children.outcome(children.start(one)) == 0
    assert [children.outcome(pid) for pid in children.two_ranks(two)] == [0, 0]
    expected, found = helpers.adapter_of(one.run_dir), helpers.adapter_of(two.run_dir)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), atol=1e-5, rtol=1e-3)
    summaries = [json.loads((run.run_dir / "heldout.json").read_text()) for run in (one, two)]
    assert summaries[1]["base"]["heldout"]["loss"] == pytest.approx(summaries[0]["base"]["heldout"]["loss"], rel=1e-5)


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
    assert started_ranks() == started


def test_ranks_that_do_not_see_each_other_are_an_error(alone: pytest.MonkeyPatch) -> None:
    check_world(1)
    alone.setenv("WORLD_SIZE", "4")
    check_world(4)
    with pytest.raises(ConfigError, match=r"4 ranks were started but 1 would train together.*devices x num_nodes = 4"):
        check_world(1)
    alone.delenv("WORLD_SIZE")
    with pytest.raises(ConfigError, match=r"asks for 2 ranks, but 1 was started.*torchrun"):
        check_world(2)
