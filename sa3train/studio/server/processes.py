"""Commands that outlive the page and the server: each in a session of its own, its record and log in a folder.

`process.json` says what is about to be started. The new process itself leaves `process.stat`, the kernel's line about
it, before it becomes the command, so a server killed at any moment loses nothing. A process counts as the one that was
started when its number, its start time and the boot agree: a number used again is somebody else.
"""

import contextlib
import datetime
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sa3train.core.errors import SA3Error
from sa3train.core.files import write_json

RECORD, STAT, LOG, LOCK = "process.json", "process.stat", "process.log", "process.lock"

PROC = Path("/proc")
LEAVE_STAT = 'cat "/proc/$$/stat" > "$0.part" && mv "$0.part" "$0" && exec "$@"'
"""What the shell does with the place of `process.stat` as $0 and the command as its arguments."""

STARTING_SECONDS = 10.0
TAIL_BYTES = 64_000

_children: list[subprocess.Popen[bytes]] = []
_lock = threading.Lock()


def program(name: str) -> str:
    """The console command `name` of this environment. Raises `SA3Error` when it is not installed."""
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise SA3Error(f"the command {name} is not installed beside {sys.executable}: pip install sa3train")
    return str(path)


def start(folder: Path, argv: Sequence[str], **about: Any) -> int:
    """Start a console command with its record and log in `folder`, and give its process number.

    `about` goes into the record. Raises `SA3Error` when the folder's process still runs or cannot be started.
    """
    command = [program(argv[0]), *argv[1:]]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _held(folder), (folder / LOG).open("ab") as log:
            pid = running(folder)
            if pid is not None:
                raise SA3Error(f"{folder} has a process at work already (number {pid}): wait for it, or stop it.")
            (folder / STAT).unlink(missing_ok=True)
            record = {"command": list(argv), "at": _now(), "boot": _boot(), "stop_asked": None, **about}
            write_json(folder / RECORD, record)
            log.write(f"$ {shlex.join(argv)}\n".encode())
            log.flush()
            child = subprocess.Popen(
                ["/bin/sh", "-c", LEAVE_STAT, str(folder / STAT), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            with _lock:
                _children.append(child)
            _await_stat(folder, child)
    except OSError as error:
        raise SA3Error(f"cannot start {argv[0]} in {folder}: {error.strerror or error}.") from error
    return child.pid


def running(folder: Path) -> int | None:
    """The number of the folder's process while it runs, else None."""
    _reap()
    try:
        then = _parse((folder / STAT).read_text(encoding="utf-8", errors="replace"))
        now = _parse((PROC / str(then[0]) / "stat").read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, IndexError):
        return None
    alive = now[1] not in "ZXx" and now[2] == then[2] and record_of(folder).get("boot") == _boot()
    return then[0] if alive else None


def stop(folder: Path, *, at_once: bool = False) -> bool:
    """Ask the folder's process to save and end (SIGTERM), or end it and its helpers `at_once` (SIGKILL).

    Returns whether there was one. The record notes that it was asked.
    """
    pid = running(folder)
    if pid is None:
        return False
    write_json(folder / RECORD, record_of(folder) | {"stop_asked": _now()})
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself meanwhile
        if at_once:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGTERM)
    return True


def record_of(folder: Path) -> dict[str, Any]:
    """What was started in `folder`: command, at, boot, stop_asked and what else was noted; empty when nothing was."""
    try:
        found: Mapping[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(found) if isinstance(found, dict) else {}


def log_tail(folder: Path, lines: int = 30) -> str:
    """The last lines that the folder's processes have written."""
    try:
        with (folder / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def failure(folder: Path) -> str | None:
    """The error with which the folder's last process ended, as it said it or as Python did, or None."""
    last: list[str] = []
    traced = False
    for line in log_tail(folder, 400).splitlines():
        if line.startswith("$ "):
            last, traced = [], False  # a new process
        elif line.startswith("error: "):
            last, traced = [line.removeprefix("error: ")], False
        elif line.startswith("Traceback (most recent call last)"):
            last, traced = [], True
        elif traced and line and not line.startswith(" "):
            last, traced = [line], False
        elif last and line.startswith("   "):
            last.append(line.strip())
    return " ".join(last) or None


def _parse(line: str) -> tuple[int, str, str]:
    """Number, state and start time (ticks since boot) from a line of `/proc/PID/stat`; its name may hold anything."""
    number, _, rest = line.partition(" (")
    fields = rest[rest.rindex(")") + 2 :].split()
    return int(number), fields[0], fields[19]


def _boot() -> str:
    """What names this boot of the machine: start times are counted from it."""
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """One start at a time in a folder, over threads and servers."""
    with (folder / LOCK).open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _await_stat(folder: Path, child: subprocess.Popen[bytes]) -> None:
    """Until the new process has said who it is, or is gone."""
    until = time.monotonic() + STARTING_SECONDS
    while not (folder / STAT).exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.01)


def _reap() -> None:
    """Let go of own children that have ended, so that they do not stay as zombies."""
    with _lock:
        _children[:] = [child for child in _children if child.poll() is None]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
