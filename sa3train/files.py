"""Files appear whole or not at all, and are known by their content."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sa3train.errors import SA3Error

PART = ".part"


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """Yield an empty folder in the folder of `target`, for what is to be renamed to `target`; it is removed at the end.

    First, what writers of `target` that were killed have left there is removed. Whoever still writes holds a lock on
    its folder, which the system lets go of however the process dies. Raises `OSError` when the folder cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name[:100]}."
    _remove_abandoned(target.parent, prefix)
    folder, lock = _locked_folder(target.parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=PART, dir=parent))
        with contextlib.suppress(FileNotFoundError):  # removed before it was locked: make another
            lock = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks: nobody can remove it either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the folders of that prefix that nobody holds; one that cannot be locked or removed stays."""
    ours = re.compile(re.escape(prefix) + "[a-z0-9_]{8}" + re.escape(PART))
    for folder in parent.iterdir():
        if not ours.fullmatch(folder.name):
            continue
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
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
