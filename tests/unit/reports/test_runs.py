"""Run folders as they are found, the state each is in, and what may be done with it."""

import json
import platform
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.run_dirs import make_run, write_record
from sa3train.adapters.formats.run_dir import get_checkpoint_path
from sa3train.core import processes
from sa3train.core.errors import ConfigError, DataError, SA3Error
from sa3train.reports import comparison, runs
from sa3train.reports.run_files import RUN_FORMAT
from sa3train.training.run_dir import open_run


def get_run(folder: Path) -> runs.Run:
    run = runs.load_run(folder)
    assert run is not None
    return run


def test_runs_on_other_clips_are_ranked_by_what_each_gained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, base, loss in (("few", 1.76, 1.63), ("many", 2.86, 2.23)):
        rows = [{"step": 20, "val": {"loss": loss}}]
        validation = {"base": {"val": {"loss": base}}, "history": rows}
        (make_run(tmp_path / name, "finished") / "validation.json").write_text(json.dumps(validation))
    assert [Path(row["run"]).name for row in comparison.compare_runs([tmp_path])] == ["many", "few"]
    assert "by its change against its own base" in caplog.text
    with pytest.raises(DataError, match=r"^name at least one run\.$"):
        comparison.compare_runs([])


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
    get_checkpoint_path(folder, 30).parent.mkdir()
    get_checkpoint_path(folder, 30).touch()
    assert get_run(folder).step == (30 if state == "crashed" else 40)


def test_a_process_makes_it_run_and_a_request_to_stop_makes_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run")
    write_record(folder)
    monkeypatch.setattr(processes, "get_running_pid", lambda _: 4711)
    run = get_run(folder)
    assert (run.state, run.is_alive, run.seconds_left) == ("running", True, 40.0)
    assert replace(run, step=100).seconds_left is None, "it plays its last demos, and no step is left"
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


def test_a_run_that_finishes_while_it_is_looked_at_did_not_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "a", "running")
    write_record(folder)

    def end(folder: Path) -> None:
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(record | {"status": "finished"}))

    monkeypatch.setattr(processes, "get_running_pid", end)
    assert get_run(folder).state == "finished"


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


def test_a_run_started_in_a_terminal_of_this_computer_is_known_by_its_process(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    record = json.loads((folder / "run.json").read_text())
    started = psutil.Process(child.pid).create_time() - (psutil.boot_time() if psutil.LINUX else 0)
    record["process"] = {"pid": child.pid, "started": started, "host": platform.node()}
    (folder / "run.json").write_text(json.dumps(record))
    try:
        assert get_run(folder).state == "elsewhere"
        if processes.SENDS_SIGNALS:
            runs.stop_run(folder)
            assert child.wait(30) == -signal.SIGTERM
    finally:
        child.kill()
        child.wait()
    assert get_run(folder).state == "crashed", "its trace is fresh, but the process is gone"


def test_a_run_of_a_newer_version_is_listed_and_refused(tmp_path: Path) -> None:
    folder, old = make_run(tmp_path / "new", "finished"), make_run(tmp_path / "old", "finished")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"format": RUN_FORMAT + 1, "version": "9.0"}))
    states = {run.path.name: run.state for run in runs.find_runs([tmp_path])}
    assert states == {"new": "newer", "old": "finished"}
    with pytest.raises(DataError, match=r"format 2, made by sa3train 9\.0.*Update"):
        runs.describe_run(folder)
    with pytest.raises(ConfigError, match="Update"):
        open_run(folder, {}, {}, resume=True)
    assert runs.describe_run(old)["adapter"] is None


def test_a_search_that_ends_early_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_run(tmp_path / "a" / "one")
    make_run(tmp_path / "b" / "two")
    monkeypatch.setattr("sa3train.data.sources.own_folders.MAX_FOLDERS", 3)
    assert [run.path.name for run in runs.find_runs([tmp_path])] == ["one"]
    assert "first 3 folders" in caplog.text
    make_run(tmp_path / "a" / "one" / "checkpoints" / "not-another")
    assert [run.path.name for run in runs.find_runs([tmp_path / "a" / "one"])] == ["one"]


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


def test_the_difference_between_two_runs(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", adapter={"adapter_type": "lora", "rank": 8}, data={"prompts": {"trigger": "x"}})
    two = make_run(tmp_path / "two", adapter={"adapter_type": "lora", "rank": 16}, data={"prompts": {"trigger": ""}})
    assert comparison.compare_settings(one, two) == [("adapter.rank", "8", "16"), ("data.prompts.trigger", "x", "")]


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
        comparison.compare_settings(folder, folder)
