"""Audio handed to a generation: paths and arrays, in both orders of the tuple."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.audio import tone, write_clip
from sa3train.core.errors import AudioError, GenerationError
from sa3train.core.files import hash_file
from sa3train.inference.input_audio import load_input_audio

RATE = 44100
AUDIO = torch.from_numpy(tone(0.2).T.copy())


def test_a_path_is_read_and_hashed(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.wav", tone(0.2))
    source = load_input_audio(path, RATE, "init_audio")
    assert source.audio_CN.shape == (2, len(tone(0.2)))
    assert source.to_dict() == {"path": str(path), "sha256": hash_file(path)}


def test_a_file_is_decoded_once_until_it_changes(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.wav", tone(0.2))
    source = load_input_audio(path, RATE, "init_audio")
    assert load_input_audio(str(path), RATE, "inpaint_audio") is source
    assert load_input_audio(path, RATE // 2, "init_audio").audio_CN.shape[1] == source.audio_CN.shape[1] // 2
    write_clip(path, tone(0.3))
    assert load_input_audio(path, RATE, "init_audio").to_dict() == {"path": str(path), "sha256": hash_file(path)}


@pytest.mark.parametrize(
    "value",
    [(RATE, AUDIO), (AUDIO, RATE), (AUDIO[None], RATE), (AUDIO.numpy(), RATE), (np.int64(RATE), AUDIO.double())],
)
def test_arrays_come_in_either_order(value: Any) -> None:
    source = load_input_audio(value, RATE, "init_audio")
    assert torch.equal(source.audio_CN, AUDIO)
    assert source.path is None


def test_mono_surround_and_other_rates_are_converted() -> None:
    assert load_input_audio((AUDIO[0], RATE), RATE, "x").audio_CN.shape == AUDIO.shape
    assert load_input_audio((torch.zeros(6, 4800), 48000), RATE, "x").audio_CN.shape == (2, 4410)


def test_equal_arrays_have_equal_hashes_and_others_not() -> None:
    one, same, other = (load_input_audio((a, RATE), RATE, "x").sha256 for a in (AUDIO, AUDIO.clone(), AUDIO * 0.5))
    assert one == same != other


@pytest.mark.parametrize("value", [3, (RATE, RATE), (AUDIO, AUDIO), (AUDIO, 44100.0), (AUDIO,), (True, AUDIO)])
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(GenerationError, match="init_audio must be a path"):
        load_input_audio(value, RATE, "init_audio")


def test_unusable_audio_is_refused() -> None:
    with pytest.raises(AudioError, match="NaN"):
        load_input_audio((torch.full((2, 100), float("nan")), RATE), RATE, "init_audio")
    with pytest.raises(AudioError, match="floating point"):
        load_input_audio((torch.zeros(2, 100, dtype=torch.int16), RATE), RATE, "init_audio")
    with pytest.raises(AudioError, match="0 samples"):
        load_input_audio((torch.zeros(2, 0), RATE), RATE, "init_audio")
    with pytest.raises(AudioError, match="channels, samples"):
        load_input_audio((torch.zeros(3, 2, 100), RATE), RATE, "init_audio")
    with pytest.raises(AudioError, match="no such audio file"):
        load_input_audio("nowhere.wav", RATE, "init_audio")
