"""The jobs of `sa3-mcp`: audits, encodes, trials, evaluations and generations, recorded in the workspace."""

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sa3train.cli.budget import REASONS, STOPPED_FOR, Budget
from sa3train.core import processes
from sa3train.core.errors import SA3Error
from sa3train.core.user_files import read_file
from sa3train.data.shards.index import summarize_data
from sa3train.reports import runs
from sa3train.studio.data.jobs import read_progress
from sa3train.studio.runs import estimate
from sa3train.studio.server.workspace import Workspace

MAX_WAIT, POLL_SECONDS = 50.0, 0.5
"""Clients give up on a call after a minute."""
JOBS, TRIALS = "jobs", "trials"
KILLED = "the process was killed, possibly out of memory"


class Jobs:
    """Jobs of a workspace.

    Args:
        workspace: Where their records are.
        budget: Time and disk.
    """

    def __init__(self, workspace: Workspace, budget: Budget) -> None:
        self.workspace, self.budget, self._numbers = workspace, budget, itertools.count(1)

    def make_name(self, kind: str) -> str:
        """Make the name of a new job.

        Args:
            kind: What it does.

        Returns:
            The name.
        """
        return f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{next(self._numbers)}"

    def get_trial_dir(self, name: str) -> Path:
        """Get the run folder of a plan's trial.

        Args:
            name: Name of the job.

        Returns:
            The folder.
        """
        return self.workspace.home / TRIALS / name

    def start(self, kind: str, command: list[str], wait_seconds: float, name: str = "", **facts: Any) -> dict[str, Any]:
        """Start a job.

        Args:
            kind: What it does.
            command: The command, its name first.
            wait_seconds: How long to wait for it.
            name: Its name. Empty: a new one.
            **facts: What else to record.

        Returns:
            As of `watch`.
        """
        name = name or self.make_name(kind)
        folder = self.workspace.home / JOBS / name
        self.budget.launch(name, folder, lambda: processes.start(folder, command, kind=kind, **facts))
        return self.watch(name, wait_seconds)

    def watch(self, name: str, wait_seconds: float) -> dict[str, Any]:
        """Wait for a job.

        Args:
            name: Its name.
            wait_seconds: How long.

        Returns:
            Its state; progress, result or error.
        """
        folder = self._find(name)
        for _ in iterate_until(wait_seconds):
            if processes.get_running_pid(folder) is None:
                break
        return self._describe(folder)

    def stop(self, name: str) -> dict[str, Any]:
        """Stop a job.

        Args:
            name: Its name.

        Returns:
            As of `watch`.

        Raises:
            SA3Error: It is not running.
        """
        folder = self._find(name)
        if not processes.stop(folder, grace_seconds=MAX_WAIT):
            raise SA3Error(f"{name} is not running. There is nothing to stop.")
        return self._describe(folder)

    def _find(self, name: str) -> Path:
        jobs = self.workspace.home / JOBS
        folder = jobs / name
        if folder.parent != jobs or not (folder / processes.PROCESS_FILE).is_file():
            raise SA3Error(f"There is no job {name}. Tools return their job's name.")
        return folder

    def _describe(self, folder: Path) -> dict[str, Any]:
        record, error = processes.read_record(folder), processes.read_failure(folder)
        shown: dict[str, Any] = {"job": folder.name, "command": record.get("command"), "state": "running"}
        if processes.get_running_pid(folder) is not None:
            has_progress = record.get("kind") not in ("generate", "plan", "sweep")
            return shown | ({"progress": read_progress(folder)[1]} if has_progress else {})
        result = self._read_plan(folder, record) if record.get("kind") == "plan" else _read_result(folder, record)
        if result is not None:
            return shown | {"state": "finished", "result": result}
        reason = REASONS.get(str(record.get(STOPPED_FOR)))
        if reason or record.get("stop_asked"):
            return shown | {"state": "stopped", "error": reason or "it was stopped"}
        return shown | {"state": "failed", "error": error or KILLED, "log": processes.read_log_tail(folder, 10)}

    def _read_plan(self, folder: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
        trial_dir = self.get_trial_dir(folder.name)
        run = runs.load_run(trial_dir)
        if run is None or run.state != "finished":
            return None
        measured = estimate.describe_trial(
            record["config"], summarize_data(Path(record["data"])), estimate.read_trial(trial_dir)
        )
        return {"plan": format_rows([*record["plan"], *measured])}


def iterate_until(seconds: float) -> Iterator[None]:
    """Iterate at intervals until a time is over.

    Args:
        seconds: The time, limited to `MAX_WAIT`.

    Yields:
        Nothing, at least once.
    """
    end = time.monotonic() + min(max(0.0, seconds), MAX_WAIT)
    yield
    while time.monotonic() < end:
        time.sleep(POLL_SECONDS)
        yield


def format_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format the lines of a plan.

    Args:
        rows: (name, text) of each.

    Returns:
        The lines.
    """
    return [f"{name}: {text}" for name, text in rows]


def _read_result(folder: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the result of a job's latest process; None without one."""
    if record.get("kind") == "generate":
        out = Path(record["out"])
        sidecar = out.with_name(f"{out.name}.json")
        return {"audio": str(out), "settings": str(sidecar)} if out.is_file() and sidecar.is_file() else None
    log = read_file(folder / processes.LOG_FILE).decode("utf-8", "replace").rpartition("\n$ ")[2]
    if record.get("kind") == "sweep":
        start = log.find("\n{\n")  # progress before it
        return None if start < 0 else dict(json.loads(log[start:]))
    line = next((line for line in reversed(log.splitlines()) if line.startswith('{"result":')), None)
    result = None if line is None else json.loads(line)["result"]
    if result is None or record.get("kind") != "evaluate":
        return result
    rows = [
        {name: row[name] for name in ("adapter", "step", "strength", "loss", "frechet", "nearest")}
        | {"loss_against_base": row["against_base"]["loss"]}
        for row in result["candidates"]
    ]
    return {"pick": result["pick"], "base_loss": result["base"]["loss"], "candidates": rows}
