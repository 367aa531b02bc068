"""Graphs as files: nano-base with two adapters, checked, played by inference/onnx_generate.py, and in fewer bits."""

import shutil
from pathlib import Path

import pytest
import torch

from helpers.nano_adapters import write_lora_adapters
from helpers.onnx_runner import STRENGTHS, load_exact, load_runner, measure_error
from sa3train.cli.export import main
from sa3train.export.graphs import build_graphs
from sa3train.export.onnx_files import TEXT_DTYPE, _convert_file, compare_graphs
from sa3train.export.precision import STORED_PRECISIONS


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


@pytest.mark.parametrize(("precision", "size"), [("fp16", 0.56), ("int8", 0.45)])
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
    errors = compare_graphs(generator.model, build_graphs(generator.model), folder / precision)
    assert errors.pop(TEXT_DTYPE) < 1e-12 < max(errors.values()) < STORED_PRECISIONS[precision].limit
