"""Wording of numbers and lists in messages and tables."""

import datetime
import difflib
import math
import os
import shlex
import subprocess
from collections.abc import Collection, Iterable, Sequence


def format_number(value: float | None) -> str:
    """Format a number with four significant digits.

    Args:
        value: Number, or None for none.

    Returns:
        The number as text; "-" for None.
    """
    return "-" if value is None else f"{value:.4g}"


def format_share(value: float) -> str:
    """Format a share as a percentage with three significant digits, so that a small one does not look like none.

    Args:
        value: The share, 1 for all.

    Returns:
        Such as "13.9%", "0.0412%" or "0%".
    """
    percent = 100 * value
    digits = 2 - math.floor(math.log10(abs(percent))) if percent and math.isfinite(percent) else 0
    return f"{percent:.{max(0, digits)}f}%"


def format_range(values: Sequence[float]) -> str:
    """Format the range of some numbers.

    Args:
        values: One number or more.

    Returns:
        "8" where all are equal, else "4 to 16".
    """
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def format_columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Format a table as aligned columns.

    Args:
        rows: Cells of each row, as many in all.
        right: Columns that are aligned to the right.

    Returns:
        A line for each row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [">" if number in right else "<" for number in range(len(widths))]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [form.format(*row).rstrip() for row in rows]


def get_utc_time() -> str:
    """Get the time as records hold it.

    Returns:
        Such as "2026-11-30T12:00:00+00:00".
    """
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


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


def suggest_name(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Suggest the known name most like a mistyped one: first among whole names, then by the part after the last dot.

    Args:
        name: What was written.
        known: Known names.
        otherwise: What to say where none is like it.

    Returns:
        A sentence such as "Did you mean comfy?", or `otherwise`.
    """
    candidates = list(known)
    by_last = {candidate.rpartition(".")[2]: candidate for candidate in reversed(candidates)}
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.75)
    last = [] if close else difflib.get_close_matches(name.rpartition(".")[2], list(by_last), n=1, cutoff=0.75)
    close += [by_last[found] for found in last]
    return f"Did you mean {close[0]}?" if close else otherwise


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
