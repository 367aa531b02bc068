"""The studio ends politely: it says what goes on without it, and finishes what it computes itself."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sa3train.cli.studio import _note_other_studio
from sa3train.core import processes
from sa3train.studio.server.workspace import Workspace

STUDIO = "import sys; from sa3train.cli.studio import main; sys.exit(main(sys.argv[1:]))"


def record_process(folder: Path, process: "subprocess.Popen[bytes]", **facts: str) -> None:
    """Record a process as if the studio had started it in a folder."""
    folder.mkdir(parents=True)
    started = processes._get_start_time(psutil.Process(process.pid))
    record = {"command": ["x"], "at": "2026-01-01T00:00:00+00:00", "stop_asked": None}
    record |= {"pid": process.pid, "started": started, **facts}
    (folder / processes.PROCESS_FILE).write_text(json.dumps(record))


def test_another_studio_in_the_same_workspace_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _note_other_studio(tmp_path, "http://first")
    assert capsys.readouterr().out == ""
    _note_other_studio(tmp_path, "http://second")
    said = capsys.readouterr().out
    assert "another studio uses this workspace" in said and f"PID {os.getpid()}, http://first" in said
    assert processes.read_record(tmp_path)["address"] == "http://second"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_studio_names_what_continues(tmp_path: Path, number: signal.Signals) -> None:
    workspace = Workspace.create(tmp_path / "studio", [tmp_path])
    with subprocess.Popen(["/bin/sleep", "300"], start_new_session=True) as going:
        try:
            record_process(tmp_path / "runs" / "a", going, kind="train")
            facts = {"kind": "encode", "source": str(tmp_path / "audio"), "out": str(tmp_path / "latents")}
            record_process(workspace.home / "jobs" / "encode-x", going, **facts)
            command = [sys.executable, "-u", "-c", STUDIO, str(tmp_path), f"--workspace={workspace.folder}"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as studio:
                assert studio.stdout is not None
                assert "Studio running" in studio.stdout.readline()
                studio.send_signal(number)
                said, errors = studio.communicate(timeout=60)
            assert studio.returncode == 128 + number
            assert f"training run {tmp_path / 'runs' / 'a'} (PID {going.pid})" in said
            assert f"encode of {tmp_path / 'audio'} (PID {going.pid})" in said
            assert "Traceback" not in errors
            assert going.poll() is None and os.getsid(going.pid) == going.pid
        finally:
            going.kill()
