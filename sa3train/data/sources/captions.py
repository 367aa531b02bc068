"""What is said about a clip: caption, tags and beats, from sidecars, manifests, and tags inside the file."""

import io
import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sa3train.core.errors import DataError
from sa3train.data.sources.listing import PATH_FIELDS, Clip
from sa3train.data.sources.storage import Blob

CAPTION_FIELDS = ("caption", "text", "prompt", "description")
LONGEST_TAG = 500
"""Characters; embedded lyrics and licence texts are longer and no tags."""

_ID3 = {
    "TIT2": "title",
    "TPE1": "artist",
    "TALB": "album",
    "TCON": "genre",
    "TBPM": "bpm",
    "TKEY": "key",
    "TMOO": "mood",
    "TDRC": "date",
    "TIT1": "grouping",
    "COMM": "comment",
    "TIT3": "description",
}
_MP4 = {
    "\xa9nam": "title",
    "\xa9ART": "artist",
    "\xa9alb": "album",
    "\xa9gen": "genre",
    "tmpo": "bpm",
    "\xa9day": "date",
    "\xa9cmt": "comment",
    "\xa9grp": "grouping",
    "desc": "description",
}


@dataclass
class Description:
    """A clip's text. `notes`: (code, detail) of what was found amiss with it."""

    caption: str = ""
    tags: dict[str, str | int | float] = field(default_factory=dict)
    beats: list[float] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


def describe(clip: Clip, audio: bytes | None = None) -> Description:
    """Gather what is said of `clip`. Captions: `.txt` first, then `.json`, manifest, and the file's own description;
    tags of the same name likewise. `audio`: the file's bytes, if at hand.
    """
    description = Description()
    captions: list[tuple[str, str]] = []
    sources = (
        ("embedded tags", _embedded(clip, audio)),
        ("manifest", _row(clip)),
        (".json", _fields(clip, description)),
    )
    for where, fields in sources:
        if fields:
            caption = _take_fields(fields, description)
            captions += [(where, caption)] if caption else []
    text = _text(clip, description)
    captions += [(".txt", text)] if text else []
    if captions:
        description.caption = captions[-1][1]
        others = [where for where, caption in captions[:-1] if caption != description.caption]
        if others:
            description.notes.append(
                ("caption_conflict", f"{captions[-1][0]} is used, {', '.join(others)} says otherwise")
            )
    return description


def _take_fields(fields: Mapping[str, Any], description: Description) -> str:
    """Sort `fields` into tags and beats; returns the caption among them."""
    caption = next((" ".join(str(fields[name]).split()) for name in CAPTION_FIELDS if _is_text(fields.get(name))), "")
    used = next((name for name in CAPTION_FIELDS if _is_text(fields.get(name))), None)
    for name, value in fields.items():
        if name == "beats":
            description.beats = _beats(value, description)
        elif name != used and (tag := _tag(value)) is not None:
            description.tags[str(name)] = tag
    return caption


def _tag(value: Any) -> str | int | float | None:
    """A tag's value: text, a number, or a list of texts joined by commas; None for anything else and for nothing."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        return value
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _beats(value: Any, description: Description) -> list[float]:
    if isinstance(value, list) and all(isinstance(b, int | float) and 0 <= b < 1e6 for b in value):
        return [round(float(beat), 4) for beat in value]
    description.notes.append(("bad_fields", "`beats` is not a list of seconds"))
    return []


def _text(clip: Clip, description: Description) -> str:
    content = _read_text(clip.text, description)
    return " ".join(content.split()) if content else ""


def _fields(clip: Clip, description: Description) -> dict[str, Any]:
    content = _read_text(clip.fields, description)
    if not content:
        return {}
    try:
        fields = json.loads(content)
    except (json.JSONDecodeError, RecursionError) as error:
        description.notes.append(("bad_fields", f"its .json cannot be parsed ({error})"))
        return {}
    if not isinstance(fields, dict):
        description.notes.append(("bad_fields", "its .json is not an object with fields"))
        return {}
    return fields


def _row(clip: Clip) -> dict[str, Any]:
    if clip.row is None:
        return {}
    row = {str(name): value for name, value in json.loads(clip.row).items() if name and name not in PATH_FIELDS}
    return {name: _number(value) if isinstance(value, str) else value for name, value in row.items()}


def _number(text: str) -> str | int | float:
    """A CSV cell that is a number, as a number; leading zeros and other text stay text."""
    if re.fullmatch(r"-?(0|[1-9]\d{0,15})", text.strip()):
        return int(text)
    if re.fullmatch(r"-?(0|[1-9]\d*)\.\d{1,15}", text.strip()):
        return float(text)
    return text


def _read_text(blob: Blob | None, description: Description) -> str:
    if blob is None:
        return ""
    try:
        return blob.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        description.notes.append(("bad_text", f"{blob.name or 'its text'} is not UTF-8; save it as UTF-8"))
    except DataError as error:
        description.notes.append(("bad_text", f"{blob.name or 'its text'} {error}"))
    return ""


def _embedded(clip: Clip, audio: bytes | None) -> dict[str, Any]:
    """Tags inside the file, by their usual names. Unreadable tags are no tags: they are not what a set is made for."""
    import mutagen

    path = clip.audio.local_path()
    try:
        file = mutagen.File(
            path if path and audio is None else io.BytesIO(audio if audio is not None else clip.audio.read())
        )
        items = list(file.tags.items()) if file is not None and file.tags else []
        return dict(pair for pair in _named(items) if pair[1] not in ("", None))
    except (mutagen.MutagenError, DataError, *_TAG_DAMAGE):
        return {}


_TAG_DAMAGE = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, MemoryError, EOFError,
               OSError, AssertionError, struct.error, RecursionError, ZeroDivisionError)  # fmt: skip
"""What mutagen lets through on damaged files."""


def _named(items: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    for key, value in items:
        name = _ID3.get(key[:4]) or _MP4.get(key) or (value.desc if key.startswith("TXXX") else key)
        text = _first_text(value)
        known = key[:4] in _ID3 or key in _MP4 or key.startswith("TXXX") or re.fullmatch(r"[A-Za-z][A-Za-z _-]*", key)
        if known and text and len(text) <= LONGEST_TAG:
            yield _tidy(str(name)), _number(text) if _tidy(str(name)) == "bpm" else text


def _tidy(name: str) -> str:
    lowered = name.strip().lower().replace(" ", "_").replace("-", "_")
    return {"initialkey": "key", "tempo": "bpm", "comments": "comment"}.get(lowered, lowered)


def _first_text(value: Any) -> str:
    text = getattr(value, "text", value)
    if isinstance(text, list | tuple):
        text = text[0] if text else ""
    return str(text).strip() if isinstance(text, str | int | float) or hasattr(text, "text") else ""
