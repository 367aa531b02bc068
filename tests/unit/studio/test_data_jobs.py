"""Audits and encodes as processes of their own: their commands, their progress, what became of them."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from sa3train.core.errors import SA3Error
from sa3train.studio.data import jobs
from sa3train.studio.server import processes
from sa3train.studio.server.workspace import Workspace


def noted(workspace: Workspace, kind: str = "encode", log: str = "", **values: Any) -> Path:
    """The record of a job that is over."""
    folder = workspace.home / "jobs" / kind
    folder.mkdir(parents=True, exist_ok=True)
    root = workspace.roots[0]
    record = {
        "command": ["sa3-encode", "a=b"], "at": "2026-01-01T00:00:00+00:00", "boot": "gone", "stop_asked": None,
        "kind": kind, "source": str(root / "audio"), "out": str(root / "latents"), "had": 0,
    }  # fmt: skip
    (folder / processes.RECORD).write_text(json.dumps(record | values))
    (folder / processes.LOG).write_text(log)
    return folder


def test_the_commands_name_every_choice(workspace: Workspace) -> None:
    source, out = workspace.roots[0] / "audio", workspace.roots[0] / "latents" / "x"
    assert jobs.encode_command(source, out, "nano", fix=["dc", "loudness"], split=0.1) == [
        "sa3-encode", f"source={source}", f"out={out}", "model=nano", "split=0.1", "captions=required",
        "duplicates=keep", "max_rejected=0.1", "fix=[dc,loudness]",
    ]  # fmt: skip
    audit = jobs.audit_command(workspace, source, "optional", "nano")
    assert audit[:3] == ["sa3-data", "audit", str(source)]
    assert audit[-4:] == ["--captions", "optional", "--model", "nano"]
    assert jobs.audit_folder(workspace, source).is_relative_to(workspace.home)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"fix": ["noise"]}, "fix is noise"), ({"split": 1.5}, "between 0 and 1"), ({}, "lies inside")],
)
def test_encodes_that_cannot_be(workspace: Workspace, options: dict[str, Any], told: str) -> None:
    source = workspace.roots[0] / "audio"
    with pytest.raises(SA3Error, match=told):
        jobs.encode_command(source, source / "x" if not options else source.parent / "x", "nano", **options)


def test_what_became_of_a_job(workspace: Workspace) -> None:
    latents = workspace.roots[0] / "latents"
    latents.mkdir()
    folder = noted(workspace)
    work = jobs.read(folder)
    assert work is not None
    assert (work.state, work.alive) == ("failed", False)
    assert "without a word" in str(work.error)
    folder = noted(workspace, stop_asked="now")
    assert jobs.read(folder).state == "stopped"  # type: ignore[union-attr]
    (latents / "index.json").touch()
    assert jobs.read(noted(workspace)).state == "finished"  # type: ignore[union-attr]
    work = jobs.read(noted(workspace, log="$ sa3-encode a=b\nerror: 2 of 3 clips are rejected\n"))
    assert (work.state, work.error) == ("failed", "2 of 3 clips are rejected")  # type: ignore[union-attr]
    os.utime(latents / "index.json", (0, 0))
    assert jobs.read(noted(workspace)).state == "failed", "an index of long ago is not its work"  # type: ignore[union-attr]
    assert jobs.read(workspace.home) is None
    with pytest.raises(SA3Error, match="nothing to stop"):
        jobs.stop(work)  # type: ignore[arg-type]


def test_progress_is_read_from_its_log_and_journals(workspace: Workspace) -> None:
    latents = workspace.roots[0] / "latents"
    (latents / ".encode").mkdir(parents=True)
    old = "$ sa3-encode\naudit: 90 clips, 0 of them known\nencode: 90 clips, 0 takes done before\n"
    folder = noted(workspace, log=f"{old}$ sa3-encode\n", had=2)
    record = processes.record_of(folder)
    assert jobs.progress(folder, record, latents) == (None, "getting ready")
    (folder / processes.LOG).write_text(f"{old}$ sa3-encode\naudit: 8 clips, 2 of them known\n")
    (latents / ".encode" / "audit-000.jsonl").write_text("{}\n" * 4)
    assert jobs.progress(folder, record, latents) == (0.5, "listening: 4 of 8 clips")
    with (folder / processes.LOG).open("a") as log:
        log.write("encode: 6 clips, 0 takes done before\n")
    assert jobs.progress(folder, record, latents) == (0.0, "encoding: 0 takes of 6 clips written")


def test_a_job_is_found_again_and_not_started_twice(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "program", lambda name: "/bin/sh")
    source, out = workspace.roots[0] / "audio", workspace.roots[0] / "latents"
    command = ["sa3-encode", "-c", "sleep 60"]
    jobs.begin(workspace, "encode", source, out, command)
    try:
        (work,) = jobs.works(Workspace.at(workspace.roots))
        assert (work.kind, work.source, work.out, work.state) == ("encode", source, out, "running")
        with pytest.raises(SA3Error, match="at work already"):
            jobs.begin(workspace, "encode", source, out, command)
        jobs.stop(work)
        end = time.monotonic() + 20
        while jobs.works(workspace)[0].alive and time.monotonic() < end:
            time.sleep(0.05)
        assert jobs.works(workspace)[0].state == "stopped"
    finally:
        processes.stop(workspace.home / "jobs", at_once=True)
