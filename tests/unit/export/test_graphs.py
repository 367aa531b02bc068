"""The graphs as modules, run by the steps of inference/onnx_generate.py, against `sa3-generate`; what is refused."""

import ast
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.generation import inpaint
from helpers.nano_adapters import write_lora_adapters
from helpers.onnx_runner import SCRIPT, STRENGTHS, load_exact, measure_error, run_modules, write_noise
from sa3train.adapters.lora_argument import LoraArgument
from sa3train.cli.export import main
from sa3train.core.errors import ConfigError, SA3Error
from sa3train.export import export_onnx, onnx_files
from sa3train.inference import Generator

LIMIT = 1e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path, Generator]]:
    """The runner on the graphs of nano-base with two adapters, their folder, and the exact path."""
    folder = tmp_path_factory.mktemp("export")
    write_lora_adapters(folder, tuple(STRENGTHS))
    adapters = [LoraArgument(str(folder / f"{name}.safetensors"), each) for name, each in STRENGTHS.items()]
    with run_modules(folder / "base", adapters) as (runner, path):
        yield runner, path, load_exact(folder)


SLOW = [pytest.param(mode, marks=pytest.mark.slow) for mode in ("guidance", "init", "inpaint")]


@pytest.mark.parametrize("mode", ["text", *SLOW])
def test_a_host_makes_the_latents_of_the_exact_path(base: tuple[Any, Path, Generator], mode: str) -> None:
    runner, exported, generator = base
    audio = write_noise(exported.parent / "in.wav")
    flags, settings = {
        "text": (["--sampler", "pingpong"], {"sampler_type": "pingpong"}),
        "guidance": (["--cfg-scale", "5"], {"cfg_scale": 5.0}),
        "init": (
            ["--init-audio", str(audio), "--init-noise-level", "0.8"],
            {"init_audio": audio, "init_noise_level": 0.8},
        ),
        "inpaint": (["--inpaint-audio", str(audio), "--inpaint", "1", "2.5"], inpaint(audio, 1, 2.5)),
    }[mode]
    flags, settings = ["--steps", "4", "--cfg-scale", "1", *flags], {"steps": 4, "cfg_scale": 1.0, **settings}
    assert measure_error(runner, generator, exported, flags, **settings) < LIMIT


def test_the_runner_refuses_a_changed_file_and_another_format(
    base: tuple[Any, Path, Generator], tmp_path: Path
) -> None:
    runner, exported, _ = base
    facts, model = json.loads((exported / "manifest.json").read_text(encoding="utf-8")), tmp_path / "copy"
    model.mkdir()
    arguments = [str(model), "-p", "x", "-o", str(tmp_path / "out.wav")]
    for name in facts["files"]:
        (model / name).write_bytes((exported / name).read_bytes() + b"\0" * (name == "step.onnx"))
    for changed, message in (({}, r"step\.onnx has changed"), ({"version": 99}, "not an export that this script")):
        (model / "manifest.json").write_text(json.dumps(facts | changed), encoding="utf-8")
        with pytest.raises(SystemExit, match=message):
            runner.main(arguments)
    assert not (tmp_path / "out.wav").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--init-noise-level 0.5", "--init-noise-level needs --init-audio"),
        ("--inpaint 1 2", "--inpaint needs --inpaint-audio"),
        ("--inpaint-audio {0}/in.wav", "--inpaint-audio needs --inpaint"),
        ("--lora-strength 0", "--lora-strength needs --lora"),
        ("--lora {0}/step.onnx", "For --lora, export with --lora-inputs."),
        ("--inpaint-audio {0}/in.wav --inpaint 2 1", "START < END"),
        ("--inpaint-audio {0}/in.wav --inpaint 1 9 --duration 8", "END <= --duration"),
        ("--inpaint-audio {0}/in.wav --inpaint -1 2", "0 <= START"),
        ("--init-audio {0}/none.wav", "none.wav is missing or not 16-bit WAV"),
        ("--init-audio {0}/manifest.json", "manifest.json is missing or not 16-bit WAV"),
        ("--latents {0}/none/x.npy", "folders that exist"),
        ("-o {0}", "must be files"),
    ],
)
def test_the_runner_says_what_is_wrong(
    base: tuple[Any, Path, Generator], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    runner, exported, _ = base
    arguments = ["-p", "x", "-o", str(tmp_path / "out.wav"), *flags.format(exported).split()]
    with pytest.raises(SystemExit) as caught:
        runner.main([str(exported), *arguments])
    assert message in f"{caught.value} {capsys.readouterr().err}"
    with pytest.raises(SystemExit):
        runner.main([str(tmp_path / "none"), *arguments])


@pytest.mark.parametrize(("lora", "word"), [("=0.2..0.9", "0.2..0.9"), ("=0.8@0.1-0.5", "@MIN-MAX")])
def test_strengths_that_change_are_refused(
    base: tuple[Any, Path, Generator], tmp_path: Path, capsys: pytest.CaptureFixture[str], lora: str, word: str
) -> None:
    adapter = base[1].parent / "one.safetensors"
    assert main(["--model", "nano", "--lora", f"{adapter}{lora}", str(tmp_path / "out")]) != 0
    assert not any(tmp_path.iterdir()) and word in capsys.readouterr().err


def test_what_exists_is_kept(
    base: tuple[Any, Path, Generator], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", "nano", str(base[1])]) != 0
    assert "--overwrite" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(SA3Error, match="something else"):
        export_onnx("nano", tmp_path, overwrite=True)
    with pytest.raises(ConfigError, match=r"unknown precision='bf16'\. Choose fp32, fp16, int8, int8-products\."):
        export_onnx("nano", tmp_path / "out", precision="bf16")


def test_a_failed_check_and_a_full_disk_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "_write_graph", lambda graph, path, identity: path.write_bytes(b""))
    monkeypatch.setattr(onnx_files, "_convert_file", lambda path, precision: None)
    for error, precision in ((float("nan"), "fp32"), (2e-3, "fp32"), (2e-2, "fp16"), (0.1, "int8")):
        exact = SimpleNamespace(compare=lambda _, error=error: {"step": error})
        monkeypatch.setattr(onnx_files, "GraphCheck", lambda *_, exact=exact: exact)
        with pytest.raises(SA3Error, match=f"step.*{precision}"):
            export_onnx("nano", tmp_path / "out", check=True, precision=precision)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_files, "_write_graph", fail)
    with pytest.raises(SA3Error, match="Nothing was left behind"):
        export_onnx("nano", tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 3])
def test_the_runner_gives_a_graph_what_it_takes(base: tuple[Any, Path, Generator], count: int) -> None:
    runner, exported, _ = base
    model = runner.Model(exported)
    model.adapt(None, 1.0)
    with pytest.raises(ValueError, match="zip"):
        model.run("encoder", *range(count))


def test_the_runner_is_short_and_needs_three_packages() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert names - sys.stdlib_module_names == {"numpy", "onnxruntime", "tokenizers"}
    assert text.count("\n") <= 150


@pytest.mark.parametrize("is_replaced", [False, True], ids=["new", "replaced"])
def test_a_killed_export_leaves_nothing_or_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_replaced: bool
) -> None:
    earlier = {"manifest.json": "{}"} if is_replaced else {}
    target = tmp_path / "out"
    for name, text in earlier.items():
        target.mkdir()
        (target / name).write_text(text, encoding="utf-8")

    def die(generator: Any, folder: Path, *_: Any) -> None:
        (folder / "step.onnx").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(onnx_files, "load_exportable", lambda *_: None)
    monkeypatch.setattr(onnx_files, "_write_graphs", die)
    if not (child := os.fork()):
        try:
            export_onnx("nano", target, overwrite=True)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert {path.name: path.read_text(encoding="utf-8") for path in target.glob("*")} == earlier
    monkeypatch.setattr(onnx_files, "_write_graphs", lambda *_: ({"new": 1}, None))
    export_onnx("nano", target, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((target / "manifest.json").read_text(encoding="utf-8"))["new"] == 1
