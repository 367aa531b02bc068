"""Sizes of chunks that do not agree with the file."""

import io
import struct

import pytest

from helpers.audio import encode, make_chunk, noise
from sa3train.audio.decode import decode_audio
from sa3train.audio.scan_chunks import scan_chunks

RATE = 44100


def encode_noise(container: str = "WAV", subtype: str = "PCM_16") -> bytes:
    return encode(noise(1.0), container, subtype)


def check(content: bytes, *codes: str, seconds: float = 1.0) -> None:
    decoded = decode_audio(content)
    assert decoded.audio_CN.shape[1] == round(seconds * RATE)
    assert tuple(problem.code for problem in decoded.problems) == codes


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFF00, 0xFFFFFFFF])
@pytest.mark.parametrize("riff", [0, 36, 0xFFFFFFFF])
def test_sizes_that_pipes_leave_mean_to_the_end(size: int, riff: int) -> None:
    content = bytearray(encode_noise())
    at = content.index(b"data") + 4
    content[4:8], content[at : at + 4] = struct.pack("<I", riff), struct.pack("<I", size)
    check(bytes(content), "open_length")
    check(bytes(content) * 2, "open_length", seconds=2.0)
    check(bytes(content[: at + 4]) + bytes(RATE), "open_length", seconds=0.25)


@pytest.mark.parametrize(
    "chunk",
    [
        make_chunk(b"JUNK", bytes(28)),
        make_chunk(b"bext", bytes(603)),
        make_chunk(b"LIST", b"INFOISFT\5\0\0\0Tool\0\0"),
        make_chunk(b"id3 ", b"ID3\3\0\0\0\0\0\x0a" + bytes(10)),
        make_chunk(b"smpl", b"RIFF" + bytes(56)),
    ],
)
def test_other_chunks_before_and_after_the_audio_change_nothing(chunk: bytes) -> None:
    content = encode_noise()
    for body in (content[12:36] + chunk + content[36:], content[12:] + chunk):
        check(b"RIFF" + struct.pack("<I", len(body) + 4) + b"WAVE" + body)
        check(b"RIFF" + struct.pack("<I", 36) + b"WAVE" + body)


@pytest.mark.parametrize(
    "tail", [bytes(100_000), b"TAG" + bytes(125), b"ID3\3\0\0\0\0\0\x0a" + bytes(10), b"\1" * 4000]
)
def test_padding_and_tags_after_the_audio_are_harmless(tail: bytes) -> None:
    check(encode_noise() + tail)


def test_audio_beyond_the_stated_size_is_reported() -> None:
    """What a recorder leaves that could not finish its header."""
    content = bytearray(encode_noise())
    at = content.index(b"data") + 4
    content[at : at + 4] = struct.pack("<I", RATE)
    check(bytes(content), "unread_data", seconds=0.25)


@pytest.mark.parametrize("container", ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF"])
def test_missing_bytes_are_counted(container: str) -> None:
    content = encode_noise(container)
    scan = scan_chunks(io.BytesIO(content[:-44100]), len(content) - 44100)
    assert scan.lost == pytest.approx(1 / 3, abs=0.01)
    assert scan_chunks(io.BytesIO(content), len(content)).is_trusted


@pytest.mark.parametrize("tag", [0x674F, 0x6750, 0x6751, 0x676F, 0x6770, 0x6771])
def test_ogg_in_wav_is_read_as_ogg(tag: int) -> None:
    form = struct.pack("<HHIIHHH", tag, 2, RATE, 11000, 1, 16, 0)
    body = make_chunk(b"fmt ", form) + make_chunk(b"data", bytes(3) + encode_noise("OGG", "VORBIS"))
    decoded = decode_audio(b"RIFF" + struct.pack("<I", len(body) + 4) + b"WAVE" + body)
    assert (decoded.container, decoded.audio_CN.shape, decoded.problems) == ("OGG", (2, RATE), ())


def test_bw64_is_read_as_rf64() -> None:
    content = b"BW64" + encode_noise("RF64")[4:]
    check(content)
    check(content[:-44100], "cut_short", seconds=0.75)
    check(content * 2, seconds=2.0)


def test_a_file_without_audio_chunk_is_left_to_the_decoder() -> None:
    content = encode_noise()[:30]
    assert not scan_chunks(io.BytesIO(content), len(content)).is_known
