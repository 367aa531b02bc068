"""On the path of a child process: this package's own modules find what Windows has, and nothing more.

The standard library and other packages keep what they need. Modules of sa3train see another `os` and `signal`, cannot
import what only POSIX has, and read nothing of `/proc`. Their `Path` takes backslashes, and `C:` is the folder
`SA3TRAIN_TEST_WORK`. Processes are spawned, never forked. In that folder a file that this process has open can be
neither replaced nor removed, whoever asks, and no folder with such a file. While a file whose name begins with
`SA3TRAIN_TEST_HELD` is put in its place, the process waits until it has been asked to stop, if it can be.
"""

# What pathlib does is what is watched here.
# ruff: noqa: PTH112, PTH118, PTH123, PTH208

import builtins
import importlib.machinery
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
import types
from typing import Any

MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "posix", "syslog"}
OF_OS = {
    "fork", "forkpty", "killpg", "setsid", "getuid", "geteuid", "getgid", "getpgid", "mkfifo", "mknod", "chown",
    "pread", "sched_getaffinity", "sched_setaffinity", "getloadavg", "statvfs", "uname", "sysconf", "register_at_fork",
    "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "WIFSIGNALED",
}  # fmt: skip
OF_SIGNAL = {
    "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGCHLD", "SIGPIPE", "pthread_sigmask", "sigtimedwait",
    "sigwait", "SIG_BLOCK", "SIG_UNBLOCK", "SIG_SETMASK", "alarm", "setitimer", "pause", "siginterrupt",
}  # fmt: skip


class _Without(types.ModuleType):
    """A module without some of its names."""

    def __init__(self, module: types.ModuleType, gone: set[str], **instead: Any) -> None:
        super().__init__(module.__name__)
        self._module, self._gone = module, gone
        vars(self).update(instead)

    def __getattr__(self, name: str) -> Any:
        if name in self._gone:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on Windows")
        return getattr(self._module, name)


def _open(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", os.fspath(path))
    return os.open(path, flags, *arguments, **options)


def _symlink(source: Any, target: Any, *_: Any, **__: Any) -> None:
    raise OSError(22, "A required privilege is not held by the client", os.fspath(source), 1314, os.fspath(target))


def _convert(part: Any) -> Any:
    text = os.fspath(part).replace("\\", "/")
    return os.path.join(WORK, text[2:].lstrip("/")) if text[:2].upper() == "C:" else text


class _Path(type(pathlib.Path())):  # type: ignore[misc]
    """A path in the words of Windows, of a file here."""

    if sys.version_info < (3, 12):

        def __new__(cls, *parts: Any) -> Any:
            return super().__new__(cls, *map(_convert, parts))

        def __truediv__(self, part: Any) -> Any:
            return super().__truediv__(_convert(part))

    else:

        def __init__(self, *parts: Any) -> None:
            super().__init__(*map(_convert, parts))


INSTEAD = {
    "pathlib": _Without(pathlib, set(), Path=_Path),
    "os": _Without(os, OF_OS, name="nt", open=_open, symlink=_symlink),
    "signal": _Without(signal, OF_SIGNAL),
}


def _import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    if level == 0 and name.partition(".")[0] in MODULES:
        raise ModuleNotFoundError(f"No module named {name!r} on Windows", name=name)
    module = builtins.__import__(name, globals, locals, fromlist, level)
    return INSTEAD.get(name.partition(".")[0], module) if level == 0 and (not fromlist or name in INSTEAD) else module


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__["__builtins__"] = vars(builtins) | {"__import__": _import}
        super().exec_module(module)


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] != "sa3train":
            return None
        for finder in sys.meta_path:
            spec = None if finder is _Finder else finder.find_spec(name, path, target)  # type: ignore[attr-defined]
            if spec is not None:
                if isinstance(spec.loader, importlib.machinery.SourceFileLoader):
                    spec.loader.__class__ = _Loader
                return spec
        return None


def _list_open_files() -> set[str]:
    descriptors = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        mapped = {line.split(maxsplit=5)[5].rstrip("\n") for line in file if line.count(" /")}
    return {os.path.realpath(path) for path in descriptors if not os.path.isdir(path)} | mapped


def _refuse_open_files(path: Any, folder: int = -1) -> None:
    text = os.fsdecode(path)
    if isinstance(folder, int) and folder >= 0:
        text = os.path.join(os.path.realpath(f"/proc/self/fd/{folder}"), text)
    text = os.path.realpath(text)
    if not text.startswith(WORK + os.sep):
        return
    for busy in _list_open_files():
        if busy == text or busy.startswith(text + os.sep):
            error = PermissionError(13, f"The process cannot access the file: {busy} is open", text)
            error.winerror = 32  # type: ignore[attr-defined]
            raise error


def _is_ours(depth: int = 2) -> bool:
    frame: types.FrameType | None = sys._getframe(depth)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name not in ("pathlib", "pathlib._local", "io", "os"):
            return bool(name.partition(".")[0] == "sa3train")
        frame = frame.f_back
    return False


def _waits_for_stop() -> bool:
    return any("_wait_for_file" in thread.name for thread in threading.enumerate())


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and str(arguments[0]).startswith("/proc/") and _is_ours():
        raise FileNotFoundError(2, "No such file or directory", str(arguments[0]))
    if event == "os.rename":
        while HELD and pathlib.Path(arguments[1]).name.startswith(HELD) and _waits_for_stop():
            time.sleep(0.05)
        _refuse_open_files(arguments[0], arguments[2])
        _refuse_open_files(arguments[1], arguments[3])
    elif event == "os.remove":
        _refuse_open_files(arguments[0], arguments[1])


WORK = os.path.realpath(os.environ["SA3TRAIN_TEST_WORK"])
HELD = os.environ.get("SA3TRAIN_TEST_HELD", "")
sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
sys.addaudithook(_audit)
multiprocessing.set_start_method("spawn")
