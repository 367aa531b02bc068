"""Atomic writing of files and folders, content hashes, and the folders of cache and configuration."""

import contextlib
import errno
import glob
import hashlib
import itertools
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3train.core.errors import DataError, SA3Error
from sa3train.core.mapped import iterate_bytes
from sa3train.core.text import shorten
from sa3train.core.user_files import find_special, stat_file, suggest_path

if TYPE_CHECKING:
    from filelock import FileLock

MADE_BY = "sa3train"
"""Value of `made_by` in a sidecar."""
FOLDER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "model_config.json",
                "model.safetensors")  # fmt: skip
"""What is read from the folder of an adapter or model."""
RECORD_FILE, ADAPTER_FILE = "run.json", "adapter.safetensors"
"""What makes a folder a run's, and what is read from it as its adapter."""
_PART = ".part"
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
_ABANDONED = re.compile(rf"\..*\.{_HOST}-[a-z0-9_]{{8}}{re.escape(_PART)}")
_LOCK = f".{_HOST}.lock"
BUSY_SECONDS = 5.0
"""How long a file that another program has open is waited for."""
_BUSY = (5, 32, 33)
"""What Windows says of such a file: access denied, sharing violation, lock violation."""
_SWEPT: set[Path] = set()
"""Folders in which this process has looked for abandoned staging folders."""


@contextlib.contextmanager
def create_staging_dir(target: Path) -> Iterator[Path]:
    """Create an empty staging folder beside `target` and remove it at the end.

    What is built in it is renamed to `target`, which is atomic within one file system. Staging folders that killed
    writers left are removed when a process first writes to a folder. A writer holds a lock on its own, which the system
    releases however the process dies. Network file systems may keep such locks per host, so the names contain that of
    the host, and those of other hosts are left alone.

    Args:
        target: File or folder that is to be replaced.

    Yields:
        The staging folder. `OSError` is raised when it cannot be made.
    """
    if reason := find_special(target):
        raise OSError(errno.EINVAL, reason, str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent.absolute()
    if folder not in _SWEPT:
        _SWEPT.add(folder)
        _remove_abandoned(folder)
    part, lock = _create_locked_part(target)
    try:
        yield part
    finally:
        _remove_part(part, lock)


def _create_locked_part(target: Path) -> tuple[Path, "FileLock"]:
    from filelock import FileLock  # here, since most commands that only read would wait for it

    while True:
        part = target.parent / f".{target.name[:100]}.{_HOST}-{secrets.token_hex(4)}{_PART}"
        part.mkdir()
        lock = FileLock(part / _LOCK, thread_local=False)
        with contextlib.suppress(FileNotFoundError):  # removed before it was locked: make another
            try:
                lock.acquire()
            except (OSError, NotImplementedError):  # a file system without locks: nobody can remove it either
                part.stat()
            if part.exists():
                return part, lock


def _remove_abandoned(folder: Path) -> None:
    """Remove staging folders of this host that nobody locks. What cannot be locked or removed stays."""
    from filelock import FileLock

    parts: list[Path] = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:  # one may write where one may not look
        parts = [
            Path(each.path)
            for each in entries
            if _ABANDONED.fullmatch(each.name) and each.is_dir(follow_symlinks=False)
        ]
    for part in parts:
        lock = FileLock(part / _LOCK, thread_local=False)
        with contextlib.suppress(OSError, NotImplementedError):
            lock.acquire(blocking=False)
            _remove_part(part, lock)


def _remove_part(part: Path, lock: "FileLock") -> None:
    """Remove a staging folder and release its lock. Windows removes the locked file, and so the folder, only then."""
    shutil.rmtree(part, ignore_errors=True)
    lock.release()
    with contextlib.suppress(OSError):
        (part / _LOCK).unlink()
        part.rmdir()


def replace_path(source: Path, target: Path) -> None:
    """Rename a file over another, or a folder to a free name.

    Windows refuses while another program, such as a virus scanner, has one of them open: then it is tried again.

    Args:
        source: What is renamed.
        target: Its new name, in the same file system.

    Raises:
        OSError: It cannot be renamed, also not within `BUSY_SECONDS`.
    """
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            source.replace(target)
            return
        except PermissionError as error:
            if getattr(error, "winerror", None) not in _BUSY or time.monotonic() > end:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Replace a file atomically: write to a temporary path, which is renamed on success and removed on failure.

    Args:
        path: File to create or replace.

    Yields:
        The temporary path to write to; it exists and is empty.

    Raises:
        SA3Error: The folder cannot be written or the disk is full.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        with create_staging_dir(target) as folder:
            temporary = folder / target.name  # alone in a folder, since some writers create a file of their own there
            temporary.touch()
            yield temporary
            temporary.chmod(0o666 & ~_get_umask())  # some writers make files that only their owner may read
            _fsync(temporary)
            replace_path(temporary, target)
            _fsync_folder(target.parent)
    except OSError as error:
        own = {str(target), str(temporary), *map(str, (temporary or target).parents)}
        has_begun = temporary is not None  # before that, no code of the caller has run
        if has_begun and (error.errno is None or str(error.filename or target) not in own):
            raise  # not about this file: something that the caller does failed
        raise _explain_unwritable(target, error) from error


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write bytes to a file atomically.

    Args:
        path: File to create or replace.
        content: Its content.
    """
    with replace_file(path) as temporary:
        _write(temporary, content)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.writelines(iterate_bytes(content))


def write_text(path: str | os.PathLike[str], content: str) -> None:
    """Write text to a file atomically, in UTF-8.

    Args:
        path: File to create or replace.
        content: Its content.
    """
    write_bytes(path, content.encode("utf-8"))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write indented UTF-8 JSON to a file atomically.

    Args:
        path: File to create or replace.
        content: Value that JSON can hold. NaN and infinity raise `ValueError`.
    """
    write_bytes(path, format_json(content))


def write_new(path: Path, content: bytes) -> Path:
    """Write bytes to a file, or to the next free number of its name.

    Args:
        path: The file.
        content: Its content.

    Returns:
        The file that was written.
    """
    return write_files(lambda number: [number_path(path, number)], lambda _: [content], overwrite=False)[0]


def format_json(content: Any) -> bytes:
    """Format a value as indented UTF-8 JSON.

    Args:
        content: Value that JSON can hold. NaN and infinity raise `ValueError`.

    Returns:
        The JSON, with a line feed at its end.
    """
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def path_exists(path: str | os.PathLike[str]) -> bool:
    """Check whether a path leads to something; one that is too long, or may not be looked at, leads nowhere.

    Args:
        path: The path.

    Returns:
        Whether there is a file or folder.
    """
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def check_exists(path: str, what: str) -> None:
    """Check that a path leads to something, before slow imports; a URL is left to whoever opens it.

    Args:
        path: The path.
        what: What to give, for the message.

    Raises:
        DataError: It does not.
    """
    if "://" not in path and not path_exists(path):
        raise DataError(f"cannot open {shorten(path)} (it does not exist). {suggest_path(path) or f'Give {what}.'}")


def relate_path(path: str | os.PathLike[str], folder: str | os.PathLike[str] = ".") -> str:
    """Describe a path as seen from a folder.

    Args:
        path: The path.
        folder: The folder, the working directory by default.

    Returns:
        The way from the folder, such as "../..", which stays right when both are moved together; on another drive the
        absolute path.
    """
    try:
        return os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    except ValueError:
        return os.path.realpath(path)


def check_target(target: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]], overwrite: bool) -> None:
    """Check that a file or folder may be written, before the work that makes it.

    Args:
        target: File or folder to write.
        inputs: Files, and folders of adapters or models, that are read; none of them may be replaced, whatever name or
            link leads to it.
        overwrite: Whether it may replace something else.

    Raises:
        SA3Error: It is an input, lies in the way of one, or exists already.
    """
    for source in map(Path, inputs):
        holds = os.path.realpath(source).startswith(os.path.realpath(target) + os.sep)
        names = (*FOLDER_FILES, *([ADAPTER_FILE] if path_exists(source / RECORD_FILE) else []))
        if holds or any(_is_same(Path(target), each) for each in (source, *map(source.joinpath, names))):
            raise SA3Error(f"cannot write {target}: that would replace the input {source}. Choose another name.")
    if reason := find_special(target):
        raise SA3Error(f"cannot write {target}: {reason}. Choose another name.")
    if not overwrite and os.path.lexists(target):
        raise SA3Error(f"{target} exists already. Choose another name, or replace it with overwrite=True.")


def _is_same(first: Path, second: Path) -> bool:
    try:
        return first.samefile(second)
    except (OSError, ValueError):  # one of them does not exist
        return False


def is_sidecar(content: Any) -> bool:
    """Check whether a JSON value is the sidecar of generated audio.

    Args:
        content: The value.

    Returns:
        Whether it says that sa3train made it.
    """
    return isinstance(content, dict) and content.get("made_by") == MADE_BY


def number_path(path: Path, number: int) -> Path:
    """Add a number to a path that is to be written beside others of its name.

    Args:
        path: The path asked for.
        number: 1 for the path itself.

    Returns:
        Such as `NAME-2.wav` for 2.
    """
    return path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def write_files(
    list_paths: Callable[[int], Sequence[Path]],
    make_contents: Callable[[Sequence[Path]], Sequence[bytes]],
    overwrite: bool,
) -> Sequence[Path]:
    """Write files that belong together: all of them or none, and under the first number at which none of them exists.

    Two processes that write at the same time get different numbers.

    Args:
        list_paths: Lists their paths by number, from 1.
        make_contents: Makes their contents for these paths.
        overwrite: Whether to replace those of number 1 instead.

    Returns:
        The paths.

    Raises:
        SA3Error: The folder cannot be written or the disk is full.
    """
    for number in itertools.count(1):
        paths = list_paths(number)
        if not overwrite and any(map(os.path.lexists, paths)):
            continue
        try:
            with create_staging_dir(paths[0]) as folder, contextlib.ExitStack() as undo:
                parts = [folder / path.name for path in paths]
                for part, content in zip(parts, make_contents(paths), strict=True):
                    _write(part, content)
                    _fsync(part)
                try:
                    for path in () if overwrite else paths:
                        path.touch(exist_ok=False)
                        undo.callback(path.unlink, missing_ok=True)
                except FileExistsError:  # another process has just taken the number
                    continue
                for part, path in zip(parts, paths, strict=True):
                    replace_path(part, path)
                undo.pop_all()
                _fsync_folder(paths[0].parent)
                return paths
        except OSError as error:
            raise _explain_unwritable(paths[0], error) from error
    raise AssertionError("numbers do not end")


def hash_file(path: str | os.PathLike[str]) -> str:
    """Hash the bytes of a file.

    Args:
        path: File.

    Returns:
        Hex SHA-256.
    """
    stat_file(path)
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _get_umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _fsync(path: Path) -> None:
    with path.open("r+b") as file:  # Windows flushes only what it may write
        os.fsync(file)


def _fsync_folder(folder: Path) -> None:
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def get_config_dir() -> Path:
    """Get the folder of the Hydra configuration that belongs to this copy of the package.

    A checkout that is found by `PYTHONPATH` alone has it beside the package, an installed package inside. It is not
    imported as `sa3train.conf`: that would find the one of another, editable installation.

    Returns:
        The folder that holds `train.yaml` and `encode.yaml`.
    """
    package = Path(__file__).parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def get_cache_dir() -> Path:
    """Get the folder of files that can be made again.

    Returns:
        `$SA3TRAIN_CACHE`, else `~/.cache/sa3train`.
    """
    return Path(os.environ.get("SA3TRAIN_CACHE") or Path.home() / ".cache" / "sa3train")


@contextlib.contextmanager
def replace_folder(path: str | os.PathLike[str], is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Replace a folder atomically: fill a new one, which takes its place on success and is removed on failure.

    Args:
        path: Folder to create, or to replace where it is empty or `is_ours`.
        is_ours: Tells whether an existing folder is of the same kind, so that it may be replaced.

    Yields:
        The folder to fill.

    Raises:
        SA3Error: Something else is at `path`, or nothing can be written.
    """
    target = Path(path)
    _restore_interrupted(target)
    if target.exists() and not (target.is_dir() and (is_ours(target) or not any(target.iterdir()))):
        raise SA3Error(f"{target} exists and is something else. Choose another name, or move it away first.")
    try:
        with create_staging_dir(target) as folder:
            staged = folder / target.name
            staged.mkdir()
            yield staged
            _swap_in(staged, target)
    except OSError as error:
        raise _explain_unwritable(target, error) from error


def _explain_unwritable(target: Path, error: OSError) -> SA3Error:
    if error.errno == errno.EINVAL:
        return SA3Error(f"cannot write {target}: {error.strerror}. Choose another name.")
    is_busy = getattr(error, "winerror", None) in _BUSY
    advice = "Close the program that has it open" if is_busy else "Free disk space"
    return SA3Error(
        f"cannot write {target}: {error.strerror or error}. Nothing was left behind. {advice} or choose a "
        f"folder you may write to, then run again."
    )


def _restore_interrupted(target: Path) -> None:
    """Put back what a writer that was killed between its two renames had moved away."""
    if not target.exists() and target.parent.is_dir():
        for earlier in target.parent.glob(f".{glob.escape(target.name[:100])}.????????.old"):
            with contextlib.suppress(OSError):
                earlier.rename(target)
            return


def _swap_in(staged: Path, target: Path) -> None:
    """Rename `staged` to `target`; on failure what was there is put back."""
    earlier = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.old")
    if target.exists():
        replace_path(target, earlier)
    try:
        replace_path(staged, target)
    except OSError:
        if earlier.exists():
            earlier.rename(target)
        raise
    shutil.rmtree(earlier, ignore_errors=True)
