"""Latent shards without an autoencoder, and folders of captioned clips."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helpers.audio import noise, write_clip
from sa3train.data.loading.datamodule import LatentDataModule
from sa3train.data.loading.settings import DataSettings, DataSource
from sa3train.data.shards.index import SILENCE_FILE, build_index
from sa3train.data.shards.writer import ShardWriter

CHANNELS = 4


def make_latents(frames: int, number: int) -> np.ndarray:
    """(4, frames) float16: clip number in channel 0, frame number in channel 1."""
    latent_CT = np.zeros((CHANNELS, frames), np.float16)
    latent_CT[0], latent_CT[1] = number, np.arange(frames)
    return latent_CT


def make_store(
    folder: Path,
    lengths: Sequence[int],
    heldout: int = 0,
    prefix: str = "clip",
    *,
    make: Callable[[int, int], np.ndarray] = make_latents,
    fingerprint: str = "f" * 64,
    **fields: Any,
) -> Path:
    """Shards of clips with `lengths` frames, the last `heldout` held out.

    `make(frames, number)` gives a clip's latents, `fields[name](number)` further fields of its record.
    """
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
                    "augmentation": "original",
                    "caption": f"caption {number}",
                    "tags": {},
                    "source": f"folder/{prefix}{number}.wav",
                    "seconds": lengths[number] * 4096 / 44100,
                }
                record |= {name: field(number) for name, field in fields.items() if callable(field)}
                writer.add(make(lengths[number], number), record)
    np.save(folder / SILENCE_FILE, np.full((fields.get("channels", CHANNELS), 16), -1, np.float16))
    model = {"name": "tiny", "fingerprint": fingerprint, "sample_rate": 44100, "downsampling_ratio": 4096}
    build_index(folder, {"model": model}, {})
    return folder


def write_set(folder: Path, count: int, seconds: float = 0.3) -> Path:
    """A folder of `count` captioned clips of noise, each a little longer than the last."""
    for number in range(count):
        samples = noise(seconds + 0.05 * number, seed=number, peak=0.3)
        write_clip(folder / f"part{number % 3}" / f"{number:02d}.wav", samples, f"noise number {number}")
    return folder


def mutate(content: bytes, rng: random.Random) -> bytes:
    """`content` with bytes changed, cut off, removed, put in or copied."""
    out = bytearray(content)
    at = rng.randrange(len(out))
    kind = rng.randrange(5)
    if kind == 0:
        for _ in range(rng.randint(1, 20)):
            out[rng.randrange(len(out))] = rng.randrange(256)
    elif kind == 1:
        del out[at:]
    elif kind == 2:
        del out[at : at + rng.randrange(1, 2000)]
    elif kind == 3:
        out[at:at] = rng.randbytes(rng.randrange(1, 600))
    else:
        start, size = rng.randrange(len(out)), rng.randrange(1, 600)
        out[at : at + size] = out[start : start + size]
    return bytes(out)


def make_data_module(
    sources: str | Path | Sequence[DataSource], batch_size: int = 4, *, seed: int = 0, **settings: Any
) -> LatentDataModule:
    """A data module without workers and silent tails unless `settings` say so; they include `rank` and `world_size`."""
    rank, world_size = settings.pop("rank", None), settings.pop("world_size", None)
    first, *more = [DataSource(str(sources))] if isinstance(sources, str | Path) else sources
    chosen = {"silence_tail_seconds": 0.0, "num_workers": 0, "more": more, **settings}
    data = DataSettings(first.path, first.repeats, first.weight, batch_size=batch_size, **chosen)
    return LatentDataModule(data, seed=seed, rank=rank, world_size=world_size)
