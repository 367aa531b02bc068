"""Rank-aware logging and progress bars. The library logs; only jobs print."""

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def rank() -> int:
    """This process's rank among those started together (torchrun, SLURM), 0 when alone."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


class _MainRankOnly(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return rank() == 0 or record.levelno >= logging.ERROR


def get_logger(name: str) -> logging.Logger:
    """A logger that speaks on rank 0 only; errors come from every rank."""
    logger = logging.getLogger(name)
    if not any(isinstance(existing, _MainRankOnly) for existing in logger.filters):
        logger.addFilter(_MainRankOnly())
    return logger


class _Stderr(logging.Handler):
    """Writes to whatever `sys.stderr` is at the time, not to what it was when logging was set up."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def set_up_logging(level: int = logging.INFO) -> None:
    """Send sa3train's log lines to stderr, once. Jobs call this; libraries must not."""
    logger = logging.getLogger("sa3train")
    logger.setLevel(level)
    if not logger.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def progress(items: Iterable[Item], description: str, total: int | None = None, unit: str = "it") -> Iterator[Item]:
    """Iterate `items` behind a progress bar on stderr (rank 0, terminals only)."""
    from tqdm import tqdm

    hidden = rank() != 0 or not sys.stderr.isatty()
    yield from tqdm(items, desc=description, total=total, unit=unit, disable=hidden, dynamic_ncols=True)
