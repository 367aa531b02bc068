"""Tags inside audio files of every kind."""

import struct
from pathlib import Path
from typing import Any

import mutagen
import mutagen.aiff
import mutagen.mp3
import mutagen.mp4
import mutagen.wave
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from mutagen.apev2 import APEv2
from mutagen.id3 import COMM, TBPM, TCON, TIT2, TIT3, TXXX

from helpers.audio import encode, make_chunk, noise, write_clip
from sa3train.data.audit.audit import AuditRules, audit_clip
from sa3train.data.sources import tags
from sa3train.data.sources.captions import read_clip_text
from sa3train.data.sources.facts import parse_bpm
from sa3train.data.sources.listing import list_source
from sa3train.data.sources.tags import is_promotional, read_embedded_tags


def write(path: Path, **how: Any) -> Path:
    soundfile.write(path, noise(0.2), 44100, **how)
    return path


def make_wav(*chunks: bytes) -> bytes:
    body = encode(noise(0.2))[8:] + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def make_acid(tempo: float, flags: int = 0) -> bytes:
    return make_chunk(b"acid", struct.pack("<IHHfIHHf", flags, 57, 0x8000, 0.0, 8, 4, 4, tempo))


FRAMES = [
    COMM(encoding=3, lang="eng", desc="iTunNORM", text=" 00000A1B 00000C2D"),
    COMM(encoding=3, lang="eng", desc="Songs-DB_Custom1", text="5 stars"),
    COMM(encoding=3, lang="eng", desc="mood", text="calm"),
    COMM(encoding=3, lang="eng", desc="", text="warm felt piano"),
    TBPM(encoding=3, text="0"),
    TCON(encoding=3, text=["(4)Eurodisco", "17"]),
    TXXX(encoding=3, desc="replaygain_track_gain", text="-3 dB"),
    TXXX(encoding=3, desc="Instrument", text="piano"),
]
EXPECTED = {"comment": "warm felt piano", "genre": "Disco, Eurodisco, Rock", "instrument": "piano"}


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize(
    ("name", "kind"), [("a.mp3", mutagen.mp3.MP3), ("a.wav", mutagen.wave.WAVE), ("a.aiff", mutagen.aiff.AIFF)]
)
def test_id3_tags(tmp_path: Path, name: str, kind: Any, version: int) -> None:
    file = kind(write(tmp_path / name))
    file.add_tags()
    for frame in FRAMES:
        file.tags.add(frame)
    file.save(v2_version=version)
    assert read_embedded_tags(str(tmp_path / name)).values == EXPECTED
    assert read_embedded_tags((tmp_path / name).read_bytes()).values == EXPECTED


@pytest.mark.parametrize(
    ("text", "found"),
    [("Ã¼ber", "über"), ("tr\xe4ge", "träge"), ("\xcf\xf0\xe8\xe2\xe5\xf2", None), ("\x83L\x83b", None)],
)
def test_latin_1_is_what_the_bytes_are(tmp_path: Path, text: str, found: str | None) -> None:
    """Few taggers that write Latin-1 mean it: UTF-8 and Windows-1252 are read, other encodings are no text."""
    file = mutagen.mp3.MP3(write(tmp_path / "a.mp3"))
    file.add_tags()
    file.tags.add(TIT2(encoding=0, text=text))
    file.save()
    assert read_embedded_tags(str(tmp_path / "a.mp3")).values == ({"title": found} if found else {})


def test_ape_tags_of_mp3(tmp_path: Path) -> None:
    tags = APEv2()
    tags.update({"Title": "Rim", "Genre": "Dub", "MP3GAIN_MINMAX": "1,2"})
    tags.save(write(tmp_path / "a.mp3"))
    assert read_embedded_tags(str(tmp_path / "a.mp3")).values == {"title": "Rim", "genre": "Dub"}


def test_tags_of_a_file_with_the_suffix_of_another_kind(tmp_path: Path) -> None:
    file = mutagen.File(write(tmp_path / "a.flac"))
    file.update({"TITLE": ["Rim"], "CUESHEET": ["FILE"], "LOG": ["EAC"], "MOOD": ["\x1b[31m\tcalm\x07"]})
    file.save()
    path = (tmp_path / "a.flac").rename(tmp_path / "a.wav")
    assert read_embedded_tags(str(path)).values == {"title": "Rim", "mood": "[31m calm"}


def test_id3_of_version_2_2(tmp_path: Path) -> None:
    def frame(name: bytes, content: bytes) -> bytes:
        return name + struct.pack(">I", len(content))[1:] + content

    frames = frame(b"COM", b"\0engiTunSMPB\0 00000000 00000210") + frame(b"COM", b"\0eng\0dusty keys")
    frames += frame(b"TCO", b"\0(17)Garage Rock") + frame(b"TBP", b"\x00093")
    size = bytes(len(frames) >> shift & 0x7F for shift in (21, 14, 7, 0))
    path = write(tmp_path / "a.mp3")
    path.write_bytes(b"ID3\x02\0\0" + size + frames + path.read_bytes())
    assert read_embedded_tags(str(path)).values == {"comment": "dusty keys", "genre": "Rock, Garage Rock", "bpm": 93}


def test_tags_behind_countless_chunks_are_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = mutagen.wave.WAVE(write(tmp_path / "a.wav"))
    file.add_tags()
    file.tags.add(TIT2(encoding=3, text="deep"))
    file.save()
    content = (tmp_path / "a.wav").read_bytes()
    chunks = b"junk\0\0\0\0" * 500
    content = b"RIFF" + struct.pack("<I", len(content) - 8 + len(chunks)) + b"WAVE" + chunks + content[12:]
    assert read_embedded_tags(content).values == {"title": "deep"}
    monkeypatch.setattr(tags, "MAX_READS", 400)
    assert read_embedded_tags(content).values == {}


def test_a_described_comment_is_better_than_none(tmp_path: Path) -> None:
    file = mutagen.mp3.MP3(write(tmp_path / "a.mp3"))
    file.add_tags()
    for frame in FRAMES[:3]:
        file.tags.add(frame)
    file.save()
    assert read_embedded_tags(str(tmp_path / "a.mp3")).values == {"comment": "calm"}


@pytest.mark.parametrize("name", ["a.ogg", "a.opus", "a.flac"])
def test_vorbis_comments(tmp_path: Path, name: str) -> None:
    how = {"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {}
    soundfile.write(tmp_path / name, noise(0.2, 48000), 48000, **how)
    file = mutagen.File(tmp_path / name)
    file.update({"GENRE": ["Techno", "(17)", "Techno"], "TEMPO": ["nan", "127,5 BPM"], "COMMENT": ["dark"]})
    file.update({"REPLAYGAIN_TRACK_GAIN": ["-3 dB"], "ENCODER": ["x"], "ITUNNORM": [" 00000A1B"]})
    file.save()
    found = read_embedded_tags(str(tmp_path / name)).values
    assert found == {"genre": "Techno, Rock", "bpm": 127.5, "comment": "dark"}


def test_mp4_tags() -> None:
    from sa3train.data.sources.tags import _name_tag  # no encoder of MP4 is at hand

    free = mutagen.mp4.MP4FreeForm(b"calm")
    assert _name_tag("tmpo", [0]) == (0, "bpm", ["0"])
    assert _name_tag("\xa9gen", ["Rock", "Pop"]) == (0, "genre", ["Rock", "Pop"])
    assert _name_tag("----:com.apple.iTunes:MOOD", [free]) == (1, "mood", ["calm"])
    assert _name_tag("----:com.apple.iTunes:iTunSMPB", [free]) is None


def test_riff_info_and_acid() -> None:
    info = b"INFO" + make_chunk(b"IGNR", b"Techno\0") + make_chunk(b"ICMT", "tr\xe4ge".encode("cp1252"))
    info += make_chunk(b"INAM", "leise\0".encode("utf-16")) + make_chunk(b"IART", "キック".encode("cp932"))
    content = make_wav(make_acid(128.0), make_chunk(b"LIST", b"adtlxyzw"), make_chunk(b"LIST", info))
    expected = {"bpm": 128, "type": "loop", "genre": "Techno", "comment": "träge", "title": "leise"}
    assert read_embedded_tags(content).values == expected


@pytest.mark.parametrize("chunk", [make_acid(0.0), make_acid(float("nan")), make_acid(-3.0), make_acid(120.0, flags=1)])
def test_loops_without_a_tempo(chunk: bytes) -> None:
    assert read_embedded_tags(make_wav(chunk)).values.keys() == {"type"}


def test_aiff_text_chunks() -> None:
    body = encode(noise(0.2), "AIFF")[8:] + make_chunk(b"NAME", b"Low Tom", ">") + make_chunk(b"ANNO", b"tape", ">")
    assert read_embedded_tags(b"FORM" + struct.pack(">I", len(body)) + body).values == {
        "title": "Low Tom",
        "comment": "tape",
    }


@pytest.mark.parametrize(
    ("text", "bpm"),
    [("128", 128), ("127.50", 127.5), ("127,5", 127.5), (" 93 bpm", 93), ("090", 90), ("0", None), ("0.0", None)]
    + [(text, None) for text in ("-120", "fast", "", "nan", "inf", "1e3", "12000", "120-130", "0.4")],
)
def test_tempo(text: str, bpm: float | None) -> None:
    assert parse_bpm(text) == bpm


@given(st.text(max_size=12))
def test_whatever_a_tempo_is_it_is_none_or_plausible(text: str) -> None:
    bpm = parse_bpm(text)
    assert bpm is None or 1 <= bpm < 1000


@given(st.binary(max_size=300), st.sampled_from([b"", b"RIFF\0\0\1\0WAVE", b"FORM\0\0\1\0AIFF", b"ID3\3\0\0\0\0\1\0"]))
def test_damaged_tags_are_no_tags(content: bytes, head: bytes) -> None:
    assert isinstance(read_embedded_tags(head + content).values, dict)


PROMOTION = [
    "www.free-loops.com", "https://x.y/z", "Visit us at loopmasters.com", "mail me@example.org", "Royalty-free!",
    "FREE DOWNLOAD", "Download more loops", "\u00a9 2009 Someone", "All rights reserved.", "50% off", "Encoded by LAME",
    "Buy the full pack", "get 99sounds.org packs", "Subscribe for more",
]  # fmt: skip
CAPTIONS = [
    "warm felt piano", "free jazz drums, 120 BPM", "a demo-like bedroom recording", "recorded with a ribbon microphone",
    "No.1 hit style", "made with analog synths", "follow-up riff in A minor", "order and chaos", "made for dancing",
    "drum'n'bass at 174.5 bpm, vol.2", "buying time, slow ballad", "C.O.M. style",
]  # fmt: skip


@pytest.mark.parametrize("text", PROMOTION)
def test_advertisements(text: str) -> None:
    assert is_promotional(text)


@pytest.mark.parametrize("text", CAPTIONS)
def test_captions_are_no_advertisements(text: str) -> None:
    assert not is_promotional(text)


def test_an_advertisement_is_no_caption_without_the_users_word(tmp_path: Path) -> None:
    file = mutagen.mp3.MP3(write_clip(tmp_path / "a.mp3", noise(0.2)))
    file.add_tags()
    file.tags.add(TIT3(encoding=3, text="Visit www.loops.example"))
    file.save()
    (clip,) = list_source(str(tmp_path)).clips
    text = read_clip_text(clip)
    assert text.caption == ""
    assert [code for code, _ in text.problems] == ["promotional"]
    allowed = read_clip_text(clip, allow_promotional=True)
    assert (allowed.caption, allowed.problems) == ("Visit www.loops.example", [])
    codes = {finding["code"] for finding in audit_clip(clip, AuditRules())["findings"]}
    assert {"promotional", "no_caption"} <= codes
    codes = {finding["code"] for finding in audit_clip(clip, AuditRules(allow_promotional=True))["findings"]}
    assert codes.isdisjoint({"promotional", "no_caption"})
