"""Counting the frames of MP3 files whose statements are missing or false."""

import re
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.audio import encode, noise, tone
from sa3train.audio.decode import decode_audio
from sa3train.audio.scan import OPEN_LENGTH
from sa3train.audio.scan_mpeg import EMPTY_ID3, scan_mpeg

RATE, FRAME = 44100, 1152


def encode_mp3(samples: np.ndarray, rate: int = RATE) -> bytes:
    return encode(samples, "MP3", "MPEG_LAYER_III", rate, bitrate_mode="VARIABLE", compression_level=0.4)


def split(content: bytes) -> list[bytes]:
    """The frames of a file of MPEG 1, layer III at 44.1 kHz."""
    kbps = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
    frames = []
    while content:
        length = 144000 * kbps[content[2] >> 4] // RATE + (content[2] >> 1 & 1)
        frames.append(content[:length])
        content = content[length:]
    return frames


LOUD_FIRST = encode_mp3(np.concatenate([noise(1.0), np.zeros((RATE, 2), np.float32)]))
INFO, *FRAMES = split(LOUD_FIRST)


def make_tag(size: int) -> bytes:
    digits = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\3\0\0" + digits + b"\xff\xfb\x90\x64" * (size // 4) + bytes(size % 4)


def count_seconds(content: bytes) -> float:
    decoded = decode_audio(content)
    return decoded.audio_CN.shape[1] / decoded.sample_rate


def count_frames(content: bytes) -> int:
    """Frames that decoding is made to deliver."""
    parts = scan_mpeg(content).parts
    return sum(struct.unpack(">I", part[part.index(b"Info") + 8 :][:4])[0] for part in parts)


tags = st.sampled_from([b"", make_tag(7), make_tag(3000), b"TAG" + bytes(125), make_tag(20) + make_tag(900)])
junk = st.binary(min_size=1, max_size=9000).map(lambda content: re.sub(rb"\xff|ID3|TAG|APE", b"-", content))


@given(first=tags, last=tags, at=st.integers(1, len(FRAMES) - 1), middle=st.one_of(tags, junk))
def test_frames_are_counted_whatever_lies_between_them(first: bytes, last: bytes, at: int, middle: bytes) -> None:
    content = b"".join((first, *FRAMES[:at], middle, *FRAMES[at:], last))
    assert count_frames(content) in (len(FRAMES), len(FRAMES) - (at == 1))  # the first frame alone may be chance


@given(end=st.integers(3000, len(LOUD_FIRST) - 1), has_info=st.booleans())
def test_a_cut_anywhere_is_told(end: int, has_info: bool) -> None:
    content = b"".join((*([INFO] if has_info else []), *FRAMES))[:end]
    scan = scan_mpeg(content)
    left, held = len(content) - len(INFO) * has_info, 0
    while held < len(FRAMES) and left >= len(FRAMES[held]):
        left -= len(FRAMES[held])
        held += 1
    assert count_frames(content) == held
    if has_info:
        assert scan.lost == pytest.approx((len(FRAMES) - held) / held)
        assert scan.problems == ()
    else:
        assert scan.problems == (OPEN_LENGTH,) or (left >= 4 and scan.problems[0].code == "cut_short")


@pytest.mark.parametrize("stated", [0, 1, 10, 1000, 2**32 - 1])
def test_a_wrong_number_of_frames_is_not_believed(stated: int) -> None:
    at = LOUD_FIRST.index(b"Xing")
    content = LOUD_FIRST[: at + 8] + struct.pack(">I", stated) + LOUD_FIRST[at + 12 :]
    decoded = decode_audio(content)
    assert decoded.audio_CN.shape == (2, 2 * RATE)
    assert {problem.code for problem in decoded.problems} == ({"open_length"} if stated == 0 else set())


def test_without_an_info_frame_all_is_read() -> None:
    """libsndfile estimates from the first frames: it would read less than half."""
    assert count_seconds(b"".join(FRAMES)) == pytest.approx(2.0, abs=0.06)


def test_an_info_frame_of_the_vbri_kind_counts() -> None:
    header = FRAMES[0][:4] + bytes(32) + b"VBRI" + bytes(10) + struct.pack(">I", len(FRAMES))
    first = header.ljust(len(FRAMES[0]), b"\0")
    assert scan_mpeg(b"".join((first, *FRAMES))).problems == ()
    assert scan_mpeg(b"".join((first, *FRAMES[: len(FRAMES) // 2]))).lost == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("between", [b"", make_tag(40000), b"TAG" + bytes(125)])
def test_joined_files_are_read_to_the_last(between: bytes) -> None:
    decoded = decode_audio(LOUD_FIRST + between + encode_mp3(tone(1.0)))
    assert decoded.audio_CN.shape[1] / RATE == pytest.approx(3.0, abs=0.06)
    assert decoded.problems == ()


def test_a_joined_file_of_another_rate_is_said_to_be_unread() -> None:
    decoded = decode_audio(LOUD_FIRST + encode_mp3(tone(1.0, sample_rate=48000), 48000))
    assert decoded.audio_CN.shape[1] / RATE == pytest.approx(2.0, abs=0.06)
    assert "48000 Hz" in next(problem.detail for problem in decoded.problems if problem.code == "unread_data")


def test_a_rip_that_begins_within_a_frame_is_read() -> None:
    assert count_seconds(b"".join(FRAMES)[100:]) == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("before", [bytes(3000), make_tag(10) * 2, make_tag(10)[:6] + b"\x7f\x7f\x7f\x7f"])
def test_what_libsndfile_does_not_pass_over_is_passed_over(before: bytes) -> None:
    assert count_seconds(before + LOUD_FIRST) == 2.0


def test_healthy_files_are_left_alone() -> None:
    for content in (LOUD_FIRST, EMPTY_ID3 + LOUD_FIRST, make_tag(50000) + LOUD_FIRST + b"TAG" + bytes(125)):
        assert scan_mpeg(content).is_trusted
        assert count_seconds(content) == 2.0


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"\xff\xfb\x90\x64" * 3, bytes(5000), b"\xff" * 5000, make_tag(2**20)]
)
def test_what_has_no_frames_is_left_to_the_decoder(content: bytes) -> None:
    assert not scan_mpeg(content).is_known
