"""Reading and writing audio files of every kind a user may bring."""

import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from helpers.audio import noise, tone, write_fake_ffmpeg
from sa3train.audio import io as audio_io
from sa3train.audio.io import encode_audio, load_audio, read_audio, read_audio_info, write_audio
from sa3train.core import files
from sa3train.core.errors import AudioError, SA3Error

RATE = 44100
KINDS = [
    ("wav", "PCM_U8", 1e-2),
    ("wav", "PCM_16", 1e-4),
    ("wav", "PCM_24", 1e-6),
    ("wav", "PCM_32", 1e-6),
    ("wav", "FLOAT", 1e-7),
    ("wav", "DOUBLE", 1e-7),
    ("flac", "PCM_16", 1e-4),
    ("flac", "PCM_24", 1e-6),
    ("aiff", "PCM_16", 1e-4),
    ("ogg", "VORBIS", 3e-2),
]


@pytest.mark.parametrize(("suffix", "subtype", "tolerance"), KINDS)
def test_reads_what_was_written(tmp_path: Path, suffix: str, subtype: str, tolerance: float) -> None:
    samples = tone(0.5)
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, samples, RATE, subtype=subtype)
    audio, rate = read_audio(path)
    assert (rate, audio.shape, audio.dtype) == (RATE, (2, len(samples)), torch.float32)
    assert np.abs(audio.T.numpy() - samples).max() <= tolerance


@pytest.mark.parametrize(("suffix", "container", "subtype"), [("mp3", "MP3", None), ("opus", "OGG", "OPUS")])
def test_reads_lossy_files(tmp_path: Path, suffix: str, container: str, subtype: str | None) -> None:
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, tone(1.0, sample_rate=48000), 48000, format=container, subtype=subtype)
    audio = load_audio(path)
    assert abs(audio.shape[1] - RATE) < 0.1 * RATE
    middle = audio[:, RATE // 4 : RATE // 2]
    assert middle.square().mean().sqrt().item() == pytest.approx(0.5 / 2**0.5, rel=0.05)


def test_reads_bytes_as_files(tmp_path: Path) -> None:
    path = tmp_path / "clip.flac"
    soundfile.write(path, tone(0.1), RATE)
    assert torch.equal(read_audio(path.read_bytes())[0], read_audio(path)[0])


@pytest.mark.parametrize("rate", [8000, 22255, 32000, 44056, 48000, 96000])
def test_loads_any_sample_rate_at_the_model_rate(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, tone(0.5, 1000.0, rate), rate, subtype="FLOAT")
    audio = load_audio(path)
    assert audio.shape == (2, -(-rate // 2 * RATE // rate))
    expected = tone(0.5, 1000.0)[2000:-2000].T
    assert np.abs(audio[:, 2000 : 2000 + expected.shape[1]].numpy() - expected).max() < 2e-3


def test_mono_is_doubled(tmp_path: Path) -> None:
    path = tmp_path / "mono.wav"
    soundfile.write(path, tone(0.1, channels=1), RATE, subtype="FLOAT")
    audio = load_audio(path)
    assert audio.shape[0] == 2
    assert torch.equal(audio[0], audio[1])


@pytest.mark.parametrize(
    ("container", "subtype", "order"),
    [
        ("WAV", "FLOAT", (0, 1, 2, 3, 4, 5)),
        ("FLAC", "PCM_24", (0, 1, 2, 3, 4, 5)),
        ("OGG", "VORBIS", (0, 2, 1, 4, 5, 3)),
    ],
)
def test_five_point_one_is_mixed_by_itu_and_its_bass_channel_left_out(
    tmp_path: Path, container: str, subtype: str, order: tuple[int, ...]
) -> None:
    """`order` is where each channel of WAV order lies in the file: Ogg keeps the Vorbis order."""
    wav_order = np.stack([tone(0.5, f, channels=1, peak=0.1)[:, 0] for f in (200, 300, 500, 50, 700, 1100)], axis=1)
    path = tmp_path / "surround.wav"
    soundfile.write(path, wav_order[:, list(order)], RATE, format=container, subtype=subtype)
    left, right = load_audio(path).double()
    half = 0.5**0.5
    expected = torch.from_numpy(wav_order.T.copy()).double()
    error_left = left - (expected[0] + half * expected[2] + half * expected[4])
    error_right = right - (expected[1] + half * expected[2] + half * expected[5])
    assert max(error_left.square().mean().sqrt(), error_right.square().mean().sqrt()) < 5e-3


def test_more_channels_than_there_is_a_rule_for_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ambisonic.wav"
    soundfile.write(path, noise(0.1, channels=16), RATE)
    with pytest.raises(AudioError, match=r"ambisonic\.wav: no rule to mix 16 channels"):
        load_audio(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(tmp_path: Path, bad: float) -> None:
    samples = tone(0.1)
    samples[100, 1] = bad
    path = tmp_path / "bad.wav"
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"bad\.wav: 1 samples are NaN or infinite"):
        read_audio(path)


@pytest.mark.parametrize("rate", [1, 8, 1_000_000, 2_000_000_000])
def test_a_sample_rate_that_no_audio_has_is_refused(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "odd.wav"
    soundfile.write(path, tone(0.1), rate)
    with pytest.raises(AudioError, match=rf"odd\.wav: a sample rate of {rate} Hz"):
        load_audio(path)


def test_missing_folder_empty_and_text_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AudioError, match="no such audio file"):
        read_audio(tmp_path / "none.wav")
    with pytest.raises(AudioError, match="is a folder"):
        read_audio(tmp_path)
    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 2)), RATE)
    with pytest.raises(AudioError, match="contains no audio"):
        read_audio(tmp_path / "empty.wav")
    (tmp_path / "text.wav").write_text("not audio")
    with pytest.raises(AudioError, match="not WAV, FLAC"):
        read_audio(tmp_path / "text.wav")


@pytest.mark.parametrize("suffix", ["m4a", "aac"])
def test_without_ffmpeg_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setenv("PATH", "")
    path = tmp_path / f"song.{suffix}"
    path.write_bytes(b"\0\0\0\x20ftypM4A " + bytes(64))
    with pytest.raises(AudioError, match="apt install ffmpeg"):
        read_audio(path)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_m4a_is_read_through_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_bytes: bool) -> None:
    soundfile.write(tmp_path / "answer.wav", tone(0.2), RATE, subtype="FLOAT")
    copy = "import shutil; given = sys.argv[sys.argv.index('-i') + 1]; assert open(given, 'rb').read(4) == b'M4A!'; "
    write_fake_ffmpeg(tmp_path, copy + f"shutil.copy({str(tmp_path / 'answer.wav')!r}, sys.argv[-1])")
    monkeypatch.setenv("PATH", str(tmp_path))
    song = tmp_path / "song.m4a"
    song.write_bytes(b"M4A!")
    audio, rate = read_audio(song.read_bytes() if as_bytes else song)
    assert (rate, audio.shape) == (RATE, (2, len(tone(0.2))))
    assert read_audio_info(song).seconds == pytest.approx(0.2)


def test_what_ffmpeg_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fake_ffmpeg(tmp_path, "sys.exit('moov atom not found')")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "song.m4a").write_bytes(b"M4A!")
    with pytest.raises(AudioError, match="moov atom not found"):
        read_audio(tmp_path / "song.m4a")


def test_a_signal_to_our_process_group_does_not_cut_ffmpeg_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had decoded by then would count as the whole file."""
    write_fake_ffmpeg(tmp_path, "import os; sys.exit(f'group {os.getpgrp()}')")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "song.m4a").write_bytes(b"M4A!")
    with pytest.raises(AudioError, match=rf"group (?!{os.getpgrp()}\))\d"):
        read_audio(tmp_path / "song.m4a")


def test_info_reads_the_header(tmp_path: Path) -> None:
    path = tmp_path / "clip.flac"
    soundfile.write(path, tone(0.5), RATE, subtype="PCM_24")
    info = read_audio_info(path)
    assert (info.sample_rate, info.channels, info.samples) == (RATE, 2, RATE // 2)
    assert (info.seconds, info.container, info.encoding) == (0.5, "FLAC", "PCM_24")
    with pytest.raises(AudioError, match="no such audio file"):
        read_audio_info(tmp_path / "none.wav")


@pytest.mark.parametrize(
    ("suffix", "subtype"), [("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "FLOAT"), ("flac", "PCM_24")]
)
def test_writes_equal_bytes_for_equal_audio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, subtype: str
) -> None:
    audio = torch.from_numpy(tone(0.2).T.copy())
    write_audio(tmp_path / f"a.{suffix}", audio, RATE, subtype)
    content = (tmp_path / f"a.{suffix}").read_bytes()
    assert b"PEAK" not in content or content[content.find(b"PEAK") + 12 :][:4] == bytes(4)
    assert encode_audio(audio, RATE, f".{suffix}", subtype) == content
    assert soundfile.info(tmp_path / f"a.{suffix}").subtype == subtype
    assert (read_audio(tmp_path / f"a.{suffix}")[0] - audio).abs().max() < 1e-4


@pytest.mark.parametrize("suffix", ["ogg", "opus", "mp3", "aiff"])
def test_writes_other_kinds(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    write_audio(path, torch.from_numpy(tone(0.5, sample_rate=48000).T.copy()), 48000)
    assert read_audio(path)[1] == 48000


@pytest.mark.parametrize(
    ("name", "subtype", "message"),
    [
        ("a.xyz", "PCM_16", "unknown suffix"),
        ("a", "PCM_16", "unknown suffix"),
        ("a.flac", "FLOAT", "FLAC does not support FLOAT"),
        ("a.wav", "PCM_16", "NaN"),
        ("a.opus", "PCM_16", "as OGG at 44100 Hz"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, name: str, subtype: str, message: str) -> None:
    value = float("nan") if message == "NaN" else 0.0
    with pytest.raises(AudioError, match=message):
        write_audio(tmp_path / name, torch.full((2, 4410), value), RATE, subtype)
    assert list(tmp_path.iterdir()) == []


def test_long_audio_says_that_the_disk_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, content: Any) -> int:
            return min(len(content), 100)

    monkeypatch.setattr(audio_io, "LONG", 1000)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **options: Full())
    with pytest.raises(SA3Error, match="cannot write a temporary file in .*: No space left on device"):
        encode_audio(torch.zeros(2, 4410), RATE)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(SA3Error, match="No space left on device"):
        audio_io.write_audio(tmp_path / "a.wav", torch.zeros(2, 4410), RATE)
    assert list(tmp_path.iterdir()) == []
