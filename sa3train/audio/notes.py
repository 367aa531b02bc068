"""Names of notes and keys."""

import re

NOTES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
"""Name of each pitch class."""

_LETTERS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_SIGNS = {"": "", "#": "#", "♯": "#", "sharp": "#", "b": "b", "♭": "b", "flat": "b"}
_MINOR = ("m", "mi", "min", "minor", "moll")
_KEY = re.compile(
    r"\s*([A-Ga-g])(?:([#♯b♭])|[ _-]?(sharp|flat))?[ _-]*"
    r"([mM]|[Mm]in(?:or)?|MIN(?:OR)?|[Mm]aj(?:or)?|MAJ(?:OR)?|moll|dur|)\s*"
)
_CAMELOT = re.compile(r"\s*0?([1-9]|1[0-2])([ABab])\s*")


def parse_key(text: str) -> str | None:
    """Parse a key.

    Args:
        text: Such as "Am", "Bb minor", "F#min", "C", which is major, or "8A", which is A minor on Camelot's wheel.

    Returns:
        Such as "A minor", spelled with the sharp or flat of the text; None for anything else.
    """
    if match := _CAMELOT.fullmatch(text):
        is_minor = match[2] in "Aa"
        return f"{NOTES[(7 * (int(match[1]) - 8) + (9 if is_minor else 0)) % 12]} {'minor' if is_minor else 'major'}"
    if match := _KEY.fullmatch(text):
        is_minor = match[4] != "M" and match[4].lower() in _MINOR
        return f"{match[1].upper()}{_SIGNS[match[2] or match[3] or '']} {'minor' if is_minor else 'major'}"
    return None


def get_pitch_class(key: str) -> int:
    """Get the pitch class of a key's tonic.

    Args:
        key: As `parse_key` returns, or a note such as "Bb".

    Returns:
        0 for C to 11 for B.
    """
    return (_LETTERS[key[0]] + (key[1:2] == "#") - (key[1:2] == "b")) % 12


def get_relative_key(key: str) -> str:
    """Get the relative key, which has the same notes.

    Args:
        key: Such as "A minor".

    Returns:
        Such as "C major".
    """
    is_minor = key.endswith("minor")
    return f"{NOTES[(get_pitch_class(key) + (3 if is_minor else 9)) % 12]} {'major' if is_minor else 'minor'}"
