"""Folders that appear whole or not at all."""

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from sa3train.errors import SA3Error
from sa3train.files import beside


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
