"""Every container and encoding: whole, cut, zeroed in part, joined, and streamed, as docs/audio-formats.md has it.

`python tests/unit/audio/test_formats.py` writes the table anew.
"""

import functools
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from mutagen.ogg import OggPage

from helpers.audio import encode, noise, split_pages
from sa3train.audio.decode import DecodedAudio, decode_audio
from sa3train.audio.io import read_audio_info

DOC = Path(__file__).parents[3] / "docs" / "audio-formats.md"
STATES = ("whole", "cut", "zeroed", "joined", "streamed")
SECONDS = {"whole": 3.0, "cut": 2.0, "zeroed": 3.0, "joined": 5.0, "streamed": 3.0}

Stream = Callable[[bytes], bytes | None]


def encode_noise(seconds: float, container: str, subtype: str, rate: int, channels: int, **settings: object) -> bytes:
    samples = noise(seconds, rate, channels, peak=0.3, seed=round(seconds))
    return encode(samples, container, subtype, rate, **settings)


def put(content: bytes, at: int, value: bytes) -> bytes:
    return content[:at] + value + content[at + len(value) :]


def stream_chunk(name: bytes, value: bytes, offset: int = 4) -> Stream:
    return lambda content: put(content, content.rindex(name) + offset, value)


def stream_flac(content: bytes) -> bytes:
    return put(content, 21, bytes([content[21] & 0xF0]) + bytes(4))


def drop_info_frame(content: bytes) -> bytes:
    kbps = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)[content[2] >> 4]
    return content[144000 * kbps // 44100 + (content[2] >> 1 & 1) :]


def wrap(content: bytes, tag: int) -> bytes:
    """Put a whole stream into the audio chunk of a WAV file."""
    form = struct.pack("<HHIIHHH", tag, 2, 44100, 16000, 1, 16, 0)
    chunks = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks + bytes(len(content) % 2)


def make_ogg_flac(content: bytes) -> bytes:
    """Put a FLAC file into Ogg pages: its header, and its frames in packets of any size."""
    packets = [b"\x7fFLAC\1\0\0\1" + content[:42], *(content[at : at + 20000] for at in range(42, len(content), 20000))]
    return write_pages(packets, 1, 4096)


def write_pages(packets: list[bytes], serial: int, samples: int) -> bytes:
    pages = []
    for number, packet in enumerate(packets):
        page = OggPage()
        page.packets, page.serial, page.sequence, page.position = [packet], serial, number, number * samples
        page.first, page.last = number == 0, number == len(packets) - 1
        pages.append(page.write())
    return b"".join(pages)


def multiplex(content: bytes) -> bytes:
    """Put the pages of a stream without audio between those of an Ogg file."""
    video = write_pages([b"\x80theora" + bytes(40), bytes(5000), bytes(5000)], 12345, 1)
    pages = split_pages(content)
    other = [video[:75], video[75 : 75 + len(video[75:]) // 2], video[75 + len(video[75:]) // 2 :]]
    return b"".join((other[0], pages[0], *pages[1:3], other[1], *pages[3:-1], other[2], pages[-1]))


def same(content: bytes) -> bytes:
    return content


OPEN, CONSTANT = b"\xff\xff\xff\xff", {"bitrate_mode": "CONSTANT", "compression_level": 0.5}
# name: container, subtype, rate, channels, settings, change of the encoded file, how a pipe writes it
KINDS: dict[str, tuple[str, str, int, int, dict[str, object], Stream, Stream | None]] = {
    **{
        f"WAV {subtype}": ("WAV", subtype, 44100, 2, {}, same, stream_chunk(b"data", OPEN))
        for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM", "MS_ADPCM")
    },
    **{
        f"WAV {subtype}": ("WAV", subtype, 44100, 1, {}, same, stream_chunk(b"data", bytes(4)))
        for subtype in ("GSM610", "G721_32", "NMS_ADPCM_16")
    },
    "WAV extensible PCM_24": ("WAVEX", "PCM_24", 44100, 2, {}, same, stream_chunk(b"data", bytes(4))),
    "RF64 PCM_16": ("RF64", "PCM_16", 44100, 2, {}, same, stream_chunk(b"ds64", bytes(8), 16)),
    "W64 PCM_16": ("W64", "PCM_16", 44100, 2, {}, same, stream_chunk(b"data", bytes(8), 16)),
    "AIFF PCM_16": ("AIFF", "PCM_16", 44100, 2, {}, same, stream_chunk(b"SSND", bytes(4))),
    "AIFC FLOAT": ("AIFF", "FLOAT", 44100, 2, {}, same, stream_chunk(b"SSND", OPEN)),
    "AIFC IMA_ADPCM": ("AIFF", "IMA_ADPCM", 44100, 1, {}, same, stream_chunk(b"SSND", OPEN)),
    "AU PCM_16": ("AU", "PCM_16", 44100, 2, {}, same, lambda content: put(content, 8, OPEN)),
    "CAF PCM_16": ("CAF", "PCM_16", 44100, 2, {}, same, stream_chunk(b"data", OPEN * 2)),
    "CAF ALAC_16": ("CAF", "ALAC_16", 44100, 2, {}, same, None),
    "FLAC PCM_16": ("FLAC", "PCM_16", 44100, 2, {}, same, stream_flac),
    "FLAC PCM_24": ("FLAC", "PCM_24", 44100, 2, {}, same, stream_flac),
    "Ogg FLAC": ("FLAC", "PCM_16", 44100, 2, {}, make_ogg_flac, None),
    "Ogg Vorbis": ("OGG", "VORBIS", 44100, 2, {}, same, None),
    "Ogg Vorbis with video": ("OGG", "VORBIS", 44100, 2, {}, multiplex, None),
    "Ogg Vorbis in WAV": ("OGG", "VORBIS", 44100, 2, {}, lambda content: wrap(content, 0x674F), None),
    "Ogg Opus": ("OGG", "OPUS", 48000, 2, {}, same, None),
    "MP3 CBR": ("MP3", "MPEG_LAYER_III", 44100, 2, CONSTANT, same, drop_info_frame),
    "MP3 VBR": ("MP3", "MPEG_LAYER_III", 44100, 2, {"bitrate_mode": "VARIABLE"}, same, drop_info_frame),
    "MP3 mono": ("MP3", "MPEG_LAYER_III", 44100, 1, {}, same, drop_info_frame),
    "MP3 in WAV": ("MP3", "MPEG_LAYER_III", 44100, 2, {}, lambda content: wrap(content, 0x55), None),
}
ROWS = [(kind, state) for kind in KINDS for state in STATES if state != "streamed" or KINDS[kind][6]]


@functools.cache
def make_file(kind: str, state: str) -> bytes:
    container, subtype, rate, channels, settings, change, stream = KINDS[kind]
    whole = change(encode_noise(3.0, container, subtype, rate, channels, **settings))
    assert whole is not None
    third = len(whole) // 3
    if state == "cut":
        return whole[: 2 * third]
    if state == "zeroed":
        return whole[:third] + bytes(third) + whole[2 * third :]
    if state == "joined":
        other = change(encode_noise(2.0, container, subtype, rate, channels, **settings))
        return whole + (other or b"")
    streamed = stream(whole) if stream and state == "streamed" else whole
    assert streamed is not None
    return streamed


def describe_sndfile(content: bytes, folder: Path) -> str:
    """Seconds that soundfile.read gives."""
    path = folder / "clip"
    path.write_bytes(content)
    try:
        info = soundfile.info(path)
        return "unknown" if info.frames > 2**40 else f"{len(soundfile.read(path)[0]) / info.samplerate:.2f}"
    except RuntimeError:
        return "error"


def describe_ours(decoded: DecodedAudio) -> str:
    words = []
    for problem in decoded.problems:
        missing = re.match(r"([\d.]+) s of", problem.detail)
        known = f"{missing[1]} missing" if missing else "unknown part missing"
        words.append({"cut_short": known, "open_length": "length open", "unread_data": "rest unread"}[problem.code])
    return f"{decoded.audio_CN.shape[1] / decoded.sample_rate:.2f}" + (f" ({', '.join(words)})" if words else "")


def write_table(folder: Path) -> str:
    lines = [f"| file | {' | '.join(STATES)} |", "|---" * (len(STATES) + 1) + "|"]
    for kind in KINDS:
        contents = [make_file(kind, state) if (kind, state) in ROWS else b"" for state in STATES]
        cells = [f"{describe_sndfile(c, folder)} → {describe_ours(decode_audio(c))}" if c else "" for c in contents]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize(("kind", "state"), ROWS)
def test_every_frame_is_read_or_said_to_be_missing(tmp_path: Path, kind: str, state: str) -> None:
    content = make_file(kind, state)
    decoded = decode_audio(content)
    seconds, codes = decoded.audio_CN.shape[1] / decoded.sample_rate, {problem.code for problem in decoded.problems}
    allowed = 0.05 if "MP3" in kind or "ADPCM" in kind or "GSM" in kind or "G721" in kind else 0.0
    if state == "cut":
        assert 1.3 < seconds < 2.06
        assert codes == {"cut_short"}
    elif state == "zeroed" and seconds < 2.99:
        assert codes == {"cut_short"}
    elif (kind, state) == ("CAF ALAC_16", "joined"):
        assert codes == {"unread_data"}
    else:
        assert seconds == pytest.approx(SECONDS[state], abs=allowed + 1e-4)
        assert codes == ({"open_length"} if state == "streamed" else set())
    path = tmp_path / f"clip.{kind.split()[0].lower()}"
    path.write_bytes(content)
    assert read_audio_info(path).samples == decoded.audio_CN.shape[1]
    assert np.array_equal(decode_audio(path).audio_CN, decoded.audio_CN)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if re.search(r"\bPCM|FLOAT|DOUBLE|FLAC", kind)])
def test_lossless_audio_is_what_was_written(kind: str) -> None:
    whole = decode_audio(make_file(kind, "whole")).audio_CN
    joined = decode_audio(make_file(kind, "joined")).audio_CN
    cut = decode_audio(make_file(kind, "cut")).audio_CN
    assert np.abs(whole.T.numpy() - noise(3.0, peak=0.3, seed=3)).max() < 0.01
    assert np.array_equal(joined[:, : whole.shape[1]], whole)
    assert np.array_equal(cut, whole[:, : cut.shape[1]])


@pytest.mark.slow
def test_the_table_of_the_docs_is_this_one(tmp_path: Path) -> None:
    if soundfile.__libsndfile_version__ != "1.2.2":
        pytest.skip("the table is that of libsndfile 1.2.2")
    assert write_table(tmp_path) in DOC.read_text(), "run python tests/unit/audio/test_formats.py"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        table = write_table(Path(folder))
    DOC.write_text(
        re.sub(r"\| file \| whole .*?\|\n(?=\n|$)", lambda _: f"{table}\n", DOC.read_text(), flags=re.DOTALL)
    )
