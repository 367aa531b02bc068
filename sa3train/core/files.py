"""Files appear whole or not at all, and are known by their content.

Folders that appear whole or not at all.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3train.core.errors import SA3Error

if TYPE_CHECKING:
    from torch import Tensor

PART = ".part"
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
_ABANDONED = re.compile(rf"\..*\.{_HOST}-[a-z0-9_]{{8}}{re.escape(PART)}")
_SWEPT: set[Path] = set()
"""Folders whose abandoned parts this process has removed."""


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """Yield an empty folder in the folder of `target`, for what is to be renamed to `target`; it is removed at the end.

    What writers that were killed have left in the folder of `target` is removed when a process first comes there.
    Whoever still writes holds a lock on its part, which the system lets go of however the process dies. Network file
    systems may keep such locks on each host alone, so parts carry their host's name, and other hosts' are left alone.
    Raises `OSError` when the folder cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent.absolute()
    if folder not in _SWEPT:
        _SWEPT.add(folder)
        _remove_abandoned(folder)
    part, lock = _locked_part(target)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(lock)


def _locked_part(target: Path) -> tuple[Path, int]:
    while True:
        part = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.{_HOST}-", suffix=PART, dir=target.parent))
        with contextlib.suppress(FileNotFoundError):  # removed before it was locked: make another
            lock = os.open(part, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks: nobody can remove it either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if part.exists():
                return part, lock
            os.close(lock)


def _remove_abandoned(folder: Path) -> None:
    """Remove this host's parts that nobody holds; one that cannot be locked or removed stays."""
    parts: list[str] = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:  # one may write where one may not look
        parts = [entry.path for entry in entries if _ABANDONED.fullmatch(entry.name)]
    for part in parts:
        with contextlib.suppress(OSError):
            lock = os.open(part, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(part)
            finally:
                os.close(lock)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path near `path`; on success it is fsynced and renamed to `path`, on failure removed.

    Raises `SA3Error` when the folder cannot be written or the disk is full, naming the folder and the remedy.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        with beside(target) as folder:
            temporary = folder / target.name  # alone in a folder: some writers put a file of their own beside it
            temporary.touch()
            yield temporary
            temporary.chmod(0o666 & ~_umask())  # some writers leave files that only their owner may read
            _fsync(temporary)
            temporary.replace(target)
            _fsync(target.parent)
    except OSError as error:
        own = {str(target), str(temporary), *map(str, (temporary or target).parents)}
        begun = temporary is not None  # before that, nothing of the caller's has run
        if begun and (error.errno is None or str(error.filename or target) not in own):
            raise  # not about this file: the caller's own reading failed
        raise SA3Error(
            f"cannot write {target}: {error.strerror or error}. Nothing was left behind; "
            f"free some space or choose a folder you may write to, then run again."
        ) from error


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_tensors(
    path: str | os.PathLike[str], tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically, names in order. Raises `SA3Error` as `atomic_path` does."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        try:
            save_file(dict(sorted(tensors.items())), temporary, dict(sorted((metadata or {}).items())) or None)
        except SafetensorError as error:  # the system's refusals come as text
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(temporary)) from error


def write_text(path: str | os.PathLike[str], content: str) -> None:
    """Write UTF-8 `content` to `path` atomically."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write `content` as indented UTF-8 JSON to `path` atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_dir() -> Path:
    """Where what can be made again is kept: `$SA3TRAIN_CACHE`, else `~/.cache/sa3train`."""
    return Path(os.environ.get("SA3TRAIN_CACHE") or Path.home() / ".cache" / "sa3train")


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it takes the place of `path`, on failure it is removed.

    A folder already at `path` is replaced when it is empty or `is_ours` says that it is of the same sort. Raises
    `SA3Error` for any other file or folder there, and when nothing can be written.
    """
    target = Path(path)
    _put_back(target)
    if target.exists() and not (target.is_dir() and (is_ours(target) or not any(target.iterdir()))):
        raise SA3Error(f"{target} exists and holds something else. Give another name, or move it away first.")
    try:
        with beside(target) as workplace:
            aside = workplace / target.name
            aside.mkdir()
            yield aside
            _put(aside, target)
    except OSError as error:
        raise SA3Error(
            f"cannot write {target}: {error.strerror or error}. Nothing was left behind; free some space or choose a "
            f"folder you may write to, then run again."
        ) from error


def _put_back(target: Path) -> None:
    """Put back what was there before a writer that was killed between its two renames."""
    if not target.exists() and target.parent.is_dir():
        for earlier in target.parent.glob(f".{glob.escape(target.name[:100])}.????????.old"):
            with contextlib.suppress(OSError):
                earlier.rename(target)
            return


def _put(aside: Path, target: Path) -> None:
    """Rename `aside` to `target`; what was there is put back when that fails."""
    if not target.exists():
        aside.rename(target)
        return
    earlier = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", suffix=".old", dir=target.parent))
    target.rename(earlier)  # onto an empty folder, which POSIX replaces
    try:
        aside.rename(target)
    except OSError:
        earlier.rename(target)
        raise
    shutil.rmtree(earlier, ignore_errors=True)
