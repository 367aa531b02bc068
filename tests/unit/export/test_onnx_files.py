"""Graphs as files: nano-base with two adapters, checked, and played by inference/onnx_generate.py."""

from pathlib import Path

import pytest

from helpers.nano_adapters import write_lora_adapters
from helpers.onnx_runner import STRENGTHS, load_exact, load_runner, measure_error
from sa3train.cli.export import main
from sa3train.export.onnx_files import TEXT_DTYPE


def test_the_files_make_the_latents_of_the_exact_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lora_adapters(tmp_path, tuple(STRENGTHS))
    loras = [word for name, each in STRENGTHS.items() for word in ("--lora", f"{tmp_path / name}.safetensors={each}")]
    assert main(["--model", "nano-base", *loras, "--check", str(tmp_path / "base")]) == 0
    printed = capsys.readouterr().out
    assert "relative error: decoder" in printed and f"difference: {TEXT_DTYPE}" in printed
    runner, generator = load_runner(), load_exact(tmp_path)
    flags = ["--cfg-scale", "5", "--steps", "8"]
    assert measure_error(runner, generator, tmp_path / "base", flags, cfg_scale=5.0, steps=8) < 2e-4
    generator.set_strength(0.0)
    assert measure_error(runner, generator, tmp_path / "base", flags, cfg_scale=5.0, steps=8) > 1e-2
