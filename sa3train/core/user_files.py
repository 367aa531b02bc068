"""Read files that others made: only regular ones, never more than a limit, and only from drives that answer.

A pipe, socket or device never ends or blocks for ever, and so does any access to a network drive whose server is gone.
Every reader of a folder of the user's goes through `stat_file`, `read_file` or `scan_folder`.
"""

import difflib
import errno
import functools
import os
import re
import stat
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from sa3train.core.errors import SA3Error

T = TypeVar("T")

DRIVE_TIMEOUT = 20.0
"""Seconds after which a drive counts as gone."""
IS_WINDOWS = os.name == "nt"
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[1-9¹²³]) *(\..*)?", re.IGNORECASE)

_SPECIAL = (
    (stat.S_ISDIR, "it is a folder, not a file"),
    (stat.S_ISFIFO, "it is a named pipe, not a file"),
    (stat.S_ISSOCK, "it is a socket, not a file"),
    (stat.S_ISCHR, "it is a device, not a file"),
    (stat.S_ISBLK, "it is a device, not a file"),
)


def stat_file(path: str | os.PathLike[str]) -> os.stat_result:
    """Return the state of a regular file without opening it.

    Args:
        path: The file, or a link to it.

    Returns:
        Its state.

    Raises:
        OSError: It does not exist, is a pipe, socket, device or folder, or its drive does not answer.
    """
    name = os.fspath(path)
    if "\0" in name:
        raise OSError(errno.EINVAL, "its name contains a zero byte", name)
    if not _is_answering(os.path.dirname(name) or "."):  # noqa: PTH120 (a list may have 100 000 rows)
        raise TimeoutError(errno.ETIMEDOUT, "its drive does not answer", name)
    state = os.lstat(name)
    if stat.S_ISLNK(state.st_mode):  # may lead to another drive
        state = _call_with_timeout(os.stat, name)
    for is_special, reason in _SPECIAL:
        if is_special(state.st_mode):
            raise OSError(errno.EISDIR if is_special is stat.S_ISDIR else errno.EINVAL, reason, name)
    return state


def find_special(path: str | os.PathLike[str]) -> str:
    """Tell why a path must be neither opened nor replaced.

    Args:
        path: The path.

    Returns:
        What is wrong with it, such as that it is a pipe; empty for a file, a folder and nothing at all.
    """
    if IS_WINDOWS and (problem := find_name_problem(Path(path).name)):
        return problem
    try:
        stat_file(path)
    except OSError as error:
        return error.strerror or "" if error.errno == errno.EINVAL else ""
    return ""


def find_name_problem(name: str) -> str:
    """Tell why a name is none for a file on every system. On Windows `take:1.wav` would be a part of the file `take`.

    Args:
        name: Name of a file or folder, without the path to it.

    Returns:
        What is wrong with it; empty for nothing.
    """
    if forbidden := _FORBIDDEN.search(name):
        return f"Windows allows no {forbidden[0]!r} in a name"
    if _RESERVED.fullmatch(name):
        return "Windows reserves this name for a device"
    return "on Windows no name may end in a dot or space" if name.endswith((".", " ")) else ""


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Check that every file below a folder of ours can be opened, before any of them is.

    Args:
        folder: The folder; it need not exist.

    Raises:
        SA3Error: There is a pipe, socket or device in it.
    """
    for path, _, names in os.walk(folder):
        for name in names:
            if reason := find_special(os.path.join(path, name)):  # noqa: PTH118 (a shard folder may have 100 000 files)
                raise SA3Error(f"cannot use {folder}: {name} in {path} is in the way, {reason}. Remove it.")


def check_content(path: str | os.PathLike[str]) -> None:
    """Check a file that a library will open by its path.

    Files of /proc say that they are empty, and some of them block when they are read.

    Args:
        path: The file.

    Raises:
        OSError: As for `stat_file`; or it is empty.
    """
    if stat_file(path).st_size == 0:
        raise OSError(errno.ENODATA, "it is empty", os.fspath(path))


def is_file(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry of a folder is a regular file, or a link to one.

    Args:
        entry: The entry.

    Returns:
        False for anything that is not to be opened.
    """
    if not entry.is_symlink():
        return entry.is_file(follow_symlinks=False)
    try:
        return bool(stat_file(entry.path))
    except OSError:
        return False


def read_file(path: str | os.PathLike[str], offset: int = 0, size: int = -1, limit: int | None = None) -> bytes:
    """Read a regular file, or part of it.

    Args:
        path: The file.
        offset: First byte.
        size: Number of bytes; -1 for all.
        limit: Most bytes to read; None for no limit.

    Returns:
        The bytes; fewer than `size` where the file ends.

    Raises:
        OSError: As for `stat_file`; or the file cannot be read, or has more bytes than `limit`.
    """
    length = stat_file(path).st_size
    wanted = max(0, length - offset) if size < 0 else size
    if limit is not None and wanted > limit:
        raise OSError(errno.EFBIG, f"it has {wanted} bytes; at most {limit} are read", os.fspath(path))
    if length == 0:  # files of /proc say so too, and some of them block when they are read
        return b""
    with Path(path).open("rb") as file:
        file.seek(offset)
        return file.read(wanted)


def suggest_path(path: str | os.PathLike[str]) -> str:
    """Suggest what a path that does not exist was meant to be.

    Args:
        path: The path.

    Returns:
        A sentence such as "Did you mean runs/style?"; empty where nothing beside it has a similar name.
    """
    parent = Path(path).parent
    try:
        names = [entry.name for entry in scan_folder(str(parent))[1]]
    except OSError:
        return ""
    close = difflib.get_close_matches(Path(path).name, {*names} - {Path(path).name}, n=1, cutoff=0.75)
    return f"Did you mean {parent / close[0]}?" if close else ""


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a regular file of UTF-8 text.

    Args:
        path: The file.

    Returns:
        The text.

    Raises:
        OSError: As for `read_file`.
        UnicodeDecodeError: It is not in UTF-8.
    """
    return read_file(path).decode("utf-8")


def scan_folder(path: str) -> tuple[str, list[os.DirEntry[str]]]:
    """List a folder.

    Args:
        path: The folder, or a link to it.

    Returns:
        Its real path, and its entries in order of name.

    Raises:
        OSError: It cannot be listed, or its drive does not answer.
    """
    return _call_with_timeout(_scan, path)


def _scan(path: str) -> tuple[str, list[os.DirEntry[str]]]:
    with os.scandir(path) as entries:
        return os.path.realpath(path), sorted(entries, key=lambda entry: entry.name)


@functools.lru_cache(maxsize=65536)
def _is_answering(folder: str) -> bool:
    try:
        _call_with_timeout(os.stat, folder)
    except OSError as error:
        return not isinstance(error, TimeoutError)  # that there is no such folder is an answer, too
    return True


def _call_with_timeout(function: Callable[[str], T], path: str) -> T:
    """Call in a daemon thread, which is left behind when a drive never answers and does not keep the process alive."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function(path))
        except OSError as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    try:
        return future.result(DRIVE_TIMEOUT)
    except TimeoutError as error:
        raise TimeoutError(errno.ETIMEDOUT, "its drive does not answer", path) from error
