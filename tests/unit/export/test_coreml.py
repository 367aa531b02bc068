"""CoreML packages: what a host is told of them, and their graphs as coremltools writes them. Nothing here runs them."""

import json
import sys
from pathlib import Path

import pytest
import torch

from sa3train.cli.export import main
from sa3train.core.errors import LibraryError, SA3Error
from sa3train.export import coreml
from sa3train.export.graphs import Graph, build_graphs
from sa3train.export.package import load_exportable

tools = pytest.importorskip("coremltools", reason="coremltools is not installed: pip install coremltools")


@pytest.mark.parametrize(
    ("model", "seconds", "rows", "frames", "chunk"),
    [("nano", 1.0, 1, 76, 76), ("nano-base", 120.0, 2, 1292, 128)],
)
def test_the_manifest_says_what_the_packages_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, seconds: float, rows: int, frames: int, chunk: int
) -> None:
    graphs = dict[str, Graph]()
    monkeypatch.setattr(coreml, "_write_package", lambda graph, path: graphs.update({path.name: graph}))
    target = tmp_path / "out"
    assert main(["--model", model, "--to", "coreml", "--seconds", str(seconds), str(target)]) == 0
    shapes = {name: [tuple(each.shape) for each in graph.inputs.values()] for name, graph in graphs.items()}
    local = shapes["step.mlpackage"].pop(-2)
    assert local[1] == rows and local[2] >= frames
    assert {name: found[:2] for name, found in shapes.items()} == {
        "conditions.mlpackage": [(rows, 64), (rows, 64)],
        "prepare.mlpackage": [(rows, 65, 128), (rows, 128)],
        "step.mlpackage": [(rows, 128, frames), (rows, frames)],
        "decoder.mlpackage": [(1, 128, chunk), (1, 128, chunk)],
        "encoder.mlpackage": [(1, 2, 4096 * chunk), (chunk, 1, 256)],
    }
    facts = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    assert facts["sizes"] == {"rows": rows, "frames": frames, "chunk_frames": chunk, "prompt_tokens": 64}
    assert facts["frames"] == {"multiple_of": 2, "min": frames, "max": frames}
    assert (facts["max_seconds"], facts["max_rows"], facts["precision"]) == (seconds, rows, "fp32")
    assert (facts["guidance"] is None) == (rows == 1) and list(facts["files"]) == ["tokenizer.json"]


@pytest.mark.slow
def test_graphs_are_converted_in_fp32_of_five_dimensions(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    graphs = build_graphs(load_exportable("nano", []).model, rows=1)
    for name in ("conditions", "step", "decoder"):
        path = tmp_path / f"{name}.mlpackage"
        coreml._write_package(graphs[name], path)
        assert {each.name for each in path.iterdir()} == {"Data", "Manifest.json"}
        main_function = tools.models.MLModel(str(path), skip_model_load=True).get_spec().mlProgram.functions["main"]
        operations = main_function.block_specializations[main_function.opset].operations
        types = [output.type.tensorType for each in operations for output in each.outputs]
        assert max(len(each.dimensions) for each in types) <= 5, "CoreML has no tensors of six dimensions"
        assert tools.proto.MIL_pb2.FLOAT16 not in {each.dataType for each in types}
    assert capfd.readouterr().err == ""


class _Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_other_inputs_and_failures_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "step.mlpackage"
    with pytest.raises(SA3Error, match=r"step.mlpackage was not written.* \[\('x'.* of \[\('other'"):
        coreml._write_package(Graph(_Double(), {"other": torch.ones(1, 8)}, ("y",), {}), path)
    with pytest.raises(SA3Error, match=r"coremltools .* cannot write step.mlpackage of .* \(FileExistsError: "):
        coreml._write_package(Graph(_Double(), {"x": torch.ones(1, 8)}, ("y",), {}), path)  # where one lies already


def test_a_broken_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(LibraryError, match=r"coremltools cannot be loaded .*sa3train\[coreml\]"):
        coreml._find_coremltools()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--to coreml --check", "only macOS runs packages. Remove it."),
        ("--to coreml --lora-inputs 4", "excludes --lora-inputs. Remove it"),
        ("--to coreml --precision fp16", "in which t is too coarse. Remove --precision."),
        ("--to coreml --precision int8", "writes fp32 alone"),
        ("--seconds 5", "--seconds needs --to coreml"),
        *((f"--to coreml --seconds={text}", f"--seconds {text} is not above 0") for text in ("0", "-1", "nan", "inf")),
        ("--to coreml --seconds 121", "at most 120.00, the longest of nano"),
    ],
)
def test_what_packages_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    assert main(["--model", "nano", *flags.split(), str(tmp_path / "out")]) != 0
    assert message in capsys.readouterr().err and not any(tmp_path.iterdir())
