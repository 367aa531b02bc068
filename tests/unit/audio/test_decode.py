"""Decoding to the last frame, whatever happened to a file."""

import contextlib
import shutil
import struct
from pathlib import Path

import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from helpers.audio import encode, noise, tone, write_fake_ffmpeg
from sa3train.audio import decode
from sa3train.audio.decode import decode_audio
from sa3train.audio.io import load_audio, read_audio_info
from sa3train.core.errors import AudioError

RATE = 44100
FFMPEG = shutil.which("ffmpeg")


FILES = {
    (container, subtype): encode(noise(0.4, rate, seed=1), container, subtype, rate)
    for container, subtype, rate in (
        *((name, "PCM_16", RATE) for name in ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC")),
        *(("WAV", "IMA_ADPCM", RATE), ("WAV", "FLOAT", RATE), ("CAF", "ALAC_16", RATE)),
        *(("OGG", "VORBIS", RATE), ("OGG", "OPUS", 48000), ("MP3", "MPEG_LAYER_III", RATE)),
    )
}
WHOLE = {kind: decode_audio(content).audio_CN for kind, content in FILES.items()}


@given(kind=st.sampled_from(sorted(FILES)), share=st.floats(0, 1))
def test_a_file_cut_anywhere_gives_what_it_holds_or_an_error(kind: tuple[str, str], share: float) -> None:
    content = FILES[kind][: round(share * len(FILES[kind]))]
    try:
        decoded = decode_audio(content)
    except AudioError:
        return
    held, whole = decoded.audio_CN.shape[1], WHOLE[kind].shape[1]
    assert held <= whole
    if 0 < held < whole * 0.97:
        assert "cut_short" in {problem.code for problem in decoded.problems}


@given(
    kind=st.sampled_from(sorted(FILES)),
    place=st.floats(0, 1),
    damage=st.one_of(st.binary(min_size=1, max_size=64), st.integers(1, 20000).map(bytes)),
)
def test_damage_anywhere_gives_audio_or_an_error(kind: tuple[str, str], place: float, damage: bytes) -> None:
    content = bytearray(FILES[kind])
    at = round(place * (len(content) - 1))
    content[at : at + len(damage)] = damage[: len(content) - at]
    try:
        decoded = decode_audio(bytes(content))
    except AudioError:
        return
    assert decoded.audio_CN.dim() == 2


@given(st.binary(max_size=300))
def test_any_bytes_give_audio_or_an_error(content: bytes) -> None:
    starts = (b"", b"RIFF\xff\xff\xff\xffWAVEfmt ", b"OggS", b"\xff\xfb\x90\x64", b"fLaC", b"caff", b".snd", b"ID3")
    for start in starts:
        with contextlib.suppress(AudioError):
            decode_audio(start + content)


@pytest.mark.parametrize("error", [MemoryError, OverflowError, RuntimeError, TypeError, AssertionError, SystemError])
def test_any_failure_of_libsndfile_leads_to_ffmpeg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    opened = soundfile.SoundFile

    def fail(file: object) -> soundfile.SoundFile:
        if "decoded.wav" in str(file):
            return opened(file)
        raise error("no")

    soundfile.write(tmp_path / "answer.wav", tone(0.2), RATE)
    write_fake_ffmpeg(tmp_path, f"import shutil; shutil.copy({str(tmp_path / 'answer.wav')!r}, sys.argv[-1])")
    monkeypatch.setattr(decode.soundfile, "SoundFile", fail)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "clip.flac").write_bytes(FILES["FLAC", "PCM_16"])
    assert decode_audio(tmp_path / "clip.flac").encoding == "ffmpeg"
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AudioError, match=r"clip\.flac"):
        decode_audio(tmp_path / "clip.flac")


@pytest.mark.parametrize(("seconds", "encoding"), [(0.3, "ffmpeg"), (0.01, "PCM_16")])
def test_the_decoder_that_reads_more_of_a_damaged_file_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, encoding: str
) -> None:
    soundfile.write(tmp_path / "answer.wav", tone(seconds), RATE)
    write_fake_ffmpeg(tmp_path, f"import shutil; shutil.copy({str(tmp_path / 'answer.wav')!r}, sys.argv[-1])")
    monkeypatch.setenv("PATH", str(tmp_path))
    content = FILES["FLAC", "PCM_16"]
    decoded = decode_audio(content[: len(content) // 2] + bytes(len(content) // 4) + content[len(content) * 3 // 4 :])
    assert decoded.encoding == encoding
    assert [problem.code for problem in decoded.problems] == ["cut_short"]
    assert "of 0.40 s" in decoded.problems[0].detail


@pytest.mark.parametrize(
    ("stated", "complaint", "expected"),
    [
        (0.0, "", ["open_length"]),
        (0.2, "", []),
        (1.0, "", ["cut_short"]),
        (0.2, "[aac @ 0x1234] channel element is not allocated", ["cut_short"]),
        (0.0, "File ended prematurely", ["cut_short"]),
    ],
)
def test_what_ffmpeg_could_not_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: float, complaint: str, expected: list[str]
) -> None:
    soundfile.write(tmp_path / "answer.wav", tone(0.2), RATE)
    copy = f"import shutil; shutil.copy({str(tmp_path / 'answer.wav')!r}, sys.argv[-1]); "
    write_fake_ffmpeg(tmp_path, copy + f"sys.stderr.write({complaint!r})")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(decode, "_find_stated_seconds", lambda path: stated)
    (tmp_path / "song.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(64))
    decoded = decode_audio(tmp_path / "song.m4a")
    assert [problem.code for problem in decoded.problems] == expected
    assert "0x1234" not in str(decoded.problems)


def test_joined_files_of_another_shape_are_said_to_be_unread() -> None:
    mono = encode(tone(0.2, channels=1), "WAV", "PCM_16")
    decoded = decode_audio(FILES["WAV", "PCM_16"] + mono + b"RIFF\0\0\0\0WAVE")
    assert decoded.audio_CN.shape == (2, round(0.4 * RATE))
    assert [problem.code for problem in decoded.problems] == ["unread_data"]
    assert "0.20 s with 44100 Hz and 1 channel" in decoded.problems[0].detail


def test_a_thousand_joined_files_are_read() -> None:
    content = encode(tone(0.01), "WAV", "PCM_16")
    assert decode_audio(content * 1001).audio_CN.shape[1] == 1001 * 441


def test_the_padding_of_adpcm_blocks_is_dropped() -> None:
    content = encode(noise(2.0, channels=1), "WAV", "IMA_ADPCM")
    at = content.index(b"fact") + 8
    exact = content[:at] + struct.pack("<I", 2 * RATE) + content[at + 4 :]
    assert decode_audio(exact).audio_CN.shape[1] == 2 * RATE
    assert decode_audio(exact + exact).audio_CN.shape[1] == 4 * RATE
    foreign = content[:at] + struct.pack("<I", RATE) + content[at + 4 :]
    assert decode_audio(foreign).audio_CN.shape[1] > 2 * RATE, "a fact that is not within a block is not believed"


def test_a_length_that_no_file_can_have_is_not_believed(tmp_path: Path) -> None:
    content = bytearray(FILES["FLAC", "PCM_16"])
    content[21] |= 0x0F
    content[22:26] = b"\xff" * 4
    (tmp_path / "clip.flac").write_bytes(content)
    assert read_audio_info(tmp_path / "clip.flac").samples == round(0.4 * RATE)


def test_what_is_missing_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "clip.wav").write_bytes(FILES["WAV", "PCM_16"][:40000])
    load_audio(tmp_path / "clip.wav")
    assert "clip.wav: 0.17 s of 0.40 s missing" in caplog.text


@pytest.mark.skipif(FFMPEG is None, reason="the ffmpeg program is not installed")
def test_flac_goes_on_after_damage_with_ffmpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(str(FFMPEG)).parent))
    content = encode(noise(3.0), "FLAC", "PCM_16")
    third = len(content) // 3
    decoded = decode_audio(content[:third] + bytes(third) + content[2 * third :])
    assert decoded.audio_CN.shape[1] > 1.8 * RATE
    assert "of 3.00 s" in decoded.problems[0].detail
