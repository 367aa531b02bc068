"""Audits, encodes and evaluations that the page starts: processes of their own, recorded in the studio's home."""

import hashlib
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sa3train.core import processes
from sa3train.core.overrides import format_override
from sa3train.data.encode.settings import EncodeSettings
from sa3train.data.shards.index import INDEX_FILE
from sa3train.studio.server.workspace import StudioError, Workspace

AUDIT_FILE = "audit.json"
STATES = {
    "running": "running",
    "stopping": "stopping; press Stop again to kill it",
    "finished": "done",
    "failed": "failed",
    "stopped": "stopped",
}
EVALUATION_FILE = "evaluation.json"
RESULTS = {"audit": AUDIT_FILE, "encode": INDEX_FILE, "evaluate": EVALUATION_FILE}
"""Kinds of jobs, and the file that each has written last when it is done."""
_GRACE_SECONDS = 60.0
"""Time to finish the clip at hand after Stop."""


@dataclass(frozen=True)
class DataJob:
    """An audit, encode or evaluation.

    Attributes:
        folder: Folder of its record.
        kind: Key of `RESULTS`.
        source: Folder of audio, or of the run that is evaluated.
        out: Output folder.
        state: Key of `STATES`.
        share: Progress from 0 to 1; None when unknown.
        progress: Progress in words.
        error: Why it failed.
        command: Command line.
    """

    folder: Path
    kind: str
    source: Path
    out: Path
    state: str
    share: float | None
    progress: str
    error: str | None
    command: tuple[str, ...]

    @property
    def is_running(self) -> bool:
        """Whether its process exists."""
        return self.state in ("running", "stopping")


def get_audit_dir(workspace: Workspace, source: Path) -> Path:
    """Get the output folder of an audit.

    Args:
        workspace: The studio's folders.
        source: Folder of audio.

    Returns:
        A folder in the studio's home.
    """
    return workspace.home / "audits" / _make_name(source)


def get_evaluation_dir(workspace: Workspace, run: Path) -> Path:
    """Get the output folder of an evaluation.

    Args:
        workspace: The studio's folders.
        run: The run folder.

    Returns:
        A folder in the studio's home.
    """
    return workspace.home / "evaluations" / _make_name(run)


def build_audit_command(workspace: Workspace, source: Path, captions: str, model: str | None) -> list[str]:
    """Build the command that audits a folder.

    Args:
        workspace: The studio's folders.
        source: Folder of audio.
        captions: "required" or "optional".
        model: Model whose limits apply; None for none.

    Returns:
        The arguments.
    """
    out = ["--out", str(get_audit_dir(workspace, source))]
    return ["sa3-data", "audit", str(source), *out, "--captions", captions, *(["--model", model] if model else [])]


def build_encode_command(source: Path, out: Path, model: str, settings: EncodeSettings) -> list[str]:
    """Build the command that encodes a folder.

    Args:
        source: Folder of audio.
        out: Output folder.
        model: Model whose autoencoder encodes.
        settings: Settings of the encode.

    Returns:
        The arguments.
    """
    changed = {name: value for name, value in vars(settings).items() if value != getattr(EncodeSettings(), name)}
    chosen = {"source": source, "out": out, "model": model} | changed
    return ["sa3-encode", *(format_override(key, value) for key, value in chosen.items())]


def start_job(workspace: Workspace, kind: str, source: Path, out: Path, command: Sequence[str]) -> Path:
    """Start an audit, encode or evaluation.

    Args:
        workspace: The studio's folders.
        kind: Key of `RESULTS`.
        source: Folder of audio, or of a run.
        out: Output folder.
        command: The arguments.

    Returns:
        Folder of its record.

    Raises:
        StudioError: When one with this output folder is running.
    """
    folder = workspace.home / "jobs" / f"{kind}-{_make_name(out)}"
    job = read_job(folder)
    if job is not None and job.is_running:
        what = f"{kind.capitalize()}: {job.source} is already being processed, into {out}."
        raise StudioError(f"{what} Wait, or press Stop.")
    processes.start(folder, command, kind=kind, source=str(source), out=str(out))
    return folder


def stop_job(job: DataJob) -> None:
    """Stop a job, or kill one that was asked already. The same command resumes an audit or an encode.

    Args:
        job: The job.

    Raises:
        StudioError: When it is not running.
    """
    if not processes.stop(job.folder, at_once=job.state == "stopping", grace_seconds=_GRACE_SECONDS):
        raise StudioError("it is not running: nothing to stop.")


def dismiss_job(job: DataJob) -> None:
    """Forget a job that is over, with its log.

    Args:
        job: The job.

    Raises:
        StudioError: When it is running.
    """
    if processes.get_running_pid(job.folder) is not None:
        raise StudioError("it is running: stop it first.")
    shutil.rmtree(job.folder, ignore_errors=True)


def list_jobs(workspace: Workspace) -> list[DataJob]:
    """List all jobs, running ones first, then latest first.

    Args:
        workspace: The studio's folders.

    Returns:
        The jobs.
    """
    folders = sorted((workspace.home / "jobs").glob("*/"), key=_get_start_time, reverse=True)
    found = [job for job in map(read_job, folders) if job is not None]
    return sorted(found, key=lambda job: not job.is_running)


def read_state(workspace: Workspace, kind: str) -> list[tuple[DataJob, int]]:
    """Read what changes with the jobs of a kind and with their results.

    Args:
        workspace: The studio's folders.
        kind: Key of `RESULTS`.

    Returns:
        Each job, and when its result was written; 0 for none.
    """
    found = [(job, job.out / RESULTS[kind]) for job in list_jobs(workspace) if job.kind == kind]
    return [(job, file.stat().st_mtime_ns if file.is_file() else 0) for job, file in found]


def read_job(folder: Path) -> DataJob | None:
    """Read a job from its record.

    Args:
        folder: Folder of its record.

    Returns:
        The job; None when there is none.
    """
    record = processes.read_record(folder)
    kind = record.get("kind")
    if kind not in RESULTS or not {"out", "source", "command", "stop_asked"} <= record.keys():
        return None
    out, is_running = Path(record["out"]), processes.get_running_pid(folder) is not None
    error = None if is_running else processes.read_failure(folder)
    made = out / RESULTS[kind]
    is_made = made.is_file() and made.stat().st_mtime >= _get_start_time(folder) - 1
    if is_running:
        state = "stopping" if record["stop_asked"] else "running"
    elif error is not None or (not record["stop_asked"] and not is_made):
        state = "failed"
        last = processes.read_log_tail(folder, 1)
        how = last if last.startswith("stopped by") else "killed, possibly out of memory"
        again = "It starts anew when you start it again." if kind == "evaluate" else "Start it again to resume."
        error = error or f"The process was {how}. {again}"
    else:
        state = "finished" if is_made else "stopped"
    share, progress = read_progress(folder) if is_running else (1.0, "")
    command = tuple(map(str, record["command"]))
    return DataJob(folder, kind, Path(record["source"]), out, state, share, progress, error, command)


def read_progress(folder: Path) -> tuple[float | None, str]:
    """Read the progress that a job's process has written.

    Args:
        folder: Folder of its record.

    Returns:
        Share from 0 to 1 (None while unknown), and the progress in words.
    """
    found = processes.read_progress(folder)
    stage, done, total = found.get("stage", "starting"), found.get("done", 0), found.get("total")
    unit = {"clip": "clips", "batch": "batches"}.get(found.get("unit", ""), "")
    return (done / max(1, total), f"{stage}: {done} of {total} {unit}") if total is not None else (None, stage)


def _get_start_time(folder: Path) -> float:
    try:
        return datetime.fromisoformat(str(processes.read_record(folder).get("at"))).timestamp()
    except ValueError:
        return time.time()


def _make_name(path: Path) -> str:
    digest = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', path.name)[:40] or 'folder'}-{digest}"
