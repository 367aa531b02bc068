"""Synthetic audio for tests. Samples are float32 (samples, channels); full scale is ±1."""

import io
import math
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from mutagen.ogg import OggPage


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


def encode(
    samples: np.ndarray, container: str = "WAV", subtype: str | None = None, rate: int = 44100, **settings: Any
) -> bytes:
    """Encode samples (samples, channels) as the bytes of a file, by libsndfile."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype, **settings)
    return buffer.getvalue()


def split_pages(content: bytes) -> list[bytes]:
    """Split an Ogg file into its pages."""
    file, pages = io.BytesIO(content), []
    while file.tell() < len(content):
        start = file.tell()
        OggPage(file)
        pages.append(content[start : file.tell()])
    return pages


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
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(target, samples, sample_rate)
    if caption is not None:
        target.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return target


def write_fake_ffmpeg(folder: Path, script: str) -> None:
    """Write an `ffmpeg` into `folder` that runs `script` as Python; the output file is `sys.argv[-1]`."""
    program = folder / "ffmpeg"
    program.write_text(f"#!{sys.executable}\nimport sys\n{script}\n")
    program.chmod(0o755)


def make_chunk(name: bytes, content: bytes, order: str = "<") -> bytes:
    """A chunk of RIFF, or of AIFF with `order=">"`."""
    return name + struct.pack(f"{order}I", len(content)) + content + bytes(len(content) % 2)
