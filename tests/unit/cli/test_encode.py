"""`sa3-encode` as a command: what it makes, what it prints, and how it fails."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.audio import noise, write_clip
from helpers.base_yaml import CONF, render_encode
from helpers.golden import PLAIN
from helpers.shards import write_set
from sa3train.cli.encode import load_encoder, load_rules, lock_calls, main
from sa3train.data.shards.reader import LatentStore
from sa3train.data.shards.writer import ShardWriter

MODEL = str(PLAIN)


def run(*arguments: str) -> int:
    return main([f"model={MODEL}", "device=cpu", "threads=1", *arguments])


def test_the_command_makes_a_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_set(tmp_path / "my set, [1]", 6), tmp_path / "out"
    assert run(f"source={source}", f"out={out}") == 0
    printed = capsys.readouterr().out
    assert "6 clips, 0 rejected" in printed
    assert "6 latents" in printed
    assert "× real time" in printed
    assert "padding" in printed
    store = LatentStore(out, verify="hash")
    assert len(store) == 6
    assert store.index["model"]["name"] == MODEL
    assert store.index["settings"]["precision"] == "float32"
    assert run(f"source={source}", f"out={out}") == 0
    again = capsys.readouterr().out
    assert "all cached" in again and f"6 clips, 0 rejected, 2.5 s of usable audio, audited before: {out}" in again
    assert "problems" in printed and "problems" not in again


def test_a_signal_leaves_what_is_encoded_and_no_half_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, whole = write_set(tmp_path / "set", 6), tmp_path / "out", tmp_path / "whole"
    add, added = ShardWriter.add, []

    def stopped(self: ShardWriter, *arguments: Any) -> Any:
        added.append(arguments)
        if len(added) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return add(self, *arguments)

    settings = (f"source={source}", "split=0", "batch_seconds=0.1")
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", stopped)
        assert run(*settings, f"out={out}") == 130
    assert "3 latents are encoded. Run the same command" in capsys.readouterr().err
    assert not list(out.glob("*.tar"))
    assert run(*settings, f"out={out}") == 0 and "encoded: 3 at" in capsys.readouterr().out
    assert run(*settings, f"out={whole}") == 0
    assert (
        json.loads((out / "index.json").read_text())["manifest"] == LatentStore(whole, verify="hash").index["manifest"]
    )


def test_progress_is_written_as_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_set(tmp_path / "set", 3), tmp_path / "out"
    assert run(f"source={source}", f"out={out}", "progress=json") == 0
    *progress, last = map(json.loads, capsys.readouterr().out.splitlines())
    counted = [line for line in progress if line["total"] is not None]
    assert {line["stage"] for line in counted} == {"audit", "encode"}
    assert all(0 <= line["done"] <= line["total"] and line["seconds"] >= 0 for line in counted)
    loading = next(line["stage"] for line in progress if line["total"] is None)
    assert loading.startswith("loading ")
    assert (last["result"]["clips"], last["result"]["encoded"]) == (3, 3)


def test_the_yaml_holds_the_defaults_and_help_of_the_code() -> None:
    assert render_encode() in (CONF / "encode.yaml").read_text(encoding="utf-8")


def test_lists_are_written_with_commas(tmp_path: Path) -> None:
    source, out = write_set(tmp_path / "set, [two] = ${oc.env:HOME} ", 2), tmp_path / "out, 'too'"
    lists = ["fixes=trim_silence,dc,loudness", "augmentations=polarity,gain"]
    assert run(f"source={source}", f"out={out}", *lists, "split=0") == 0
    assert LatentStore(out).index["settings"]["fixes"] == ["dc", "trim_silence", "loudness"]
    assert len(LatentStore(out)) == 6


def test_a_split_may_be_a_list(tmp_path: Path) -> None:
    source, out = write_set(tmp_path / "set", 6), tmp_path / "out"
    (tmp_path / "held.txt").write_text("part2/02.wav\npart1/04.wav\n")
    assert run(f"source={source}", f"out={out}", f"split={tmp_path / 'held.txt'}") == 0
    store = LatentStore(out)
    assert {store.read_record(row)["source"] for row in store.list_rows("heldout")} == {"part2/02.wav", "part1/04.wav"}


def test_too_many_bad_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_set(tmp_path / "set", 6), tmp_path / "out"
    write_clip(source / "uncaptioned.wav", noise(0.5, seed=50))
    assert run(f"source={source}", f"out={out}") == 1
    error = capsys.readouterr().err
    assert "error: 1 of 7 clips" in error
    assert "uncaptioned.wav, no caption" in error
    (row,) = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    assert row == {"source": "uncaptioned.wav", "reason": "no caption", "codes": ["no_caption"]}
    assert run(f"source={source}", f"out={out}", "max_rejected=0.2") == 0
    assert len(LatentStore(out)) == 6
    assert "1 rejected" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source=/nowhere", "out={out}"], "cannot open /nowhere (it does not exist)"),
        (["source={source}", "out={source}"], "is the source itself"),
        (["source={source}"], "'out' must be given"),
        (["source={source}", "out={out}", "fix=dc"], "unknown setting 'fix'. Did you mean fixes?"),
        (["source={source}", "out={out}", "fixes=reverb"], "fixes=reverb is unknown"),
        (["source={source}", "out={out}", "split=1.5"], "split=1.5"),
        (["source={source}", "out={out}", "split=no-list.txt"], "cannot read the held-out list no-list.txt"),
        (["source={source}", "out={out}", "reuse={source}"], "contains no latent shards"),
        (["source={source}", "out={out}", "threads=0"], "threads=0"),
        (["source={source}", "out={out}", "duplicates=some"], "keep, drop"),
        (["source={source}", "out={out}", "max_rejected=3"], "max_rejected=3"),
        (["source={source}", "out={out}", "shard_mb=9999"], "shard_mb=9999"),
        (["source={source}", "out={out}", "model=no-such-model"], "no-such-model"),
        (["source={source}", "out={out}", "adapter=lora"], "'adapter' cannot be chosen here"),
        (["source={source}", "out={out}", "device=abacus"], "device=abacus is unknown"),
        (["source={source}", "out=/proc/nothing/x"], "cannot write to"),
    ],
)
def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    source = write_set(tmp_path / "set", 1)
    assert run(*(argument.format(source=source, out=tmp_path / "out") for argument in arguments)) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert "Audit:" not in captured.err, "what is asked is checked before the audio is"


def test_nan_in_audio_is_listed(tmp_path: Path) -> None:
    import soundfile

    source, out = write_set(tmp_path / "set", 10), tmp_path / "out"
    samples = noise(0.5)
    samples[7] = np.nan
    soundfile.write(source / "nan.wav", samples, 44100, subtype="FLOAT")
    (source / "nan.txt").write_text("x")
    assert run(f"source={source}", f"out={out}", "max_rejected=0.1") == 0
    (row,) = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    assert row["codes"] == ["not_finite"]


@pytest.mark.slow
def test_two_processes_by_torchrun(tmp_path: Path) -> None:
    source = write_set(tmp_path / "set", 8)
    settings = [f"source={source}", f"model={MODEL}", "device=cpu", "threads=1", "batch_seconds=1"]
    assert main([*settings, f"out={tmp_path / 'one'}"]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "sa3train.cli.encode", *settings, f"out={tmp_path / 'two'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("real time") == 1, "the first process speaks for all"
    one, two = LatentStore(tmp_path / "one", verify="hash"), LatentStore(tmp_path / "two", verify="hash")
    assert sorted(one.keys) == sorted(two.keys)
    rows = {key: row for row, key in enumerate(two.keys)}
    assert all(np.array_equal(one.read_latents(row), two.read_latents(rows[key])) for row, key in enumerate(one.keys))
    assert one.index["manifest"] == two.index["manifest"]
    assert {shard["file"].split("-")[1] for shard in two.index["shards"]} == {"000", "001"}


def test_what_the_model_says_of_captions_and_length() -> None:
    rules = load_rules(MODEL, "required")
    assert rules.max_tokens == 24
    assert rules.count_tokens is not None
    assert rules.count_tokens(["a slow low hum"])[0] > 3
    assert rules.longest_seconds == pytest.approx(120, abs=1)


def test_one_at_a_time() -> None:
    assert lock_calls(lambda texts: [len(text) for text in texts])(["ab"]) == [2]


def test_help_is_quick_and_whole(capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "sa3train.cli.encode", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "max_rejected" in done.stdout
    assert "optimizer" not in done.stdout, "only what can be set here"
    assert all(name in done.stdout for name in ("small-music", "small-sfx", "medium", "nano", "same-s", "same-l"))
    assert " torch\n" not in done.stderr, "nothing heavy is imported for --help"


def test_fp16_is_tried_before_it_is_taken() -> None:
    assert load_encoder(MODEL, "fp16", "cpu").precision == "float16"
    assert load_encoder("nano", "fp16", "cpu").precision == "float32", "hand-set units cancel: 3.5 % off in fp16"
