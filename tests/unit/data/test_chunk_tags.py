"""Tempo, key, beats and genre in chunks of WAV and AIFF, written here byte by byte."""

import struct
from pathlib import Path

import pytest

from helpers.audio import encode, make_chunk, noise
from sa3train.data.sources.captions import ClipText, read_clip_text
from sa3train.data.sources.listing import list_source
from sa3train.data.sources.tags import EmbeddedTags, read_embedded_tags

SECONDS = 4.0


def make_wav(*chunks: bytes, seconds: float = SECONDS) -> bytes:
    body = encode(noise(seconds, 8000, 1), rate=8000)[8:] + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def make_aiff(*chunks: bytes) -> bytes:
    body = encode(noise(SECONDS, 8000, 1), "AIFF", rate=8000)[8:] + b"".join(chunks)
    return b"FORM" + struct.pack(">I", len(body)) + body


def make_acid(tempo: float = 120.0, beats: int = 8, flags: int = 2, root: int = 57, meter: int = 4) -> bytes:
    return make_chunk(b"acid", struct.pack("<IHHfIHHf", flags, root, 0x8000, 0.0, beats, 4, meter, tempo))


def make_basc(beats: int = 8, root: int = 57, scale: int = 1, loop: int = 2) -> bytes:
    return make_chunk(b"basc", struct.pack(">IIHHHHH66x", 1, beats, root, scale, 3, 4, loop), ">")


def make_smpl(note: int) -> bytes:
    return make_chunk(b"smpl", struct.pack("<9I", 0, 0, 0, note, 0, 0, 0, 0, 0))


IXML = b"""<?xml version="1.0"?><BWFXML><ASWG>
<genre>Techno</genre><inKey>Bbm</inKey><tempo>131</tempo><isLoop>true</isLoop>
</ASWG><STEINBERG><ATTR_LIST><ATTR><NAME>MusicalInstrument</NAME><VALUE>Pad</VALUE></ATTR></ATTR_LIST></STEINBERG>
</BWFXML>"""
CATE = b"\0" * 4 + b"Drums".ljust(50, b"\0") + b"Electronic/Dance".ljust(50, b"\0") + b"Processed".ljust(50, b"\0")
BEATS = [index / 2 for index in range(8)]


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (make_wav(make_acid()), {"bpm": 120, "root": "A", "type": "loop"}),
        (make_wav(make_acid(flags=3)), {"root": "A", "type": "one-shot"}),
        (make_wav(make_acid(tempo=0, beats=0)), {"root": "A"}),
        (make_wav(make_acid(flags=0, meter=3)), {"bpm": 120, "type": "loop", "meter": "3/4"}),
        (make_wav(make_smpl(58)), {"root": "Bb"}),
        (make_wav(make_smpl(60)), {}),
        (make_wav(make_chunk(b"iXML", IXML)),
         {"genre": "Techno", "key": "Bb minor", "bpm": 131, "type": "loop", "instrument": "Pad"}),
        (make_wav(make_chunk(b"iXML", b"<a><!ENTITY x 'y'><genre>&x;</genre></a>")), {}),
        (make_wav(make_chunk(b"iXML", b"<a><genre>cut")), {}),
        (make_wav(make_chunk(b"bext", b"Door slams in hall".ljust(602, b"\0"))), {"description": "Door slams in hall"}),
        (make_wav(make_chunk(b"bext", b"sSPEED=25-ND sTAKE=3".ljust(602, b"\0"))), {}),
        (make_wav(make_chunk(b"LIST", b"INFO" + make_chunk(b"IKEY", b"F#m\0"))), {"key": "F# minor"}),
        (make_wav(make_chunk(b"LIST", b"INFO" + make_chunk(b"IKEY", b"dark; slow\0"))), {"keywords": "dark; slow"}),
        (make_aiff(make_basc()), {"bpm": 120, "key": "A minor", "type": "loop", "meter": "3/4"}),
        (make_aiff(make_basc(root=0, scale=0, loop=0)), {"bpm": 120, "meter": "3/4"}),
        (make_aiff(make_chunk(b"cate", CATE, ">")),
         {"genre": "Electronic, Dance", "keywords": "Drums, Electronic/Dance, Processed"}),
        (make_wav(make_acid()[:20]), {}),
    ],
)  # fmt: skip
def test_chunks(content: bytes, values: dict[str, object]) -> None:
    assert read_embedded_tags(content).values == values


@pytest.mark.parametrize("content", [make_wav(make_acid()), make_aiff(make_basc())])
def test_a_loop_has_its_beats(content: bytes) -> None:
    assert read_embedded_tags(content).beats == BEATS
    assert read_embedded_tags(make_wav(make_acid(flags=8))) != EmbeddedTags() and not EmbeddedTags().beats


def read_text(folder: Path, name: str, content: bytes) -> ClipText:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return read_clip_text(list_source(str(folder)).clips[0])


def test_facts_say_where_they_stand(tmp_path: Path) -> None:
    text = read_text(tmp_path, "Deep House/pad 120bpm.wav", make_wav(make_acid()))
    assert text.tags["bpm"] == 120 and text.beats == BEATS and text.problems == []
    assert [(fact.name, fact.source) for fact in text.facts if fact.name in ("bpm", "genre")] == [
        ("genre", "name"), ("bpm", "file name"), ("bpm", "ACID chunk")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "codes"),
    [
        ("pad 128bpm.wav", make_wav(make_acid()), ["tempo_conflict"]),
        ("pad 120bpm Cm.wav", make_aiff(make_basc()), ["key_conflict"]),
        ("pad A#m.wav", make_wav(make_chunk(b"iXML", IXML)), []),  # another spelling of Bb minor
        ("pad.wav", make_wav(make_acid(beats=10)), ["tempo_conflict"]),  # 10 beats in 4 s are 150 BPM
        ("pad 120.4bpm.wav", make_wav(make_acid()), []),
    ],
)
def test_sources_that_contradict_one_another(tmp_path: Path, name: str, content: bytes, codes: list[str]) -> None:
    assert [code for code, _ in read_text(tmp_path, name, content).problems] == codes
