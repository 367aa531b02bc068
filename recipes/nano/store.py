"""A rendered piece of the corpus on disk, so that each training step need not render: int16 audio beside its plans.

    python recipes/nano/store.py FOLDER --chunks 40 [--seed 0]      # resumable: finished chunks are kept

Chunk K is `K.npy` (samples of all clips on end, (N, 2) int16) and `K.json` (per clip: first, length, class, attributes,
captions). About 300 MB and 1.4 h of audio a chunk of 300 clips.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "datasets" / "nano"))

import numpy as np
from corpus import Clip, chunk
from numpy.typing import NDArray

from sa3train.core.files import write_json

CHUNK = 300  # clips


def describe(clip: Clip, first: int) -> dict[str, Any]:
    """One clip's entry: where its samples are, and what it is."""
    plan = dataclasses.asdict(clip.plan)
    plan["sound"] = clip.plan.sound.name
    return {"first": first, "length": clip.audio.shape[1], "plan": plan, "captions": clip.captions}


def write_chunk(folder: Path, seed: int, number: int) -> None:
    """Render and write one chunk; its JSON comes last, so that a chunk with JSON is whole."""
    clips = chunk(seed, number, CHUNK)
    firsts = np.concatenate([[0], np.cumsum([clip.audio.shape[1] for clip in clips])])
    audio = np.concatenate([clip.audio for clip in clips], 1).T
    np.save(folder / f"{number}.npy", np.round(audio * 32767).astype(np.int16))
    write_json(
        folder / f"{number}.json", [describe(clip, int(first)) for clip, first in zip(clips, firsts, strict=False)]
    )


class Store:
    """The finished chunks of a folder: `entries` and, by `audio(i)`, their samples as (2, N) float32."""

    def __init__(self, folder: Path) -> None:
        self.entries: list[dict[str, Any]] = []
        self._chunks: list[NDArray[np.int16]] = []
        for path in sorted(folder.glob("*.json"), key=lambda path: int(path.stem)):
            self.entries += [entry | {"chunk": len(self._chunks)} for entry in json.loads(path.read_text())]
            self._chunks.append(np.load(path.with_suffix(".npy"), mmap_mode="r"))
        if not self.entries:
            raise FileNotFoundError(f"no chunks in {folder}: run recipes/nano/store.py {folder}")

    def audio(self, index: int, start: int = 0, length: int | None = None) -> NDArray[np.float32]:
        """Samples of one clip from `start`, at most `length`."""
        entry = self.entries[index]
        end = entry["length"] if length is None else min(entry["length"], start + length)
        samples = self._chunks[entry["chunk"]][entry["first"] + start : entry["first"] + end]
        return samples.T.astype(np.float32) / 32767


def main() -> None:
    """Render the chunks that are not there yet."""
    parser = argparse.ArgumentParser(description="render nano's corpus to disk")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for number in range(args.chunks):
        if not (args.folder / f"{number}.json").exists():
            write_chunk(args.folder, args.seed, number)
            print(f"chunk {number + 1} of {args.chunks}", flush=True)


if __name__ == "__main__":
    main()
