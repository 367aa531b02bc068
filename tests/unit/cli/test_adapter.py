"""`sa3-adapter`: every command through its main on a checkpoint of the released layout, and every kind of bad input."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.golden import PLAIN
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.cli.adapter import build_parser, main

ADAPTERS = PLAIN / "adapters"
LORA, DORA, BORA, XS = (ADAPTERS / f"{kind}.safetensors" for kind in ("lora", "dora-rows", "bora", "lora-xs"))
OTHER = PLAIN.parent / "diff" / "adapters" / "lora.safetensors"


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def run_json(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:
    """What a command prints with --json."""
    capsys.readouterr()
    assert run(*words, "--json") == 0
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("path", sorted(ADAPTERS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_inspect_tells_every_kind_with_and_without_a_model(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", path, "--layers") == 0
    shown = capsys.readouterr().out
    assert path.stem in shown
    assert "self-attention" in shown
    assert run("inspect", path, "--model", PLAIN, "--plot", "norms.png") == 0
    shown = capsys.readouterr().out
    assert "it can be loaded" in shown
    assert "‖W' − W‖ / ‖W‖" in shown
    assert Path("norms.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "inspect", DORA, "--model", PLAIN)
    assert (found["adapter_type"], found["load_report"]["refusal"]) == ("dora-rows", None)
    assert found["load_report"]["effect"]["all"] > 0.01
    assert set(found["load_report"]["layer_effect"]) == set(found["layers"])
    assert "load_report" not in run_json(capsys, "inspect", DORA)


def test_inspect_shows_a_misfit_and_then_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", OTHER, "--model", PLAIN) == 1
    shown = capsys.readouterr()
    assert "mismatched" in shown.out
    assert shown.err.startswith("error: ")
    assert "is refused" in shown.err


def test_a_card_has_examples_generated_with_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter("koto.safetensors", replace(load_adapter(LORA), metadata={"prompts": '["solo koto"]'}))
    assert run("card", "koto.safetensors", "--model", PLAIN, "--duration", "0.2") == 0
    shown = capsys.readouterr().out
    assert "Wrote koto-hub: README.md, koto.safetensors, samples/1.flac" in shown and "no license stated" in shown
    card = Path("koto-hub/README.md").read_text()
    assert "[1.flac](samples/1.flac)" in card and "solo koto" in card
    written = run_json(capsys, "card", "koto.safetensors", "-o", "bare", "--no-prompts", "--license", "mit")
    assert written["files"] == ["README.md", "koto.safetensors"]
    assert "solo koto" in " ".join(run_json(capsys, "inspect", "koto.safetensors")["prompts"])


def test_a_model_and_an_adapter_go_to_diffusers_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", OTHER, "adapter", "--to", "diffusers") == 0
    assert run("merge", "adapter=0.5", "--model", OTHER.parents[1], "--to", "diffusers", "-o", "pipeline") == 0
    assert run("inspect", OTHER, "--model", "pipeline") == 0
    assert "it can be loaded" in capsys.readouterr().out
    found = run_json(capsys, "merge", "--model", PLAIN, "--to", "diffusers", "-o", "plain")
    assert len(found["not_carried"]) == 1
    assert not (Path("plain") / "vae").exists()
    assert run("inspect", LORA, "--model", "plain") == 1
    assert "has no vae" in capsys.readouterr().err


LINKS: dict[str, Callable[[Path], object]] = {
    "mine.safetensors": lambda link: None,
    "folder/../mine.safetensors": lambda link: None,
    "symbolic.safetensors": lambda link: link.symlink_to("mine.safetensors"),
    "hard.safetensors": lambda link: link.hardlink_to("mine.safetensors"),
    "folder/mine.safetensors": lambda link: link.parent.rmdir() or link.parent.symlink_to("."),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("target", LINKS)
@pytest.mark.parametrize("tool", ["convert", "merge", "resize", "scale"])
def test_no_tool_replaces_its_input_or_what_it_was_not_told_to(
    tool: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(LORA, "mine.safetensors")
    Path("folder").mkdir()
    LINKS[target](Path(target))
    before = Path("mine.safetensors").read_bytes()
    words = {
        "convert": ["mine.safetensors", target],
        "merge": ["mine.safetensors", LORA, "-o", target, "--rank", 2],
        "resize": ["mine.safetensors", target, "--rank", 2],
        "scale": ["mine.safetensors", target, 0.5],
    }[tool]
    for flags in ([], ["--overwrite"]):
        assert run(tool, *words, *flags) == 1
        assert "would replace the input mine.safetensors" in capsys.readouterr().err
    Path("other.safetensors").write_text("theirs")
    words = ["other.safetensors" if word == target and index else word for index, word in enumerate(words)]
    assert run(tool, *words) == 1
    assert "other.safetensors exists already" in capsys.readouterr().err
    assert Path("other.safetensors").read_text() == "theirs"
    assert run(tool, *words, "--overwrite") == 0
    assert load_adapter("other.safetensors").tensors
    assert Path("mine.safetensors").read_bytes() == before


def test_a_peft_folder_is_an_input_with_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", LORA, "peft") == 0
    before = {path.name: path.read_bytes() for path in Path("peft").iterdir()}
    for words in (("convert", "peft", "peft"), ("convert", "peft", "peft/adapter_model.safetensors")):
        assert run(*words, "--overwrite") == 1
        assert "would replace the input peft" in capsys.readouterr().err
    assert run("convert", "peft/adapter_model.safetensors", "peft", "--overwrite") == 1
    assert run("inspect", "peft", "--plot", "peft/adapter_model.safetensors") == 1
    assert {path.name: path.read_bytes() for path in Path("peft").iterdir()} == before


def test_diff_compares_tensors_or_whole_changes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("diff", LORA, LORA) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert run("diff", LORA, DORA, "--layers") == 0
    shown = capsys.readouterr()
    assert "adapter_type" in shown.out
    assert "shared layers" not in shown.out, "a table of nothing"
    assert "31 layers are not compared" in shown.err
    adapter = load_adapter(LORA)
    save_adapter("some.safetensors", replace(adapter, spec=replace(adapter.spec, include=tuple(adapter.tensors))))
    assert run("diff", LORA, "some.safetensors") == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if " include " in line)
    assert "and 28 more" in row and len(row) < 250, "a pipe has no width to fit into, but people read it"
    found = run_json(capsys, "diff", LORA, BORA, "--model", PLAIN)
    assert found["compared"] == "weight changes"
    assert all(row["cosine"] is not None for row in found["layers"].values())


def test_training_settings_that_one_adapter_does_not_record_are_no_difference(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = {"training_config": json.dumps({"trainer": {"max_steps": 2}, "seed": 0}), "run": "1", "step": "2"}
    save_adapter("ours.safetensors", replace(load_adapter(LORA), metadata=config))
    save_adapter("other.safetensors", replace(load_adapter(LORA), metadata={"step": "3"}))
    assert run("diff", "ours.safetensors", "other.safetensors") == 0
    shown = capsys.readouterr()
    assert "step" in shown.out and "None" not in shown.out and "max_steps" not in shown.out
    assert "only ours.safetensors records run, training_config, which cannot be compared" in shown.err


def test_a_pipe_gets_whole_values(capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter("long.safetensors", replace(load_adapter(LORA), metadata={"training_config": "x" * 4000}))
    assert run("inspect", "long.safetensors", "--layers") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("x" * 4000) for line in lines)
    assert any("model.transformer.layers.0.self_attn.to_qkv" in line for line in lines)


def test_convert_there_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", LORA, "folder") == 0
    assert run("convert", "folder", "back.safetensors") == 0
    before, after = load_file(LORA), load_file("back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    capsys.readouterr()
    assert run("convert", BORA, "comfy.safetensors", "--to", "comfy", "--model", PLAIN) == 0
    shown = capsys.readouterr()
    assert "not carried over: 1 layer(s) of the duration embedder" in shown.err
    assert "relative error of the written file, rounding included: 0.0" in shown.out
    for to in ("comfy", "sa3cpp"):
        found = run_json(capsys, "convert", BORA, f"{to}-again.safetensors", "--to", to, "--model", PLAIN)
        assert found["not_carried"] == ["conditioners.seconds_total.embedder.embedding.1"]
    found = run_json(capsys, "convert", XS, "x.safetensors", "--to", "comfy", "--model", PLAIN, "--dtype", "fp32")
    assert (found["adapter_type"], found["layers"]) == ("lora", 30)
    assert found["error"] < 1e-4
    found = run_json(capsys, "convert", BORA, "low", "--to", "peft", "--model", PLAIN, "--rank", 8)
    assert (found["adapter_type"], found["rank"]) == ("lora", "8")
    assert 0.01 < found["error"] < 1
    assert run("inspect", "low") == 0


def test_convert_reads_a_pickle_and_inspect_refuses_it(capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads(load_adapter(DORA).metadata["lora_config"])
    torch.save({"state_dict": load_file(DORA), "lora_config": config}, "old.ckpt")
    assert run("inspect", "old.ckpt") == 1
    assert "sa3-adapter convert old.ckpt old.safetensors" in capsys.readouterr().err
    assert run("convert", "old.ckpt", "old.safetensors") == 0
    assert "weights-only reader" in capsys.readouterr().out
    assert load_adapter("old.safetensors").fingerprint == load_adapter(DORA).fingerprint


def test_merge_into_one_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(
        capsys, "merge", f"{LORA}=0.8", f"{LORA}=0.2", "-o", "same.safetensors", "--rank", 4, "--dtype", "fp32"
    )
    assert found["error"] < 1e-6
    apart = run_json(capsys, "diff", LORA, "same.safetensors")["layers"]
    assert max(row["relative_difference"] for row in apart.values()) < 1e-4
    words = ["merge", LORA, f"{DORA}=0.5", "-o", "both.safetensors", "--model", PLAIN, "--overwrite"]
    assert run(*words, "--rank", 6) == 1
    assert "--allow-loss" in capsys.readouterr().err
    found = run_json(capsys, *words, "--rank", 6, "--allow-loss")
    assert (found["adapter_type"], found["rank"]) == ("dora-rows", "6")
    assert 0.01 < found["error"] < 1
    found = run_json(capsys, *words)  # the ranks add up
    assert (found["adapter_type"], found["rank"]) == ("dora-rows", "7")
    assert found["error"] < 1e-2  # fp16
    assert run("inspect", "both.safetensors", "--model", PLAIN) == 0
    assert run(*words[:3], BORA, *words[3:]) == 1
    assert "merge into a checkpoint" in capsys.readouterr().err


def test_merge_into_a_checkpoint_and_extract_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "merge", f"{LORA}=0.8", "-o", "merged", "--model", PLAIN)
    assert found["reports"][0]["missing"] == []
    assert run("merge", f"{LORA}=0.8", "-o", "merged", "--model", PLAIN) == 1
    assert "merged exists already" in capsys.readouterr().err
    assert run("merge", f"{LORA}=0.8", "-o", "merged", "--model", PLAIN, "--overwrite") == 0
    shown = capsys.readouterr().out
    assert "merged adapters: 1" in shown and "rounding error of the written weights: 2.00% of" in shown
    assert run("merge", f"{LORA}=0.8", "-o", "merged", "--model", "merged", "--overwrite") == 1
    assert "would replace the input" in capsys.readouterr().err
    found = run_json(capsys, "extract", "merged", "--base", PLAIN, "-o", "again.safetensors", "--rank", 4)
    assert found["error"] < 0.02  # what the checkpoint's bf16 weights rounded
    assert found["not_carried"] == []
    rows = run_json(capsys, "diff", LORA, "again.safetensors")["layers"]
    assert all(row["cosine"] > 0.999 for row in rows.values())
    metadata = load_adapter("again.safetensors").metadata
    assert (metadata["base_model"], metadata["extracted_from"]) == ("plain", "merged")
    assert len(metadata["base_hash"]) == 64
    assert run("inspect", "again.safetensors", "--model", PLAIN) == 0


def test_extract_names_what_a_lora_cannot_hold(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(PLAIN, "tuned", ignore=shutil.ignore_patterns("adapters", "cases*"))
    tensors = load_file("tuned/model.safetensors")
    tensors["model.model.transformer.project_in.weight"] += 0.1
    tensors["model.model.transformer.layers.0.pre_norm.gamma"] += 0.1
    save_file(tensors, "tuned/model.safetensors")
    found = run_json(capsys, "extract", "tuned", "--base", PLAIN, "-o", "x.safetensors", "--explained-variance", 0.99)
    assert found["layers"] == 1
    assert found["not_carried"] == ["model.transformer.layers.0.pre_norm.gamma"]


def test_resize_and_scale(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "resize", LORA, "two.safetensors", "--rank", 2)
    assert found["rank"] == "2"
    assert found["error"] > 0.1
    (advice,) = found["notes"]
    enough = int(re.search(r"rank=(\d+) would reach 99%", advice)[1])  # type: ignore[index]
    errors = {
        rank: run_json(capsys, "resize", LORA, f"{rank}.safetensors", "--rank", rank)["error"]
        for rank in (enough - 1, enough)
    }
    assert errors[enough] <= 0.1 < errors[enough - 1]
    assert (
        run_json(capsys, "resize", DORA, "dora.safetensors", "--explained-variance", 0.5)["adapter_type"] == "dora-rows"
    )
    found = run_json(capsys, "resize", XS, "xs.safetensors", "--rank", 4, "--model", PLAIN)
    assert found["notes"][0] == "lora-xs became lora"
    assert run("scale", LORA, "half.safetensors", "-0.5") == 0
    half = load_adapter("half.safetensors")
    assert half.spec.get_scale("model.transformer.project_in") == -0.5
    with safe_open("half.safetensors", framework="pt") as file:
        assert "scale" in file.metadata()["sa3train_history"]
    for dtype, low, high in (("fp32", 0, 1e-6), ("fp16", 1e-4, 1e-2)):  # rounding is what the file is wrong by
        found = run_json(capsys, "scale", DORA, f"{dtype}.safetensors", "0.5", "--model", PLAIN, "--dtype", dtype)
        assert (found["adapter_type"], found["rank"]) == ("dora-rows", "3")
        assert "for another model, its sibling too, give --model NAME" in found["notes"][0]
        assert low <= found["error"] < high
    words = ["scale", BORA, "b.safetensors", "0.5", "--model", PLAIN, "--rank", 8]
    assert run(*words) == 1
    assert "would lose" in capsys.readouterr().err
    found = run_json(capsys, *words, "--allow-loss")
    assert (found["adapter_type"], found["rank"]) == ("lora", "8")
    assert found["error"] > 0.01


def test_another_base_than_it_was_trained_on_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    adapter = load_adapter(XS)
    save_adapter("xs.safetensors", replace(adapter, metadata={**adapter.metadata, "base_hash": "0" * 64}))
    assert run("convert", "xs.safetensors", "peft", "--model", PLAIN) == 0
    assert "xs.safetensors: it was trained on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "none.safetensors"], "There is no adapter at"),
        (["inspect", PLAIN / "model.safetensors"], "whole checkpoint"),
        (["inspect", "."], "is no PEFT adapter"),
        (["inspect", LORA, "--model", "nowhere"], "nowhere"),
        (["inspect", LORA, "--plot", "/proc/none/x.png"], "cannot write"),
        (["diff", LORA, OTHER, "--model", PLAIN], "is refused"),
        (["diff", LORA, LORA, "--layers", "--json"], "--layers has no effect with --json"),
        (["convert", BORA, "out"], "peft has no bora"),
        (["convert", BORA, "out.safetensors", "--to", "comfy"], "--model NAME"),
        (["convert", LORA, "out", "--to", "comfy"], "does not suit"),
        (["convert", LORA, "out.safetensors", "--to", "peft"], "does not suit"),
        (["convert", LORA, "out.safetensors", "--rank", "2"], "use: sa3-adapter resize"),
        (["convert", "none.ckpt", "out.safetensors"], "There is no adapter at"),
        (["card", LORA, "-p", "koto"], "--prompt has no effect"),
        (["card", LORA, "--duration", "3"], "--duration has no effect"),
        (["card", LORA, "--strength", "nan"], "--strength nan"),
        (["card", LORA, "--name", "a/b"], "without slashes"),
        (["card", LORA, "--model", PLAIN], "carries no prompts"),
        (["card", LORA, "-o", OTHER.parents[1]], "exists already"),
        (["merge", LORA, "-o", "out"], "to merge into"),
        (["merge", f"{LORA}=loud", "-o", "out", "--model", PLAIN], "strength 'loud'"),
        (["merge", OTHER, "-o", "out", "--model", PLAIN], "is refused"),
        (["merge", DORA, LORA, "-o", "out.safetensors", "--rank", "3"], "needs the weights"),
        (["merge", LORA, "-o", "out", "--rank", "3", "--allow-partial"], "for checkpoints"),
        (["extract", PLAIN, "--base", PLAIN, "-o", "out.safetensors", "--rank", "4"], "nothing to extract"),
        (
            ["extract", PLAIN.parent / "diff", "--base", PLAIN, "-o", "out.safetensors", "--rank", "4"],
            "different archi",
        ),
        (["extract", PLAIN, "--base", PLAIN, "-o", "out.safetensors"], "Set --rank R"),
        (["resize", LORA, "out.safetensors"], "Set --rank R"),
        (["resize", LORA, "out.safetensors", "--rank", "0"], "from 1 to"),
        (["resize", LORA, "out.safetensors", "--rank", "100000"], "from 1 to"),
        (["resize", LORA, "out.ckpt", "--rank", "2"], "does not suit"),
        (["resize", LORA, "out.gguf", "--rank", "2"], "does not suit"),
        (["convert", LORA, "out.safetensors", "--to", "gguf"], "does not suit"),
        (["convert", LORA, "out.safetensors", "--dtype", "q8_0"], "cannot be written in q8_0"),
        (["convert", LORA, "out.safetensors", "--to", "sa3cpp", "--dtype", "bf16"], "cannot be written in bf16"),
        (["inspect", LORA, "--plot", "out.json"], r".png"),
        (["merge", f"{LORA}=0", "-o", "out.safetensors", "--rank", "2"], "strength 0"),
        (["merge", LORA, "-o", "out", "--model", PLAIN, "--dtype", "fp32"], "--dtype"),
        (["scale", LORA, "out.safetensors", "1e30"], "factor"),
        (["resize", LORA, "out.safetensors", "--explained-variance", "2"], "at most 1"),
        (["resize", XS, "out.safetensors", "--rank", "2"], "needs the weights"),
        (["scale", LORA, "out.safetensors", "0"], "other than 0"),
        (["scale", DORA, "out.safetensors", "0.5"], "needs the weights"),
        (["scale", BORA, "out.safetensors", "0.5"], "not proportional"),
        (["convert", DORA, "out.safetensors", "--to", "comfy"], "--model NAME"),
        (["convert", LORA, "out.safetensors", "--dense"], "Set --to comfy"),
    ],
    ids=lambda value: " ".join(Path(str(word)).name for word in value)[:60] if isinstance(value, list) else "",
)
def test_wrong_input_is_a_message_and_leaves_nothing(
    words: list[Any], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(*words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ["convert a b", "convert a -o b", "resize -o b a --rank 2", "scale a 1.3 --output=b"])
def test_every_tool_takes_its_output_as_a_flag(words: str) -> None:
    parsed = build_parser("-o" in words or "--output" in words).parse_args(words.split())
    assert (parsed.source, parsed.target) == ("a", "b")


@pytest.mark.parametrize(
    "words", ["inspect no.pt", "diff no.pt b", "merge no.pt=0.5 b -o c", "resize no.pt b --rank 2"]
)
def test_what_is_not_there_is_said_before_torch_is_loaded(words: str) -> None:
    code = f"import sys; from sa3train.cli.adapter import main; main({words.split()}); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False" and "There is no adapter at no.pt" in shown.stderr
