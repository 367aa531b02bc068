"""FLAC files whose stated length is not the true one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.audio import encode, noise
from sa3train.audio.decode import decode_audio
from sa3train.audio.scan import scan_flac

RATE = 44100


def encode_flac(samples: int = RATE, rate: int = RATE, subtype: str = "PCM_16", level: float = 0.5) -> bytes:
    return encode(noise(samples / RATE), "FLAC", subtype, rate, compression_level=level)


def state(content: bytes, samples: int) -> bytes:
    return content[:21] + bytes([content[21] & 0xF0]) + samples.to_bytes(4, "big") + content[26:]


@given(stated=st.integers(0, RATE), samples=st.integers(16, RATE), level=st.sampled_from([0, 0.5, 1]))
def test_every_frame_is_read_whatever_the_header_states(stated: int, samples: int, level: float) -> None:
    decoded = decode_audio(state(encode_flac(samples, level=level), min(stated, samples)))
    assert decoded.audio_CN.shape[1] == samples
    assert [problem.code for problem in decoded.problems] == ([] if stated else ["open_length"])


@pytest.mark.parametrize("rate", [44100, 12345, 11000, 96000, 655350])
@pytest.mark.parametrize("tail", [b"", b"TAG" + bytes(125), b"\xff\xf8\xff\xf9" * 5000])
def test_a_length_is_found_behind_every_kind_of_frame_header(rate: int, tail: bytes) -> None:
    content = encode_flac(30_000, rate, "PCM_24")
    assert decode_audio(state(content, 100) + tail).audio_CN.shape[1] == 30_000
    assert scan_flac(content + tail).parts == ()


@pytest.mark.parametrize("stated", [0, 100])
def test_damage_is_told_where_the_header_tells_no_length(stated: int) -> None:
    content = state(encode_flac(), stated)
    third = len(content) // 3
    decoded = decode_audio(content[:third] + bytes(third) + content[2 * third :])
    assert [problem.code for problem in decoded.problems] == ["cut_short"]
    assert "of 1.00 s missing" in decoded.problems[0].detail
