"""Tags inside audio files: ID3, Vorbis comments, MP4, APE and ASF by mutagen; chunks of RIFF and AIFF."""

import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import mutagen
from mutagen.apev2 import APEv2
from mutagen.id3 import ID3, TCON, Encoding

from sa3train.audio.notes import parse_key
from sa3train.core.errors import DataError
from sa3train.data.sources.chunk_tags import FIELDS_OF_CHUNKS, decode_unnamed, read_chunk_tags
from sa3train.data.sources.facts import Fact, parse_bpm

MAX_TAG_LENGTH = 500
"""Characters. Longer embedded tags are lyrics and license texts."""
MAX_READS = 200_000
"""More than a day of Ogg pages needs; some seconds of time."""

_ID3 = {
    "TIT2": "title", "TPE1": "artist", "TALB": "album", "TCON": "genre", "TBPM": "bpm", "TKEY": "key", "TMOO": "mood",
    "TDRC": "date", "TIT1": "grouping", "COMM": "comment", "TIT3": "description",
}  # fmt: skip
_MP4 = {
    "\xa9nam": "title", "\xa9ART": "artist", "\xa9alb": "album", "\xa9gen": "genre", "tmpo": "bpm", "\xa9day": "date",
    "\xa9cmt": "comment", "\xa9grp": "grouping", "desc": "description",
}  # fmt: skip
EMBEDDED_TAGS = {**_ID3, **_MP4, **FIELDS_OF_CHUNKS}
"""Names of tags inside audio files, by their code in ID3, MP4, RIFF or AIFF."""

_OTHER_NAMES = {
    "initialkey": "key", "initial_key": "key", "tempo": "bpm", "beatsperminute": "bpm", "beats_per_minute": "bpm",
    "comments": "comment", "albumtitle": "album", "author": "artist", "year": "date",
}  # fmt: skip

_KINDS = {"ID3": "ID3 tag", "MP3": "ID3 tag", "VC": "Vorbis comment", "VComment": "Vorbis comment", "MP4": "MP4 tag"}
"""Kinds of tags by what the names of mutagen's classes hold; others are "tag"."""

_MACHINE_NOTES = re.compile(
    r"itun|replaygain|r128_|musicbrainz|acoustid|serato|traktor|encod|cddb|gracenote|songs-db|musicmatch|discogs|"
    r"accuraterip|metadata_block|coverart|waveformatextensible|major_brand|minor_version|"
    r"compatible_brands|mp3gain|software|cuesheet|log$|c0$",
    re.IGNORECASE,
)
"""Names of tags and descriptions of comments that players, encoders and databases write for themselves."""

_HEX_WORDS = re.compile(r"\s*(?:[0-9A-Fa-f]{8}\s+)+[0-9A-Fa-f]{8}\s*")
"""A player's volume or gap figures, in a comment that lost its description."""

_PROMOTION = re.compile(
    r"https?://|\bwww\.|\S@\w[\w-]*\.\w|"
    r"\b\w[\w-]+\.(?:com|net|org|info|biz|io|de|fr|co|uk|eu|ru|app|shop|store|fm|tv)\b|"
    r"\bvisit (?:us|our|my|the)\b|\bclick here\b|\bsubscribe\b|\bfollow (?:us|me)\b|\bsign up\b|"
    r"\bcheck out (?:our|my)\b|\bfree downloads?\b|\bdownload (?:at|from|more|free|now|your|the)\b|"
    r"\bbuy (?:now|it|at|from|more|the|this)\b|"
    r"\border now\b|\bdiscount|\bpromo(?:tional)? codes?\b|\d ?% off\b|\bavailable (?:now|at|on|from)\b|"
    r"\ball rights reserved\b|\broyalty[- ]free\b|\bcopyright\b|\u00a9|\bunregistered\b|\b(?:demo|trial) version\b|"
    r"\b(?:ripped|encoded|converted|downloaded|powered) (?:by|with|from|using)\b",
    re.IGNORECASE,
)

TAG_PATTERNS = tuple(pattern.pattern for pattern in (_MACHINE_NOTES, _HEX_WORDS, _PROMOTION))
"""What decides which embedded tags are used, for the version of the audit."""


@dataclass
class EmbeddedTags:
    """What is written inside an audio file.

    Attributes:
        facts: Tags, the most trusted of each name first.
        beats: Seconds of the beats of a loop whose length is its beats at its tempo.
        seconds: Length of the audio; None where mutagen does not tell it.
    """

    facts: list[Fact] = field(default_factory=list)
    beats: list[float] = field(default_factory=list)
    seconds: float | None = None

    @property
    def values(self) -> dict[str, str | int | float]:
        """The most trusted value of each tag."""
        return {fact.name: fact.value for fact in reversed(self.facts)}


def read_embedded_tags(source: str | bytes) -> EmbeddedTags:
    """Read the tags inside an audio file. Unreadable ones are ignored: a set is not made for them.

    Args:
        source: Path, or the bytes of a file.

    Returns:
        Tags with lower-case names: a number for `bpm`, several values joined by commas.
    """
    found = EmbeddedTags()
    named = _read_tags(source, found)
    chunks, found.beats = read_chunk_tags(source, found.seconds)
    for name, values, place in [*named, *chunks]:
        value = _combine(name, values)
        if value is not None and all((fact.name, fact.value) != (name, value) for fact in found.facts):
            found.facts.append(Fact(name, value, place))
    return found


def is_promotional(text: Any) -> bool:
    """Tell whether text reads like an advertisement or a web address.

    Args:
        text: Value of a tag.

    Returns:
        Whether it does; False for anything but text.
    """
    return isinstance(text, str) and bool(_PROMOTION.search(text))


def _combine(name: str, values: Iterable[str]) -> str | int | float | None:
    """The value of a tag: all its different texts joined, or its first valid number."""
    shown = ("".join(c if c.isprintable() or c == "\0" else " " for c in value) for value in values)
    parts = (" ".join(part.split()) for value in shown for part in value.split("\0"))
    texts = list(dict.fromkeys(filter(None, parts)))
    if name == "bpm":
        return next(filter(None, map(parse_bpm, texts)), None)
    if name == "key":
        texts = [parse_key(text) or text for text in texts]
    if name == "genre":
        texts = _expand_genres(texts)
    joined = ", ".join(text for text in texts if not _HEX_WORDS.fullmatch(text))
    return joined if 0 < len(joined) <= MAX_TAG_LENGTH else None


def _expand_genres(texts: Sequence[str]) -> list[str]:
    """All genres, and the names of those that ID3 numbers: "(4)Eurodisco/17" is Disco, Eurodisco and Rock."""
    parts = [part for text in texts for part in re.split(r"\s*[/;]\s*", text) if part]
    names = (name.strip() for name in TCON(encoding=3, text=parts).genres)
    return list(dict.fromkeys(name for name in names if name and name != "Unknown" and not name.isdigit()))


def _read_tags(source: str | bytes, into: EmbeddedTags) -> list[tuple[str, list[str], str]]:
    """(name, values, place) of all tags that mutagen reads, the most trusted of each name first; sets the length."""
    names = (source, "-") if isinstance(source, str) else ("-",)  # by suffix and by content, which may differ
    readers: list[Callable[..., Any]] = [functools.partial(mutagen.File, filename=name) for name in names]
    named = []
    for read in (*readers, ID3, APEv2):
        with (
            contextlib.suppress(Exception),  # what mutagen raises for damaged tags is not one class
            io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file,
        ):
            found = read(fileobj=_LimitedFile(file))
            into.seconds = into.seconds or getattr(getattr(found, "info", None), "length", None)
            tags = getattr(found, "tags", found)
            place = next((name for kind, name in _KINDS.items() if kind in type(tags).__name__), "tag")
            for key, value in (tags or {}).items():
                entry = _name_tag(str(key), value)
                named += [(*entry, place)] if entry else []
    return [(name, values, place) for _, name, values, place in sorted(named, key=lambda entry: entry[0])]


class _LimitedFile:
    """A file that fails after `MAX_READS` reads: mutagen follows chunks and atoms without content for hours."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._reads = file, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        self._reads += 1
        if self._reads > MAX_READS:
            raise DataError("has too many parts to look for tags in all of them")
        return self._file.read(size)


def _name_tag(key: str, value: Any) -> tuple[int, str, list[str]] | None:
    """(order, name, values) of a tag; None for what is no text or meant for machines.

    Order: 0 for a format's own field, 1 for named ones, 2 for a comment with a description.
    """
    frame = key.partition(":")[0]
    description = str(getattr(value, "desc", ""))
    order, name = 1, key.rpartition(":")[2] if key.startswith("----:") else key.removeprefix("WM/")
    if frame in _ID3 or key in _MP4:
        order, name = (2 if description else 0), _ID3.get(frame) or _MP4[key]
    elif frame == "TXXX":
        name, description = description, ""
    elif not re.fullmatch(r"[A-Za-z][A-Za-z _-]*", name) or hasattr(value, "FrameID"):
        return None
    if not name or _MACHINE_NOTES.match(name) or _MACHINE_NOTES.match(description):
        return None
    return order, _normalize_name(name), _list_texts(value)


def _list_texts(value: Any) -> list[str]:
    values = getattr(value, "text", value)
    values = list(values) if isinstance(values, Sequence) and not isinstance(values, str | bytes) else [values]
    values = [getattr(entry, "value", entry) for entry in values]
    texts = [entry.decode("utf-8", "replace") if isinstance(entry, bytes) else entry for entry in values]
    texts = [str(entry) for entry in texts if isinstance(entry, str | int | float) or hasattr(entry, "text")]
    if getattr(value, "encoding", None) != Encoding.LATIN1:
        return texts
    return [decode_unnamed(part.encode("latin-1")) for text in texts for part in text.split("\0")]  # few mean Latin-1


def _normalize_name(name: str) -> str:
    lowered = name.strip().lower().replace(" ", "_").replace("-", "_")
    return _OTHER_NAMES.get(lowered, lowered)
