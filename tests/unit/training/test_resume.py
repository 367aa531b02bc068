"""A run that is stopped anywhere and resumed ends exactly where the uninterrupted one does."""

import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from sa3train.adapters.spec import AdapterSpec
from sa3train.training.settings import JudgeSettings

Make = Callable[..., Any]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def hard(trial: Make, name: str, **values: Any) -> Any:
    """Two loader workers, accumulation 2, running average, judgements, dropout in the adapter."""
    return trial(
        name,
        max_steps=14,
        workers=2,
        loop={"accumulate": 2, "average": 0.9},
        save_every=3,
        judge=JudgeSettings(every=4, clips=2),
        spec=AdapterSpec("dora-rows", rank=4, dropout=0.1),
        **values,
    )


def assert_same_run(helpers: Any, run: Any, whole: Any) -> None:
    assert helpers.losses_of(run.run_dir) == helpers.losses_of(whole.run_dir)
    assert same(helpers.adapter_of(run.run_dir), helpers.adapter_of(whole.run_dir))
    assert (run.run_dir / "heldout.json").read_text() == (whole.run_dir / "heldout.json").read_text()


def kill_until_done(
    helpers: Any, run: Any, start: Callable[[bool], list[int]], chance: random.Random, most: float
) -> int:
    """Kill and resume `run` at random moments until it ends by itself; how often it was killed."""
    kills = 0
    while True:
        pids = start((run.run_dir / "run.json").is_file())
        time.sleep(chance.uniform(0.1, 1.0) * most)
        for pid in pids:
            os.killpg(pid, signal.SIGKILL)
        ended = [helpers.outcome(pid) for pid in pids]
        if ended == [0] * len(pids):
            return kills
        assert set(ended) <= {0, -signal.SIGKILL}, ended
        kills += 1


def test_killed_at_ten_random_points_ends_the_same(trial: Make, helpers: Any) -> None:
    whole = hard(trial, "whole")
    started = time.monotonic()
    assert helpers.outcome(helpers.in_child(whole.run)) == 0
    seconds = time.monotonic() - started
    chance, kills, number = random.Random(5), 0, 0
    while kills < 10:
        number += 1
        killed = hard(trial, f"killed{number}")

        def start(resume: bool, killed: Any = killed) -> list[int]:
            return [helpers.in_child(lambda: killed.run(resume=resume))]

        kills += kill_until_done(helpers, killed, start, chance, seconds)
        assert_same_run(helpers, killed, whole)


def test_two_ranks_killed_and_resumed_end_the_same(trial: Make, helpers: Any) -> None:
    whole = hard(trial, "whole", batch_size=1)
    started = time.monotonic()
    assert [helpers.outcome(pid) for pid in helpers.two_ranks(whole)] == [0, 0]
    seconds = time.monotonic() - started
    killed = hard(trial, "killed", batch_size=1)

    def start(resume: bool) -> list[int]:
        return helpers.two_ranks(killed, resume=resume)

    kill_until_done(helpers, killed, start, random.Random(8), seconds)
    assert_same_run(helpers, killed, whole)
