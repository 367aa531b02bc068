"""Streams and pages of Ogg files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.audio import encode, noise, split_pages
from sa3train.audio.decode import decode_audio
from sa3train.audio.scan_ogg import scan_ogg

RATE = 44100


def encode_ogg(seconds: float, seed: int = 0) -> bytes:
    return encode(noise(seconds, seed=seed), "OGG", "VORBIS")


CONTENT = encode_ogg(3.0)
PAGES = split_pages(CONTENT)


@given(st.sets(st.integers(2, len(PAGES) - 2), min_size=1, max_size=4), st.booleans())
def test_pages_that_are_gone_are_reported_and_the_others_read(gone: set[int], are_zeroed: bool) -> None:
    pages = [bytes(len(page)) if number in gone and are_zeroed else page for number, page in enumerate(PAGES)]
    content = b"".join(page for number, page in enumerate(pages) if are_zeroed or number not in gone)
    decoded = decode_audio(content)
    assert decoded.audio_CN.shape[1] > RATE / 4
    is_start = gone == set(range(2, 2 + len(gone))) and not are_zeroed
    assert [problem.code for problem in decoded.problems] == ([] if is_start else ["cut_short"])


def test_a_recording_of_a_running_stream_is_whole() -> None:
    """Its headers are followed by a later page: nothing is missing of what was recorded."""
    decoded = decode_audio(b"".join((*PAGES[:2], *PAGES[6:])))
    assert decoded.problems == ()
    assert 1.0 < decoded.audio_CN.shape[1] / RATE < 2.0


@pytest.mark.parametrize("count", [2, 5])
def test_every_link_of_a_chain_is_read(count: int) -> None:
    links = [encode_ogg(0.5 + number / 10, seed=number) for number in range(count)]
    decoded = decode_audio(b"".join(links))
    assert decoded.problems == ()
    assert decoded.audio_CN.shape[1] == sum(round((0.5 + number / 10) * RATE) for number in range(count))


@pytest.mark.parametrize("broken", [b"".join(PAGES[:2]), PAGES[0] + PAGES[5]])
def test_a_link_that_cannot_be_read_is_reported_and_the_others_read(broken: bytes) -> None:
    decoded = decode_audio(encode_ogg(1.0) + broken + encode_ogg(0.5))
    assert decoded.audio_CN.shape[1] == round(1.5 * RATE)
    assert decoded.problems


@pytest.mark.parametrize("end", [len(b"".join(PAGES[:5])), len(b"".join(PAGES[:5])) + 1000])
def test_what_is_joined_to_a_cut_file_is_read(end: int) -> None:
    """The cut page claims bytes of the next file."""
    decoded = decode_audio(CONTENT[:end] + encode_ogg(0.5))
    assert decoded.audio_CN.shape[1] == decode_audio(CONTENT[:end]).audio_CN.shape[1] + RATE // 2
    assert [problem.code for problem in decoded.problems] == ["cut_short"]


def test_the_first_of_parallel_streams_is_read_and_the_other_named() -> None:
    other = split_pages(encode_ogg(3.0, seed=1))
    mixed = [page for pair in zip(PAGES, other, strict=False) for page in pair]
    decoded = decode_audio(b"".join((*mixed, *PAGES[len(other) :], *other[len(PAGES) :])))
    assert decoded.audio_CN.shape[1] == 3 * RATE
    assert [problem.code for problem in decoded.problems] == ["unread_data"]


@pytest.mark.parametrize("before", [b"\1" * 5000, b"ID3\3\0\0\0\0\0\x0a" + bytes(10)])
def test_what_lies_before_the_first_page_is_passed_over(before: bytes) -> None:
    assert decode_audio(before + CONTENT).audio_CN.shape[1] == 3 * RATE


def test_healthy_files_are_left_alone() -> None:
    assert scan_ogg(CONTENT).is_trusted
    assert not scan_ogg(CONTENT[:-1]).is_trusted or scan_ogg(CONTENT[:-1]).problems
