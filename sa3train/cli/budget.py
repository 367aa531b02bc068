"""The time and disk that `sa3-mcp` was given, held also for a running job, and when the server itself is killed.

`python -m sa3train.cli.budget FOLDER ROOT DEADLINE SOFT_BYTES MAX_BYTES` is the guard of one job: it stops the process
of FOLDER at DEADLINE, when ROOT has grown too large, or when its own standard input ends, as it does with the server.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sa3train.core import processes
from sa3train.core.errors import SA3Error
from sa3train.core.files import write_json

STOP_SECONDS, STOP_SHARE = 20.0, 0.9
"""A job is asked to save and exit this long before its time is over, and at this share of the disk."""
POLL_SECONDS, GUARD_SECONDS = 0.5, 5.0
"""A guard looks at its job this often, and is waited for this long when the job has ended."""
STOPPED_FOR = "stopped_for"
_PYTHON = sys.executable
REASONS = {
    "time": "the time given to sa3-mcp at its start (--minutes) is used up",
    "disk": "the disk given to sa3-mcp at its start (--gigabytes) is used up",
    "server": "sa3-mcp ended",
}


class Budget:
    """Time and disk for jobs, one at a time.

    Args:
        root: Folder whose growth counts.
        minutes: Time of all jobs together.
        gigabytes: How much the folder may grow.
    """

    def __init__(self, root: Path, minutes: float, gigabytes: float) -> None:
        if not (minutes > 0 and gigabytes > 0):
            raise SA3Error("--minutes and --gigabytes must be above 0.")
        self.root, self.seconds = root, 60 * minutes
        self.first_bytes = measure_folder(root)
        self.max_bytes = self.first_bytes + int(gigabytes * 1e9)
        self.soft_bytes = self.first_bytes + int(STOP_SHARE * gigabytes * 1e9)
        self._spent, self._since, self._job = 0.0, 0.0, ""
        self._folder: Path | None = None
        self._lock = threading.Lock()
        self._guards: list[subprocess.Popen[bytes]] = []

    @property
    def seconds_left(self) -> float:
        """Time left, with what the running job has used."""
        running = time.monotonic() - self._since if self._job else 0.0
        return max(0.0, self.seconds - self._spent - running)

    def describe(self) -> dict[str, Any]:
        """Describe what is left.

        Returns:
            Minutes and gigabytes left, and the running job.
        """
        left, folder = max(0, self.max_bytes - measure_folder(self.root)), self._folder
        running = "" if folder is not None and not _list_running(folder) else self._job  # before its guard notices
        minutes = round(self.seconds_left / 60, 2)
        return {"minutes_left": minutes, "gigabytes_left": round(left / 1e9, 3), "running": running}

    def launch(self, name: str, folder: Path, start: Callable[[], object]) -> None:
        """Start a job, with a guard beside it.

        Args:
            name: What to call it in messages.
            folder: Folder of its process record.
            start: Starts it.

        Raises:
            SA3Error: Another job is running, or time or disk are used up.
        """
        self._take(name)
        self._folder = folder
        try:
            start()
        except BaseException:
            self._give_back()
            raise
        try:
            limits = (folder, self.root, time.time() + self.seconds_left, self.soft_bytes, self.max_bytes)
            command = [_PYTHON, "-m", "sa3train.cli.budget", *map(str, limits)]
            quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, **quiet)
        except BaseException:
            processes.stop(folder, at_once=True)
            self._give_back()
            raise
        self._guards.append(guard)

        def wait() -> None:
            guard.wait()
            self._give_back()

        threading.Thread(target=wait, daemon=True).start()

    @contextlib.contextmanager
    def spend(self, name: str) -> Iterator[float]:
        """Count the time of a block as that of a job.

        Args:
            name: What to call it in messages.

        Yields:
            Seconds that it may take.
        """
        self._take(name)
        try:
            yield self.seconds_left
        finally:
            self._give_back()

    def close(self) -> None:
        """Stop what runs, and wait for it."""
        for guard in self._guards:
            if guard.stdin is not None:
                guard.stdin.close()
            guard.wait()

    def _take(self, name: str) -> None:
        end = time.monotonic() + GUARD_SECONDS
        while self._job and self._folder is not None and processes.get_running_pid(self._folder) is None:
            if time.monotonic() > end:
                break
            time.sleep(POLL_SECONDS / 10)  # it has ended, and its guard is about to notice
        with self._lock:
            if self._job:
                raise SA3Error(f"{self._job} is running, and one job runs at a time. Wait for it, or stop it.")
            if self.seconds_left <= _get_grace(self.seconds):
                raise SA3Error(f"{name} cannot start: {REASONS['time']}. Ask the user to start sa3-mcp with more.")
            if measure_folder(self.root) >= self.soft_bytes:
                raise SA3Error(
                    f"{name} cannot start: {REASONS['disk']}. Ask the user for more, or to delete something."
                )
            self._job, self._since = name, time.monotonic()

    def _give_back(self) -> None:
        with self._lock:
            self._spent += time.monotonic() - self._since
            self._job, self._folder = "", None


def measure_folder(root: Path) -> int:
    """Measure what is in a folder.

    Args:
        root: The folder.

    Returns:
        Bytes of its files; links count as themselves.
    """
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(OSError):  # it has just gone
                total += os.lstat(os.path.join(folder, name)).st_size  # noqa: PTH118 (many files, often)
    return total


def guard_job(
    folder: Path, root: Path, deadline: float, soft_bytes: int, max_bytes: int, is_alone: threading.Event
) -> None:
    """Watch a job until it ends, and the runs that a sweep has started; end them when they must.

    Args:
        folder: Folder of its process record.
        root: Folder whose size is limited.
        deadline: When its time is over, in seconds of `time.time`.
        soft_bytes: Size of `root` at which it is asked to end.
        max_bytes: Size of `root` at which it is killed.
        is_alone: Set when the server is gone.
    """
    grace, asked = _get_grace(deadline - time.time()), None
    while running := _list_running(folder):
        now, used = time.time(), measure_folder(root)
        reason = "server" if is_alone.is_set() else "disk" if used > soft_bytes else "time"
        is_over = is_alone.is_set() or used > soft_bytes or deadline - now <= grace
        if asked is None and (is_over or running[0] != folder):
            asked = now
            if is_over:
                processes.stop(folder)
                write_json(folder / processes.PROCESS_FILE, processes.read_record(folder) | {STOPPED_FOR: reason})
        if running[0] != folder:  # its sweep is gone
            for each in running:
                if not processes.read_record(each).get("stop_asked"):
                    processes.stop(each)
        if now >= deadline or used > max_bytes or (asked is not None and now - asked > STOP_SECONDS):
            for each in running:
                processes.stop(each, at_once=True)
        time.sleep(POLL_SECONDS)


def _list_running(folder: Path) -> list[Path]:
    """List the folders of processes that run: that of a job, and of runs that it has started as a sweep."""
    record = processes.read_record(folder)
    trials = Path(record["runs"]).glob("trial-*") if record.get("runs") else ()
    folders = [folder, *(each for each in trials if processes.read_record(each).get("at", "") >= record["at"])]
    return [each for each in folders if processes.get_running_pid(each) is not None]


def _get_grace(seconds: float) -> float:
    return min(STOP_SECONDS, seconds / 10)


def _run_guard(folder: str, root: str, deadline: str, soft_bytes: str, max_bytes: str) -> None:
    is_alone = threading.Event()

    def watch_server() -> None:
        sys.stdin.buffer.read()
        is_alone.set()

    threading.Thread(target=watch_server, daemon=True).start()
    guard_job(Path(folder), Path(root), float(deadline), int(soft_bytes), int(max_bytes), is_alone)


if __name__ == "__main__":
    _run_guard(*sys.argv[1:])
