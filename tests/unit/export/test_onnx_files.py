"""Graphs as files: nano-base with two adapters, checked, played by inference/onnx_generate.py, and in fewer bits."""

import json
import shutil
from pathlib import Path

import onnxruntime
import pytest
import torch
from onnx import helper

from helpers.nano_adapters import write_lora_adapters
from helpers.onnx_runner import STRENGTHS, load_exact, load_script, measure_error
from sa3train.cli.export import main
from sa3train.core.errors import SA3Error
from sa3train.core.files import hash_file, write_json
from sa3train.export import onnx_files
from sa3train.export import precision as precisions
from sa3train.export.check import TEXT_DTYPE, GraphCheck
from sa3train.export.graphs import Graph, build_graphs
from sa3train.export.onnx_files import MANIFEST, _convert_file
from sa3train.export.precision import STORED_PRECISIONS
from sa3train.models.dit_graph import EXAMPLE_FRAMES, ROWS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters and, in `base`, nano-base with both, checked."""
    folder = tmp_path_factory.mktemp("export")
    write_lora_adapters(folder, tuple(STRENGTHS))
    loras = [word for name, each in STRENGTHS.items() for word in ("--lora", f"{folder / name}.safetensors={each}")]
    assert main(["--model", "nano-base", *loras, "--check", str(folder / "base")]) == 0
    return folder


def test_the_files_make_the_latents_of_the_exact_path(folder: Path) -> None:
    runner, generator = load_script(), load_exact(folder)
    flags = ["--cfg-scale", "5", "--steps", "8"]
    assert measure_error(runner, generator, folder / "base", flags, cfg_scale=5.0, steps=8) < 2e-4
    generator.set_strength(0.0)
    assert measure_error(runner, generator, folder / "base", flags, cfg_scale=5.0, steps=8) > 1e-2


def test_sizes_of_inputs_are_read_from_the_files(folder: Path) -> None:
    script = load_script("tensorrt_build")
    for name, graph in build_graphs(load_exact(folder, {}).model).items():
        found = script.list_shapes(folder / "base" / f"{name}.onnx", rows=2, pairs=EXAMPLE_FRAMES // 2, tokens=5)
        assert found == {each: tuple(example.shape) for each, example in graph.inputs.items()}


@pytest.fixture(scope="module")
def with_inputs(folder: Path) -> Path:
    """A folder with nano-base with two inputs for adapters, checked, and beside it `scales.safetensors` of `one`."""
    base = ["--model", "nano-base"]
    assert main([*base, "--lora-inputs", "2", "--check", str(folder / "inputs")]) == 0
    lora, scales = folder / "one.safetensors", folder / "scales.safetensors"
    assert main(["scales", *base, "--rank", "2", "--lora", str(lora), "--overwrite", str(scales)]) == 0
    return folder / "inputs"


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 2e-4), ("int8-products", 5e-2)])
def test_files_with_inputs_make_the_latents_of_the_exact_path(
    folder: Path, with_inputs: Path, precision: str, limit: float
) -> None:
    exported = folder / f"inputs-{precision}"
    shutil.copytree(with_inputs, exported)
    manifest = json.loads((exported / MANIFEST).read_text())
    for path in exported.glob("*.onnx"):
        _convert_file(path, precision)
        manifest["files"][path.name] = hash_file(path)
    write_json(exported / MANIFEST, manifest)
    runner, flags = load_script(), ["--cfg-scale", "5", "--steps", "8"]
    given = [*flags, "--lora", str(folder / "scales.safetensors"), "--lora-strength", "0.8"]
    exact, bare = load_exact(folder, {"one": 0.8}), load_exact(folder, {})
    assert measure_error(runner, exact, exported, given, cfg_scale=5.0, steps=8) < limit
    assert measure_error(runner, bare, exported, flags, cfg_scale=5.0, steps=8) < limit
    assert measure_error(runner, exact, exported, flags, cfg_scale=5.0, steps=8) > limit


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
    monkeypatch.setattr(precisions, "SENSITIVE", ())
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


def test_products_that_int8_must_leave_out_are_found_or_missed() -> None:
    node = helper.make_node("MatMul", ["x", "W"], ["y"])
    node.metadata_props.add(key=precisions.SCOPES, value="['', 'dit.project_in']")
    model = helper.make_model(helper.make_graph([node], "step", [], []))
    with pytest.raises(SA3Error, match=r"of \.ff\.ff\.2', \.project_out', .*--precision int8"):
        STORED_PRECISIONS["int8-products"].convert(model, "step")  # type: ignore[misc]
