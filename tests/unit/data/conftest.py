"""Latent shards without an autoencoder, for the reading side; a tiny autoencoder and folders of clips, for encoding."""

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.audio import noise, write_clip
from helpers.golden import GOLDEN
from sa3train.data.encode.encoder import Encoder
from sa3train.data.shards.index import SILENCE, build_index
from sa3train.data.shards.writer import ShardWriter
from sa3train.models.checkpoint import load_autoencoder

CHANNELS = 4


def make_latents(frames: int, number: int) -> np.ndarray:
    """(4, frames) float16: clip number in channel 0, frame number in channel 1."""
    latent_CT = np.zeros((CHANNELS, frames), np.float16)
    latent_CT[0], latent_CT[1] = number, np.arange(frames)
    return latent_CT


def make_store(folder: Path, lengths: list[int], heldout: int = 0, prefix: str = "clip", **fields: Any) -> Path:
    """Shards of clips with `lengths` frames, the last `heldout` held out; `fields[name](number)` gives more fields."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {
        "train": range(len(lengths) - heldout),
        "heldout": range(len(lengths) - heldout, len(lengths)),
    }
    for split, numbers in splits.items():
        with ShardWriter(folder, split, max_bytes=fields.get("max_bytes", 512_000_000)) as writer:
            for number in numbers:
                record = {
                    "key": f"{prefix}-{number:03d}",
                    "clip": f"{prefix}-{number:03d}",
                    "view": "original",
                    "caption": f"caption {number}",
                    "tags": {},
                    "source": f"folder/{prefix}{number}.wav",
                    "seconds": lengths[number] * 4096 / 44100,
                }
                record |= {name: make(number) for name, make in fields.items() if callable(make)}
                writer.add(make_latents(lengths[number], number), record)
    np.save(folder / SILENCE, np.full((CHANNELS, 16), -1, np.float16))
    model = {"name": "tiny", "fingerprint": "f" * 64, "sample_rate": 44100, "downsampling_ratio": 4096}
    build_index(folder, {"model": model}, {})
    return folder


@pytest.fixture
def store_maker(tmp_path: Path) -> Callable[..., Path]:
    return lambda name, *args, **kwargs: make_store(tmp_path / name, *args, **kwargs)


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    """The autoencoder of the small recorded checkpoint."""
    return Encoder(load_autoencoder(GOLDEN / "plain"), "tests/golden/plain")


def write_set(folder: Path, count: int, seconds: float = 0.3) -> Path:
    """A folder of `count` captioned clips of noise, each a little longer than the last."""
    for number in range(count):
        samples = noise(seconds + 0.05 * number, seed=number, peak=0.3)
        write_clip(folder / f"part{number % 3}" / f"{number:02d}.wav", samples, f"noise number {number}")
    return folder


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()
