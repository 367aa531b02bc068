"""What sources say of a clip's tempo and key, and whether they contradict one another."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from sa3train.audio.notes import get_pitch_class, parse_key

TEMPO_TOLERANCE = 0.01
"""Relative difference up to which two tempos are one: tags are rounded to whole beats per minute."""

_BPM = re.compile(r"\s*(\d{1,3}(?:[.,]\d*)?)\s*(?:bpm)?\s*", re.IGNORECASE)


class Fact(NamedTuple):
    """What one source says of a clip.

    Attributes:
        name: Such as "bpm", "key", "root", "genre".
        value: Such as 128, "A minor", "A", "Deep House".
        source: Where it stands, such as "ACID chunk", "file name", "kick.json".
    """

    name: str
    value: str | int | float
    source: str


def parse_bpm(text: str) -> int | float | None:
    """Parse a tempo.

    Args:
        text: Such as "128", "127,5" or "128 BPM".

    Returns:
        Beats per minute from 1 to 999; None for 0, which means unknown, and for anything else.
    """
    match = _BPM.fullmatch(text)
    bpm = round(float(match[1].replace(",", ".")), 3) if match else 0.0
    return None if bpm < 1 else int(bpm) if bpm == int(bpm) else bpm


def is_same(name: str, one: str | int | float, other: str | int | float) -> bool:
    """Tell whether two values of a fact agree.

    Args:
        name: "bpm", "key", or another, whose values are compared as text in any case.
        one: A value.
        other: Another.

    Returns:
        Whether they do: tempos within `TEMPO_TOLERANCE`, keys whatever their spelling.
    """
    if name == "bpm" and not isinstance(one, str) and not isinstance(other, str):
        return abs(one - other) <= TEMPO_TOLERANCE * max(one, other)
    keys = (parse_key(str(one)), parse_key(str(other))) if name == "key" else (None, None)
    if keys[0] and keys[1]:
        return get_pitch_class(keys[0]) == get_pitch_class(keys[1]) and keys[0].split()[1] == keys[1].split()[1]
    return str(one).casefold() == str(other).casefold()


def find_contradictions(facts: Iterable[Fact]) -> list[tuple[str, str]]:
    """Find tempos and keys of one clip that differ.

    Args:
        facts: What its sources say.

    Returns:
        (finding code, the values with their sources) pairs.
    """
    found = []
    for name, code in (("bpm", "tempo_conflict"), ("key", "key_conflict")):
        of_name = [fact for fact in facts if fact.name == name]
        if any(not is_same(name, of_name[0].value, fact.value) for fact in of_name[1:]):
            found.append((code, ", ".join(f"{format_fact_value(fact.value)} ({fact.source})" for fact in of_name)))
    return found


def format_fact_value(value: str | int | float) -> str:
    """Format a value for people.

    Args:
        value: A value.

    Returns:
        Text; numbers without trailing zeros.
    """
    return f"{value:g}" if isinstance(value, float) else str(value)
