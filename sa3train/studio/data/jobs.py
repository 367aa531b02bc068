"""Audits and encodes that the page starts: processes of their own, kept track of in the studio's home."""

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sa3train.core.errors import SA3Error
from sa3train.data.encode.fixes import FIXES
from sa3train.data.encode.plan import VIEWS, done_keys
from sa3train.data.encode.workers import work_folder
from sa3train.data.shards.index import INDEX
from sa3train.studio.server import processes
from sa3train.studio.server.workspace import StudioError, Workspace

JOBS, AUDITS = "jobs", "audits"
AUDIT = "audit.json"
STATES = {
    "running": "at work",
    "stopping": "stopping",
    "finished": "done",
    "failed": "ended with an error",
    "stopped": "stopped; start it again to go on",
}
_AUDITED = re.compile(r"audit: (\d+) clips, (\d+) of them known")
_ENCODING = re.compile(r"encode: (\d+) clips, (\d+) takes done before")


@dataclass(frozen=True)
class Work:
    """An audit or encode: its `source`, where it writes, its state, and how far it is (0 to 1, None: unknown)."""

    folder: Path
    kind: str
    source: Path
    out: Path
    state: str
    share: float | None
    said: str
    error: str | None
    command: tuple[str, ...]

    @property
    def alive(self) -> bool:
        """Whether it is at work."""
        return self.state in ("running", "stopping")


def audit_folder(workspace: Workspace, source: Path) -> Path:
    """Where the audit of `source` is kept."""
    return workspace.home / AUDITS / _name(source)


def audit_command(workspace: Workspace, source: Path, captions: str, model: str | None) -> list[str]:
    """The command that audits `source`."""
    out = ["--out", str(audit_folder(workspace, source))]
    return ["sa3-data", "audit", str(source), *out, "--captions", captions, *(["--model", model] if model else [])]


def encode_command(
    source: Path,
    out: Path,
    model: str,
    *,
    fix: Sequence[str] = (),
    views: Sequence[str] = (),
    split: float = 0.05,
    captions: str = "required",
    duplicates: str = "keep",
    max_rejected: float = 0.1,
) -> list[str]:
    """The command that encodes `source` into `out`. Raises `StudioError` for what cannot be."""
    if out.is_relative_to(source):
        raise StudioError(f"{out} lies inside {source}: choose a folder for the latents outside of the audio.")
    for name, given, known in (("fix", fix, FIXES), ("views", views, VIEWS)):
        if not set(given) <= set(known):
            raise StudioError(f"{name} is {', '.join(given)}; choose among {', '.join(known)}.")
    if not 0 <= split < 1 or not 0 <= max_rejected <= 1:
        raise StudioError("the shares held out and rejected lie between 0 and 1.")
    lists = [f"{name}=[{','.join(given)}]" for name, given in (("fix", fix), ("views", views)) if given]
    return [
        "sa3-encode",
        f"source={source}",
        f"out={out}",
        f"model={model}",
        f"split={split:g}",
        f"captions={captions}",
        f"duplicates={duplicates}",
        f"max_rejected={max_rejected:g}",
        *lists,
    ]


def begin(workspace: Workspace, kind: str, source: Path, out: Path, command: Sequence[str]) -> Path:
    """Start an audit or encode; the folder of its record. Raises `SA3Error` when it is at work already."""
    folder = workspace.home / JOBS / f"{kind}-{_name(out)}"
    had = journal_lines(out)
    processes.start(folder, command, kind=kind, source=str(source), out=str(out), had=had)
    return folder


def stop(work: Work) -> None:
    """End it; what is done is kept, and the same command goes on. Raises `StudioError` when it is not at work."""
    if not processes.stop(work.folder):
        raise StudioError("it is not at work: there is nothing to stop.")


def works(workspace: Workspace) -> list[Work]:
    """Every audit and encode that was started here: those at work first, then the latest."""
    folders = sorted((workspace.home / JOBS).glob("*/"), key=lambda folder: _started(folder), reverse=True)
    found = [work for work in map(read, folders) if work is not None]
    return sorted(found, key=lambda work: not work.alive)


def read(folder: Path) -> Work | None:
    """The audit or encode whose record is in `folder`, or None."""
    record = processes.record_of(folder)
    if record.get("kind") not in ("audit", "encode"):
        return None
    out, alive = Path(record["out"]), processes.running(folder) is not None
    error = None if alive else processes.failure(folder)
    made = out / (AUDIT if record["kind"] == "audit" else INDEX)
    share, said = progress(folder, record, out) if alive else (1.0, "")
    if alive:
        state = "stopping" if record["stop_asked"] else "running"
    elif error is not None or (not record["stop_asked"] and not _newer(made, _started(folder))):
        state, error = "failed", error or "it ended without a word: killed, or out of memory. Start it again to go on."
    else:
        state = "finished" if _newer(made, _started(folder)) else "stopped"
    command = tuple(str(part) for part in record["command"])
    return Work(folder, record["kind"], Path(record["source"]), out, state, share, said, error, command)


def progress(folder: Path, record: dict[str, Any], out: Path) -> tuple[float | None, str]:
    """How far a process is, by what it said and wrote: a share (None before it knows) and a line."""
    log = processes.log_tail(folder, 400).rpartition("\n$ ")[2]
    encoding = _ENCODING.search(log)
    if encoding:
        clips = max(1, int(encoding[1]))
        done = _done(out)
        return min(1.0, done / clips), f"encoding: {done} takes of {clips} clips written"
    audited = _AUDITED.search(log)
    if audited:
        clips, known = int(audited[1]), int(audited[2])
        done = min(clips, known + journal_lines(out) - int(record["had"]))
        return done / max(1, clips), f"listening: {done} of {clips} clips"
    return None, "getting ready"


def journal_lines(out: Path) -> int:
    """How many rows the audit journals of an output folder hold."""
    count = 0
    for journal in work_folder(out).glob("audit-*.jsonl"):
        with journal.open("rb") as file:
            while chunk := file.read(1 << 20):
                count += chunk.count(b"\n")
    return count


def _done(out: Path) -> int:
    try:
        return len(done_keys(out))
    except (SA3Error, OSError, ValueError):
        return 0  # a shard is being renamed this very moment


def _newer(path: Path, moment: float) -> bool:
    return path.is_file() and path.stat().st_mtime >= moment - 1


def _started(folder: Path) -> float:
    try:
        return datetime.fromisoformat(str(processes.record_of(folder).get("at"))).timestamp()
    except ValueError:
        return time.time()


def _name(path: Path) -> str:
    digest = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', path.name)[:40] or 'folder'}-{digest}"
