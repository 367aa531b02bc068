"""Several processes on one output folder: who is who, one run at a time, and one set of settings."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sa3train.core.errors import DataError
from sa3train.core.files import write_json
from sa3train.core.user_files import check_folder, read_file

MARKS = {
    "README.md": b"# Latents of ",
    "audit.html": b"<title>Audit of ",
    "audit.json": b'{"clips": [',
    "index.json": b'"format": "sa3train-',
}
"""Files of an output folder that are replaced, and what their first 300 bytes contain."""


@dataclass(frozen=True)
class Workers:
    """This process among those that share the work.

    Attributes:
        rank: Number of this process.
        world_size: Number of processes.
        wait: Returns once all processes have called it.
    """

    rank: int = 0
    world_size: int = 1
    wait: Callable[[], None] = lambda: None

    @property
    def is_main(self) -> bool:
        """Whether this process does what must be done once."""
        return self.rank == 0


def get_work_dir(folder: Path) -> Path:
    """Get the folder of an encode's journals.

    Args:
        folder: Output folder.

    Returns:
        A hidden folder inside it.
    """
    return folder / ".encode"


@contextmanager
def lock_output_dir(folder: Path, workers: Workers) -> Iterator[None]:
    """Lock the output folder for one run; the system releases the lock however the process ends.

    Args:
        folder: Output folder; created if needed.
        workers: This process; only the main one locks.

    Yields:
        Nothing.

    Raises:
        DataError: When another run holds the lock, or the folder cannot be written or holds files of those names that
            sa3train did not write.
    """
    if not workers.is_main:
        yield
        return
    check_folder(folder)
    for name, mark in MARKS.items():
        with suppress(OSError):
            if mark not in read_file(folder / name, size=300):
                raise DataError(f"{folder / name} is not of sa3train and would be replaced. Choose another folder.")
    lock = FileLock(get_work_dir(folder) / "lock", timeout=0)
    try:
        get_work_dir(folder).mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise DataError(f"another encode is writing to {folder}: wait for it, or choose another folder.") from error
    except OSError as error:
        raise DataError(
            f"cannot write to {folder}: {error.strerror or error}. Choose an output folder that you may write to."
        ) from error
    try:
        yield
    finally:
        lock.release()


def record_settings(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Record what the latents in a folder are made from and with.

    Args:
        folder: Output folder.
        settings: Everything that the latents depend on, as JSON.
        overwrite: Replace latents made with other settings.

    Raises:
        DataError: When the folder already contains latents made with other settings, listing the differences.
    """
    path = get_work_dir(folder) / "settings.json"
    if path.is_file() and not overwrite and any(folder.glob("*.tar*")):
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise DataError(f"{path} is damaged ({error}): run again with overwrite=true.") from error
        changed = [
            f"{name} was {before.get(name)!r}, now {settings[name]!r}"
            for name in settings
            if before.get(name) != settings[name]
        ]
        if changed:
            raise DataError(
                f"{folder} contains latents made with other settings: {'; '.join(changed)}. Choose another out=DIR, or "
                f"replace them with overwrite=true."
            )
    write_json(path, dict(settings))
