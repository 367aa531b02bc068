"""Recorded cases, synthetic audio and tiny checkpoints, for tests and demos."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

DEVICE = os.environ.get("SA3TRAIN_TEST_DEVICE", "cpu")
"""Where recorded cases are computed; `launch/bench_gpu.sh` asks for CUDA."""


class GoldenSet:
    """Recorded inputs and outputs of the released implementation: an index JSON beside a safetensors file.

    `GoldenSet("tests/golden/plain/cases")` reads `cases.json` and `cases.safetensors`. Tensors keep their dtype.
    """

    def __init__(self, stem: str | os.PathLike[str]) -> None:
        self.stem = Path(stem)
        self.cases: dict[str, dict[str, Any]] = json.loads(self.stem.with_suffix(".json").read_text(encoding="utf-8"))

    def names(self, prefix: str) -> list[str]:
        """Cases whose name starts with `prefix`, in recorded order. Raises `KeyError` when there is none."""
        found = [name for name in self.cases if name.startswith(prefix)]
        if not found:
            raise KeyError(f"no golden case starts with {prefix!r} in {self.stem}")
        return found

    def settings(self, case: str) -> dict[str, Any]:
        """The recorded settings of `case`, without its tensor index."""
        return {key: value for key, value in self.cases[case].items() if key != "tensors"}

    def tensors(self, case: str, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Every tensor of `case` on `device`, by its name within the case."""
        index = self.cases[case]["tensors"]
        with safe_open(self.stem.with_suffix(".safetensors"), framework="pt") as file:
            return {name: file.get_tensor(key).to(device) for name, key in index.items()}

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor by its key in the file."""
        with safe_open(self.stem.with_suffix(".safetensors"), framework="pt") as file:
            return file.get_tensor(key)


def tone(
    seconds: float, frequency: float = 440.0, sample_rate: int = 44100, channels: int = 2, peak: float = 0.5
) -> np.ndarray:
    """A sine of `frequency` Hz as float32 (samples, channels)."""
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    wave = (peak * np.sin(2 * math.pi * frequency * time)).astype(np.float32)
    return np.repeat(wave[:, None], channels, axis=1)


def noise(seconds: float, sample_rate: int = 44100, channels: int = 2, peak: float = 0.5, seed: int = 0) -> np.ndarray:
    """Uniform white noise as float32 (samples, channels)."""
    generator = np.random.default_rng(seed)
    return generator.uniform(-peak, peak, (round(seconds * sample_rate), channels)).astype(np.float32)


def sweep(
    seconds: float, low: float = 40.0, high: float = 16000.0, sample_rate: int = 44100, channels: int = 2
) -> np.ndarray:
    """An exponential sine sweep from `low` to `high` Hz as float32 (samples, channels)."""
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    rate = math.log(high / low) / seconds
    wave = (0.5 * np.sin(2 * math.pi * low * (np.exp(rate * time) - 1) / rate)).astype(np.float32)
    return np.repeat(wave[:, None], channels, axis=1)


def write_clip(
    path: str | os.PathLike[str], samples: np.ndarray, caption: str | None = None, sample_rate: int = 44100
) -> Path:
    """Write `samples` (samples, channels) to `path` and, when given, `caption` to the `.txt` beside it."""
    import soundfile

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(target, samples, sample_rate)
    if caption is not None:
        target.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return target
