"""Audits and encodes as processes of their own: their commands, their progress, what became of them."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers.run_dirs import make_run
from sa3train.cli.eval import build_parser
from sa3train.core import processes
from sa3train.core.errors import SA3Error
from sa3train.data.encode.settings import EncodeSettings
from sa3train.studio.data import jobs
from sa3train.studio.data.jobs_tabs import ENCODE, ENCODE_FIELDS
from sa3train.studio.runs.evaluate_tab import EVALUATE
from sa3train.studio.server.workspace import Workspace


def noted(workspace: Workspace, kind: str = "encode", log: str = "", **values: Any) -> Path:
    """The record of a job that is over."""
    folder = workspace.home / "jobs" / kind
    folder.mkdir(parents=True, exist_ok=True)
    root = workspace.sources[0]
    record = {
        "command": ["sa3-encode", "a=b"], "at": "2026-01-01T00:00:00+00:00", "stop_asked": None,
        "kind": kind, "source": str(root / "audio"), "out": str(root / "latents"),
    }  # fmt: skip
    (folder / processes.PROCESS_FILE).write_text(json.dumps(record | values))
    (folder / processes.LOG_FILE).write_text(log)
    return folder


def test_the_commands_name_what_was_chosen(workspace: Workspace) -> None:
    source, out = workspace.sources[0] / "audio", workspace.sources[0] / "latents" / "x"
    assert jobs.build_encode_command(source, out, "nano", EncodeSettings(fixes=["dc", "loudness"], split=0.1)) == [
        "sa3-encode", f"source={source}", f"out={out}", "model=nano", "fixes=[dc,loudness]", "split=0.1",
    ]  # fmt: skip
    audit = jobs.build_audit_command(workspace, source, "optional", "nano")
    assert audit[:3] == ["sa3-data", "audit", str(source)]
    assert audit[-4:] == ["--captions", "optional", "--model", "nano"]
    assert jobs.get_audit_dir(workspace, source).is_relative_to(workspace.home)


@pytest.mark.parametrize(("options", "setting"), [({"fixes": ["noise"]}, "fixes"), ({"split": 1.5}, "split")])
def test_encodes_that_cannot_be(workspace: Workspace, options: dict[str, Any], setting: str) -> None:
    source = workspace.sources[0] / "audio"
    with pytest.raises(SA3Error, match=setting):
        jobs.build_encode_command(source, source.parent / "x", "nano", EncodeSettings(**options))


def test_what_became_of_a_job(workspace: Workspace) -> None:
    latents = workspace.sources[0] / "latents"
    latents.mkdir()
    folder = noted(workspace)
    work = jobs.read_job(folder)
    assert work is not None
    assert (work.state, work.is_running) == ("failed", False)
    assert "killed" in str(work.error)
    assert "stopped by SIGTERM" in str(jobs.read_job(noted(workspace, log="$ x\nstopped by SIGTERM\n")).error)  # type: ignore[union-attr]
    for kind, hint in (("evaluate", "anew"), ("encode", "to resume")):
        assert hint in str(jobs.read_job(noted(workspace, kind)).error)  # type: ignore[union-attr]
        jobs.dismiss_job(jobs.read_job(noted(workspace, kind)))  # type: ignore[arg-type]
    folder = noted(workspace, stop_asked="now")
    assert jobs.read_job(folder).state == "stopped"  # type: ignore[union-attr]
    (latents / "index.json").touch()
    assert jobs.read_job(noted(workspace)).state == "finished"  # type: ignore[union-attr]
    work = jobs.read_job(noted(workspace, log="$ sa3-encode a=b\nerror: 2 of 3 clips are rejected\n"))
    assert (work.state, work.error) == ("failed", "2 of 3 clips are rejected")  # type: ignore[union-attr]
    os.utime(latents / "index.json", (0, 0))
    assert jobs.read_job(noted(workspace)).state == "failed", "an index of long ago is not its work"  # type: ignore[union-attr]
    assert jobs.read_job(workspace.home) is None
    with pytest.raises(SA3Error, match="nothing to stop"):
        jobs.stop_job(work)  # type: ignore[arg-type]
    jobs.dismiss_job(work)  # type: ignore[arg-type]
    assert jobs.list_jobs(workspace) == []


def test_latents_land_beside_the_other_latents(workspace: Workspace) -> None:
    source = workspace.folder / "my_pack"
    source.mkdir()
    values = {name: getattr(EncodeSettings(), name) for name in ENCODE_FIELDS} | {"model": "nano"}
    for typed, out in (("", "latents/my_pack"), (" ", "latents/my_pack"), ("other", "latents/other")):
        assert ENCODE.build_command(workspace, source, values | {"out": typed})[0] == workspace.folder / out


def test_an_encode_that_lacks_captions_has_a_way_out(workspace: Workspace) -> None:
    lacking = "error: 5 of 6 clips are rejected. Fix them (write one to a .txt of its name, or set captions=auto)"
    for log, can_retry in ((lacking, True), ("error: 5 of 6 clips are rejected: too long", False)):
        assert ENCODE.can_retry(jobs.read_job(noted(workspace, log=f"$ x\n{log}\n"))) is can_retry
    assert not ENCODE.can_retry(None)


def test_an_evaluation_is_a_command_and_names_what_to_use(workspace: Workspace) -> None:
    run = make_run(workspace.folder / "runs" / "a", "finished")
    out, command = EVALUATE.build_command(workspace, run, {"strengths": "-0.5; 1", "generated": 0})
    flags = build_parser().parse_args(command[1:])
    assert (flags.adapters, flags.strengths, flags.generate, flags.device) == ([str(run)], (-0.5, 1.0), 0, "cpu")
    for strengths, generated, message in (("0, 1", 4, "strength 0 is the base"), ("1", -1, "Generated clips")):
        with pytest.raises(SA3Error, match=message):
            EVALUATE.build_command(workspace, run, {"strengths": strengths, "generated": generated})
    file = out / jobs.EVALUATION_FILE
    assert file == Path(flags.json) == EVALUATE.find_result(workspace, run, None)
    Path(flags.html).touch()
    end = run / "adapter.safetensors"
    names = {"runs/a@10": f"{run}@10", "runs/a/adapter.safetensors": str(end)}
    save_file({"a": torch.zeros(1)}, end, metadata={"step": "20"})  # as after a resume
    for is_kept in (False, True):
        for name, adapter in names.items():
            pick = {"adapter": adapter, "strength": 0.5, "is_base": False, "candidate": 0, "text": "surely"}
            row = {"adapter": adapter, "strength": 0.5, "step": 10, "against_base": {"loss": {"change": -0.1}}}
            file.write_text(json.dumps({"pick": pick, "candidates": [row]}))
            shown = EVALUATE.render_result(workspace, file, run)
            assert "Later steps than 10 were not measured." in shown
            assert (f"{name} was the best, and is gone" in shown and "data-play" not in shown) is not is_kept
            assert ("Use runs/a@10 at strength 0.5" in shown) is is_kept
            assert ('data-play="runs/a@10" data-strength="0.5"' in shown) is is_kept
        (run / "checkpoints").mkdir(exist_ok=True)
        (run / "checkpoints" / "step-00000010.safetensors").touch()
    save_file({"a": torch.zeros(1)}, end, metadata={"step": "10"})
    assert "Use runs/a/adapter.safetensors at" in EVALUATE.render_result(workspace, file, run)
    for base in (None, {"is_base": True}):
        file.write_text(json.dumps({"pick": base}))
        assert "beyond noise" in EVALUATE.render_result(workspace, file, run)


def test_progress_is_read_as_data(workspace: Workspace) -> None:
    old = '$ sa3-encode\n{"stage": "audit", "done": 90, "total": 90, "unit": "clip", "seconds": 1.0}\n'
    folder = noted(workspace, log=f"{old}$ sa3-encode\n")
    assert jobs.read_progress(folder) == (None, "loading libraries")
    with (folder / processes.LOG_FILE).open("a") as log:
        log.write('audit: 8 clips\n{"stage": "audit", "done": 4, "total": 8, "unit": "clip", "seconds": 1.0}\n{"stage"')
    assert jobs.read_progress(folder) == (0.5, "audit: 4 of 8 clips")
    with (folder / processes.LOG_FILE).open("a") as log:
        log.write('\n{"stage": "encode", "done": 0, "total": 0, "unit": "batch", "seconds": 0.0}\n')
    assert jobs.read_progress(folder) == (0.0, "encode: 0 of 0 batches")
    with (folder / processes.LOG_FILE).open("a") as log:
        log.write('{"stage": "loading nano", "done": 0, "total": null, "unit": "", "seconds": 0.0}\n')
    assert jobs.read_progress(folder) == (None, "loading nano")
    assert processes.read_log_tail(folder, 3).splitlines()[:2] == ["$ sa3-encode", "audit: 8 clips"]


def test_a_job_is_found_again_and_not_started_twice(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "find_program", lambda name: "/bin/sh")
    source, out = workspace.sources[0] / "audio", workspace.sources[0] / "latents"
    command = ["sa3-encode", "-c", "sleep 60"]
    jobs.start_job(workspace, "encode", source, out, command)
    try:
        (work,) = jobs.list_jobs(Workspace.create(workspace.folder, workspace.sources))
        assert (work.kind, work.source, work.out, work.state) == ("encode", source, out, "running")
        with pytest.raises(SA3Error, match="already") as refused:
            jobs.start_job(workspace, "encode", source.parent, out, command)
        assert str(source) in str(refused.value) and str(out) in str(refused.value)
        jobs.stop_job(work)
        end = time.monotonic() + 20
        while jobs.list_jobs(workspace)[0].is_running and time.monotonic() < end:
            time.sleep(0.05)
        assert jobs.list_jobs(workspace)[0].state == "stopped"
    finally:
        processes.stop(workspace.home / "jobs", at_once=True)


def test_a_second_stop_kills(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "find_program", lambda name: "/bin/sh")
    source, out = workspace.sources[0] / "audio", workspace.sources[0] / "latents"
    script = 'trap "" TERM; echo ready; while :; do sleep 0.05; done'
    folder = jobs.start_job(workspace, "encode", source, out, ["sa3-encode", "-c", script])
    end = time.monotonic() + 20
    try:
        while "ready" not in processes.read_log_tail(folder).splitlines() and time.monotonic() < end:
            time.sleep(0.02)
        for state in ("running", "stopping"):
            (job,) = jobs.list_jobs(workspace)
            assert job.state == state
            jobs.stop_job(job)
        while jobs.list_jobs(workspace)[0].is_running and time.monotonic() < end:
            time.sleep(0.02)
        assert jobs.list_jobs(workspace)[0].state == "stopped"
    finally:
        processes.stop(folder, at_once=True)
