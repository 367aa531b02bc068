"""inference/onnx_generate.py beside the exact path."""

import contextlib
import importlib.util
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.generation import generate_latents
from sa3train.adapters.lora_argument import LoraArgument
from sa3train.export import export_onnx, onnx_files
from sa3train.export.graphs import Graph
from sa3train.inference import Generator

SCRIPT = Path(__file__).parents[2] / "inference" / "onnx_generate.py"
STRENGTHS = {"one": 0.8, "two": 0.5}
SECONDS = 8.0
"""Long enough for two chunks of the autoencoder."""


def load_script(name: str = SCRIPT.stem) -> Any:
    """Import a script of inference/."""
    spec = importlib.util.spec_from_file_location(name, SCRIPT.with_stem(name))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Session:
    """A graph as onnxruntime would run it, without the translation."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def get_inputs(self) -> list[Any]:
        return [type("Input", (), {"name": name}) for name in self.graph.inputs]

    def run(self, outputs: None, inputs: dict[str, Any]) -> list[Any]:
        with torch.no_grad():
            found = self.graph.module(*(torch.tensor(each) for each in inputs.values()))
        return [each.numpy() for each in ((found,) if isinstance(found, torch.Tensor) else found)]


@contextlib.contextmanager
def run_modules(target: Path, adapters: Sequence[LoraArgument] = (), **options: Any) -> Iterator[tuple[Any, Path]]:
    """Export nano-base with graphs that are modules still, and yield a runner of these and the folder."""
    graphs = dict[str, Graph]()

    def keep(graph: Graph, path: Path, identity: str) -> None:
        graphs[path.stem] = graph
        path.write_text(identity, encoding="utf-8")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_files, "_write_graph", keep)
        result = export_onnx("nano-base", target, adapters, **options)
        assert result.errors == {} and {*result.sizes, "manifest.json"} == {path.name for path in result.path.iterdir()}
        runner = load_script()
        patch.setattr(runner.onnxruntime, "InferenceSession", lambda path: Session(graphs[path.stem]))
        yield runner, result.path


def write_noise(path: Path) -> Path:
    """Write four seconds of noise as WAV."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2), file.setsampwidth(2), file.setframerate(44100)
        samples = np.random.default_rng(0).standard_normal((4 * 44100, 2)) * 3000
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def load_exact(
    folder: Path, strengths: dict[str, float] = STRENGTHS, model: str = "nano-base", **options: Any
) -> Generator:
    """Load a model with adapters of a folder, its text encoder in fp32 as exports have it."""
    generator = Generator.from_pretrained(model, "cpu", "fp32", **options)
    encoder = generator.model.conditioner.text_encoder.model(torch.device("cpu"))
    encoder.weights = {name: tensor.float() for name, tensor in encoder.weights.items()}
    for name, strength in strengths.items():
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
