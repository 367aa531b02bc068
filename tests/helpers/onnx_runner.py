"""inference/onnx_generate.py beside the exact path."""

import importlib.util
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers.generation import generate_latents
from sa3train.inference import Generator

SCRIPT = Path(__file__).parents[2] / "inference" / "onnx_generate.py"
STRENGTHS = {"one": 0.8, "two": 0.5}
SECONDS = 8.0
"""Long enough for two chunks of the autoencoder."""


def load_runner() -> Any:
    """Import the script."""
    spec = importlib.util.spec_from_file_location("onnx_generate", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_noise(path: Path) -> Path:
    """Write four seconds of noise as WAV."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2), file.setsampwidth(2), file.setframerate(44100)
        samples = np.random.default_rng(0).standard_normal((4 * 44100, 2)) * 3000
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def load_exact(folder: Path) -> Generator:
    """Load nano-base with the adapters of a folder, its text encoder in fp32 as exports have it."""
    generator = Generator.from_pretrained("nano-base", "cpu", "fp32")
    encoder = generator.model.conditioner.text_encoder.model(torch.device("cpu"))
    encoder.weights = {name: tensor.float() for name, tensor in encoder.weights.items()}
    for name, strength in STRENGTHS.items():
        generator.load_adapter(folder / f"{name}.safetensors", strength)
    return generator


def measure_error(runner: Any, generator: Generator, exported: Path, flags: list[str], **settings: Any) -> float:
    """Run both on one seed and return the relative error of the latents."""
    given = ["-p", "solo cello", "--seed", "7", "--duration", str(SECONDS), *flags]
    latents, audio = exported.parent / "latents.npy", exported.parent / "out.wav"
    runner.main([str(exported), *given, "-o", str(audio), "--latents", str(latents)])
    exact = generate_latents(generator, "solo cello", seed=7, duration=SECONDS, **settings)
    with wave.open(str(audio)) as file:
        assert (file.getnframes(), file.getnchannels()) == (int(SECONDS * 44100), 2)
    return float((torch.from_numpy(np.load(latents)) - exact).norm() / exact.norm())
