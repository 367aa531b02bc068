"""Several processes on one output folder: who is who, one run at a time, and one set of settings."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa3train.core.errors import DataError
from sa3train.core.files import write_json

WORK = ".encode"
_SETTINGS = "settings.json"


def _alone() -> None:
    """Nobody to wait for."""


@dataclass(frozen=True)
class Workers:
    """This process among those that share the work; `wait` returns once all of them have called it."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = _alone

    @property
    def first(self) -> bool:
        """Whether this process does what is to be done once."""
        return self.rank == 0


def work_folder(folder: Path) -> Path:
    """Where an encode keeps its journals."""
    return folder / WORK


@contextmanager
def claim(folder: Path, workers: Workers) -> Iterator[None]:
    """Hold the output folder for one run; the system lets go of it when the process dies, however it dies.

    Raises `DataError` when another run holds it, or the folder cannot be made.
    """
    if not workers.first:
        yield
        return
    try:
        work_folder(folder).mkdir(parents=True, exist_ok=True)
        handle = os.open(work_folder(folder) / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise DataError(
            f"cannot write to {folder}: {error.strerror or error}. Choose an output folder that you may write to."
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise DataError(f"another encode is writing to {folder}: wait for it, or choose another folder.") from error
    finally:
        os.close(handle)


def settle(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Record what this folder's latents are made from and with. Raises `DataError` when it already holds latents made
    otherwise, naming each difference, unless `overwrite`.
    """
    path = work_folder(folder) / _SETTINGS
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
                f"{folder} holds latents made otherwise: {'; '.join(changed)}. Choose another out=DIR, or replace them "
                f"with overwrite=true."
            )
    write_json(path, dict(settings))
