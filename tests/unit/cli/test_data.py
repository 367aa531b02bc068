"""`sa3-data audit`, `preview`, `inspect`: what they print, leave and return."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from helpers.audio import noise, tone, write_clip
from helpers.golden import PLAIN
from helpers.shards import make_data_module
from sa3train.cli.data import main
from sa3train.cli.encode import main as encode
from sa3train.cli.train import main as train

MODEL = str(PLAIN)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoded set with tags."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(8):
        write_clip(
            folder / "set" / f"{number}.wav", noise(0.4 + 0.1 * number, seed=number, peak=0.3), f"noise, no {number}"
        )
        (folder / "set" / f"{number}.json").write_text(json.dumps({"genre": "test", "bpm": 90 + number}))
    settings = ["device=cpu", "threads=1", f"model={MODEL}", "split=0.2"]
    assert encode([f"source={folder / 'set'}", f"out={folder / 'out'}", *settings]) == 0
    return folder / "out"


def test_audit_prints_and_leaves_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "set"
    write_clip(source / "good.wav", noise(1.0), "good")
    write_clip(source / "silent.wav", tone(1.0, peak=0.0), "silent")
    write_clip(source / "long.wav", noise(1.0, seed=2), "word " * 40)
    out = tmp_path / "report"
    assert main(["audit", str(source), "--out", str(out), "--model", MODEL]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].startswith("silent.wav: error: silent throughout")
    assert lines[1].startswith("long.wav: warning: caption longer than the model reads")
    assert "3 clips, 1 rejected" in printed
    assert "no problems" not in printed
    written = json.loads((out / "audit.json").read_text())
    assert len(written["clips"]) == 3
    assert (out / "audit.html").read_text().count("<svg") == 3
    assert sorted(path.name for path in source.iterdir()) == sorted(
        f"{name}.{kind}" for name in ("good", "silent", "long") for kind in ("wav", "txt")
    ), "the source is left alone"


def test_audit_shows_what_remains_after_fixes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_clip(tmp_path / "set" / "a.wav", noise(1.0, peak=0.3) + 0.2, "x")
    words = ["audit", str(tmp_path / "set"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "a.wav: warning: DC offset" in shown and "--fixes dc shows what an encode" in shown
    assert main([*words, "--fixes", "dc,loudness"]) == 0
    shown = capsys.readouterr().out
    assert "a.wav" not in shown and "mended by fixes=dc" in shown and "shows what an encode" not in shown
    with pytest.raises(SystemExit):
        main([*words, "--fixes", "dcc"])
    assert "Did you mean dc?" in capsys.readouterr().err


def test_audit_writes_its_progress_as_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_clip(tmp_path / "music" / "a.wav", noise(1.0), "x")
    assert main(["audit", str(tmp_path / "music"), "--out", str(tmp_path / "out"), "--progress-json"]) == 0
    *progress, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [(line["stage"], line["done"], line["total"], line["unit"]) for line in progress] == [
        ("audit", 0, 1, "clip"), ("audit", 1, 1, "clip")
    ]  # fmt: skip
    assert last["result"]["clips"] == 1 and last["result"]["out"] == str(tmp_path / "out")


def test_audit_has_a_folder_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "music" / "a.wav", noise(1.0), "x")
    monkeypatch.chdir(tmp_path)
    assert main(["audit", "music/"]) == 0
    assert (tmp_path / "audit-music" / "audit.html").exists()
    assert main(["audit", "nothing-here"]) == 1
    assert "error: cannot open nothing-here (it does not exist)" in capsys.readouterr().err


def test_preview_tells_what_training_will(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sa3train.data.loading.prompts import PromptSettings, Template

    flags = ["--template", "{genre} at {bpm}", "--trigger", "sks", "--trigger-probability", "0.5", "--seed", "3"]
    assert main(["preview", str(shards), "-n", "5", "--crop-seconds", "0.3", *flags]) == 0
    printed = capsys.readouterr().out.splitlines()
    settings = PromptSettings((Template("{genre} at {bpm}"),), "sks", 0.5)
    data = make_data_module(shards, 4, crop_seconds=0.3, prompts=settings, seed=3)
    loader = data.train_dataloader()
    first = [*iter(loader), *iter(loader)]
    told = [
        f"{key}  [{seconds:.0f} s]  {prompt}"
        for batch in first
        for key, seconds, prompt in zip(batch["keys"], batch["seconds_total_S"], batch["prompts"], strict=True)
    ]
    assert printed[:5] == told[:5]
    assert printed[-1].endswith("distinct prompts: 16")


def test_preview_of_a_run_tells_what_it_was_told(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SA3TRAIN_RUN_STAMP", raising=False)
    quick = ["trainer=cpu", "trainer.max_steps=1", "data.num_workers=0", "adapter.rank=2", "callbacks=none"]
    told = [
        "data.prompts.trigger=sks",
        "data.crop_seconds=0.3",
        "data.silence_tail_seconds=0",
        "seed=5",
        "data.batch_size=2",
    ]
    shutil.copytree(shards, "latents")
    assert train(["data=latents", f"model={MODEL}", "run_dir=run", *quick, *told]) == 0
    os.environ.pop("SA3TRAIN_RUN_STAMP", None)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path / "run")
    assert main(["preview", "--run", "../run", "-n", "3"]) == 0
    of_run = capsys.readouterr().out
    flags = ["--trigger", "sks", "--crop-seconds", "0.3", "--seed", "5", "--batch-size", "2"]
    assert main(["preview", str(shards), "-n", "3", *flags]) == 0
    assert of_run == capsys.readouterr().out and "sks" in of_run
    (tmp_path / "latents").rename("latents")
    (tmp_path / "latents").mkdir()
    assert main(["preview", "latents", "--run", ".", "-n", "3"]) == 0
    assert capsys.readouterr().out == of_run, "shards that have moved"
    for arguments, message in (
        (["--run", ".", "--trigger", "x", str(shards)], "trigger has no effect with --run"),
        (["gone", "--run", "."], "cannot open gone (it does not exist)"),
        (["--run", "none"], "none is not a training run"),
        ([], "name a folder of latent shards, or a training run"),
    ):
        assert main(["preview", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_preview_refuses_settings_without_effect(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", str(shards), "--template", "{mood}"]) == 1
    assert "no clip has mood" in capsys.readouterr().err
    assert main(["preview", str(shards), "--shuffle-tags", "--template", "{caption}=2", "-n", "2"]) == 0
    assert "too many to list" in capsys.readouterr().out
    assert main(["preview", str(shards.parent)]) == 1
    assert f"Did you mean {shards}?" in capsys.readouterr().err


def test_inspect_lists_verifies_and_plays(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(shards), "--verify", "-n", "100"]) == 0
    printed = capsys.readouterr().out
    assert "8 latents" in printed
    assert "verified" in printed
    keys = [line.split()[0] for line in printed.splitlines() if "noise, no" in line]
    assert len(keys) == 8
    assert main(["inspect", str(shards), "-n", "0", "--play", keys[0], "--play", keys[1], "--out", str(tmp_path)]) == 0
    samples, rate = soundfile.read(tmp_path / f"{keys[0]}.wav")
    record = next(
        row["record"]
        for path in shards.glob("*-*.jsonl")
        for row in map(json.loads, path.read_text().splitlines())
        if row["record"]["key"] == keys[0]
    )
    assert rate == 44100
    assert samples.shape == (round(record["seconds"] * 44100), 2)
    assert np.isfinite(samples).all()
    before = (tmp_path / f"{keys[0]}.wav").read_bytes()
    assert main(["inspect", str(shards), "-n", "0", "--play", keys[0], "--out", str(tmp_path)]) == 0
    assert (tmp_path / f"{keys[0]}.wav").read_bytes() == before == (tmp_path / f"{keys[0]}-2.wav").read_bytes()
    assert main(["inspect", str(shards), "--play", "nobody"]) == 1
    assert "no clip nobody" in capsys.readouterr().err


def test_inspect_verifies_silence_and_listings(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    listing, silence = sorted(copy.glob("train-*.jsonl"))[0], copy / "silence.npy"
    changed = listing.read_text().replace("noise, no", "sound, no", 1)
    assert changed != listing.read_text()
    listing.write_text(changed)
    silence.write_bytes(silence.read_bytes()[:-1] + b"x")
    assert main(["inspect", str(copy), "--verify"]) == 1
    printed = capsys.readouterr()
    assert f"damaged: {listing.stem}.tar its listing does not match" in printed.err
    assert "damaged: silence.npy its bytes" in printed.err
    assert "2 damaged file(s)" in printed.out
    silence.unlink()
    assert main(["inspect", str(copy), "--verify"]) == 1
    assert "damaged: silence.npy cannot read" in capsys.readouterr().err


def test_inspect_names_damage(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    shard = sorted(copy.glob("train-*.tar"))[0]
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    assert main(["inspect", str(copy), "--verify"]) == 1
    captured = capsys.readouterr()
    assert f"damaged: {shard.name}" in captured.err
    assert "1 damaged file" in captured.out
    assert main(["inspect", str(copy), "--verify", "--allow-damaged"]) == 0
    shard.unlink()
    assert main(["inspect", str(copy)]) == 1
    capsys.readouterr()
    assert main(["inspect", str(copy), "--allow-damaged"]) == 0
    assert "damaged, left out" in capsys.readouterr().out


def test_help_is_light() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "sa3train.cli.data", "audit", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "SOURCE" in done.stdout or "source" in done.stdout
    assert " torch\n" not in done.stderr


def test_a_source_that_is_not_there_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["audit", "nothere"]) == 1
    assert not list(tmp_path.iterdir())
