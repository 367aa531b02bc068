"""Graphs as files: nano-base with two adapters, checked, played by inference/onnx_generate.py, and in fewer bits."""

import shutil
from pathlib import Path

import onnxruntime
import pytest
import torch

from helpers.nano_adapters import write_lora_adapters
from helpers.onnx_runner import STRENGTHS, load_exact, load_runner, measure_error
from sa3train.cli.export import main
from sa3train.export import onnx_files
from sa3train.export.check import TEXT_DTYPE, GraphCheck
from sa3train.export.graphs import Graph, build_graphs
from sa3train.export.onnx_files import _convert_file
from sa3train.export.precision import STORED_PRECISIONS
from sa3train.models.dit_graph import ROWS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters and, in `base`, nano-base with both, checked."""
    folder = tmp_path_factory.mktemp("export")
    write_lora_adapters(folder, tuple(STRENGTHS))
    loras = [word for name, each in STRENGTHS.items() for word in ("--lora", f"{folder / name}.safetensors={each}")]
    assert main(["--model", "nano-base", *loras, "--check", str(folder / "base")]) == 0
    return folder


def test_the_files_make_the_latents_of_the_exact_path(folder: Path) -> None:
    runner, generator = load_runner(), load_exact(folder)
    flags = ["--cfg-scale", "5", "--steps", "8"]
    assert measure_error(runner, generator, folder / "base", flags, cfg_scale=5.0, steps=8) < 2e-4
    generator.set_strength(0.0)
    assert measure_error(runner, generator, folder / "base", flags, cfg_scale=5.0, steps=8) > 1e-2


@pytest.mark.parametrize(("precision", "size"), [("fp16", 0.56), ("int8", 0.45), ("int8-products", 0.46)])
def test_fewer_bits_are_smaller_and_near(folder: Path, precision: str, size: float) -> None:
    generator = load_exact(folder)
    generator.stack.apply(None)
    generator.model.autoencoder.encode(torch.zeros(1, 2, 4 * 4096))
    shutil.copytree(folder / "base", folder / precision)
    paths = list((folder / precision).glob("*.onnx"))
    before = sum(path.stat().st_size for path in paths)
    for path in paths:
        _convert_file(path, precision)
    assert sum(path.stat().st_size for path in paths) < size * before
    errors = GraphCheck(generator.model, build_graphs(generator.model)).compare(folder / precision)
    assert errors.pop(TEXT_DTYPE) < 1e-12 < max(errors.values()) < STORED_PRECISIONS[precision].limit


@pytest.mark.parametrize("precision", STORED_PRECISIONS)
def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(onnx_files, "EXTERNAL_BYTES", 1000)
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 128), torch.randn(3, 64)
    path = tmp_path / "step.onnx"
    onnx_files._write_graph(Graph(layer, {"input": x}, ("output",), {"input": {0: ROWS}}), path, "identity")
    onnx_files._convert_file(path, precision)
    assert {each.name for each in tmp_path.iterdir()} == {"step.onnx", "step.onnx.data"}
    assert b"stack_trace" not in path.read_bytes()
    assert path.stat().st_size < 4000 < (tmp_path / "step.onnx.data").stat().st_size
    found = torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"input": x.numpy()})[0])
    exact = layer(x).detach()
    assert float((found - exact).norm() / exact.norm()) < STORED_PRECISIONS[precision].limit
