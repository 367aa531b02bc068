"""The denoiser on OpenVINO: the latents of torch, with adapters, strengths and intervals, without compiling again."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.generation import generate_latents, inpaint
from helpers.nano_adapters import write_lora_adapters
from helpers.onnx_runner import write_noise
from sa3train.core.errors import ConfigError, LibraryError
from sa3train.inference import Generator
from sa3train.inference.openvino_step import check_backend

LIMIT = 1e-4
STRENGTHS = (0.8, 0.5)
SETTINGS = {"seed": 3, "steps": 4, "duration": 3.0, "cfg_scale": 5.0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Generator, Generator, Path]:
    """nano-base on OpenVINO and on torch, each with two adapters, one of them at some noise levels only."""
    folder = tmp_path_factory.mktemp("openvino")
    write_lora_adapters(folder)
    generators = [Generator.from_pretrained("nano-base", "cpu", "fp32", backend=name) for name in ("openvino", "torch")]
    for each in generators:
        each.load_adapter(folder / "one.safetensors", STRENGTHS[0])
        each.load_adapter(folder / "two.safetensors", STRENGTHS[1], interval=(0.0, 0.6))
    return generators[0], generators[1], folder


def measure_error(pair: tuple[Generator, Generator, Path], **settings: Any) -> float:
    found, exact = (generate_latents(each, "solo cello", **SETTINGS | settings) for each in pair[:2])
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("mode", ["text", "batch", "init", "inpaint"])
def test_latents_are_those_of_torch(pair: tuple[Generator, Generator, Path], mode: str) -> None:
    audio = write_noise(pair[2] / "in.wav")
    settings: dict[str, dict[str, Any]] = {
        "text": {"cfg_scale": 1.0, "sampler_type": "pingpong"},
        "batch": {"duration": (2.0, 4.0), "negative_prompt": "noise"},
        "init": {"init_audio": audio, "init_noise_level": 0.8},
        "inpaint": inpaint(audio, 1, 2.5),
    }
    assert measure_error(pair, **settings[mode]) < LIMIT


def test_strengths_change_without_compiling_again(
    pair: tuple[Generator, Generator, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = generate_latents(pair[0], "solo cello", **SETTINGS)
    monkeypatch.setattr("openvino.Core", None)
    for each in pair[:2]:
        each.set_strength(0.0, 0)
    assert measure_error(pair) < LIMIT
    changed = generate_latents(pair[0], "solo cello", **SETTINGS)
    assert float((changed - before).norm() / before.norm()) > 100 * LIMIT
    for each in pair[:2]:
        each.set_strength(STRENGTHS[0], 0)
    assert generate_latents(pair[0], "solo cello", **SETTINGS).equal(before)


def test_bf16_is_near_and_a_sidecar_names_the_backend(pair: tuple[Generator, Generator, Path]) -> None:
    near = Generator.from_pretrained("nano-base", "cpu", "bf16", backend="openvino")
    output = near.generate("solo cello", return_latents=True, **SETTINGS)
    assert output.latents is not None and output.record["environment"]["backend"] == "openvino"
    pair[1].set_strength(0.0)
    exact = generate_latents(pair[1], "solo cello", **SETTINGS)
    for index, strength in enumerate(STRENGTHS):
        pair[1].set_strength(strength, index)
    assert float((output.latents - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "not compute in fp16. Choose --precision fp32 or bf16, or --backend torch"),
        ({"precision": "int8"}, "not compute in int8. Choose --precision fp32 or bf16|does not run here: products"),
        ({"compiled": True}, "Remove --compile"),
        ({"backend": "onnx"}, "Choose torch or openvino"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Generator.from_pretrained("nano", **{"device": "cpu", "precision": "fp32", "backend": "openvino"} | options)


def test_another_device_and_a_missing_package_are_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="for CPUs, not cuda. Choose --device cpu or --backend torch"):
        check_backend("openvino", torch.device("cuda"), "fp32", False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sa3train.inference.generator.load_checkpoint", None)
    with pytest.raises(LibraryError, match=r"pip install 'sa3train\[openvino\]'"):
        Generator.from_pretrained("nano", "cpu", "fp32", backend="openvino")
