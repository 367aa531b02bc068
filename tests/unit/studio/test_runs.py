"""Run folders as they are found, the state each is in, and what may be done with it."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from sa3train.core.errors import DataError, SA3Error
from sa3train.reports.run_files import format_settings
from sa3train.studio.runs import runs
from sa3train.studio.runs.page import resolve_run_dir
from sa3train.studio.server import processes
from sa3train.studio.server.folders import FoundFolders, find_folders
from sa3train.studio.server.workspace import Workspace

OLD = time.time() - 7200


def make_run(folder: Path, status: str = "running", *, steps: int = 100, old: bool = True, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    config = {"trainer": {"max_steps": steps}, "run_dir": str(folder), **settings}
    (folder / "config.yaml").write_text(format_settings(config))
    record = {"id": "x", "status": status, "started": "2026-01-01T00:00:00+00:00", "resumed": [], "steps": 40}
    record["identity"] = {}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.csv").write_text("step,train/loss,time/steps_per_second\n10,1.5,2.0\n20,1.25,\n30,1.")
    if old:
        for file in folder.iterdir():
            os.utime(file, (OLD, OLD))
    return folder


def write_record(folder: Path, **values: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"command": ["sa3-train", "a=b"], "at": "2026-01-01T00:00:00+00:00", "stop_asked": None}
    (folder / processes.PROCESS_FILE).write_text(json.dumps(record | {"kind": "train", "parts": 0} | values))


def get_run(folder: Path) -> runs.Run:
    run = runs.load_run(folder)
    assert run is not None
    return run


@pytest.mark.parametrize(
    ("status", "started", "state"),
    [
        ("finished", False, "finished"),
        ("interrupted", False, "stopped"),
        ("running", False, "crashed"),
        ("running", True, "crashed"),
    ],
)
def test_state_from_the_files_alone(tmp_path: Path, status: str, started: bool, state: str) -> None:
    folder = make_run(tmp_path / "run", status)
    if started:
        write_record(folder)
    run = get_run(folder)
    assert (run.state, run.total, run.loss, run.speed) == (state, 100, 1.25, 2.0)
    assert run.step == (20 if state == "crashed" else 40)


def test_a_process_makes_it_run_and_a_request_to_stop_makes_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run")
    write_record(folder)
    monkeypatch.setattr(processes, "get_running_pid", lambda _: 4711)
    run = get_run(folder)
    assert (run.state, run.is_alive, run.seconds_left) == ("running", True, 40.0)
    write_record(folder, stop_asked="now")
    assert get_run(folder).state == "stopping"
    with pytest.raises(DataError, match="already stopping"):
        runs.stop_run(folder)
    monkeypatch.undo()
    assert get_run(folder).state == "stopped"


def test_a_run_that_failed_while_it_was_stopped_did_not_stop(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_record(folder, stop_asked="now")
    log = "$ sa3-train\nTraceback (most recent call last):\n  File x\nOSError: full\n"
    (folder / processes.LOG_FILE).write_text(log)
    run = get_run(folder)
    assert (run.state, run.error) == ("crashed", "OSError: full")


def test_a_run_of_somebody_else_is_seen_while_it_writes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", old=False)
    assert get_run(folder).state == "elsewhere"
    with pytest.raises(DataError, match="started elsewhere"):
        runs.stop_run(folder)
    with pytest.raises(DataError, match="already running"):
        runs.resume_run(folder)
    write_record(folder)  # ours, and dead: a fresh trace is our own
    assert get_run(folder).state == "crashed"
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"resumed": [{"at": "later"}]}))
    assert get_run(folder).state == "elsewhere", "somebody went on with it"


def test_a_run_that_never_began(tmp_path: Path) -> None:
    write_record(tmp_path / "run")
    (tmp_path / "run" / processes.LOG_FILE).write_text("$ sa3-train a=b\nerror: no such data\n")
    run = get_run(tmp_path / "run")
    assert (run.state, run.error) == ("failed", "no such data")
    assert runs.build_resume_command(tmp_path / "run") == ["sa3-train", "a=b"]
    (tmp_path / "run" / "adapter.safetensors").touch()
    with pytest.raises(SA3Error, match="holds more"):
        runs.dismiss_run(tmp_path / "run")
    (tmp_path / "run" / "adapter.safetensors").unlink()
    runs.dismiss_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resuming_is_the_trainers_own_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "run", "interrupted")
    seen: dict[str, Any] = {}
    monkeypatch.setattr(processes, "start", lambda where, argv, **about: seen.update(argv=argv, **about) or 1)
    runs.resume_run(folder)
    assert seen == {"argv": ["sa3-train", f"resume={folder}"], "kind": "train", "parts": 1}
    with pytest.raises(DataError, match="is finished"):
        runs.resume_run(make_run(tmp_path / "done", "finished"))
    with pytest.raises(DataError, match="contains no run"):
        runs.resume_run(tmp_path / "nothing")


def test_a_new_run_wants_a_new_folder(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with pytest.raises(DataError, match="already exists"):
        runs.start_run(tmp_path / "run", ["sa3-train"])


def test_runs_latents_and_audio_are_found_under_the_roots_alone(tmp_path: Path) -> None:
    root = tmp_path / "root"
    make_run(root / "runs" / "one", "finished")
    (root / "runs" / "one" / "demos").mkdir()
    (root / "runs" / "one" / "demos" / "a.wav").touch()
    write_record(root / "runs" / "two")
    (root / "latents").mkdir()
    (root / "latents" / "index.json").write_text('{"format": "sa3train-latents"}')
    (root / "audio" / "deep").mkdir(parents=True)
    (root / "audio" / "deep" / "a.wav").touch()
    make_run(tmp_path / "outside" / "three")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "a.wav").touch()
    workspace = Workspace.create(tmp_path / "studio", [root])
    found = find_folders(workspace)
    assert found.runs == [root / "runs" / "one", root / "runs" / "two"]
    assert found.latents == [root / "latents"]
    assert found.audio == [root, root / "audio" / "deep"]
    assert [run.path.name for run in runs.find_runs(workspace)] == ["one", "two"]


def test_a_run_that_began_after_the_survey_is_found_when_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make_run(tmp_path / "old", "finished"), make_run(tmp_path / "new", "finished")
    workspace = Workspace.create(tmp_path / "studio", [tmp_path])
    monkeypatch.setattr(runs, "find_folders", lambda workspace: FoundFolders(runs=[old]))
    assert [run.path for run in runs.find_runs(workspace)] == [old]
    assert {run.path for run in runs.find_runs(workspace, new)} == {old, new}
    assert [run.path for run in runs.find_runs(workspace, old)] == [old]
    assert [run.path for run in runs.find_runs(workspace, tmp_path / "gone")] == [old]


def test_a_run_whose_files_are_links_out_shows_nothing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "root" / "borrowed")
    workspace = Workspace.create(tmp_path / "studio", [tmp_path / "root"])
    (tmp_path / "secret.yaml").write_text("token: hidden")
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").symlink_to(tmp_path / "secret.yaml")
    assert runs.find_runs(workspace, folder) == []
    with pytest.raises(SA3Error, match="link out of"):
        resolve_run_dir(workspace, str(folder))


def test_the_difference_between_two_runs(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", adapter={"adapter_type": "lora", "rank": 8}, data={"prompts": {"trigger": "x"}})
    two = make_run(tmp_path / "two", adapter={"adapter_type": "lora", "rank": 16}, data={"prompts": {"trigger": ""}})
    assert runs.compare_settings(one, two) == [("adapter.rank", "8", "16"), ("data.prompts.trigger", "x", "")]


def test_metrics_of_a_long_and_torn_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    lines = "".join(f"{step},{step / 7!r}\n" for step in range(20_000))
    path.write_text(f"step,train/loss\n{lines}20000,not")
    assert runs.read_last_metrics(path) == {"step": 19_999.0, "train/loss": 19_999 / 7}
    assert runs.read_last_metrics(tmp_path / "none.csv") == {}


def test_damaged_files_do_not_hide_a_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "config.yaml").write_text("trainer: [")
    (folder / "run.json").write_text("{")
    run = get_run(folder)
    assert run.total is None
    with pytest.raises(DataError, match="Cannot read"):
        runs.compare_settings(folder, folder)
