"""Processes that outlive whoever started them, and are told from others that have their number."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from sa3train.core import processes
from sa3train.core.errors import SA3Error

PATIENT = 'trap "echo saved; exit 143" TERM; while :; do sleep 0.05; done'


@pytest.fixture(autouse=True)
def shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command is a shell script: `sh -c SCRIPT`."""
    monkeypatch.setattr(processes, "find_program", lambda name: "/bin/sh")


def begin(folder: Path, script: str, **about: object) -> int:
    return processes.start(folder, ["sa3-train", "-c", script], **about)


def until(condition: object, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def test_a_process_has_its_record_its_log_and_a_session_of_its_own(tmp_path: Path) -> None:
    pid = begin(tmp_path / "run", f"echo hello; {PATIENT}", kind="train")
    try:
        assert processes.get_running_pid(tmp_path / "run") == pid
        assert os.getsid(pid) == pid != os.getsid(0)
        record = processes.read_record(tmp_path / "run")
        assert record["command"][0] == "sa3-train"
        assert (record["kind"], record["stop_asked"]) == ("train", None)
        until(lambda: "hello" in processes.read_log_tail(tmp_path / "run"))
    finally:
        assert processes.stop(tmp_path / "run", at_once=True)
    until(lambda: processes.get_running_pid(tmp_path / "run") is None)


def test_it_goes_on_when_its_starter_is_killed_and_is_found_again(tmp_path: Path) -> None:
    starter = (
        "import sys, os, signal; from pathlib import Path; from sa3train.core import processes\n"
        "processes.program = lambda name: '/bin/sh'\n"
        "processes.start(Path(sys.argv[1]), ['sa3-train', '-c', sys.argv[2]])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", starter, str(tmp_path / "run"), PATIENT], start_new_session=True)
    assert done.returncode == -signal.SIGKILL
    pid = processes.get_running_pid(tmp_path / "run")
    assert pid is not None
    assert processes.stop(tmp_path / "run")
    until(lambda: processes.get_running_pid(tmp_path / "run") is None)
    assert "saved" in processes.read_log_tail(tmp_path / "run")


@pytest.mark.parametrize("sends_signals", [True, False])
def test_stopping_asks_and_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sends_signals: bool) -> None:
    """Without signals, as on Windows, too."""
    monkeypatch.setattr(processes, "SENDS_SIGNALS", sends_signals)
    job = "h.run_job(lambda: (print('at work', flush=True), [time.sleep(0.02) for _ in range(3000)]))"
    begin(tmp_path, f'exec {sys.executable} -c "import time; from sa3train.cli import hydra_app as h; {job}"')
    until(lambda: "at work" in processes.read_log_tail(tmp_path).splitlines())
    assert processes.stop(tmp_path)
    until(lambda: processes.get_running_pid(tmp_path) is None)
    assert "stopped by SIGTERM" in processes.read_log_tail(tmp_path)
    assert processes.read_record(tmp_path)["stop_asked"]
    assert not processes.stop(tmp_path)


def test_what_does_not_stop_in_time_is_killed_with_its_children(tmp_path: Path) -> None:
    begin(tmp_path, 'trap "" TERM; (trap "" TERM; sleep 60; echo) & echo ready; while :; do sleep 0.05; done')
    until(lambda: "ready" in processes.read_log_tail(tmp_path).splitlines())
    process = processes._find_process(tmp_path)
    assert process is not None
    children = process.children(recursive=True)
    assert processes.stop(tmp_path, grace_seconds=0.2)
    until(lambda: processes.get_running_pid(tmp_path) is None)
    until(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children))


@pytest.mark.parametrize("what", ["start time", "torn", "no pid"])
def test_a_number_used_again_is_somebody_else(tmp_path: Path, what: str) -> None:
    other = subprocess.Popen(["/bin/sleep", "60"])
    try:
        started = processes._get_start_time(psutil.Process(other.pid))
        record = {"pid": other.pid, "started": started, "stop_asked": None}
        changes = {"start time": {"started": started - 0.01}, "no pid": {"pid": None}}
        text = json.dumps(record | changes.get(what, {}))
        (tmp_path / processes.PROCESS_FILE).write_text(text[:10] if what == "torn" else text)
        assert processes.get_running_pid(tmp_path) is None
        assert processes.read_log_tail(tmp_path) == ""
        assert not processes.stop(tmp_path, at_once=True)
        assert other.poll() is None, "somebody else was killed"
        (tmp_path / processes.PROCESS_FILE).write_text(json.dumps(record))
        assert processes.get_running_pid(tmp_path) == other.pid
    finally:
        other.kill()
        other.wait()


def test_of_two_starts_at_once_one_is_refused(tmp_path: Path) -> None:
    started: list[int] = []
    refused: list[str] = []

    def start() -> None:
        try:
            started.append(begin(tmp_path, PATIENT))
        except SA3Error as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert len(started) == 1
        assert len(refused) == 3
        assert "already running" in refused[0]
    finally:
        processes.stop(tmp_path, at_once=True)


def test_the_last_process_says_why_it_failed(tmp_path: Path) -> None:
    begin(tmp_path, "echo 'error: an old one' >&2")
    until(lambda: processes.get_running_pid(tmp_path) is None)
    assert processes.read_failure(tmp_path) == "an old one"
    begin(tmp_path, "echo 'error: first line\n       second line\n' >&2")
    until(lambda: processes.get_running_pid(tmp_path) is None)
    assert processes.read_failure(tmp_path) == "first line second line"
    begin(tmp_path, "printf 'Traceback (most recent call last):\\n  File x\\nKeyError: 3\\n' >&2")
    until(lambda: processes.get_running_pid(tmp_path) is None)
    assert processes.read_failure(tmp_path) == "KeyError: 3"
    pid = begin(tmp_path, "echo fine")
    until(lambda: processes.get_running_pid(tmp_path) is None)
    assert processes.read_failure(tmp_path) is None
    assert not psutil.pid_exists(pid), "the child stays as a zombie"


def test_what_cannot_be_started_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SA3Error, match="Cannot start sa3-train"):
        begin(tmp_path / "file" / "run", "exit 0")
    monkeypatch.undo()
    with pytest.raises(SA3Error, match="sa3-nothing is not installed"):
        processes.start(tmp_path, ["sa3-nothing"])
