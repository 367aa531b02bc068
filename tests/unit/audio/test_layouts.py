"""Channels are mixed by the places of their speakers, in every container that names them."""

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.audio import encode, noise
from sa3train.audio.edit import mix_channels
from sa3train.audio.io import load_audio
from sa3train.audio.layouts import DEFAULT_LAYOUTS, SPEAKERS, compute_downmix, read_speakers
from sa3train.core.errors import AudioError

MASK_ORDER = [
    *("FL", "FR", "FC", "LFE", "BL", "BR", "FLC", "FRC", "BC"),
    *("SL", "SR", "TC", "TFL", "TFC", "TFR", "TBL", "TBC", "TBR"),
]
PCM_GUID = bytes.fromhex("0100000000001000800000aa00389b71")
AMBISONIC_GUID = bytes.fromhex("010000002107d3118644c8c1ca000000")
HALF = 0.5**0.5


def make_wavex(channels: int, mask: int, guid: bytes = PCM_GUID, samples: np.ndarray | None = None) -> bytes:
    """A WAVEFORMATEXTENSIBLE file of 16-bit samples (N, C)."""
    data = (np.zeros((4, channels)) if samples is None else samples * 32767).astype("<i2").tobytes()
    form = struct.pack("<HHIIHHHHI", 0xFFFE, channels, 44100, 88200 * channels, 2 * channels, 16, 22, 16, mask) + guid
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def encode_noise(channels: int, container: str, subtype: str = "PCM_16") -> bytes:
    return encode(noise(0.05, channels=channels, peak=0.1), container, subtype, 48000)


def add_apple_layout(content: bytes, tag: int, bitmap: int = 0, labels: tuple[int, ...] = ()) -> bytes:
    """An AIFF or CAF file with a channel layout chunk."""
    layout = struct.pack(">III", tag, bitmap, len(labels))
    layout += b"".join(struct.pack(">II3f", label, 0, 0, 0, 0) for label in labels)
    if content.startswith(b"caff"):
        return content[:52] + b"chan" + struct.pack(">q", len(layout)) + layout + content[52:]
    content += b"CHAN" + struct.pack(">I", len(layout)) + layout
    return content[:4] + struct.pack(">I", len(content) - 8) + content[8:]


@pytest.mark.slow
def test_every_mask_names_its_speakers_in_order_and_mixes_them_to_their_sides() -> None:
    """Files of all masks with two to four speakers; the matrix of every mask there is."""
    for count in range(2, 5):
        for names in itertools.combinations(MASK_ORDER, count):
            mask = sum(1 << MASK_ORDER.index(name) for name in names)
            assert read_speakers(make_wavex(count, mask), count) == names
    for mask in range(1, 1 << 18):
        names = [name for bit, name in enumerate(MASK_ORDER) if mask >> bit & 1]
        for name, (left, right) in zip(names, compute_downmix(names), strict=True):
            if len(names) == 1:
                assert left == right == 1
            elif name == "LFE":
                assert left == right == 0
            elif name.endswith("L") or name == "FLC":
                assert 1 >= left > 2 * right >= 0
            elif name.endswith("R") or name == "FRC":
                assert 1 >= right > 2 * left >= 0
            else:
                assert 1 >= left == right > 0


@pytest.mark.parametrize(
    ("names", "gains"),
    [
        ("FC", [(1, 1)]),
        ("LFE", [(1, 1)]),
        ("FL FR", [(1, 0), (0, 1)]),
        ("SL SR", [(1, 0), (0, 1)]),
        ("FC LFE", [(1, 1), (0, 0)]),
        ("FL FR BC", [(1, 0), (0, 1), (0.5, 0.5)]),
        ("FL FR BL BR", [(1, 0), (0, 1), (HALF, 0), (0, HALF)]),
        ("FL FR FC LFE BL BR", [(1, 0), (0, 1), (HALF, HALF), (0, 0), (HALF, 0), (0, HALF)]),
        ("FL FR TFL TBR TC", [(1, 0), (0, 1), (HALF, 0), (0, HALF), (0.5, 0.5)]),
    ],
)
def test_the_matrix_is_that_of_bs_775(names: str, gains: list[tuple[float, float]]) -> None:
    assert np.allclose(compute_downmix(names.split()), gains)


def test_speakers_between_left_and_center_keep_their_power() -> None:
    assert sum(gain**2 for gain in SPEAKERS["FLC"]) == pytest.approx(1)
    assert SPEAKERS["FL"][1] < SPEAKERS["FLC"][1] < SPEAKERS["FC"][1]


@pytest.mark.parametrize(
    ("channels", "mask", "expected"),
    [
        (6, 0x60F, "FL FR FC LFE SL SR"),
        (8, 0xFF, "FL FR FC LFE BL BR FLC FRC"),
        (4, 0x107, "FL FR FC BC"),
        (12, 0x2D63F, "FL FR FC LFE BL BR SL SR TFL TFR TBL TBR"),
        (18, 0x3FFFF, " ".join(MASK_ORDER)),
        (3, 0x3F, "FL FR FC"),
        (4, 0x30, "BL BR 3 4"),
        (4, 0x7, "FL FR FC 4"),
        (9, 0, "1 2 3 4 5 6 7 8 9"),
        *((channels, mask, None) for channels in range(3, 9) for mask in (0, 0x3, 0x80000000)),
        (1, 0x4, "FC"),
        (1, 0, None),
        (2, 0, None),
        (2, 0x4, None),
    ],
)
def test_masks_with_more_or_fewer_bits_than_channels(channels: int, mask: int, expected: str | None) -> None:
    found = read_speakers(make_wavex(channels, mask), channels)
    assert found == (None if expected is None else tuple(expected.split()))


@pytest.mark.parametrize(
    ("content", "channels", "expected"),
    [
        (encode_noise(6, "WAV"), 6, None),
        (encode_noise(6, "AIFF"), 6, None),
        (encode_noise(6, "CAF"), 6, None),
        (encode_noise(6, "WAVEX"), 6, "FL FR FC LFE BL BR"),
        (encode_noise(6, "RF64"), 6, "FL FR FC LFE BL BR"),
        (encode_noise(7, "FLAC"), 7, "FL FR FC LFE BC SL SR"),
        (encode_noise(5, "OGG", "VORBIS"), 5, "FL FC FR BL BR"),
        (encode_noise(8, "OGG", "OPUS"), 8, "FL FC FR SL SR BL BR LFE"),
        (encode_noise(9, "OGG", "OPUS"), 9, "1 2 3 4 5 6 7 8 9"),
        (add_apple_layout(encode_noise(6, "AIFF"), 124 << 16 | 6), 6, "FC FL FR BL BR LFE"),
        (add_apple_layout(encode_noise(6, "CAF"), 119 << 16 | 6), 6, "1 2 3 4 5 6"),
        (add_apple_layout(encode_noise(5, "CAF"), 119 << 16 | 5), 5, "FL FC FR BL BR"),
        (add_apple_layout(encode_noise(4, "CAF"), 0, 0, (3, 1, 2, 9)), 4, "FC FL FR BC"),
        (add_apple_layout(encode_noise(4, "AIFF"), 1 << 16, 0x33), 4, "FL FR BL BR"),
        (add_apple_layout(encode_noise(4, "CAF"), 107 << 16 | 4), 4, "W X Y Z"),
        (add_apple_layout(encode_noise(4, "CAF"), 190 << 16 | 4), 4, "ACN0 ACN1 ACN2 ACN3"),
        (add_apple_layout(encode_noise(2, "CAF"), 104 << 16 | 2), 2, "mid side"),
        (make_wavex(4, 0, AMBISONIC_GUID), 4, "W X Y Z"),
        (b"RIFF\0\0\0\0WAVEfmt ", 6, None),
        (b"", 6, None),
    ],
)
def test_containers_name_their_speakers(content: bytes, channels: int, expected: str | None) -> None:
    assert read_speakers(content, channels) == (None if expected is None else tuple(expected.split()))


HEADS = [
    make_wavex(6, 0x3F)[:40],
    encode_noise(4, "FLAC")[:40],
    encode_noise(4, "CAF")[:60],
    b"OggS" + bytes(24) + b"OpusHead",
]


@given(st.sampled_from(HEADS), st.binary(max_size=60), st.integers(0, 60), st.integers(1, 20))
def test_damaged_headers_name_every_channel_or_none(head: bytes, damage: bytes, at: int, channels: int) -> None:
    found = read_speakers(head[:at] + damage + head[at + len(damage) :], channels)
    assert found is None or len(found) == channels


def test_a_flac_file_names_other_speakers_in_a_tag(tmp_path: Path) -> None:
    import mutagen.flac

    path = tmp_path / "a.flac"
    path.write_bytes(encode_noise(4, "FLAC"))
    assert read_speakers(path, 4) == ("FL", "FR", "BL", "BR")
    file = mutagen.flac.FLAC(path)
    file["WAVEFORMATEXTENSIBLE_CHANNEL_MASK"] = "0x107"
    file.save()
    assert read_speakers(path, 4) == ("FL", "FR", "FC", "BC")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (make_wavex(4, 0, AMBISONIC_GUID), "ambisonics"),
        (make_wavex(9, 0), "channel 1 has no speaker"),
        (encode_noise(9, "AIFF"), "9"),
    ],
)
def test_channels_for_no_speaker_are_not_mixed(content: bytes, words: str) -> None:
    with pytest.raises(AudioError, match=words):
        load_audio(content)


def test_a_sound_stays_on_its_side() -> None:
    """7.1 with front left and right of center, as libsndfile writes eight channels: not taken for side surrounds."""
    samples = np.zeros((1000, 8))
    samples[:, 6] = 0.5
    left, right = load_audio(make_wavex(8, 0xFF, samples=samples))[:, 500].tolist()
    assert left == pytest.approx(0.5 * np.cos(np.pi / 8), abs=1e-3)
    assert right == pytest.approx(0.5 * np.sin(np.pi / 8), abs=1e-3)


@pytest.mark.parametrize("count", sorted(DEFAULT_LAYOUTS))
def test_files_that_name_no_speakers_have_the_usual_order(count: int) -> None:
    audio_CN = torch.eye(count) / 2
    expected = mix_channels(audio_CN, speakers=DEFAULT_LAYOUTS[count])
    assert torch.equal(mix_channels(audio_CN), expected)
    assert torch.allclose(load_audio(make_wavex(count, 0, samples=audio_CN.numpy())), expected, atol=1e-4)
