"""Run folders as the page lists them: what state each is in, how far it is, and how it is gone on with.

Everything is read from files and from the process record, so a run is found again whoever started it and whatever
became of the server meanwhile.
"""

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sa3train.core.config import differences
from sa3train.core.errors import DataError
from sa3train.reports.run_files import CONFIG, RECORD, load_settings
from sa3train.studio.server import processes
from sa3train.studio.server.workspace import Workspace, survey_folders

METRICS = "metrics.csv"
METRICS_TAIL = 64_000

SIGN_OF_LIFE = 600.0
"""Seconds after its last trace for which a run of somebody else's counts as going on."""

STATES = {
    "starting": "starting",
    "running": "running",
    "stopping": "saving, then stopping",
    "elsewhere": "running, started elsewhere",
    "finished": "finished",
    "stopped": "stopped",
    "crashed": "ended before its end",
    "failed": "could not start",
}
"""States of a run, in words."""
ALIVE = ("starting", "running", "stopping", "elsewhere")


@dataclass(frozen=True)
class Run:
    """One run folder. `step` of `total` optimizer steps; `speed` in steps per second; `begun` in UTC."""

    path: Path
    state: str
    step: int = 0
    total: int | None = None
    speed: float | None = None
    loss: float | None = None
    begun: str = ""
    error: str | None = None

    @property
    def alive(self) -> bool:
        """Whether something works on it."""
        return self.state in ALIVE

    @property
    def seconds_left(self) -> float | None:
        """Time until its last step at its last speed, or None."""
        if not self.alive or not self.speed or self.total is None:
            return None
        return (self.total - self.step) / self.speed


def find_runs(workspace: Workspace, known: Path | None = None) -> list[Run]:
    """Every run under the roots: those at work first, then the newest. `known` is a run that has just begun, perhaps:
    a survey may be older than it.
    """
    paths = survey_folders(workspace).runs
    if known is not None and known not in paths:
        paths = [*paths, known]
    runs = [run for run in map(read, paths) if run is not None]
    return sorted(runs, key=lambda run: (run.alive, run.begun), reverse=True)


def is_run(folder: Path) -> bool:
    """Whether `folder` holds a run, or the record of one that has yet to begin."""
    whole = (folder / RECORD).is_file() and (folder / CONFIG).is_file()
    return whole or processes.record_of(folder).get("kind") == "train"


def read(folder: Path) -> Run | None:
    """The run in `folder`, or None when there is none."""
    if not is_run(folder):
        return None
    record, started = _json(folder / RECORD), processes.record_of(folder)
    state = state_of(folder, record, started)
    row = last_metrics(folder / METRICS)
    total = _steps(folder / CONFIG, _stamp(folder / CONFIG))
    step = max(int(row.get("step", 0)), int(record.get("steps", 0)) if state in ("finished", "stopped") else 0)
    return Run(
        folder,
        state,
        step,
        total,
        row.get("time/steps_per_second"),
        row.get("train/loss"),
        str(record.get("started") or started.get("at") or ""),
        processes.failure(folder) if state in ("crashed", "failed") else None,
    )


def state_of(folder: Path, record: dict[str, Any], started: dict[str, Any]) -> str:
    """A key of `STATES`, from `run.json` and the process record."""
    asked = bool(started.get("stop_asked"))
    if processes.running(folder) is not None:
        return "stopping" if asked else "running" if record else "starting"
    if record.get("status") == "finished":
        return "finished"
    if record.get("status") == "interrupted":
        return "stopped"
    if record and _seconds_since_trace(folder) < SIGN_OF_LIFE and _traced_by_another(record, started):
        return "elsewhere"
    if asked and processes.failure(folder) is None:
        return "stopped"
    return "crashed" if record else "failed"


def resume_command(folder: Path) -> list[str]:
    """The command that goes on with the run; the one that started it, when it ended before it had begun."""
    if (folder / RECORD).is_file() and (folder / CONFIG).is_file():
        return ["sa3-train", f"resume={folder}"]
    command = processes.record_of(folder).get("command")
    if not command:
        raise DataError(f"{folder} holds no run ({RECORD} and {CONFIG}), and no record of how one was started.")
    return [str(part) for part in command]


def resume(folder: Path) -> int:
    """Go on with a run in a process of its own; its number. Raises `SA3Error` when it is at work or finished."""
    run = read(folder)
    if run is None:
        raise DataError(f"{folder} holds no run.")
    if run.alive:
        raise DataError(f"{folder.name} is at work already ({STATES[run.state]}): there is nothing to resume.")
    if run.state == "finished":
        raise DataError(f"{folder.name} is finished. Train on from its adapter with recipe=continue, in a new run.")
    parts = len(_json(folder / RECORD).get("resumed", [])) + 1 if (folder / RECORD).is_file() else 0
    return processes.start(folder, resume_command(folder), kind="train", parts=parts)


def begin(folder: Path, command: Sequence[str]) -> int:
    """Start a new run in `folder` in a process of its own; its number. Raises `SA3Error` when something is there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is there already: give the run another name.")
    return processes.start(folder, command, kind="train", parts=0)


def stop(folder: Path, *, at_once: bool = False) -> None:
    """Ask a run to save its state and end, or end it `at_once`. Raises `DataError` when it cannot be asked."""
    run = read(folder)
    if run is None or not run.alive:
        raise DataError(f"{folder.name} is not at work: there is nothing to stop.")
    if run.state == "elsewhere":
        raise DataError(f"{folder.name} was started elsewhere: stop it where it was started (Ctrl+C, or scancel).")
    if run.state == "stopping" and not at_once:
        raise DataError(f"{folder.name} was asked already: it ends once its state is saved.")
    processes.stop(folder, at_once=at_once)


def settings_between(one: Path, other: Path) -> list[tuple[str, str, str]]:
    """(key, value in `one`, value in `other`) of every setting that differs, by key, but for the folder.

    Raises `DataError` when the settings of one cannot be read.
    """
    try:
        old, new = (load_settings(folder / CONFIG) for folder in (one, other))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"the settings ({CONFIG}) of a run cannot be read: {error}.") from error
    found = differences(old, new)
    return [(key, _said(a), _said(b)) for key, (a, b) in sorted(found.items()) if key != "run_dir"]


def last_metrics(path: Path) -> dict[str, float]:
    """Each metric's last value among the last rows of a `metrics.csv`; empty when there is none."""
    try:
        with path.open("rb") as file:
            head = file.readline().decode("utf-8", "replace").strip().split(",")
            start = file.tell()
            file.seek(max(start, file.seek(0, 2) - METRICS_TAIL))
            cut = file.tell() > start
            lines = file.read().decode("utf-8", "replace").split("\n")[1 if cut else 0 : -1]
    except OSError:
        return {}
    found: dict[str, float] = {}
    for line in lines:
        for name, value in zip(head, line.split(","), strict=False):
            if value:
                found[name] = _number(value)
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _seconds_since_trace(folder: Path) -> float:
    traces = [_stamp(folder / name) for name in (METRICS, RECORD)]
    return time.time() - max(traces) / 1e9


def _traced_by_another(record: dict[str, Any], started: dict[str, Any]) -> bool:
    """Whether the run was gone on with more often than the process that this studio knows of would have it."""
    return not started or len(record.get("resumed", [])) > int(started.get("parts", 0))


@functools.lru_cache(maxsize=1024)
def _steps(config: Path, stamp: int) -> int | None:
    """`trainer.max_steps` of a run's settings; `stamp` makes a changed file be read again."""
    if not stamp:
        return None
    try:
        return int(load_settings(config)["trainer"]["max_steps"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
