"""Saving: files and sidecars appear whole or not at all."""

import errno
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.audio import tone
from sa3train.audio.io import read_audio
from sa3train.core import files
from sa3train.core.errors import AudioError, GenerationError, SA3Error
from sa3train.core.files import hash_file
from sa3train.inference.outputs import GenerationOutput, check_output, get_sidecar_path, list_output_paths
from sa3train.inference.sidecar import read_sidecar


def output(count: int = 1) -> GenerationOutput:
    audio = [torch.from_numpy(tone(0.1 * (index + 1)).T.copy()) for index in range(count)]
    return GenerationOutput(audio, 44100, [5] * count, None, [0.0] * count, [], {"settings": {"steps": 8}})


def test_one_item_goes_to_the_path_with_a_sidecar(tmp_path: Path) -> None:
    assert output().save(tmp_path / "new" / "a.wav") == [tmp_path / "new" / "a.wav"]
    sidecar = json.loads((tmp_path / "new" / "a.wav.json").read_text())
    assert sidecar["sha256"] == hash_file(tmp_path / "new" / "a.wav")
    assert (sidecar["file"], sidecar["item"], sidecar["seed"], sidecar["settings"]) == ("a.wav", 0, 5, {"steps": 8})
    assert sidecar["seconds"] == pytest.approx(0.1)


def test_a_batch_is_numbered_and_each_item_keeps_its_length(tmp_path: Path) -> None:
    paths = output(3).save(tmp_path / "a.flac", "PCM_24")
    assert [path.name for path in paths] == ["a_0.flac", "a_1.flac", "a_2.flac"]
    assert [read_audio(path)[0].shape[1] for path in paths] == [4410, 8820, 13230]
    assert [json.loads(get_sidecar_path(path).read_text())["item"] for path in paths] == [0, 1, 2]


def test_without_a_suffix_it_is_wav(tmp_path: Path) -> None:
    assert list_output_paths(tmp_path / "take", 1) == [tmp_path / "take.wav"]


def test_one_item_of_a_batch_can_be_kept_alone(tmp_path: Path) -> None:
    assert output(3).save(tmp_path / "a.wav", item=2) == [tmp_path / "a.wav"]
    assert read_audio(tmp_path / "a.wav")[0].shape[1] == 13230


def test_folders_that_cannot_be_written_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GenerationError, match="not a writable folder"):
        check_output(tmp_path / "file" / "a.wav")
    (tmp_path / "a.wav").mkdir()
    with pytest.raises(GenerationError, match="it is a folder"):
        check_output(tmp_path / "a.wav")
    for name in (tmp_path, f"{tmp_path}/new/", ""):
        with pytest.raises(GenerationError, match="it is a folder"):
            output().save(name)
    with pytest.raises(GenerationError, match="name too long"):
        check_output(tmp_path / f"{'a' * 250}.wav")  # its sidecar's name would be
    assert list(tmp_path.parent.glob(f"{tmp_path.name}.*")) == []


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sa3train.inference.outputs.os.access", lambda path, mode: False)
    with pytest.raises(GenerationError, match="not a writable folder"):
        output().save(tmp_path / "a.wav")
    assert list(tmp_path.iterdir()) == []


def test_kinds_that_cannot_be_written_are_refused_before_any_work(tmp_path: Path) -> None:
    for name, subtype in (("a.txt", "PCM_16"), ("a.flac", "FLOAT"), ("a.opus", "PCM_16")):
        with pytest.raises(AudioError, match="cannot write"):
            check_output(tmp_path / name, subtype)


def test_a_json_that_is_no_sidecar_is_never_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.wav.json").write_text('{"mine": 1}')
    with pytest.raises(GenerationError, match=r"would replace .*a\.wav\.json"):
        output().save(tmp_path / "a.wav", overwrite=True)
    assert output().save(tmp_path / "a.wav") == [tmp_path / "a-2.wav"]
    assert "a.wav.json exists: saved as" in caplog.text
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a-2.wav", "a-2.wav.json", "a.wav.json"]


def test_containers_of_one_name_have_a_sidecar_each(tmp_path: Path) -> None:
    paths = [output().save(tmp_path / f"x{suffix}")[0] for suffix in (".wav", ".flac", ".ogg")]
    assert {json.loads(get_sidecar_path(path).read_text())["file"] for path in paths} == {"x.wav", "x.flac", "x.ogg"}


def test_what_exists_gets_the_next_free_number_or_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a-3.wav.json").write_text("")
    saved = [output(1).save(tmp_path / "a.wav")[0].name for _ in range(3)]
    assert saved == ["a.wav", "a-2.wav", "a-4.wav"]
    assert "a.wav exists: saved as" in caplog.text
    before = (tmp_path / "a-2.wav").read_bytes()
    assert output(3).save(tmp_path / "a.wav", item=2, overwrite=True) == [tmp_path / "a.wav"]
    assert read_audio(tmp_path / "a.wav")[0].shape[1] == 13230
    assert json.loads((tmp_path / "a.wav.json").read_text())["item"] == 2
    assert (tmp_path / "a-2.wav").read_bytes() == before


def test_a_batch_keeps_one_number(tmp_path: Path) -> None:
    (tmp_path / "a_1.wav").write_text("")
    assert [path.name for path in output(3).save(tmp_path / "a.wav")] == ["a-2_0.wav", "a-2_1.wav", "a-2_2.wav"]
    assert [path.name for path in output(2).save(tmp_path / "a.wav")] == ["a-3_0.wav", "a-3_1.wav"]


def test_processes_that_write_at_once_get_numbers_of_their_own(tmp_path: Path) -> None:
    """Threads here: `write_files` holds nothing in memory that one process would know of another."""
    with ThreadPoolExecutor(8) as threads:
        saved = list(threads.map(lambda _: output().save(tmp_path / "a.wav")[0], range(24)))
    assert len(set(saved)) == 24
    assert all(json.loads(get_sidecar_path(path).read_text())["file"] == path.name for path in saved)
    assert len(list(tmp_path.iterdir())) == 48


LINKS: dict[str, Callable[[Path, Path], object]] = {
    "same": lambda link, target: link,
    "symlink": lambda link, target: link.symlink_to(target),
    "hard link": lambda link, target: link.hardlink_to(target),
}


@pytest.mark.parametrize("role", ["init_audio", "inpaint_audio", "adapter"])
@pytest.mark.parametrize("kind", LINKS)
def test_an_input_is_never_replaced(tmp_path: Path, kind: str, role: str) -> None:
    source = tmp_path / "recording.wav"
    source.write_text("precious")
    target = source if kind == "same" else tmp_path / "take.wav"
    LINKS[kind](target, source)
    made, entry = output(), {"path": str(tmp_path / "nowhere" / ".." / "recording.wav")}
    (tmp_path / "nowhere").mkdir()
    made.record.update({"adapters": [entry]} if role == "adapter" else {"inputs": {role: entry}})
    for overwrite in (False, True):
        with pytest.raises(SA3Error, match=r"would replace the input .*recording\.wav"):
            made.save(target, overwrite=overwrite)
    assert source.read_text() == "precious"


@pytest.mark.parametrize("failing", ["audio", "sidecar"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    whole = files._write

    def full(path: Path, content: bytes) -> None:
        if (".json" in path.name) == (failing == "sidecar"):
            whole(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        whole(path, content)

    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(SA3Error, match="No space left on device"):
        output().save(tmp_path / "a.wav")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such sidecar"),
        ("not json", "cannot be read as a sidecar"),
        ("[1]", "is not a sidecar"),
        ('{"made_by": "sa3train", "format": 99}', "has format 99"),
        ('{"made_by": "sa3train", "format": 1}', "'file' is missing"),
        ("[" * 100_000, "cannot be read as a sidecar"),
        ('{"made_by": "sa3train", "format": 1, "item": ' + "9" * 5000 + "}", "cannot be read as a sidecar"),
    ],
)
def test_what_is_no_sidecar_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(GenerationError, match=message):
        read_sidecar(tmp_path / "a.json")
    (tmp_path / "a.wav").touch()
    with pytest.raises(GenerationError, match=r"no such sidecar: .*a\.wav\.json"):
        read_sidecar(tmp_path / "a.wav")
