"""A run that is stopped anywhere and resumed ends exactly where the uninterrupted one does."""

import functools
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.training import Children, Trial, assert_same_results, read_adapter, read_losses
from sa3train.adapters.spec import AdapterSpec
from sa3train.reports.run_files import read_metrics
from sa3train.training.callbacks.checkpoint import get_checkpoint_path, list_checkpoints, read_run_checkpoint
from sa3train.training.callbacks.validation import ValidationCallback
from sa3train.training.module import LoraModule
from sa3train.training.settings import OptimizerSettings, SchedulerSettings, ValidationSettings


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def make_hard_trial(shards: Path, tmp_path: Path, name: str, **values: Any) -> Any:
    """Two loader workers, accumulation 2, EMA, validation, dropout in the adapter."""
    return Trial(
        shards,
        tmp_path / name,
        max_steps=12,
        num_workers=2,
        trainer={"accumulate": 2, "ema_decay": 0.9},
        save_every=3,
        validation=ValidationSettings(every=4, clips=2),
        spec=AdapterSpec("dora-rows", rank=4, dropout=0.1, include=["self_attn"]),
        **values,
    )


def assert_same_files(run: Any, whole: Any) -> None:
    assert_same_results(run, whole)
    assert (run.run_dir / "validation.json").read_text() == (whole.run_dir / "validation.json").read_text()


def worked(pid: int, most: float = float("inf")) -> float:
    """Wait until the process `pid` has computed for `most` seconds or has ended; the seconds it has computed for.

    Moments in its own time are as random, whatever else the machine does.
    """
    while True:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        if seconds >= most or fields[0] == "Z":
            return seconds
        time.sleep(0.01)


def kill_until_done(
    children: Children, run: Any, start: Callable[[bool], list[int]], rng: random.Random, most: float, kills: int
) -> int:
    """Kill and resume `run` at random moments, at most `kills` times, until it ends by itself; how often it was."""
    done = 0
    while True:
        pids = start((run.run_dir / "run.json").is_file())
        if done < kills:
            worked(pids[0], rng.uniform(0.1, 0.9) * most)
            for pid in pids:
                os.killpg(pid, signal.SIGKILL)
        ended = [children.outcome(pid) for pid in pids]
        if ended == [0] * len(pids):
            return done
        # 1: a rank whose partner was killed a moment before it.
        assert done < kills and set(ended) <= {0, 1, -signal.SIGKILL} and -signal.SIGKILL in ended, ended
        done += 1


def kill_ten_times(
    shards: Path, tmp_path: Path, children: Children, start: Callable[[Any, bool], list[int]], **values: Any
) -> None:
    """A whole run, then others that are killed ten times in all, each compared with it."""
    whole = make_hard_trial(shards, tmp_path, "whole", **values)
    pids = start(whole, False)
    seconds = worked(pids[0])
    assert {children.outcome(pid) for pid in pids} == {0}
    rng, kills, number = random.Random(5), 0, 0
    while kills < 10:
        number += 1
        killed = make_hard_trial(shards, tmp_path, f"killed{number}", **values)
        again = functools.partial(start, killed)
        kills += kill_until_done(children, killed, again, rng, seconds, 10 - kills)
        assert_same_files(killed, whole)


@pytest.mark.slow
def test_killed_at_ten_random_points_ends_the_same(shards: Path, tmp_path: Path, children: Children) -> None:
    kill_ten_times(shards, tmp_path, children, lambda run, resume: [children.start(run, resume=resume)])


@pytest.mark.slow
def test_two_ranks_killed_at_ten_random_points_end_the_same(shards: Path, tmp_path: Path, children: Children) -> None:
    kill_ten_times(
        shards, tmp_path, children, lambda run, resume: children.two_ranks(run, resume=resume), batch_size=1
    )  # fmt: skip


def make_small_trial(shards: Path, tmp_path: Path, name: str, **values: Any) -> Any:
    return Trial(shards, tmp_path / name, max_steps=6, trainer={"ema_decay": 0.9}, save_every=2, **values)


@pytest.fixture
def pair(shards: Path, tmp_path: Path) -> tuple[Trial, Trial]:
    """A run that is through, and an equal one that has not begun."""
    whole, part = make_small_trial(shards, tmp_path, "whole"), make_small_trial(shards, tmp_path, "part")
    assert whole.run().interrupted is None
    return whole, part


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float, tuple[float, ...], float]]:
    """Number, learning rate, betas and weight decay of each micro-batch."""
    seen: list[tuple[int, float, tuple[float, ...], float]] = []
    step = LoraModule.training_step

    def watch(self: LoraModule, batch: Any, batch_idx: int) -> Any:
        group = self.trainer.optimizers[0].param_groups[0]
        seen.append((batch_idx, group["lr"], tuple(group["betas"]), group["weight_decay"]))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LoraModule, "training_step", watch)
    return seen


@pytest.mark.slow
def test_an_extended_run_learns_from_its_first_step(shards: Path, tmp_path: Path, watched: list[Any]) -> None:
    run = Trial(shards, tmp_path / "run", max_steps=2, scheduler=SchedulerSettings("cosine"))
    for run.max_steps in (2, 4):
        run.run(resume=run.max_steps == 4, loop="cosine")
    rates = [rate for _, rate, _, _ in watched]
    assert rates == pytest.approx([1e-3, 0.5e-3, 0.5e-3, 0.1464e-3], rel=1e-3), "after half of the steps half the rate"


def test_what_may_change_wins_over_the_state_from_the_first_step(
    shards: Path, tmp_path: Path, watched: list[Any]
) -> None:
    run = Trial(shards, tmp_path / "run", max_steps=4, trainer={"accumulate": 3}, stop_after=6)
    run.run(loop="any")
    run.stop_after, run.trainer = None, {"accumulate": 1}
    run.optimizer = OptimizerSettings(lr=4e-4, betas=[0.8, 0.9], weight_decay=0.5)
    run.scheduler = SchedulerSettings("inverse", options={"gamma": 2.0, "power": 1.0})
    assert run.run(resume=True, loop="any").steps == 4
    assert watched[-2:] == [
        (6, pytest.approx(2e-4), (0.8, 0.9), 0.5), (7, pytest.approx(1.6e-4), (0.8, 0.9), 0.5)
    ], "each micro-batch of its own number, and so of draws of its own"  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_schedulers_signal_saves_and_stops_and_the_run_goes_on(
    pair: tuple[Trial, Trial], number: signal.Signals
) -> None:
    whole, part = pair
    part.stop_after, part.stop_by = 3, number
    handler = signal.getsignal(number)
    stopped = part.run()
    assert stopped.interrupted == number and stopped.steps == 3, "between two intervals"
    assert signal.getsignal(number) is handler, "handlers are given back"
    assert list(list_checkpoints(part.run_dir)) == [2, 3] and (part.run_dir / "adapter.safetensors").is_file()
    part.stop_after = None
    assert part.run(resume=True).steps == 6
    assert_same_results(part, whole)


@pytest.mark.slow
def test_a_signal_to_the_whole_group_saves_too(shards: Path, tmp_path: Path, children: Children) -> None:
    """Workers that died of it would end the run before its step is saved."""
    whole, part = (make_hard_trial(shards, tmp_path, name) for name in ("whole", "part"))
    before = multiprocessing.active_children()
    whole.run()
    assert multiprocessing.active_children() == before, "workers end with the training"
    part.stop_after, part.stop_by = 5, -signal.SIGTERM
    assert children.outcome(children.start(part)) == 0
    assert list(list_checkpoints(part.run_dir)) == [3]
    part.stop_after = None
    assert part.run(resume=True).steps == 12
    assert_same_files(part, whole)


@pytest.mark.slow
def test_a_run_that_fails_keeps_its_last_whole_step_and_goes_on_from_it(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two micro-batches make a step here: one that fails in the first has lost nothing, in the second its first."""
    whole = make_hard_trial(shards, tmp_path, "whole")
    whole.run()
    for micro_batch, saved in ((9, 4), (10, 3), (None, 4)):
        part = make_hard_trial(shards, tmp_path, f"part{micro_batch}")
        part.stop_after, part.stop_by = micro_batch, ZeroDivisionError
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            if micro_batch is None:  # the second validation, of step 4, fails
                patch.setattr(ValidationCallback, "_is_due", lambda _, trainer: trainer.global_step == 4 and 1 / 0)
            part.run()
        assert list(list_checkpoints(part.run_dir))[-1] == saved
        assert f"step {saved} is saved" in caplog.text and f"sa3-train resume={part.run_dir}" in caplog.text
        part.stop_after = None
        assert part.run(resume=True).steps == 12
        assert_same_files(part, whole)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["torn", "gone"])
def test_after_a_torn_write_the_state_before_is_used_and_without_any_it_starts_again(
    pair: tuple[Trial, Trial], damage: str
) -> None:
    whole, part = pair
    part.stop_after = 4
    part.run()
    part.stop_after = None
    if damage == "torn":
        newest = get_checkpoint_path(part.run_dir, 4)
        newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    else:
        shutil.rmtree(part.run_dir / "checkpoints")
    assert part.run(resume=True).steps == 6
    assert_same_results(part, whole)


def test_resuming_a_finished_run_leaves_what_it_finds(shards: Path, tmp_path: Path) -> None:
    run = make_small_trial(shards, tmp_path, "done")
    run.run()
    before, losses = read_adapter(run.run_dir), read_losses(run.run_dir)
    again = run.run(resume=True)
    assert again.steps == 6 and same(read_adapter(run.run_dir), before)
    assert read_losses(run.run_dir) == losses


@pytest.mark.slow
def test_a_run_that_is_made_longer_is_the_run_that_was_long(pair: tuple[Trial, Trial]) -> None:
    whole, part = pair
    for part.max_steps in (4, 6):
        part.run(resume=part.max_steps == 6, loop="any")
    assert same(read_adapter(part.run_dir), read_adapter(whole.run_dir))


def test_an_average_that_begins_with_a_resume_starts_at_the_weights(shards: Path, tmp_path: Path) -> None:
    run = Trial(shards, tmp_path / "run", max_steps=2)
    run.run(loop="any")
    run.max_steps, run.trainer = 3, {"ema_decay": 0.97}
    run.run(resume=True, loop="any")
    before, after = (read_run_checkpoint(get_checkpoint_path(run.run_dir, step)) for step in (2, 3))
    assert "ema" not in before and after["ema"]["updates"] == 1
    for name, average in after["ema"]["tensors"].items():
        expected = torch.lerp(before["state_dict"][name], after["state_dict"][name], 0.9)
        assert torch.allclose(average, expected, atol=1e-7), name


def test_only_the_last_states_are_kept_and_a_resumed_step_is_logged_once(shards: Path, tmp_path: Path) -> None:
    run = make_small_trial(shards, tmp_path, "kept")
    run.run()
    assert list(list_checkpoints(run.run_dir)) == [4, 6]
    assert list(read_losses(run.run_dir)) == [1, 2, 3, 4, 5, 6]
    _, rows = read_metrics(run.run_dir / "metrics.csv")
    assert [int(row["step"]) for row in rows] == sorted({int(row["step"]) for row in rows})


def test_a_state_holds_the_adapter_and_no_base_and_no_code(shards: Path, tmp_path: Path) -> None:
    run = make_small_trial(shards, tmp_path, "state")
    run.run()
    state = read_run_checkpoint(get_checkpoint_path(run.run_dir, 6))
    values = sum(tensor.numel() for tensor in state["state_dict"].values())
    most = 4 * values * 5 + 2 * values
    assert get_checkpoint_path(run.run_dir, 6).stat().st_size < most, "adapter, two moments, EMA; the adapter in fp16"
    assert {"optimizer_states", "lr_schedulers", "loops", "ema", "callbacks"} <= set(state)
    assert state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["batches"] == 6
