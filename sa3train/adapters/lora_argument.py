"""The grammar of `--lora`: `PATH[=STRENGTH | =START..END][@MIN-MAX]`, parsed and formatted here only.

PATH is what `load_adapter` takes; text that names an existing path is taken whole. START..END is a strength that
changes over a piece of several windows, MIN-MAX are the noise levels at which the adapter is on. Numbers may have any
form that Python reads.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from sa3train.core.errors import AdapterError
from sa3train.core.files import path_exists


@dataclass(frozen=True)
class LoraArgument:
    """An adapter and its settings, as `--lora` gives them.

    Attributes:
        path: File or folder, or RUN_FOLDER@STEP.
        strength: The strength, or (start, end) of one that changes over a piece.
        interval: Noise levels at which the adapter is on; None means all.
    """

    path: str
    strength: float | tuple[float, float] = 1.0
    interval: tuple[float, float] | None = None

    def require_strength(self) -> float:
        """Return the strength where it must be constant.

        Returns:
            The strength.

        Raises:
            AdapterError: If it changes.
        """
        if isinstance(self.strength, tuple):
            start, end = map(_format_number, self.strength)
            raise AdapterError(
                f"={start}..{end} is not available for {self.path}: its strength cannot change here. Give "
                f"one strength, such as ={end}."
            )
        return self.strength

    def to_settings(self) -> dict[str, Any]:
        """Convert to keyword arguments of `Generator.load_adapter`.

        Returns:
            `adapter`, `strength` and, where given, `interval`.
        """
        interval = {} if self.interval is None else {"interval": self.interval}
        return {"adapter": self.path, "strength": self.strength, **interval}


def parse_lora(text: str) -> LoraArgument:
    """Parse the value of `--lora`.

    Args:
        text: `PATH[=STRENGTH | =START..END][@MIN-MAX]`.

    Returns:
        The adapter and its settings.

    Raises:
        AdapterError: If a number cannot be read.
    """
    rest, settings = text, dict[str, Any]()
    if not path_exists(rest):
        rest, interval = _split_interval(rest, text)
        settings["interval"] = interval
    if not path_exists(rest) and "=" in rest:
        rest, _, strength = rest.rpartition("=")
        settings["strength"] = _parse_strength(strength, text)
    if not rest:
        raise AdapterError(f"{text!r} names no adapter. Write PATH=0.8.")
    return LoraArgument(rest, **settings)


def format_lora(argument: LoraArgument) -> str:
    """Format an adapter and its settings as the value of `--lora`.

    Args:
        argument: The adapter and its settings.

    Returns:
        Text that `parse_lora` reads back to the same. The strength is always written, so that `=` or `@` in a path are
        not taken for a setting.
    """
    ends = argument.strength if isinstance(argument.strength, tuple) else (argument.strength,)
    strength = "..".join(map(_format_number, ends))
    interval = "" if argument.interval is None else "@" + "-".join(map(_format_number, argument.interval))
    return f"{argument.path}={strength}{interval}"


def _split_interval(text: str, whole: str) -> tuple[str, tuple[float, float] | None]:
    """Split `@MIN-MAX` off the end."""
    rest, marker, tail = text.rpartition("@")
    if not marker:
        return text, None
    pairs = [(tail[:index], tail[index + 1 :]) for index, letter in enumerate(tail) if letter == "-"]
    for low, high in pairs:
        levels = _read_number(low), _read_number(high)
        if levels[0] is not None and levels[1] is not None:
            return rest, (levels[0], levels[1])
    one_is_number = next((pair for pair in pairs if any(_read_number(end) is not None for end in pair)), None)
    if one_is_number and "=" not in tail and not re.search(r"[/\\]", tail):
        wrong = next(end for end in one_is_number if _read_number(end) is None)
        raise AdapterError(f"noise level {wrong!r} in {whole!r} is not a number. Write PATH@0.2-0.8.")
    return text, None


def _parse_strength(text: str, whole: str) -> float | tuple[float, float]:
    value = _read_number(text)
    if value is not None:
        return value
    for found in re.finditer(r"(?=\.\.)", text):
        start, end = _read_number(text[: found.start()]), _read_number(text[found.start() + 2 :])
        if start is not None and end is not None:
            return start, end
    raise AdapterError(f"strength {text!r} in {whole!r} is not a number. Write PATH=0.8 or PATH=0.2..0.9.")


def _read_number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _format_number(value: float) -> str:
    return repr(float(value)).removesuffix(".0")
