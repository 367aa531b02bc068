"""Tags in chunks of RIFF and AIFF: LIST/INFO, bext, iXML, ACID, sampler and Apple Loops, AIFF's texts."""

import codecs
import contextlib
import io
import re
import struct
from collections.abc import Iterator
from xml.etree import ElementTree

from sa3train.audio.chunks import CHUNK_KINDS, iterate_chunks, read_chunks
from sa3train.audio.notes import NOTES, parse_key
from sa3train.core.errors import DataError
from sa3train.data.sources.facts import TEMPO_TOLERANCE
from sa3train.data.sources.text import decode_text

FIELDS_OF_CHUNKS = {
    "INAM": "title", "IART": "artist", "IPRD": "album", "IGNR": "genre", "ICMT": "comment", "ICRD": "date",
    "IKEY": "keywords", "ISBJ": "subject", "IBPM": "bpm", "NAME": "title", "AUTH": "artist", "ANNO": "comment",
}  # fmt: skip
_IXML = {
    "tempo": "bpm", "inkey": "key", "key": "key", "genre": "genre", "style": "genre", "instrument": "instrument",
    "mood": "mood", "character": "mood", "category": "category", "timesig": "meter", "bwf_description": "description",
}  # fmt: skip
"""Elements of iXML, of its extension ASWG-G006, and attributes of Steinberg's, without "Musical"."""
_MACHINE_TEXT = re.compile(
    r"\w=|\b(?:created|rendered|exported|recorded|bounced) (?:with|by|using|in|from|on)\b|pro ?tools|cubase|nuendo|"
    r"logic|reaper|ableton|wavelab|adobe|audition|sound forge|zoom |tascam",
    re.IGNORECASE,
)
"""Descriptions that recorders and editors write."""
_APPLE_GENRES = frozenset(
    {"rock/blues", "electronic/dance", "electronic", "jazz", "urban", "world/ethnic", "cinematic/new age", "orchestral",
     "country/folk", "experimental", "hip hop", "house", "techno", "dubstep", "chillwave"}
)  # fmt: skip
_CHUNKS = (b"LIST", b"bext", b"iXML", b"acid", b"smpl", b"basc", b"cate")
_MAX_BEATS = 4096
_LOOPS = {"true": "loop", "1": "loop", "yes": "loop", "false": "one-shot", "0": "one-shot", "no": "one-shot"}

Tag = tuple[str, list[str], str]
"""Name, values, and the place of a tag."""


def read_chunk_tags(source: str | bytes, seconds: float | None) -> tuple[list[Tag], list[float]]:
    """Read the tags in a file's chunks.

    Args:
        source: Path, or the bytes of a file.
        seconds: Length of its audio; None where it is not known.

    Returns:
        (name, values, place) of each, and the seconds of the beats of a loop whose length is its beats at its tempo.
    """
    texts = [name.encode() for name in FIELDS_OF_CHUNKS if not name.startswith("I")]
    try:
        order, chunks = read_chunks(source, *texts, *_CHUNKS)
    except OSError:
        return [], []
    tags: list[Tag] = []
    beats: list[float] = []
    sign = "<" if order == "little" else ">"
    for chunk, content in chunks:
        with contextlib.suppress(struct.error, ElementTree.ParseError):  # a chunk that is cut
            if chunk == b"LIST" and content[:4] == b"INFO":
                tags += _read_info(content, b"RIFF" if order == "little" else b"RIFX")
            elif chunk in (b"acid", b"basc"):
                read = _read_acid if chunk == b"acid" else _read_apple_loop
                found, count = read(content, sign, seconds)
                tags, beats = tags + found, beats or _space_beats(count, seconds)
            elif chunk == b"cate":
                tags += _read_apple_category(content)
            elif chunk == b"smpl":
                note = struct.unpack_from(f"{sign}12xI", content)[0]
                if 0 < note < 128 and note != 60:  # what samplers write where nobody has set it
                    tags.append(("root", [NOTES[note % 12]], "sampler chunk"))
            elif chunk == b"iXML":
                tags += _read_ixml(content)
            elif chunk == b"bext":
                tags += _describe(decode_unnamed(content[:256]), "bext chunk")
            elif chunk.decode() in FIELDS_OF_CHUNKS:
                tags.append((FIELDS_OF_CHUNKS[chunk.decode()], [decode_unnamed(content)], "AIFF chunk"))
    return tags, beats


def decode_unnamed(content: bytes) -> str:
    """Decode text that nobody gave an encoding.

    Args:
        content: The text, up to the first zero.

    Returns:
        The text; empty where its encoding cannot be told.
    """
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return decode_text(content.removesuffix(b"\0\0") if is_wide else content.partition(b"\0")[0])[0]
    except DataError:
        return ""


def _read_info(content: bytes, kind: bytes) -> Iterator[Tag]:
    for name, start, length in iterate_chunks(io.BytesIO(content), len(content), CHUNK_KINDS[kind], 4):
        if name.decode() in FIELDS_OF_CHUNKS:
            text = decode_unnamed(content[start : start + length])
            is_key = name == b"IKEY" and len(text) > 1 and parse_key(text)  # means keywords; some write the key
            yield "key" if is_key else FIELDS_OF_CHUNKS[name.decode()], [text], "INFO chunk"


def _read_acid(content: bytes, sign: str, seconds: float | None) -> tuple[list[Tag], int]:
    """Tags of an ACID chunk, and the beats of a loop. A one-shot (bit 0) has no tempo; bit 3: a long, mapped file."""
    flags, root, beats, denominator, numerator, tempo = struct.unpack_from(f"{sign}IH6xIHHf", content)
    tags: list[Tag] = [("root", [NOTES[root % 12]], "ACID chunk")] if flags & 2 else []
    if flags & 1:
        return [*tags, ("type", ["one-shot"], "ACID chunk")], 0
    if not beats and not tempo > 0:
        return tags, 0  # an empty chunk, as some editors write it
    tags += [("bpm", [f"{tempo:.3f}"], "ACID chunk"), ("type", ["loop"], "ACID chunk")]
    tags += _describe_meter(numerator, denominator, "ACID chunk")
    if flags & 8 or not beats or not seconds:
        return tags, 0
    if abs(60 * beats / seconds - tempo) > TEMPO_TOLERANCE * tempo:
        return [*tags, ("bpm", [f"{60 * beats / seconds:.2f}"], f"ACID chunk: {beats} beats in {seconds:.2f} s")], 0
    return tags, beats


def _read_apple_loop(content: bytes, sign: str, seconds: float | None) -> tuple[list[Tag], int]:
    """Tags of an Apple Loop, whose tempo is its beats over its length, and its beats."""
    beats, root, scale, numerator, denominator, loop = struct.unpack_from(f"{sign}4xIHHHHH", content)
    place = "Apple Loops chunk"
    tags: list[Tag] = [("type", ["loop"], place)] if loop == 2 else []  # 1: one-shot, which some write for loops too
    if 0 < root < 128:
        mode = {1: " minor", 2: " major"}.get(scale, "")
        tags.append(("key" if mode else "root", [NOTES[root % 12] + mode], place))
    tags += _describe_meter(numerator, denominator, place)
    if 0 < beats <= _MAX_BEATS and seconds:
        return [*tags, ("bpm", [f"{60 * beats / seconds:.2f}"], place)], beats
    return tags, 0


def _read_apple_category(content: bytes) -> list[Tag]:
    """The texts of an Apple Loop's categories and descriptors, which lie in fields of 50 bytes."""
    texts = [decode_unnamed(part) for part in content.split(b"\0") if len(part) > 2 and part.isascii()]
    texts = [text for text in texts if text.isprintable() and any(letter.isalpha() for letter in text)]
    genres = [text for text in texts if text.lower() in _APPLE_GENRES]
    tags = [("keywords", texts), ("genre", genres)]
    return [(name, values, "Apple Loops chunk") for name, values in tags if values]


def _describe_meter(numerator: int, denominator: int, place: str) -> list[Tag]:
    is_usual = (numerator, denominator) == (4, 4)
    is_meter = 0 < numerator <= 32 and denominator in (1, 2, 4, 8, 16, 32)
    return [("meter", [f"{numerator}/{denominator}"], place)] if is_meter and not is_usual else []


def _read_ixml(content: bytes) -> list[Tag]:
    if b"<!" in content.replace(b"<!--", b"").replace(b"<![CDATA[", b""):
        return []  # declarations, with which a small file becomes a large one
    tags: list[Tag] = []
    for element in ElementTree.fromstring(content.strip(b"\0 \r\n\t")).iter():
        name, text = str(element.tag), element.text or ""
        if name == "ATTR":
            name, text = element.findtext("NAME") or "", element.findtext("VALUE") or ""
        known = _IXML.get(name.lower().removeprefix("musical"))
        if name == "isLoop" and text.strip().lower() in _LOOPS:
            tags.append(("type", [_LOOPS[text.strip().lower()]], "iXML chunk"))
        elif known == "description":
            tags += _describe(text, "iXML chunk")
        elif known and text.strip():
            tags.append((known, [text], "iXML chunk"))
    return tags


def _describe(text: str, place: str) -> list[Tag]:
    """A description that a person wrote: at least three words, and no notes of a machine."""
    return [("description", [text], place)] if len(text.split()) > 2 and not _MACHINE_TEXT.search(text) else []


def _space_beats(count: int, seconds: float | None) -> list[float]:
    return [round(beat * seconds / count, 4) for beat in range(count)] if seconds and 0 < count <= _MAX_BEATS else []
