"""Small checks of values a user gives; each raises `RequestError` naming the setting."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

from sa3train.errors import RequestError

LARGEST = 2**63 - 1


def is_list(value: Any) -> bool:
    """Whether `value` is a list of values rather than one."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def per_item(value: Any, batch: int) -> list[Any]:
    """`value` for each item of the batch."""
    return list(value) if is_list(value) else [value] * batch


def text(name: str, value: Any) -> str:
    """`value`, which must be text."""
    if not isinstance(value, str):
        raise RequestError(f"{name} must be text, not {value!r}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} holds what is no character ({value[error.start]!r}): write it as UTF-8.") from error
    return value


def flag(name: str, value: Any) -> bool:
    """`value`, which must be true or false."""
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, not {value!r}.")
    return value


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """`value`, which must be a finite number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise RequestError(f"{name} must be a number, not {value!r}.")
    checked = float(value)
    if not low <= checked <= high:
        bounds = f"from {low:g} to {high:g}" if math.isfinite(high) else f"at least {low:g}"
        raise RequestError(f"{name} must be {bounds}, not {checked:g}.")
    return checked


def whole(name: str, value: Any, low: int, high: int = LARGEST) -> int:
    """`value`, which must be a whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise RequestError(f"{name} must be a whole number, not {value!r}.")
    checked = int(value)
    if not low <= checked <= high:
        bounds = f"at least {low}" if checked < low else f"at most {high}"
        raise RequestError(f"{name} must be {bounds}, not {checked}.")
    return checked
