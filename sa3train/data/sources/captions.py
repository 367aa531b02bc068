"""The text of a clip: caption, tags and beats, from sidecar files, caption lists, and tags inside the audio file."""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sa3train.core.errors import DataError
from sa3train.core.files import is_sidecar
from sa3train.core.user_files import check_content
from sa3train.data.sources.facts import Fact, find_contradictions, parse_bpm
from sa3train.data.sources.latents import LATENT_FIELDS
from sa3train.data.sources.listing import Clip
from sa3train.data.sources.lists import CAPTION_FIELDS, PATH_FIELDS, parse_object
from sa3train.data.sources.names import NameFacts, confirm_tempo, parse_name
from sa3train.data.sources.storage import Blob
from sa3train.data.sources.tags import EmbeddedTags, is_promotional, read_embedded_tags
from sa3train.data.sources.text import TEXT_LIMIT, decode_text, find_misread, tidy

FACTS = ("bpm", "key", "root", "genre", "type", "meter", "instrument", "mood", "category", "keywords")
"""Tags whose source is kept: what captions are composed of."""


@dataclass
class ClipText:
    """The text of a clip.

    Attributes:
        caption: Empty when there is none.
        tags: Value by name.
        beats: Seconds from the start.
        facts: What each source says of tempo, key, genre and the like, those that are used last.
        name: What the clip's name says.
        problems: (finding code, detail) pairs.
    """

    caption: str = ""
    tags: dict[str, str | int | float] = field(default_factory=dict)
    facts: list[Fact] = field(default_factory=list)
    name: NameFacts = field(default_factory=NameFacts)
    beats: list[float] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)

    @property
    def unread_caption(self) -> str:
        """Why a file that may hold the caption could not be read; empty where there is a caption, or no such file."""
        unread = (detail for code, detail in self.problems if code in ("bad_text", "bad_fields"))
        return "" if self.caption else next(unread, "")


def read_clip_text(clip: Clip, audio: bytes | None = None, allow_promotional: bool = False) -> ClipText:
    """Read all text of a clip.

    Captions and tags of the same name come from, in this order: `.txt`, `.json`, caption list, tags inside the file,
    its name and those of its folders.

    Args:
        clip: The clip.
        audio: Content of the audio file, if already read.
        allow_promotional: Use tags inside the file that read like an advertisement or a web address.

    Returns:
        The text, with problems where sources conflict or cannot be read.
    """
    text = ClipText(name=parse_name(clip.source))
    captions: list[tuple[str, str]] = []  # weakest first: the last one is used
    sidecars = [*reversed(clip.others), *(blob for blob in (clip.fields, clip.text) if blob)]
    sources = (
        (clip.row_name, _read_list_row(clip)),
        *((blob.name, _read_sidecar(blob, text)) for blob in sidecars),
    )
    if not clip.is_latents:
        caption = _add_embedded_tags(clip, audio, text, allow_promotional)
        captions += [("embedded tags", caption)] if caption else []
    for source, fields in sources:
        if clip.is_latents:
            fields = {name: value for name, value in fields.items() if name not in LATENT_FIELDS}
        caption = _add_fields(fields, text)
        captions += [(source, caption)] if caption else []
        known = {name: text.tags[name] for name in fields if name in FACTS and name in text.tags}
        if isinstance(bpm := known.get("bpm"), str):
            known["bpm"] = parse_bpm(bpm) or bpm
        text.facts += [Fact(name, value, source) for name, value in known.items()]
    text.problems += find_contradictions(text.facts)
    if captions:
        text.caption = captions[-1][1]
        if misread := find_misread(text.caption):
            text.problems.append(("misread_text", f"{captions[-1][0]} has {misread}"))
        others = [source for source, caption in captions[:-1] if caption != text.caption]
        if others:
            text.problems.append(("caption_conflict", f"{captions[-1][0]} is used, {', '.join(others)} differs"))
    return text


def _add_fields(fields: Mapping[str, Any], text: ClipText) -> str:
    """Add `fields` to tags and beats; returns the caption among them."""
    captions = {name: tidy(str(_parse_tag(fields[name]) or "")) for name in CAPTION_FIELDS if name in fields}
    used = next((name for name, caption in captions.items() if caption), None)
    for name, value in fields.items():
        if name == "beats":
            text.beats = _parse_beats(value, text)
        elif name == "bpm" and str(value).strip() in ("0", "0.0"):
            continue  # written where the tempo is unknown
        elif name != used and (tag := _parse_tag(value)) is not None:
            text.tags[name] = tag
    return captions[used] if used else ""


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


def _read_sidecar(blob: Blob, text: ClipText) -> dict[str, Any]:
    """The fields of a `.json`, or the caption in a `.txt`."""
    is_text = blob.name.lower().endswith(".txt")
    try:
        content, encoding = decode_text(blob.read(TEXT_LIMIT))
        if encoding:
            text.problems.append(("text_encoding", f"{blob.name} is read as {encoding}"))
        if is_text or not content.strip():
            return {CAPTION_FIELDS[0]: content}
        fields = parse_object(content)
        return {} if is_sidecar(fields) else fields  # of generated audio: no description of it
    except DataError as error:
        text.problems.append(("bad_text", f"{blob.name} {error}"))
    except ValueError as error:
        text.problems.append(("bad_fields", f"{blob.name} cannot be used: {error}"))
    return {}


def _read_list_row(clip: Clip) -> dict[str, Any]:
    if clip.row is None:
        return {}
    row = {name: value for name, value in parse_object(clip.row).items() if name and name not in PATH_FIELDS}
    kept = {name for name, value in row.items() if not isinstance(value, str) or name in CAPTION_FIELDS}
    return {name: value if name in kept else _parse_number(value) for name, value in row.items()}


def _parse_number(text: str) -> str | int | float:
    """A CSV cell that is a number, as a number; leading zeros and other text stay text."""
    if re.fullmatch(r"-?(0|[1-9]\d{0,15})", text.strip()):
        return int(text)
    if re.fullmatch(r"-?(0|[1-9]\d*)\.\d{1,15}", text.strip()):
        return float(text)
    return text


def _add_embedded_tags(clip: Clip, audio: bytes | None, text: ClipText, allow_promotional: bool) -> str:
    """Add the tags inside the file, without those that nobody would say to a model, and what its name says.

    Returns the caption among them.
    """
    path = clip.audio.local_path()
    found = EmbeddedTags()
    with contextlib.suppress(DataError, OSError):
        if path:
            check_content(path)
        found = read_embedded_tags(audio or path or clip.audio.read())
    dropped = [] if allow_promotional else [fact for fact in found.facts if is_promotional(fact.value)]
    text.problems += [("promotional", f"{fact.name}: {str(fact.value)[:80]}") for fact in dropped]
    kept = [fact for fact in reversed(found.facts) if fact not in dropped]
    facts = [*_list_name_facts(text.name, found.seconds), *kept]
    text.facts += [fact for fact in facts if fact.name in FACTS]
    caption = _add_fields({fact.name: fact.value for fact in facts}, text)
    text.beats = text.beats or found.beats
    return caption


def _list_name_facts(name: NameFacts, seconds: float | None) -> list[Fact]:
    bpm, source = name.bpm or confirm_tempo(name, seconds), name.bpm_source or "file name, whole bars"
    values = {"genre": (name.genre, "name"), "root": (name.root, "file name"), "key": (name.key, "file name"),
              "bpm": (bpm, source)}  # fmt: skip
    return [Fact(field, value, place) for field, (value, place) in values.items() if value]
