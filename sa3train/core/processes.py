"""Commands that outlive the page and the server: each in its own session, its record and log in a folder.

`process.json` says what was started, with the process ID and its start time. A process counts as the one that was
started when both agree: the system may reuse an ID for another process.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from sa3train.core.errors import SA3Error
from sa3train.core.files import write_json
from sa3train.core.log import PROGRESS_VARIABLE
from sa3train.core.signals import STOP_FILE_VARIABLE
from sa3train.core.text import get_utc_time
from sa3train.core.user_files import check_folder, read_file, stat_file

PROCESS_FILE, LOG_FILE, LOCK_FILE, STOP_FILE = "process.json", "process.log", "process.lock", "process.stop"
FILES = {PROCESS_FILE, LOG_FILE, LOCK_FILE, STOP_FILE}
TAIL_BYTES = 64_000
START_TOLERANCE = 0.005
"""Seconds; the kernel counts start times in ticks of 10 ms."""

SENDS_SIGNALS = hasattr(signal, "SIGHUP")
"""Whether a process can ask another to stop by a signal. On Windows it is asked by `STOP_FILE`: Ctrl-Break reaches only
processes of the same console, which a studio that was started again does not share."""
_PROGRESS_START = '{"stage":'
_NO_CONSOLE: int = getattr(subprocess, "CREATE_NO_WINDOW", 0)  # on Windows, which has no sessions

_children: list[subprocess.Popen[bytes]] = []
_lock = threading.Lock()


def find_program(name: str) -> str:
    """Find a console command of this environment.

    Args:
        name: Name of the command, such as `sa3-train`.

    Returns:
        Its path.

    Raises:
        SA3Error: The command is not installed.
    """
    folder = Path(sys.executable).parent
    path = shutil.which(name, path=str(folder))
    if path is None:
        raise SA3Error(f"The command {name} is not installed in {folder}. Run: pip install sa3train")
    return path


def start(folder: Path, argv: Sequence[str], **facts: Any) -> int:
    """Start a console command with its record and log in a folder.

    Args:
        folder: Folder of the process, made if needed.
        argv: The command, its name first.
        **facts: What else to record.

    Returns:
        The process ID.

    Raises:
        SA3Error: The folder's process is still running, or the command cannot be started.
    """
    command = [find_program(argv[0]), *argv[1:]]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_folder(folder)
        with FileLock(folder / LOCK_FILE), (folder / LOG_FILE).open("ab") as log:
            pid = get_running_pid(folder)
            if pid is not None:
                raise SA3Error(f"A process is already running in {folder} (PID {pid}). Wait for it or stop it.")
            record = {"command": list(argv), "at": get_utc_time(), "stop_asked": None, **facts}
            (folder / STOP_FILE).unlink(missing_ok=True)
            write_json(folder / PROCESS_FILE, record)
            log.write(f"$ {shlex.join(argv)}\n".encode())
            log.flush()
            # A session or console of its own: Ctrl-C in the terminal is for the studio.
            options: dict[str, Any] = {"start_new_session": True, "creationflags": _NO_CONSOLE}
            options["env"] = make_environment(None if SENDS_SIGNALS else folder / STOP_FILE)
            options["env"][PROGRESS_VARIABLE] = "json"
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options)
            with _lock:
                _children.append(child)
            with contextlib.suppress(psutil.NoSuchProcess):
                record |= {"pid": child.pid, "started": _get_start_time(psutil.Process(child.pid))}
                write_json(folder / PROCESS_FILE, record)
    except OSError as error:
        raise SA3Error(f"Cannot start {argv[0]} in {folder}: {error.strerror or error}.") from error
    return child.pid


def make_environment(stop_file: Path | None = None) -> dict[str, str]:
    """Make the environment of a command of ours: its output is UTF-8 everywhere.

    Args:
        stop_file: File whose existence asks the command to stop, for systems without signals.

    Returns:
        The variables.
    """
    stop = {} if stop_file is None else {STOP_FILE_VARIABLE: str(stop_file)}
    return os.environ | {"PYTHONUTF8": "1"} | stop


def record_this_process(folder: Path, **facts: Any) -> None:
    """Record this process in a folder, as `start` records another.

    Args:
        folder: Folder of the process, made if needed.
        **facts: What else to record.
    """
    record = {"command": psutil.Process().cmdline(), "at": get_utc_time(), "stop_asked": None}
    write_json(folder / PROCESS_FILE, record | describe_this_process() | facts)


def describe_this_process() -> dict[str, Any]:
    """Describe this process, so that `find_process` finds it.

    Returns:
        Its `pid` and `started`.
    """
    process = psutil.Process()
    return {"pid": process.pid, "started": _get_start_time(process)}


def get_running_pid(folder: Path) -> int | None:
    """Return the ID of the folder's process while it is running.

    Args:
        folder: Folder of the process.

    Returns:
        The process ID, or None.
    """
    process = _find_process(folder)
    return process.pid if process else None


def stop(folder: Path, *, at_once: bool = False, grace_seconds: float | None = None) -> bool:
    """Stop the folder's process, and record that it was asked to.

    Args:
        folder: Folder of the process.
        at_once: Kill the process and its children. Otherwise ask it to save and exit; its children end with it, as a
            loader's workers must not die before it.
        grace_seconds: Time after which a process that was asked, or a child that it left, is killed. None: never.

    Returns:
        Whether a process was running.
    """
    process = _find_process(folder)
    if process is None:
        return False
    write_json(folder / PROCESS_FILE, read_record(folder) | {"stop_asked": get_utc_time()})
    stop_process(process, folder / STOP_FILE, at_once=at_once, grace_seconds=grace_seconds)
    return True


def stop_process(
    process: psutil.Process, stop_file: Path | None = None, *, at_once: bool = False, grace_seconds: float | None = None
) -> None:
    """Stop a command of ours.

    Args:
        process: The process.
        stop_file: File that it watches, for systems without signals. None: it was started in a terminal.
        at_once: As for `stop`.
        grace_seconds: As for `stop`.

    Raises:
        SA3Error: It can neither be sent a signal nor does it watch a file.
    """
    with contextlib.suppress(psutil.NoSuchProcess):  # it has exited by itself meanwhile
        tree = [*process.children(recursive=True), process]
        if at_once:
            _kill(tree)
            return
        if SENDS_SIGNALS:
            process.send_signal(signal.SIGTERM)
        elif stop_file is not None:
            stop_file.touch()
        else:
            raise SA3Error(f"Process {process.pid} was started in a terminal. Stop it there with Ctrl+C.")
        if grace_seconds is not None:
            threading.Thread(target=_kill_late, args=(tree, grace_seconds), daemon=True).start()


def _kill_late(tree: Sequence[psutil.Process], grace_seconds: float) -> None:
    _kill(psutil.wait_procs(tree, timeout=grace_seconds)[1])


def _kill(tree: Sequence[psutil.Process]) -> None:
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def read_record(folder: Path) -> dict[str, Any]:
    """Read what was started in a folder.

    Args:
        folder: Folder of the process.

    Returns:
        The record: command, at, pid, started, stop_asked and the facts given to `start`; empty without one.
    """
    return read_json(folder / PROCESS_FILE)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that may be missing, or damaged.

    Args:
        path: The file.

    Returns:
        Its content; empty without a whole object.
    """
    try:
        found = json.loads(read_file(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_log_tail(folder: Path, lines: int = 30) -> str:
    """Read the end of the log of a folder's processes, without progress.

    Args:
        folder: Folder of the process.
        lines: How many lines.

    Returns:
        The last lines; empty without a log.
    """
    return "\n".join([line for line in _read_tail(folder) if not line.startswith(_PROGRESS_START)][-lines:])


def read_progress(folder: Path) -> dict[str, Any]:
    """Read the last progress of the folder's latest process.

    Args:
        folder: Folder of the process.

    Returns:
        stage, done, total, unit and seconds, as `write_json_progress` says; of one that has not said anything yet the
        stage only; empty without a process.
    """
    for line in reversed(_read_tail(folder)):
        if line.startswith(_PROGRESS_START) and line.endswith("}"):
            return dict(json.loads(line))
        if line.startswith("$ "):
            return {"stage": "loading libraries"}
    return {}


def _read_tail(folder: Path) -> list[str]:
    try:
        length = stat_file(folder / LOG_FILE).st_size
        text = read_file(folder / LOG_FILE, max(0, length - TAIL_BYTES)).decode("utf-8", "replace")
    except OSError:
        return []
    return text.splitlines()


def read_failure(folder: Path) -> str | None:
    """Read the error with which the folder's last process ended.

    Args:
        folder: Folder of the process.

    Returns:
        The text of an `error: ` line with its indented lines, or the last line of a traceback; None without one.
    """
    last: list[str] = []
    in_traceback = False
    for line in read_log_tail(folder, 400).splitlines():
        if line.startswith("$ "):
            last, in_traceback = [], False  # a new process
        elif line.startswith("error: "):
            last, in_traceback = [line.removeprefix("error: ")], False
        elif line.startswith("Traceback (most recent call last)"):
            last, in_traceback = [], True
        elif in_traceback and line and not line.startswith(" "):
            last, in_traceback = [line], False
        elif last and line.startswith("   "):
            last.append(line.strip())
    return " ".join(last) or None


def _find_process(folder: Path) -> psutil.Process | None:
    return find_process(read_record(folder))


def find_process(record: Mapping[str, Any]) -> psutil.Process | None:
    """Find a process of this computer while it is running.

    Args:
        record: Its `pid` and `started`, as `describe_this_process` returns them.

    Returns:
        The process; None when it has ended, or another has its ID.
    """
    with _lock:  # poll children that have exited, or they stay as zombies
        _children[:] = [child for child in _children if child.poll() is None]
    try:
        process = psutil.Process(int(record["pid"]))
        is_same = abs(_get_start_time(process) - float(record["started"])) < START_TOLERANCE
        is_alive = process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except (psutil.Error, KeyError, TypeError, ValueError):
        return None
    return process if is_same and is_alive else None


def _get_start_time(process: psutil.Process) -> float:
    """Return seconds that a change of the clock leaves as they are: Linux counts from boot, others note the time."""
    return process.create_time() - (psutil.boot_time() if psutil.LINUX else 0.0)
