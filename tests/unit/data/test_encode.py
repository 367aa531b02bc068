"""From a folder to shards: every clip once, at its own length; killed, changed, repeated, shared among processes."""

import functools
import gc
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.audio import noise, tone, write_clip
from helpers.shards import write_set
from sa3train.audio.io import load_audio, read_whole
from sa3train.audio.metrics import measure_loudness_lufs, measure_peak_db
from sa3train.core.errors import DataError, SA3Error
from sa3train.data.audit.audit import AuditRules
from sa3train.data.encode.encode import EncodeResult, encode_dataset
from sa3train.data.encode.encoder import Encoder
from sa3train.data.encode.fixes import apply_fixes
from sa3train.data.encode.plan import make_clip_key
from sa3train.data.encode.settings import EncodeSettings
from sa3train.data.encode.workers import Workers
from sa3train.data.shards.index import list_shards
from sa3train.data.shards.reader import LatentStore
from sa3train.data.shards.shard_file import read_listing


def encode(source: Path, out: Path, encoder: Encoder, **settings: Any) -> EncodeResult:
    chosen = {"max_rejected": 1.0, "threads": 1, "batch_seconds": 2.0, **settings}
    return encode_dataset(str(source), out, encoder, EncodeSettings(**chosen), AuditRules())


def contents(out: Path) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Every take by key, with its record and the bytes of its latents. Fails when one is there twice."""
    store = LatentStore(out, verify="hash")
    assert len(set(store.keys)) == len(store.keys), "a clip is there twice"
    return {key: (store.read_record(row), store.read_latents(row).tobytes()) for row, key in enumerate(store.keys)}


def rejected(out: Path) -> dict[str, str]:
    lines = (out / "rejected.jsonl").read_text().splitlines()
    return {row["source"]: row["reason"] for row in map(json.loads, lines)}


def stale_or_torn(out: Path) -> list[Path]:
    return [*out.glob("*.part"), *out.glob("*.stale"), *out.glob(".*.part")]


def test_every_clip_at_its_own_length(tmp_path: Path, encoder: Encoder) -> None:
    source = write_set(tmp_path / "set", 8)
    report = encode(source, tmp_path / "out", encoder, split=0.25)
    store = LatentStore(tmp_path / "out", verify="hash")
    assert len(store) == report.encoded == 8
    for row in range(8):
        latent_CT, record = store.read(row)
        audio_CN = load_audio(source / record["source"])
        expected = encoder.encode([audio_CN], [0])[0]
        assert np.allclose(latent_CT, expected, rtol=2e-3, atol=1e-4), "but for the rounding to float16"
        assert latent_CT.shape[1] == -(-audio_CN.shape[1] // 4096) == record["frames"]
        assert record["seconds"] == pytest.approx(audio_CN.shape[1] / 44100, abs=1e-5)
        assert record["caption"] == f"noise number {int(record['source'][6:8])}"
        assert record["key"] == make_clip_key(record["source"])
        assert record["split"] == store.split[row]
    assert store.index["rejected"] == 0
    assert store.index["model"]["fingerprint"] == encoder.autoencoder.fingerprint()
    assert report.padding < 0.3, "of clips this short; see the benchmark for real ones"
    assert (tmp_path / "out" / "README.md").read_text().startswith("# Latents of")
    assert not stale_or_torn(tmp_path / "out")


def test_rates_and_channels_are_brought_to_one(tmp_path: Path, encoder: Encoder) -> None:
    source = tmp_path / "set"
    source.mkdir()
    for name, samples, rate in (
        ("low", noise(0.5, 8000, channels=1), 8000),
        ("odd", noise(0.5, 44099), 44099),
        ("surround", noise(0.5, 96000, channels=6, peak=0.2), 96000),
    ):
        soundfile.write(source / f"{name}.wav", samples, rate)
        (source / f"{name}.txt").write_text(name)
    encode(source, tmp_path / "out", encoder)
    for record, latents in contents(tmp_path / "out").values():
        audio_CN = load_audio(source / record["source"])
        assert np.frombuffer(latents, np.float16).size == 64 * record["frames"]
        assert record["seconds"] == pytest.approx(audio_CN.shape[1] / 44100, abs=1e-4) == pytest.approx(0.5, abs=1e-3)
        assert record["original"]["sample_rate"] in (8000, 44099, 96000)


def test_a_second_run_does_nothing(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_set(tmp_path / "set", 5)
    encode(source, tmp_path / "out", encoder)
    shards = {path: path.stat().st_mtime_ns for path in list_shards(tmp_path / "out")}
    before, index = contents(tmp_path / "out"), (tmp_path / "out" / "index.json").read_text()
    monkeypatch.setattr("sa3train.data.audit.audit.audit_clip", lambda *_: pytest.fail("audited again"))
    report = encode(source, tmp_path / "out", encoder)
    assert report.encoded == report.reused == 0
    assert {path: path.stat().st_mtime_ns for path in list_shards(tmp_path / "out")} == shards
    assert contents(tmp_path / "out") == before
    assert (tmp_path / "out" / "index.json").read_text() == index


def test_changes_cost_only_what_changed(tmp_path: Path, encoder: Encoder) -> None:
    source, out = write_set(tmp_path / "set", 6), tmp_path / "out"
    encode(source, out, encoder, split=0.0)
    before = contents(out)
    (source / "part0" / "00.txt").write_text("another caption")
    (source / "part1" / "01.wav").unlink()
    write_clip(source / "new.wav", noise(0.4, seed=50), "new")
    write_clip(source / "part2" / "02.wav", noise(0.6, seed=51), "other sound")
    report = encode(source, out, encoder, split=0.0)
    after = contents(out)
    assert (report.encoded, report.reused) == (2, 4), "two new sounds, four latents taken over"
    assert {record["source"] for record, _ in after.values()} == {
        "part0/00.wav", "part0/03.wav", "part1/04.wav", "part2/05.wav", "part2/02.wav", "new.wav",
    }  # fmt: skip
    changed = make_clip_key("part0/00.wav")
    assert after[changed][0]["caption"] == "another caption"
    assert after[changed][1] == before[changed][1]
    assert not stale_or_torn(out)
    index = json.loads((out / "index.json").read_text())
    assert sum(shard["clips"] for shard in index["shards"]) == 6


def test_the_old_set_stays_whole_until_the_new_one_is(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_set(tmp_path / "set", 6), tmp_path / "out"
    encode(source, out, encoder)
    before = contents(out)
    (source / "part0" / "00.txt").write_text("another caption")
    with monkeypatch.context() as patched:
        patched.setattr("sa3train.data.encode.encode.build_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            encode(source, out, encoder)
    assert contents(out) == before
    report = encode(source, out, encoder)
    assert report.encoded == report.reused == 0, "all but the index was there"
    after = contents(out)
    assert {key: latents for key, (_, latents) in after.items()} == {
        key: latents for key, (_, latents) in before.items()
    }
    assert after != before
    assert sorted(path.suffix for path in out.glob("*-*-*")) == [".jsonl", ".jsonl", ".tar", ".tar"]


def test_other_settings_are_refused_unless_told(tmp_path: Path, encoder: Encoder) -> None:
    source, out = write_set(tmp_path / "set", 3), tmp_path / "out"
    encode(source, out, encoder)
    with pytest.raises(DataError, match=r"fixes was \[\], now \['dc'\].*overwrite=true"):
        encode(source, out, encoder, fixes=("dc",))
    other = Encoder(encoder.autoencoder, "x", chunked=False)
    with pytest.raises(DataError, match="chunked was True, now False"):
        encode(source, out, other)
    with pytest.raises(DataError, match=r"source was .*set.*other"):
        encode(write_set(tmp_path / "other", 3), out, encoder)
    before = contents(out)
    report = encode(source, out, encoder, fixes=("loudness",), overwrite=True)
    assert report.encoded == 3
    assert all(before[key][1] != latents for key, (_, latents) in contents(out).items())


def test_latents_are_taken_over_from_another_folder(tmp_path: Path, encoder: Encoder) -> None:
    source = write_set(tmp_path / "set", 5)
    encode(source, tmp_path / "one", encoder)
    write_clip(source / "more.wav", noise(0.5, seed=70), "more")
    report = encode(source, tmp_path / "two", encoder, reuse=str(tmp_path / "one"))
    assert (report.encoded, report.reused) == (1, 5)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert all(two[key][1] == latents for key, (_, latents) in one.items())
    report = encode(source, tmp_path / "three", encoder, reuse=str(tmp_path / "one"), fixes=("loudness",))
    assert report.reused == 0, "other fixes are other latents"


def test_damage_that_was_set_aside_is_computed_again(tmp_path: Path, encoder: Encoder) -> None:
    source = write_set(tmp_path / "set", 4)
    encode(source, tmp_path / "one", encoder, split=0.0)
    before = contents(tmp_path / "one")
    (shard,) = list_shards(tmp_path / "one")
    entry = list(read_listing(shard))[1]
    content = bytearray(shard.read_bytes())
    content[entry.npy_offset + 140] ^= 0xFF
    shard.write_bytes(content)
    report = encode(source, tmp_path / "two", encoder, split=0.0, reuse=str(tmp_path / "one"))
    assert (report.encoded, report.reused) == (1, 3)
    for key, (_, latents) in contents(tmp_path / "two").items():
        same = [np.frombuffer(content, np.float16) for content in (latents, before[key][1])]
        assert np.allclose(*same, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("damage", ["flipped", "cut short", "record"])
def test_a_damaged_shard_is_not_taken_for_done(
    tmp_path: Path, encoder: Encoder, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = write_set(tmp_path / "set", 4), tmp_path / "out"
    encode(source, out, encoder, split=0.0)
    before = {key: record for key, (record, _) in contents(out).items()}
    (shard,) = list_shards(out)
    entry = list(read_listing(shard))[1]
    content = bytearray(shard.read_bytes())
    if damage == "cut short":
        content = content[: entry.npy_offset + 200]
    else:
        content[entry.npy_offset + 140 if damage == "flipped" else entry.json_offset + 20] ^= 1
    shard.write_bytes(content)
    with caplog.at_level("WARNING", "sa3train"):
        report = encode(source, out, encoder, split=0.0)
    assert f"{shard}" in caplog.text
    assert (report.encoded, report.reused) == {"flipped": (1, 3), "cut short": (3, 1), "record": (0, 4)}[damage]
    assert LatentStore(out, verify="hash").verify_shards() == {}
    after = {key: record for key, (record, _) in contents(out).items()}
    assert [record["caption"] for record in after.values()] == [record["caption"] for record in before.values()]


def test_a_deleted_shard_is_made_again(tmp_path: Path, encoder: Encoder) -> None:
    source, out = write_set(tmp_path / "set", 6), tmp_path / "out"
    encode(source, out, encoder)
    before = contents(out)
    list_shards(out)[-1].unlink()
    report = encode(source, out, encoder)
    assert 0 < report.encoded <= 6
    assert contents(out) == before


def test_duplicates_are_computed_once(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_set(tmp_path / "set", 3)
    for number in range(3):
        write_clip(source / f"copy{number}.wav", noise(0.3, seed=0, peak=0.3), f"copy {number}")
    computed = []
    latents = Encoder.compute_latents
    monkeypatch.setattr(
        Encoder, "compute_latents", lambda self, clips, seeds: computed.extend(seeds) or latents(self, clips, seeds)
    )
    encode(source, tmp_path / "out", encoder, split=0.0)
    found = contents(tmp_path / "out")
    assert len(found) == 6
    assert len(computed) - 1 == 3, "three sounds, and silence"
    assert len({latents for _, latents in found.values()}) == 3
    with caplog.at_level("INFO"):
        encode(source, tmp_path / "few", encoder, split=0.0, duplicates="drop")
    assert len(contents(tmp_path / "few")) == 3
    index = json.loads((tmp_path / "few" / "index.json").read_text())
    assert (index["rejected"], index["dropped_duplicates"]) == (0, 3), "as the audit counts, whatever max_rejected"
    dropped = rejected(tmp_path / "few")
    assert len(dropped) == 3
    assert "dropped: of copy0.wav" in dropped["copy1.wav"]
    assert "copy1.wav (as copy0.wav)" in caplog.text


def test_duplicates_never_straddle_the_split(tmp_path: Path, encoder: Encoder) -> None:
    source = tmp_path / "set"
    for number in range(12):
        for copy in range(2):
            write_clip(source / f"{number}-{copy}.wav", noise(0.2, seed=number), "x")
    encode(source, tmp_path / "out", encoder, split=0.4)
    splits: dict[str, set[str]] = {}
    for record, _ in contents(tmp_path / "out").values():
        splits.setdefault(record["content_hash"], set()).add(record["split"])
    assert len(splits) == 12
    assert all(len(found) == 1 for found in splits.values())
    assert {next(iter(found)) for found in splits.values()} == {"train", "heldout"}


def test_bad_clips_are_listed_and_never_replaced(tmp_path: Path, encoder: Encoder) -> None:
    source, out = write_set(tmp_path / "set", 4), tmp_path / "out"
    write_clip(source / "silent.wav", tone(0.5, peak=0.0), "silent")
    soundfile.write(source / "whole.wav", np.round(tone(0.5) * 9999), 44100, subtype="FLOAT")
    (source / "whole.txt").write_text("integers stored as floats")
    write_clip(source / "none.wav", noise(0.5, seed=90))
    write_clip(source / "empty.wav", noise(0.5, seed=91), " ")
    (source / "broken.wav").write_bytes(b"RIFFxxxx")
    (source / "broken.txt").write_text("x")
    with pytest.raises(DataError, match=r"5 of 9 clips .* rejected, more than max_rejected=0.1"):
        encode(source, out, encoder, max_rejected=0.1)
    assert len(rejected(out)) == 5
    assert not list_shards(out), "nothing is computed when the source is not fit"
    report = encode(source, out, encoder, max_rejected=0.6)
    assert len(contents(out)) == 4
    assert report.index["rejected"] == 5
    reasons = rejected(out)
    assert reasons["silent.wav"].startswith("silent throughout")
    assert reasons["whole.wav"].startswith("float samples at the scale of integers")
    assert reasons["none.wav"] == "no caption"
    assert reasons["empty.wav"] == "empty caption"
    assert reasons["broken.wav"].startswith("cannot be read")


def test_nothing_left_is_an_error(tmp_path: Path, encoder: Encoder) -> None:
    write_clip(tmp_path / "set" / "a.wav", tone(0.5))
    with pytest.raises(DataError, match="1 of 1 clips"):
        encode(tmp_path / "set", tmp_path / "out", encoder)


def test_clips_that_fail_while_encoding_are_listed(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_set(tmp_path / "set", 5), tmp_path / "out"
    monkeypatch.setattr("sa3train.data.encode.pipeline.read_whole", lambda path: read_whole(_swapped(path)))

    def _swapped(path: Any) -> Any:
        return str(source / "part0" / "00.wav") if str(path).endswith("01.wav") else path

    latents = Encoder.compute_latents

    def spoiled(self: Encoder, clips: list[torch.Tensor], seeds: list[int]) -> list[torch.Tensor]:
        made = latents(self, clips, seeds)
        return [
            z * float("nan") if clip.shape[1] == round(0.4 * 44100) else z for z, clip in zip(made, clips, strict=True)
        ]

    monkeypatch.setattr(Encoder, "compute_latents", spoiled)
    report = encode(source, out, encoder, split=0.0)
    assert len(contents(out)) == 3
    reasons = rejected(out)
    assert reasons["part1/01.wav"].startswith("changed while it was being encoded")
    assert reasons["part2/02.wav"].startswith("the autoencoder returned non-finite latents")
    assert report.index["rejected"] == 2
    audit = json.loads((out / "audit.json").read_text())["summary"]["findings"]
    assert audit["changed"]["clips"] == audit["bad_latent"]["clips"] == 1
    with pytest.raises(DataError, match="2 of 5 clips are rejected"):
        encode(source, out, encoder, split=0.0, max_rejected=0.2)
    monkeypatch.undo()
    report = encode(source, out, encoder, split=0.0)
    assert (report.encoded, report.index["rejected"]) == (2, 0), "tried again, and well"


def test_fixes_are_applied_and_sources_left_alone(tmp_path: Path, encoder: Encoder) -> None:
    source, out = tmp_path / "set", tmp_path / "out"
    silence = np.zeros((round(0.7 * 44100), 2), np.float32)
    write_clip(source / "a.wav", np.concatenate([silence, noise(0.8, peak=0.1), silence]) + 0.05, "x")
    before = (source / "a.wav").read_bytes()
    encode(source, out, encoder, fixes=("loudness", "trim_silence", "dc"))
    ((record, _),) = contents(out).values()
    assert (source / "a.wav").read_bytes() == before
    assert list(record["applied"]) == ["dc", "trim_silence", "loudness"]
    assert record["applied"]["dc"] == pytest.approx(0.05, abs=1e-3)
    assert record["applied"]["trim_silence"] == pytest.approx([0.65, 0.65], abs=0.01)
    assert record["seconds"] == pytest.approx(0.9, abs=0.01)
    assert record["applied"]["loudness"] > 3


def test_the_loudness_fix_keeps_below_its_ceiling() -> None:
    quiet, _ = apply_fixes(torch.from_numpy(noise(2.0, peak=0.02).T.copy()), 44100, ["loudness"])
    assert measure_loudness_lufs(quiet, 44100) == pytest.approx(-14, abs=0.1)
    spiky = noise(2.0, peak=0.02)
    spiky[44100] = 0.9
    mended, applied = apply_fixes(torch.from_numpy(spiky.T.copy()), 44100, ["loudness"])
    assert measure_peak_db(mended) == pytest.approx(-1.0, abs=0.01)
    assert applied["loudness"] == pytest.approx(-1.0 - 20 * np.log10(0.9), abs=0.01)


def test_a_hit_without_offset_is_left_as_it_is_and_its_silence_trimmed() -> None:
    time = torch.arange(44100) / 44100
    audio_CN = ((time < 0.2) * torch.exp(-30 * time) * torch.sin(2 * torch.pi * 35 * time)).expand(2, -1)
    assert audio_CN.mean() > 10 ** (-60 / 20)
    mended, applied = apply_fixes(audio_CN, 44100, ["dc", "trim_silence"])
    assert applied["dc"] == 0
    assert applied["trim_silence"][1] == pytest.approx(0.75, abs=0.05)
    assert torch.equal(mended, audio_CN[:, : mended.shape[1]])


def test_clips_shorter_than_a_latent_frame_are_one_frame(tmp_path: Path, encoder: Encoder) -> None:
    source, out = write_set(tmp_path / "set", 2), tmp_path / "out"
    for samples in (2, 500, 4095):
        write_clip(source / f"hat{samples}.wav", noise(1.0, seed=samples)[:samples], "a hat")
    report = encode(source, out, encoder, fixes=("dc", "loudness", "trim_silence"), augmentations=("gain",))
    assert report.index["rejected"] == 0
    short = [(record, content) for key, (record, content) in contents(out).items() if key.startswith("hat")]
    assert {record["source"] for record, _ in short} == {"hat2.wav", "hat500.wav", "hat4095.wav"}
    frame = encoder.autoencoder.latent_channels * np.dtype(np.float16).itemsize
    assert all(len(content) == frame for _, content in short)
    assert report.audit is not None
    assert report.audit.findings["too_short"] == 3


def test_a_finding_whose_fix_is_applied_does_not_advise_it_again(tmp_path: Path, encoder: Encoder) -> None:
    source, out = tmp_path / "set", tmp_path / "out"
    for number in range(2):
        write_clip(source / f"{number}.wav", noise(1.0, seed=number, peak=0.3) + 0.05, "offset")
    plain = encode(source, out, encoder).audit
    fixed = encode(source, out, encoder, fixes=("dc",), overwrite=True).audit
    assert plain is not None
    assert fixed is not None
    assert "fixes=dc" in plain.as_json()["findings"]["dc_offset"]["fix"]
    assert "encode with" not in fixed.format_table()
    assert fixed.as_json()["findings"]["dc_offset"]["severity"] == "note"
    rows = json.loads((out / "audit.json").read_text())["clips"]
    assert {finding["severity"] for row in rows for finding in row["findings"]} == {"note"}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30_000), st.sampled_from([8000, 44100, 96000]), st.integers(0, 3))
def test_every_fix_serves_every_length(samples: int, rate: int, seed: int) -> None:
    hit_CN = torch.from_numpy(noise(1.0, samples, peak=0.9, seed=seed).T.copy())
    fixed_CN, applied = apply_fixes(hit_CN, rate, ["loudness", "trim_silence"])
    assert torch.isfinite(fixed_CN).all()
    assert np.isfinite(applied["loudness"])
    assert measure_peak_db(fixed_CN) < -0.99


def test_a_clip_that_trimming_leaves_too_short(tmp_path: Path, encoder: Encoder) -> None:
    source = write_set(tmp_path / "set", 2)
    click = np.zeros((44100, 2), np.float32)
    click[22050] = 0.5
    write_clip(source / "click.wav", click, "a click")
    encode(source, tmp_path / "out", encoder, fixes=("trim_silence",))
    assert len(contents(tmp_path / "out")) == 3, "50 ms on either side are kept"


def test_views_are_further_takes_of_training_clips(tmp_path: Path, encoder: Encoder) -> None:
    source, out = write_set(tmp_path / "set", 6), tmp_path / "out"
    encode(source, out, encoder, augmentations=("polarity", "gain"), split=0.3)
    found = contents(out)
    held = [record for record, _ in found.values() if record["split"] == "heldout"]
    trained = [record for record, _ in found.values() if record["split"] == "train"]
    assert held
    assert all(record["augmentation"] == "original" for record in held)
    assert len(trained) == 3 * (6 - len(held))
    clip = next(record["clip"] for record in trained)
    audio_CN = load_audio(source / found[clip][0]["source"])
    inverted = encoder.encode([-audio_CN], [0])[0]
    assert inverted is not None
    stored = np.frombuffer(found[f"{clip}-polarity"][1], np.float16)
    assert np.allclose(stored, inverted.ravel(), rtol=2e-3, atol=1e-4)
    decibels = found[f"{clip}-gain"][0]["applied"]["gain"]
    assert -9 <= decibels <= -3


def test_latents_inside_the_source_are_no_source(tmp_path: Path, encoder: Encoder) -> None:
    source = write_set(tmp_path / "set", 2)
    with pytest.raises(DataError, match="the source itself"):
        encode(source, source, encoder)
    encode(source, source / "latents", encoder)
    again = encode(source, source / "latents", encoder)
    assert again.audit is not None
    assert (again.encoded, again.audit.clips, again.audit.rejected) == (0, 2, 0)
    assert again.audit.findings["own_folder"] == 1


@pytest.mark.parametrize("name", ["README.md", "audit.json", "audit.html", "index.json"])
def test_files_of_the_users_are_not_replaced(tmp_path: Path, encoder: Encoder, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(DataError, match=f"{name} is not of sa3train"):
        encode(write_set(tmp_path / "set", 1), tmp_path / "out", encoder)
    assert (tmp_path / "out" / name).read_text() == "mine"


@pytest.mark.parametrize("name", [".encode/audit-000.jsonl", ".encode/new", "train-000-00000.tar", "index.json"])
def test_pipes_in_the_output_folder_are_never_opened(tmp_path: Path, encoder: Encoder, name: str) -> None:
    source = write_set(tmp_path / "set", 2)
    encode(source, tmp_path / "out", encoder, split=0)
    (tmp_path / "out" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "out" / name)
    with pytest.raises(SA3Error, match=rf"{Path(name).name} in .* is in the way, it is a named pipe"):
        encode(source, tmp_path / "out", encoder, split=0)


def test_one_run_at_a_time(tmp_path: Path, encoder: Encoder) -> None:
    from sa3train.data.encode.workers import lock_output_dir

    source = write_set(tmp_path / "set", 1)
    with lock_output_dir(tmp_path / "out", Workers()), pytest.raises(DataError, match="another encode is writing"):
        encode(source, tmp_path / "out", encoder)


def test_a_folder_that_cannot_be_made(tmp_path: Path, encoder: Encoder) -> None:
    source = write_set(tmp_path / "set", 1)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write to"):
        encode(source, tmp_path / "file" / "out", encoder)


def fork(run: Callable[[], object]) -> int:
    """Run a function in a forked process; returns its id."""
    gc.collect()
    child = os.fork()
    if child == 0:
        gc.disable()  # whatever else this process inherited is none of its business
        try:
            run()
        finally:
            os._exit(0)
    return child


@pytest.mark.parametrize("name", ["rejected.jsonl", "audit.html", "silence.npy", "index.json", "train-000-00000.jsonl"])
def test_killed_while_it_writes_a_file(name: str, tmp_path: Path, encoder: Encoder) -> None:
    """SIGKILL just before the file gets its name: the next run leaves nothing of it."""
    source, out, replace = write_set(tmp_path / "set", 3), tmp_path / "out", Path.replace

    def replace_or_die(path: Path, target: Path) -> Path:
        if target.name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    def run() -> None:
        Path.replace = replace_or_die  # type: ignore[assignment, method-assign]
        encode(source, out, encoder)

    _, status = os.waitpid(fork(run), 0)
    assert os.WIFSIGNALED(status) and not (out / name).exists()
    assert stale_or_torn(out)
    encode(source, out, encoder)
    assert len(LatentStore(out, verify="hash")) == 3
    assert not stale_or_torn(out)


@pytest.mark.slow
def test_killed_at_20_random_moments_and_run_again(tmp_path: Path, encoder: Encoder) -> None:
    """SIGKILL in the audit, the encode or the writing; the set is whole, each clip once, bit for bit."""
    source = write_set(tmp_path / "set", 24)
    started = time.perf_counter()
    encode(source, tmp_path / "calm", encoder)
    whole = time.perf_counter() - started
    expected = contents(tmp_path / "calm")
    rng, out, cut, tries = random.Random(0), tmp_path / "out", 0, 0
    while cut < 20:  # one that was done before it was killed does not count
        child = fork(functools.partial(encode, source, out, encoder))
        time.sleep(rng.uniform(0.05, 0.35) * whole)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        cut, tries = cut + os.WIFSIGNALED(status), tries + 1
        assert tries < 200, "hardly any was at work"
        if (out / "index.json").exists():  # it was done: begin anew in another folder
            assert contents(out) == expected
            out = tmp_path / f"out{tries}"
    encode(source, out, encoder)
    assert contents(out) == expected
    assert not stale_or_torn(out)
    both = [json.loads((folder / "index.json").read_text()) for folder in (out, tmp_path / "calm")]
    assert both[0]["manifest"] == both[1]["manifest"]


@pytest.mark.slow
def test_several_processes_make_the_same_set(tmp_path: Path, encoder: Encoder) -> None:
    """Three forked processes that meet at barriers; then one of them alone finds all done."""
    import multiprocessing

    source = write_set(tmp_path / "set", 10)
    encode(source, tmp_path / "one", encoder)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)

    def share(rank: int) -> None:
        workers = Workers(rank, 3, lambda: barrier.wait() and None)
        settings = EncodeSettings(max_rejected=1.0, threads=1, batch_seconds=2.0)
        encode_dataset(str(source), tmp_path / "three", encoder, settings, AuditRules(), workers)

    processes = [context.Process(target=share, args=(rank,)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    assert len({path.name.split("-")[1] for path in list_shards(tmp_path / "three")}) == 3, "each wrote its own"
    report = encode(source, tmp_path / "three", encoder)
    assert report.encoded == report.reused == 0


def test_fewer_processes_take_over_what_more_left(tmp_path: Path, encoder: Encoder) -> None:
    source, out = write_set(tmp_path / "set", 4), tmp_path / "out"
    encode(source, tmp_path / "calm", encoder)
    encode(source, out, encoder)
    for shard in list_shards(out):  # as a killed process of rank 5 would have left it
        part = shard.with_name(shard.name.replace("-000-", "-005-") + ".part")
        shard.with_suffix(".jsonl").unlink()
        part.write_bytes(shard.read_bytes()[:-900])
        shard.unlink()
    report = encode(source, out, encoder)
    assert report.encoded <= 2, "only what was cut off"
    assert contents(out) == contents(tmp_path / "calm")


def test_a_silence_that_is_not_what_was_written_is_refused(tmp_path: Path, encoder: Encoder) -> None:
    source, out = write_set(tmp_path / "set", 2), tmp_path / "out"
    encode(source, out, encoder)
    good = (out / "silence.npy").read_bytes()
    (out / "silence.npy").write_bytes(good[:-2] + b"\0\1")
    with pytest.raises(DataError, match=r"damaged .*silence\.npy: .*hash.* Run the same sa3-encode"):
        LatentStore(out, verify="hash")
    (out / "silence.npy").write_bytes(good[:40])
    store = LatentStore(out)
    with pytest.raises(DataError, match=r"damaged .*silence\.npy: .*array"):
        store.get_silence(3)
    encode(source, out, encoder)
    assert (out / "silence.npy").read_bytes() == good
    assert LatentStore(out, verify="hash").get_silence(3).shape[1] == 3
