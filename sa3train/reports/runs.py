"""Runs as `sa3-runs` and the studio list them: state and progress; how to start, stop and resume one.

Everything is read from files and from the process record, so a run is found again whoever started it and whatever
happened to the program that did.
"""

import contextlib
import functools
import platform
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from sa3train.adapters.formats.run_dir import list_checkpoints
from sa3train.core import processes
from sa3train.core.errors import DataError
from sa3train.core.log import get_logger
from sa3train.core.overrides import format_override
from sa3train.core.user_files import stat_file
from sa3train.data.sources import own_folders
from sa3train.data.sources.own_folders import RUN, iterate_folders
from sa3train.reports.loss_change import compute_loss_change
from sa3train.reports.run_files import (
    ADAPTER_FILE,
    BEST_ADAPTER_FILE,
    CONFIG_FILE,
    METRICS_FILE,
    RECORD_FILE,
    STEP,
    check_format,
    load_settings,
    read_run,
)
from sa3train.reports.verdict import summarize_run

_logger = get_logger(__name__)

TAIL_BYTES = 64_000
ALIVE_SECONDS = 600.0
"""For how long after its last trace a run that was started on another computer counts as running."""

STATES = {
    "starting": "starting",
    "running": "running",
    "stopping": "saving, then stopping",
    "elsewhere": "running",
    "finished": "finished",
    "stopped": "stopped",
    "crashed": "interrupted",
    "failed": "failed to start",
    "newer": "made by a newer sa3train",
}
"""Labels of the states of a run."""
ALIVE = ("starting", "running", "stopping", "elsewhere")


@dataclass(frozen=True)
class Run:
    """A run folder.

    Args:
        path: The folder.
        state: A key of `STATES`.
        step: Optimizer steps done.
        total: Optimizer steps planned, if known.
        speed: Steps per second.
        loss: Last training loss.
        started: Time of its start, ISO 8601 in UTC.
        error: The error with which it ended.
        stage: What it does beside training steps, such as "validating", where the studio started it.
    """

    path: Path
    state: str
    step: int = 0
    total: int | None = None
    speed: float | None = None
    loss: float | None = None
    started: str = ""
    error: str | None = None
    stage: str = ""

    @property
    def is_alive(self) -> bool:
        """Whether the run is starting, running or stopping."""
        return self.state in ALIVE

    @property
    def is_resumable(self) -> bool:
        """Whether the run has ended before its last step."""
        return not self.is_alive and self.state not in ("finished", "newer")

    @property
    def seconds_left(self) -> float | None:
        """Time until its last step at its last speed; None after it, or where it is not known."""
        if not self.is_alive or not self.speed or self.total is None or self.step >= self.total:
            return None
        return (self.total - self.step) / self.speed


def find_runs(roots: Sequence[Path]) -> list[Run]:
    """Find the runs in some folders and below them. Links and hidden folders are not followed.

    Args:
        roots: The folders.

    Returns:
        Running ones first, then the newest.

    Raises:
        DataError: One of them is no folder.
    """
    for root in roots:
        if not root.is_dir():
            raise DataError(f"There is no folder {root}. Name a run folder, or a folder that holds runs.")
    paths, walked = list[Path](), list(iterate_folders(roots))
    for folder, files, own in walked:
        inside = any(path in folder.parents for path in paths[-1:])  # the walk goes depth first
        if not inside and (own == RUN or processes.PROCESS_FILE in files):
            paths.append(folder)
    if len(walked) >= own_folders.MAX_FOLDERS:
        text = "only the first %d folders below %s were searched for runs: name a folder nearer to them"
        _logger.warning(text, len(walked), ", ".join(map(str, roots)))
    return sort_runs(map(load_run, paths))


def sort_runs(runs: Iterable[Run | None]) -> list[Run]:
    """Sort runs for a list.

    Args:
        runs: The runs; None is left out.

    Returns:
        Running ones first, then the newest.
    """
    found = [run for run in runs if run is not None]
    return sorted(found, key=lambda run: (run.is_alive, run.started), reverse=True)


def is_run(folder: Path) -> bool:
    """Check whether a folder holds a run, or the record of one that has not written anything yet.

    Args:
        folder: The folder.

    Returns:
        Whether it does.
    """
    return _is_begun(folder) or processes.read_record(folder).get("kind") == "train"


def load_run(folder: Path) -> Run | None:
    """Load the state and progress of a run.

    Args:
        folder: The run folder.

    Returns:
        The run, or None when there is none.
    """
    if not is_run(folder):
        return None
    record, process = processes.read_json(folder / RECORD_FILE), processes.read_record(folder)
    try:
        check_format(folder, record)
    except DataError as error:
        return Run(folder, "newer", started=str(record.get("started") or ""), error=str(error))
    state = detect_state(folder, record, process)
    if state in ("crashed", "failed"):  # or it has ended, and said so, since its record was read
        record = processes.read_json(folder / RECORD_FILE)
        state = detect_state(folder, record, process)
    row = read_last_metrics(folder / METRICS_FILE)
    saved_step = int(record.get("steps", 0)) if state in ("finished", "stopped") else 0
    return Run(
        folder,
        state,
        max(int(row.get(STEP, 0)), saved_step, *list_checkpoints(folder)),
        _read_total_steps(folder / CONFIG_FILE, _get_mtime_ns(folder / CONFIG_FILE)),
        row.get("time/steps_per_second"),
        row.get("train/loss"),
        str(record.get("started") or process.get("at") or ""),
        processes.read_failure(folder) if state in ("crashed", "failed") else None,
        str(processes.read_progress(folder).get("stage", "")) if state in ("starting", "running", "stopping") else "",
    )


def detect_state(folder: Path, record: Mapping[str, Any], process: Mapping[str, Any]) -> str:
    """Detect the state of a run.

    Args:
        folder: The run folder.
        record: Content of `run.json`; empty without one.
        process: Content of `process.json`; empty without one.

    Returns:
        A key of `STATES`.
    """
    stop_asked = bool(process.get("stop_asked"))
    if processes.get_running_pid(folder) is not None:
        return "stopping" if stop_asked else "running" if record else "starting"
    if record.get("status") == "finished":
        return "finished"
    if record.get("status") == "interrupted":
        return "stopped"
    # A run that was resumed more often than the recorded process knows of is somebody else's.
    is_foreign = not process or len(record.get("resumed", [])) > int(process.get("parts", 0))
    holder = record.get("process") or {}
    if is_foreign and "started" in holder and holder.get("host") == platform.node():
        return "elsewhere" if processes.find_process(holder) is not None else "crashed"
    last_trace = max(_get_mtime_ns(folder / name) for name in (METRICS_FILE, RECORD_FILE)) / 1e9
    if record and is_foreign and time.time() - last_trace < ALIVE_SECONDS:
        return "elsewhere"
    if stop_asked and processes.read_failure(folder) is None:
        return "stopped"
    return "crashed" if record else "failed"


def build_resume_command(folder: Path) -> list[str]:
    """Build the command that resumes a run, or that starts it again if it failed before its first step.

    Args:
        folder: The run folder.

    Returns:
        The arguments, the command first.

    Raises:
        DataError: The folder holds no run.
    """
    if _is_begun(folder):
        return ["sa3-train", format_override("resume", folder)]
    command = processes.read_record(folder).get("command")
    if not command:
        raise DataError(f"{folder} contains no run ({RECORD_FILE} and {CONFIG_FILE}). Choose another folder.")
    return [str(part) for part in command]


def resume_run(folder: Path) -> int:
    """Resume a run in a process of its own.

    Args:
        folder: The run folder.

    Returns:
        The process ID.

    Raises:
        DataError: There is no run, or it is running or finished.
    """
    run = load_run(folder)
    if run is None:
        raise DataError(f"{folder} contains no run. Choose another folder.")
    if run.is_alive:
        raise DataError(f"{folder.name} is already running ({STATES[run.state]}). There is nothing to resume.")
    if run.state == "finished":
        raise DataError(f"{folder.name} is finished. To train its adapter further, start a run with recipe=continue.")
    record = folder / RECORD_FILE
    parts = len(processes.read_json(record).get("resumed", [])) + 1 if record.is_file() else 0
    return processes.start(folder, build_resume_command(folder), kind="train", parts=parts)


def start_run(folder: Path, command: Sequence[str]) -> int:
    """Start a new run in a process of its own.

    Args:
        folder: Folder of the run, which must be empty or missing.
        command: The `sa3-train` command.

    Returns:
        The process ID.

    Raises:
        DataError: Something is in the folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} already exists. Choose another run folder.")
    return processes.start(folder, command, kind="train", parts=0)


def stop_run(folder: Path, *, at_once: bool = False) -> None:
    """Stop a run.

    Args:
        folder: The run folder.
        at_once: Kill it. Otherwise it saves its state first.

    Raises:
        DataError: The run is not running, is stopping already, or was started on another computer.
    """
    run = load_run(folder)
    if run is None or not run.is_alive:
        raise DataError(f"{folder.name} is not running. There is nothing to stop.")
    if run.state == "elsewhere":
        if (
            process := processes.find_process(processes.read_json(folder / RECORD_FILE).get("process") or {})
        ) is not None:
            processes.stop_process(process, at_once=at_once)
            return
        raise DataError(f"{folder.name} was started elsewhere. Stop it where it was started (Ctrl+C or scancel).")
    if run.state == "stopping" and not at_once:
        raise DataError(f"{folder.name} is already stopping. It exits when its state is saved.")
    processes.stop(folder, at_once=at_once)


def dismiss_run(folder: Path) -> None:
    """Remove the folder of a run that failed before it wrote anything.

    Args:
        folder: The run folder.

    Raises:
        DataError: There is more in it than the record and log of the process.
    """
    if not {path.name for path in folder.iterdir()} <= processes.FILES:
        raise DataError(f"{folder} holds more than the log of a failed start. Remove it yourself.")
    shutil.rmtree(folder)


def describe_run(folder: Path) -> dict[str, Any]:
    """Describe a run in plain values, as `sa3-runs show --json` prints them.

    Args:
        folder: The run folder.

    Returns:
        The fields of `Run` and what it means; `heldout`: change of the last held-out loss against the base, as a share
        with half of its 95% confidence interval; `best_step` and `best_loss`, None before a step is validated;
        `adapter` and `best_adapter`: files, or None; `summary`: sentences.

    Raises:
        DataError: There is no run, or a newer version wrote it.
    """
    run = load_run(folder)
    if run is None:
        raise DataError(f"{folder} contains no run. Choose another folder: sa3-runs list shows them.")
    files = read_run(folder)
    change = compute_loss_change(files.validation, "val")
    is_validated = any(row["step"] > 0 for row in files.validation.get("history", []))
    adapters = {"adapter": folder / ADAPTER_FILE, "best_adapter": folder / BEST_ADAPTER_FILE}
    return {
        **asdict(run),
        "path": str(folder),
        "means": STATES[run.state],
        "seconds_left": run.seconds_left,
        "heldout": None if change is None else asdict(change),
        **{name: files.validation.get(name) if is_validated else None for name in ("best_step", "best_loss")},
        **{name: str(path) if path.is_file() else None for name, path in adapters.items()},
        "summary": summarize_run(files),
    }


def read_last_metrics(path: Path) -> dict[str, float]:
    """Read the last value of each metric from the end of a `metrics.csv`, which may still be written to.

    Args:
        path: The file.

    Returns:
        The values by name; empty without a file.
    """
    try:
        stat_file(path)
        with path.open("rb") as file:
            head = file.readline().decode("utf-8", "replace").strip().split(",")
            start = file.tell()
            file.seek(max(start, file.seek(0, 2) - TAIL_BYTES))
            is_cut = file.tell() > start
            lines = file.read().decode("utf-8", "replace").split("\n")[1 if is_cut else 0 : -1]
    except OSError:
        return {}
    found: dict[str, float] = {}
    for line in lines:
        for name, value in zip(head, line.split(","), strict=False):
            with contextlib.suppress(ValueError):  # an empty cell
                found[name] = float(value)
    return found


def _is_begun(folder: Path) -> bool:
    return (folder / RECORD_FILE).is_file() and (folder / CONFIG_FILE).is_file()


@functools.lru_cache(maxsize=1024)
def _read_total_steps(config: Path, mtime_ns: int) -> int | None:
    """Read `trainer.max_steps`; `mtime_ns` makes a changed file be read again."""
    if not mtime_ns:
        return None
    try:
        return int(load_settings(config)["trainer"]["max_steps"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _get_mtime_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
