"""A run folder is begun once and resumed as what it is."""

import functools
import json
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sa3train.core.errors import ConfigError, SA3Error
from sa3train.core.processes import find_process
from sa3train.core.signals import Interrupted
from sa3train.reports.run_files import RUN_FORMAT, format_settings, load_settings
from sa3train.training import run_dir
from sa3train.training.callbacks.checkpoint import (
    CheckpointVersionError,
    RunCheckpointError,
    find_latest_checkpoint,
    get_checkpoint_path,
    read_run_checkpoint,
    write_run_checkpoint,
)
from sa3train.training.run_dir import RunDir, check_startable, is_requeued

SETTINGS: dict[str, Any] = {
    "run_dir": "a", "adapter": {"rank": 4}, "logger": {"name": "csv"}, "data": {"num_workers": 0, "crop": (1, 2)},
    "callbacks": {"demos": {"every": 5}, "validation": {"every": 5}}, "trainer": {"max_steps": 10, "log_every": 1},
    "scheduler": {"name": "cosine"}, "optimizer": {"name": "adamw", "lr": 0.1},
}  # fmt: skip
IDENTITY = {"data": "abc", "base": "def"}


def open_run(*arguments: Any, **settings: Any) -> RunDir:
    return run_dir.open_run(*arguments, **settings).begin()


def changed(**values: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(SETTINGS))
    for key, value in values.items():
        *sections, name = key.split("__")
        place = copy
        for section in sections:
            place = place[section]
        place[name] = value
    return copy


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def begin(path: Path) -> Path:
    """A run that has saved something."""
    with open_run(path, SETTINGS, IDENTITY, resume=False):
        (path / "adapter.safetensors").touch()
    return path


def test_a_run_is_recorded_with_its_settings_and_keeps_its_id(tmp_path: Path) -> None:
    with open_run(tmp_path / "r", SETTINGS, IDENTITY, resume=False) as first:
        pass
    assert first.state is None and load_settings(tmp_path / "r" / "config.yaml")["adapter"] == {"rank": 4}
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record["format"] == RUN_FORMAT and find_process(record["process"]).pid == os.getpid()
    again = open_run(tmp_path / "r", SETTINGS, IDENTITY, resume=True)
    assert again.run_id == first.run_id and len(again.record["resumed"]) == 1


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(ConfigError, match=r"already holds a run.*resume="):
        open_run(tmp_path, SETTINGS, IDENTITY, resume=False)


def test_a_folder_that_holds_files_of_the_same_names_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(b"somebody's")
    with pytest.raises(ConfigError, match=r"adapter\.safetensors"):
        open_run(tmp_path, SETTINGS, IDENTITY, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]


@pytest.mark.parametrize("error", [ZeroDivisionError, ConfigError, functools.partial(Interrupted, signal.SIGTERM)])
def test_a_run_that_made_nothing_leaves_nothing_but_what_is_not_its_own(
    tmp_path: Path, error: Callable[[], BaseException]
) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "process.log").touch()
    for folder, left in ((tmp_path / "new", None), (tmp_path / "r", ["process.log"])):
        failure = error()
        with pytest.raises(type(failure)), open_run(folder, SETTINGS, IDENTITY, resume=False):
            (folder / "metrics.csv").touch()
            (folder / "demos").mkdir()
            raise failure
        assert (sorted(path.name for path in folder.iterdir()) if folder.exists() else None) == left


def test_what_a_killed_run_left_before_its_first_save_is_taken_up_by_the_same_command(tmp_path: Path) -> None:
    first = open_run(tmp_path, SETTINGS, IDENTITY, resume=False)
    assert first.lock is not None
    first.lock.release()  # as the system does for a killed process
    with open_run(tmp_path, SETTINGS, IDENTITY, resume=False) as again:
        assert again.run_id != first.run_id and again.record["resumed"] == []


@pytest.mark.parametrize("resume", [True, False])
def test_one_process_at_a_time_trains_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    monkeypatch.setattr(run_dir, "LOCK_SECONDS", 0)
    begin(tmp_path)
    with open_run(tmp_path, SETTINGS, IDENTITY, resume=True) as holder:
        before = (tmp_path / "run.json").read_text()
        for start in (lambda: open_run(tmp_path, SETTINGS, IDENTITY, resume=resume), lambda: check_startable(tmp_path)):
            with pytest.raises(ConfigError, match=f"process {os.getpid()} on "):
                start()
        assert (tmp_path / "run.json").read_text() == before
        copy = pickle.loads(pickle.dumps(holder))
        assert copy.lock is None, "other ranks get a copy"
    with open_run(tmp_path, SETTINGS, IDENTITY, resume=True):
        pass


def test_pipes_in_a_run_folder_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    os.mkfifo(tmp_path / "checkpoints" / "step-2.safetensors")
    with pytest.raises(SA3Error, match=r"step-2\.safetensors in .*checkpoints is in the way, it is a named pipe"):
        open_run(tmp_path, {}, {}, resume=False)
    with pytest.raises(RunCheckpointError, match="named pipe"):
        read_run_checkpoint(tmp_path / "checkpoints" / "step-2.safetensors")


@pytest.mark.parametrize("content", ["{", "{}", "[]", "3"])
def test_a_record_that_is_none_of_a_run_is_an_error(tmp_path: Path, content: str) -> None:
    (begin(tmp_path) / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=r"cannot read .*run\.json"):
        open_run(tmp_path, SETTINGS, IDENTITY, resume=True)


def test_there_is_nothing_to_resume_in_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        open_run(tmp_path, SETTINGS, IDENTITY, resume=True)


@pytest.mark.parametrize("name", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_requeued_job_goes_on_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    begin(tmp_path)
    monkeypatch.setenv(name, "1")
    assert is_requeued() and open_run(tmp_path, SETTINGS, IDENTITY, resume=False).record["resumed"]


def test_what_differs_is_listed_and_can_be_allowed_by_name(tmp_path: Path) -> None:
    begin(tmp_path)
    write_run_checkpoint(get_checkpoint_path(tmp_path, 4), {"step": 4})
    other = changed(callbacks__validation__every=8, trainer__max_steps=20)
    with pytest.raises(ConfigError) as caught:
        open_run(tmp_path, other, {"data": "xyz", "base": "def"}, resume=True)
    message = str(caught.value)
    assert "callbacks.validation.every: 5 -> 8" in message and "trainer.max_steps: 10 -> 20" in message
    assert "identity.data: abc -> xyz" in message
    assert "allow_resume_changes=[callbacks.validation.every,trainer.max_steps,identity.data]" in message
    with pytest.raises(ConfigError, match=r"callbacks\.validation\.every"):
        open_run(tmp_path, other, IDENTITY, resume=True, allowed=["trainer.max_steps"])
    with open_run(tmp_path, other, IDENTITY, resume=True, allowed=["trainer", "callbacks.validation.*"]) as run:
        pass
    assert run.changes == {"callbacks.validation.every": (5, 8), "trainer.max_steps": (10, 20)}
    assert run.record["resumed"][-1]["changes"] == {"callbacks.validation.every": [5, 8], "trainer.max_steps": [10, 20]}
    assert load_settings(tmp_path / "config.yaml")["callbacks"]["validation"] == {"every": 8}, "compared at the next"
    open_run(tmp_path, other, {"data": "new", "base": "new"}, resume=True, allowed=["all"])


@pytest.mark.parametrize("allowed", [[], ["adapter.rank", "optimizer", "trainer"], ["all"]])
@pytest.mark.parametrize(
    ("values", "steps", "reason"),
    [
        ({"adapter__rank": 8}, 4, r"adapter\.rank: 4 -> 8 \(what it has learned fits no other tensors\)"),
        ({"optimizer__name": "lion"}, 4, r"optimizer\.name: adamw -> lion \(the state of its optimizer"),
        ({"trainer__max_steps": 3}, 4, r"trainer\.max_steps: 10 -> 3 \(4 steps are done"),
        ({"optimizer__lr": 0.5}, 10, r"optimizer\.lr: 0\.1 -> 0\.5 \(all of its 10 steps are done"),
        ({"callbacks__demos__every": 6}, 10, r"callbacks\.demos\.every: 5 -> 6 \(all of its 10 steps are done"),
    ],
)
def test_what_can_have_no_effect_is_refused_whatever_is_allowed(
    tmp_path: Path, values: dict[str, Any], steps: int, reason: str, allowed: list[str]
) -> None:
    begin(tmp_path)
    write_run_checkpoint(get_checkpoint_path(tmp_path, steps), {"step": steps})
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=rf"this cannot change:\s+{reason}"):
        open_run(tmp_path, changed(**values), IDENTITY, resume=True, allowed=allowed)
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_a_run_that_fails_after_its_last_step_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_run(begin(tmp_path), SETTINGS, IDENTITY, resume=True) as run:
        run.save(status="finished")
        raise ZeroDivisionError  # as a report that cannot be written does
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "running"


def test_another_length_needs_no_leave_where_the_rate_does_not_follow_it(tmp_path: Path) -> None:
    begin(tmp_path)
    steady, longer, shorter = (changed(scheduler__name="constant", trainer__max_steps=n) for n in (10, 20, 19))
    open_run(tmp_path, steady, IDENTITY, resume=True, allowed=["scheduler"]).save(status="finished", seconds=100)
    with open_run(tmp_path, longer, IDENTITY, resume=True) as run:
        run.save(status="finished")
    assert load_settings(tmp_path / "config.yaml")["trainer"]["max_steps"] == 20
    assert run.record["seconds"] > 100, "with the starts before"
    write_run_checkpoint(get_checkpoint_path(tmp_path, 20), {"step": 20})
    with open_run(tmp_path, longer, IDENTITY, resume=True) as again:
        assert len(again.record["resumed"]) == len(run.record["resumed"]), "nothing was left to train"
    with pytest.raises(ConfigError, match="20 steps are done"):
        open_run(tmp_path, shorter, IDENTITY, resume=True)


def test_what_does_not_touch_learning_may_change(tmp_path: Path) -> None:
    begin(tmp_path)
    free = changed(
        run_dir="moved", logger__name="wandb", data__num_workers=4, callbacks__demos__every=9, trainer__log_every=7
    )
    assert open_run(tmp_path, free, IDENTITY, resume=True).changes == {}
    with pytest.raises(ConfigError, match=r"callbacks\.validation\.every"):
        open_run(tmp_path, changed(callbacks__validation__every=6), IDENTITY, resume=True)


def test_settings_survive_yaml_even_where_hydra_would_interpolate(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    odd = [
        "${not.an.interpolation}",
        "\\${oc.env:HOME}",
        "1e-3",
        "1_000",
        "C:\\clips",
        "a: b # c",
        "{caption}",
        "ü",
        "",
    ]
    settings = {"prompts": odd, "lr": 1e-4, "none": None}
    (tmp_path / "c.yaml").write_text(format_settings(settings), encoding="utf-8")
    assert load_settings(tmp_path / "c.yaml") == settings
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "c.yaml"), resolve=True) == settings


def test_a_half_written_newest_state_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (2, 4, 6):
        write_run_checkpoint(get_checkpoint_path(tmp_path, step), {"step": torch.tensor(step)})
    get_checkpoint_path(tmp_path, 6).write_bytes(get_checkpoint_path(tmp_path, 6).read_bytes()[:-9])
    (tmp_path / "checkpoints" / ".step-00000008.safetensors.x.part").write_bytes(b"torn")
    found = find_latest_checkpoint(tmp_path)
    assert found == (4, get_checkpoint_path(tmp_path, 4))
    assert find_latest_checkpoint(tmp_path / "nowhere") is None


def test_a_run_with_other_random_draws_is_not_resumed_and_the_reason_is_given(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(ConfigError, match=r"identity\.draws: None -> 2 \(this version draws"):
        open_run(tmp_path, SETTINGS, IDENTITY | {"draws": "2"}, resume=True)
    open_run(tmp_path, SETTINGS, IDENTITY | {"draws": "2"}, resume=True, allowed=["identity.draws"])


def test_states_of_another_version_are_refused_and_not_passed_over(tmp_path: Path) -> None:
    begin(tmp_path)
    save_file({"x": torch.ones(1)}, ensure_parent(get_checkpoint_path(tmp_path, 3)), {"format": "sa3train-state-1"})
    with pytest.raises(CheckpointVersionError, match="sa3train-state-1"):
        open_run(tmp_path, SETTINGS, IDENTITY, resume=True)


def ensure_parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
