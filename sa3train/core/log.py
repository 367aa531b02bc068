"""Logging and progress bars on the main rank. The library logs; only commands print."""

import contextlib
import contextvars
import functools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

Item = TypeVar("Item")


def get_rank() -> int:
    """Get the rank of this process among those started together by torchrun or SLURM.

    Returns:
        The rank; 0 for a single process.
    """
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


class _MainRankOnly(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return get_rank() == 0 or record.levelno >= logging.ERROR


def get_logger(name: str) -> logging.Logger:
    """Get a logger that logs on rank 0 only; errors are logged on every rank.

    Args:
        name: `__name__` of the module.

    Returns:
        The logger.
    """
    logger = logging.getLogger(name)
    if not any(isinstance(existing, _MainRankOnly) for existing in logger.filters):
        logger.addFilter(_MainRankOnly())
    return logger


@contextlib.contextmanager
def silence_logger(name: str) -> Iterator[None]:
    """Show only the errors of a logger while inside.

    Args:
        name: Its name.

    Yields:
        Nothing.
    """
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Stderr(logging.Handler):
    """Writes to `sys.stderr` as it is at the time, which tests and notebooks replace."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # its terminal may be gone; that is no reason to stop
            sys.stderr.write(self.format(record) + "\n")


def set_up_logging() -> None:
    """Send sa3train's log to stderr, once. Commands call this; libraries must not."""
    logger = logging.getLogger("sa3train")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


_JSON_SECONDS = 1.0
"""Shortest time between two progress lines of one stage."""

PROGRESS_VARIABLE = "SA3TRAIN_PROGRESS"
"""Environment variable that makes a command write its progress as JSON lines where it is "json"."""

_json_progress = contextvars.ContextVar("json_progress", default=os.environ.get(PROGRESS_VARIABLE) == "json")
_hidden_progress = contextvars.ContextVar("hidden_progress", default=False)


@contextlib.contextmanager
def write_json_progress(enabled: bool = True) -> Iterator[None]:
    """Write progress as JSON lines on stdout instead of drawing bars, while inside.

    Each line is an object with the keys stage, done, total, unit and seconds; a command that reports a result writes
    it in a last line with the key result.

    Args:
        enabled: False changes nothing.

    Yields:
        Nothing.
    """
    token = _json_progress.set(enabled or _json_progress.get())
    try:
        yield
    finally:
        _json_progress.reset(token)


@contextlib.contextmanager
def hide_progress() -> Iterator[None]:
    """Show no progress while inside, where an outer stage shows its own.

    Yields:
        Nothing.
    """
    token = _hidden_progress.set(True)
    try:
        yield
    finally:
        _hidden_progress.reset(token)


@contextlib.contextmanager
def report_stage(stage: str) -> Iterator[None]:
    """Report in JSON progress what a command does while inside. Bars and the log need no stages.

    Args:
        stage: What it does, such as "validating".

    Yields:
        Nothing.
    """
    if _hidden_progress.get() or not _json_progress.get():
        yield
        return
    write_json_line(stage=stage, done=0, total=None, unit="", seconds=0.0)
    try:
        with hide_progress():
            yield
    finally:
        write_json_line(stage="", done=0, total=None, unit="", seconds=0.0)


def write_json_line(**fields: Any) -> None:
    """Write a line of JSON progress, on rank 0 only.

    Args:
        **fields: Content of the line.
    """
    if get_rank() == 0:
        sys.stdout.write(json.dumps(fields) + "\n")
        sys.stdout.flush()


def track_progress(
    items: Iterable[Item], description: str, total: int | None = None, unit: str = "it"
) -> Iterator[Item]:
    """Iterate behind a progress bar on stderr, on rank 0 and in terminals only; see also `write_json_progress`.

    Args:
        items: What to iterate.
        description: Text before the bar.
        total: Number of items; None is `len(items)` where it has one.
        unit: Name of one item.

    Yields:
        The items.
    """
    if _hidden_progress.get():
        yield from items
        return
    if _json_progress.get():
        yield from _track_as_json(items, description, total, unit)
        return
    hidden = get_rank() != 0 or not sys.stderr.isatty()
    yield from _load_tqdm()(items, desc=description, total=total, unit=unit, disable=hidden, dynamic_ncols=True)


@functools.cache
def _load_tqdm() -> Any:
    """Load tqdm with a lock of this process. Its own is shared with forks, and a fork killed with it blocks all."""
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())
    return tqdm


def _track_as_json(items: Iterable[Item], stage: str, total: int | None, unit: str) -> Iterator[Item]:
    if total is None and isinstance(items, Sized):
        total = len(items)
    started = time.monotonic()
    written, done = -_JSON_SECONDS, 0

    def write() -> None:
        write_json_line(stage=stage, done=done, total=total, unit=unit, seconds=round(time.monotonic() - started, 3))

    write()
    for item in items:
        yield item
        done += 1
        if time.monotonic() - started - written >= _JSON_SECONDS and done != total:
            written = time.monotonic() - started
            write()
    write()
