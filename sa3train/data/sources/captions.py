"""The text of a clip: caption, tags and beats, from sidecar files, manifests, and tags inside the audio file."""

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
MAX_TAG_LENGTH = 500
"""Characters. Longer embedded tags are lyrics and license texts."""

_ID3 = {
    "TIT2": "title", "TPE1": "artist", "TALB": "album", "TCON": "genre", "TBPM": "bpm", "TKEY": "key", "TMOO": "mood",
    "TDRC": "date", "TIT1": "grouping", "COMM": "comment", "TIT3": "description",
}  # fmt: skip
_MP4 = {
    "\xa9nam": "title", "\xa9ART": "artist", "\xa9alb": "album", "\xa9gen": "genre", "tmpo": "bpm", "\xa9day": "date",
    "\xa9cmt": "comment", "\xa9grp": "grouping", "desc": "description",
}  # fmt: skip
EMBEDDED_TAGS = {**_ID3, **_MP4}
"""Names of tags inside audio files, by their ID3 or MP4 code."""

_TAG_ERRORS = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, MemoryError, EOFError,
               OSError, AssertionError, struct.error, RecursionError, ZeroDivisionError)  # fmt: skip
"""What mutagen raises on damaged files besides its own errors."""


@dataclass
class ClipText:
    """The text of a clip.

    Attributes:
        caption: Empty when there is none.
        tags: Value by name.
        beats: Seconds from the start.
        problems: (finding code, detail) pairs.
    """

    caption: str = ""
    tags: dict[str, str | int | float] = field(default_factory=dict)
    beats: list[float] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)


def read_clip_text(clip: Clip, audio: bytes | None = None) -> ClipText:
    """Read all text of a clip.

    Captions and tags of the same name come from, in this order: `.txt`, `.json`, manifest, tags inside the file.

    Args:
        clip: The clip.
        audio: Content of the audio file, if already read.

    Returns:
        The text, with problems where sources conflict or cannot be read.
    """
    text = ClipText()
    captions: list[tuple[str, str]] = []
    sources = (
        ("embedded tags", _read_embedded_tags(clip, audio)),
        ("manifest", _read_manifest_row(clip)),
        (".json", _read_json(clip, text)),
    )
    for source, fields in sources:
        caption = _add_fields(fields, text)
        captions += [(source, caption)] if caption else []
    caption = " ".join(_read_blob(clip.text, text).split())
    captions += [(".txt", caption)] if caption else []
    if captions:
        text.caption = captions[-1][1]
        others = [source for source, caption in captions[:-1] if caption != text.caption]
        if others:
            text.problems.append(("caption_conflict", f"{captions[-1][0]} is used, {', '.join(others)} differs"))
    return text


def _add_fields(fields: Mapping[str, Any], text: ClipText) -> str:
    """Add `fields` to tags and beats; returns the caption among them."""
    used = next((name for name in CAPTION_FIELDS if isinstance(fields.get(name), str) and fields[name].strip()), None)
    for name, value in fields.items():
        if name == "beats":
            text.beats = _parse_beats(value, text)
        elif name != used and (tag := _parse_tag(value)) is not None:
            text.tags[str(name)] = tag
    return " ".join(fields[used].split()) if used else ""


def _parse_tag(value: Any) -> str | int | float | None:
    """A tag's value: text, a number, or a list of texts joined by commas; None for anything else and for nothing."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        return value
    return None


def _parse_beats(value: Any, text: ClipText) -> list[float]:
    if isinstance(value, list) and all(isinstance(beat, int | float) and 0 <= beat < 1e6 for beat in value):
        return [round(float(beat), 4) for beat in value]
    text.problems.append(("bad_fields", "`beats` is not a list of seconds"))
    return []


def _read_json(clip: Clip, text: ClipText) -> dict[str, Any]:
    content = _read_blob(clip.fields, text)
    if not content:
        return {}
    try:
        fields = json.loads(content)
    except (json.JSONDecodeError, RecursionError) as error:
        text.problems.append(("bad_fields", f"its .json cannot be parsed ({error})"))
        return {}
    if not isinstance(fields, dict):
        text.problems.append(("bad_fields", "its .json is not an object with fields"))
        return {}
    return fields


def _read_manifest_row(clip: Clip) -> dict[str, Any]:
    if clip.row is None:
        return {}
    row = {str(name): value for name, value in json.loads(clip.row).items() if name and name not in PATH_FIELDS}
    return {name: _parse_number(value) if isinstance(value, str) else value for name, value in row.items()}


def _parse_number(text: str) -> str | int | float:
    """A CSV cell that is a number, as a number; leading zeros and other text stay text."""
    if re.fullmatch(r"-?(0|[1-9]\d{0,15})", text.strip()):
        return int(text)
    if re.fullmatch(r"-?(0|[1-9]\d*)\.\d{1,15}", text.strip()):
        return float(text)
    return text


def _read_blob(blob: Blob | None, text: ClipText) -> str:
    if blob is None:
        return ""
    try:
        return blob.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        text.problems.append(("bad_text", f"{blob.name or 'its text'} is not UTF-8; save it as UTF-8"))
    except DataError as error:
        text.problems.append(("bad_text", f"{blob.name or 'its text'} {error}"))
    return ""


def _read_embedded_tags(clip: Clip, audio: bytes | None) -> dict[str, Any]:
    """Tags inside the file, by their usual names. Unreadable ones are ignored: a set is not made for them."""
    import mutagen

    path = clip.audio.local_path()
    try:
        file = mutagen.File(
            path if path and audio is None else io.BytesIO(audio if audio is not None else clip.audio.read())
        )
        items = list(file.tags.items()) if file is not None and file.tags else []
        return dict(pair for pair in _name_tags(items) if pair[1] not in ("", None))
    except (mutagen.MutagenError, DataError, *_TAG_ERRORS):
        return {}


def _name_tags(items: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    for key, value in items:
        name = _ID3.get(key[:4]) or _MP4.get(key) or (value.desc if key.startswith("TXXX") else key)
        text = _get_first_text(value)
        known = key[:4] in _ID3 or key in _MP4 or key.startswith("TXXX") or re.fullmatch(r"[A-Za-z][A-Za-z _-]*", key)
        if known and text and len(text) <= MAX_TAG_LENGTH:
            name = _normalize_name(str(name))
            yield name, _parse_number(text) if name == "bpm" else text


def _normalize_name(name: str) -> str:
    lowered = name.strip().lower().replace(" ", "_").replace("-", "_")
    return {"initialkey": "key", "tempo": "bpm", "comments": "comment"}.get(lowered, lowered)


def _get_first_text(value: Any) -> str:
    text = getattr(value, "text", value)
    if isinstance(text, list | tuple):
        text = text[0] if text else ""
    return str(text).strip() if isinstance(text, str | int | float) or hasattr(text, "text") else ""
