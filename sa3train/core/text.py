"""Wording of numbers and lists in messages and tables."""

import math
import os
import shlex
import subprocess
from collections.abc import Sequence


def format_number(value: float | None) -> str:
    """Format a number with four significant digits.

    Args:
        value: Number, or None for none.

    Returns:
        The number as text; "-" for None.
    """
    return "-" if value is None else f"{value:.4g}"


def format_range(values: Sequence[float]) -> str:
    """Format the range of some numbers.

    Args:
        values: One number or more.

    Returns:
        "8" where all are equal, else "4 to 16".
    """
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def shorten(text: str, limit: int = 80) -> str:
    """Shorten text that may be long, for a message.

    Args:
        text: Any text.
        limit: Most characters to keep.

    Returns:
        The text, or its start and an ellipsis.
    """
    return text if len(text) <= limit else f"{text[:limit]}…"


def list_few(names: Sequence[str], count: int = 2) -> str:
    """List the first names of many.

    Args:
        names: All names.
        count: Names to write out.

    Returns:
        Such as "a, b and 5 more"; empty for no names.
    """
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def format_command(argv: Sequence[str | os.PathLike[str]]) -> str:
    """Format a command so that it can be pasted into a shell of this system.

    Args:
        argv: The command, its name first.

    Returns:
        The command: quoted for cmd.exe on Windows, else for a POSIX shell.
    """
    words = [os.fspath(word) for word in argv]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def compute_relative_norm(change: float, whole: float) -> float:
    """Compute the norm of a change relative to the norm of what it changes.

    Args:
        change: Squared norm of the change.
        whole: Squared norm of the whole.

    Returns:
        `sqrt(change / whole)`. With nothing to change it is 0 for no change and infinite otherwise.
    """
    if whole <= 0:
        return 0.0 if change == 0 else math.inf
    return math.sqrt(change / whole)
