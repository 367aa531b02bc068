"""Folders of latents from the released pre-encoder and from Underfit become shards."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.audio import noise, tone
from sa3train.core.errors import DataError
from sa3train.data.audit.audit import AuditRules
from sa3train.data.encode import imported
from sa3train.data.encode.encode import EncodeResult, encode_dataset
from sa3train.data.encode.encoder import Encoder
from sa3train.data.encode.imported import measure_round_trip
from sa3train.data.encode.settings import EncodeSettings
from sa3train.data.shards.reader import LatentStore
from sa3train.data.sources.latents import ImportedLatents
from sa3train.data.sources.listing import Listing, list_source
from sa3train.models.checkpoint import load_autoencoder

FRAMES, PADDED = (12, 20, 7), 160


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return Encoder(load_autoencoder("nano"), "nano")


def encode(source: Path, out: Path, encoder: Encoder, **settings: Any) -> EncodeResult:
    chosen = {"max_rejected": 1.0, "threads": 1, "split": 0.0, **settings}
    return encode_dataset(str(source), out, encoder, EncodeSettings(**chosen), AuditRules())


def write_released(folder: Path, encoder: Encoder, padded: bool = False) -> list[np.ndarray]:
    """As `pre_encode_dataset.py` writes, whose files are recorded in its fields; returns the real frames."""
    folder.mkdir()
    latents = []
    for number, frames in enumerate(FRAMES):
        audio_CN = torch.zeros(2, (PADDED if padded else frames) * 4096)
        audio_CN[:, : frames * 4096 - 1000] = torch.from_numpy(noise(frames * 4096 / 44100, seed=number).T)[
            :, : frames * 4096 - 1000
        ]
        whole_CF = encoder.compute_latents([audio_CN], [0])[0].numpy()
        described = {
            "path": f"/data/set/clip{number}.wav",
            "relpath": f"clip{number}.wav",
            "timestamps": [0.0, 1.0],
            "seconds_start": 0,
            "seconds_total": -(-frames * 4096 // 44100),
            "padding_mask": [1] * frames + [0] * (whole_CF.shape[1] - frames),
            "sample_rate": 44100,
            "load_time": 0.01,
            "prompt": f"noise number {number}",
        }
        np.save(folder / f"00000{number}.npy", whole_CF)
        (folder / f"00000{number}.json").write_text(json.dumps(described))
        latents.append(whole_CF[:, :frames])
    silence_1CF = encoder.compute_latents([torch.zeros(2, PADDED * 4096)], [0])[0].numpy()[None]
    np.save(folder / "silence.npy", silence_1CF)
    return latents


def change_fields(folder: Path, **changes: Any) -> None:
    path = folder / "000000.json"
    described = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in described.items() if value is not ...}))


@pytest.mark.parametrize("padded", [False, True])
def test_the_padding_is_cut_and_the_rest_kept(tmp_path: Path, encoder: Encoder, padded: bool) -> None:
    latents = write_released(tmp_path / "latents", encoder, padded)
    result = encode(tmp_path / "latents", tmp_path / "out", encoder)
    store = LatentStore(tmp_path / "out", verify="hash")
    assert (result.encoded, result.reused, len(store)) == (0, 3, 3)
    by_source = {record["source"]: (latents_CF, record) for latents_CF, record in map(store.read, range(3))}
    for number, expected_CF in enumerate(latents):
        latents_CF, record = by_source[f"00000{number}.npy"]
        assert np.array_equal(latents_CF, expected_CF.astype(np.float16))
        assert record["caption"] == f"noise number {number}"
        assert record["tags"] == {}
        assert record["original"]["path"] == f"clip{number}.wav"
        assert record["seconds"] == pytest.approx(
            min(FRAMES[number] * 4096 / 44100, 1 + FRAMES[number] // 11), abs=1e-3
        )
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    found = audit["clips"][0]["findings"][0]
    assert found["code"] == "imported"
    assert ("148 of padding" in found["detail"]) == padded
    assert store.index["settings"]["precision"] == "imported"
    again = encode(tmp_path / "latents", tmp_path / "out", encoder)
    assert (again.reused, again.index["manifest"]) == (0, result.index["manifest"]), "what is there is kept"


def test_underfit_names_samples_tags_and_its_model(tmp_path: Path, encoder: Encoder) -> None:
    folder = tmp_path / "latents"
    write_released(folder, encoder, padded=True)
    (folder / "silence.npy").unlink()
    (folder / "details.json").write_text(json.dumps({"model": "sa3-medium", "scale": 1.0, "latent_dim": 64}))
    tags: dict[str, Any] = {"artist": "someone", "bpm": "96", "nested": {"a": 1}}
    samples = 12 * 4096 - 1000
    shape = [64, PADDED]
    change_fields(folder, audio_samples=samples, latent_shape=shape, src_relpath="a/b.wav", timestamps=..., **tags)
    encode(folder, tmp_path / "out", encoder)
    store = LatentStore(tmp_path / "out", verify="hash")
    record = next(record for _, record in map(store.read, range(3)) if record["source"] == "000000.npy")
    assert record["seconds"] == pytest.approx(samples / 44100, abs=1e-5)
    assert record["tags"] == {"artist": "someone", "bpm": "96"}
    assert record["original"]["path"] == "a/b.wav"
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert {"code": "unused_fields", "severity": "note", "detail": "nested"} in audit["clips"][0]["findings"]


@pytest.mark.parametrize("known", [True, False])
def test_another_autoencoder_is_refused(tmp_path: Path, nano: Encoder, encoder: Encoder, known: bool) -> None:
    """By silence where the folder has it, else by decoding and encoding again; by the channels in any case."""
    folder = tmp_path / "latents"
    write_released(folder, nano)
    with pytest.raises(DataError, match="128 channels, not 64"):
        encode(folder, tmp_path / "out", encoder)
    if not known:
        (folder / "silence.npy").unlink()
        for path in folder.glob("*.npy"):
            np.save(path, make_other(np.load(path)))
    else:
        np.save(folder / "silence.npy", np.roll(np.load(folder / "silence.npy"), 1, axis=1))
    with pytest.raises(DataError, match="silence is off" if known else "they agree with themselves"):
        encode(folder, tmp_path / "out", nano)


def test_zeros_that_fill_up_the_array_are_no_silence() -> None:
    zeros_CF = np.zeros((64, 100), np.float32)
    assert imported._find_silence(Listing(), [ImportedLatents(zeros_CF[:, :1], zeros_CF, 1.0, "", ())]) is None


def make_other(latents_CF: np.ndarray) -> np.ndarray:
    """Latents whose channels mean something else."""
    return latents_CF[np.random.default_rng(0).permutation(len(latents_CF))]


def test_a_round_trip_knows_its_own_latents(nano: Encoder) -> None:
    latents_CF = nano.compute_latents([torch.from_numpy(tone(3.0).T.copy())], [0])[0].numpy()
    assert measure_round_trip(nano, latents_CF) > measure_round_trip(nano, make_other(latents_CF))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"padding_mask": [1] * 11}, "for each of the 12 frames"),
        ({"padding_mask": [1] * 5 + [0] + [1] * 6}, "must be 1 for the first frames"),
        ({"padding_mask": [0] * 12}, "at least one"),
        ({"padding_mask": ...}, "padding_mask must have"),
        ({"latent_shape": [64, 13]}, "latent_shape is"),
        ({"sample_rate": 48000}, "44100 Hz"),
        ({"seconds_total": "long"}, "not a length"),
        ({"seconds_total": 0.5}, "real frames are"),
    ],
)
def test_fields_that_disagree_reject_the_clip(
    tmp_path: Path, encoder: Encoder, changes: dict[str, Any], message: str
) -> None:
    write_released(tmp_path / "latents", encoder)
    change_fields(tmp_path / "latents", **changes)
    encode(tmp_path / "latents", tmp_path / "out", encoder)
    (row,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert row["source"] == "000000.npy"
    assert message in row["reason"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((64, 12), np.nan, np.float32), "NaN"),
        (np.zeros((64, 12), np.int32), "of int32"),
        (np.zeros(64, np.float32), "shape"),
        (np.array([{}]), "no NumPy array"),
        (b"PK\x05\x06" + bytes(18), "no NumPy array"),  # an .npz
    ],
)
def test_arrays_that_are_no_latents_reject_the_clip(
    tmp_path: Path, encoder: Encoder, array: np.ndarray | bytes, message: str
) -> None:
    """Also for silence, by which the folder is known."""
    write_released(tmp_path / "latents", encoder)
    for name in ("000000.npy", "silence.npy"):
        if isinstance(array, bytes):
            (tmp_path / "latents" / name).write_bytes(array)
        else:
            np.save(tmp_path / "latents" / name, array, allow_pickle=True)
        if name != "silence.npy":
            encode(tmp_path / "latents", tmp_path / "out", encoder)
            assert message in (tmp_path / "out" / "rejected.jsonl").read_text()
    with pytest.raises(DataError, match=f"silence.npy .*{message}"):
        encode(tmp_path / "latents", tmp_path / "out", encoder)


def test_files_without_their_other_half_are_problems(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    for name in ("a.npy", "b.json", "c.npy", "c.json", "notes.txt", "0/silence.npy", "0/details.json"):
        (tmp_path / name).write_bytes(b"{}")
    listing = list_source(str(tmp_path))
    assert [clip.source for clip in listing.clips] == ["c.npy"]
    assert sorted(problem.source for problem in listing.problems) == ["a.npy", "b.json"]
    assert listing.describe_skipped() == "1 .txt"
    assert {name: blob.name for name, blob in listing.of_latents.items()} == {
        name: f"0/{name}" for name in ("silence.npy", "details.json")
    }


def test_settings_that_need_audio_are_refused(tmp_path: Path, encoder: Encoder) -> None:
    write_released(tmp_path / "latents", encoder)
    with pytest.raises(DataError, match="fixes=dc and augmentations=gain need audio"):
        encode(tmp_path / "latents", tmp_path / "out", encoder, fixes=["dc"], augmentations=["gain"])
