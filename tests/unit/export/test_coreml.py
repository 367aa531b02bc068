"""CoreML packages: inputs and operators of what coremltools writes. Nothing here can run them."""

from pathlib import Path

import pytest
import torch

from sa3train.cli.export import main
from sa3train.core.errors import SA3Error
from sa3train.export import coreml
from sa3train.export.graphs import Graph


class _Product(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(x[:, :4], self.layer(x), frame_mask.float())


@pytest.mark.slow
def test_a_package_has_the_inputs_and_operators_of_its_graph(tmp_path: Path) -> None:
    tools = pytest.importorskip("coremltools", reason="coremltools is not installed: pip install coremltools")
    inputs = {"x": torch.randn(2, 8), "frame_mask": torch.ones(2, 4, dtype=torch.bool)}
    path = tmp_path / "step.mlpackage"
    coreml._write_package(Graph(_Product(), inputs, ("velocity",), {}), path, "identity", "fp32")
    package = tools.models.MLModel(str(path), skip_model_load=True)
    main_function = package.get_spec().mlProgram.functions["main"]
    kinds = {each.type for each in main_function.block_specializations[main_function.opset].operations}
    assert {"linear", "mul", "add"} <= kinds and package.user_defined_metadata["sa3train.export"] == "identity"
    inputs["other"] = inputs.pop("frame_mask")
    with pytest.raises(SA3Error, match="other"):
        coreml._write_package(Graph(_Product(), inputs, ("velocity",), {}), path, "identity", "fp32")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--to coreml --check", "which only macOS could run"),
        ("--to coreml --lora-inputs 4", "nor --lora-inputs"),
        ("--to coreml --precision int8", "not written in int8. Choose fp32 or fp16"),
        ("--seconds 5", "--seconds needs --to coreml"),
    ],
)
def test_what_packages_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    assert main(["--model", "nano", *flags.split(), str(tmp_path / "out")]) != 0
    assert message in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize(("seconds", "frames", "count"), [(5.0, 60, 60), (30.0, 330, 128)])
def test_sizes_are_those_of_a_length(seconds: float, frames: int, count: int) -> None:
    facts = {
        "samples_per_frame": 4096, "tail_seconds": 0.5, "sample_rate": 44100, "max_tokens": 64,
        "chunks": {"enabled": True, "size": 128}, "frames": {"min": 4, "max": 400}, "defaults": {"cfg_scale": 7.0},
    }  # fmt: skip
    assert coreml._choose_sizes(facts, seconds) == {"rows": 2, "frames": frames, "count": count, "prompt_tokens": 64}
    with pytest.raises(SA3Error, match=r"from 4 to 400 frames"):
        coreml._choose_sizes(facts, 60.0)
