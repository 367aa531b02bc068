"""Render a part of the corpus to disk, so that training steps need not render: int16 audio with its plans.

    python recipes/nano/store.py FOLDER --chunks 40 [--seed 0]      # resumable: finished chunks are skipped

Chunk K is `K.npy` (samples of all clips concatenated, (N, 2) int16) and `K.json` (per clip: first, length, class,
attributes, captions). About 300 MB and 1.4 h of audio a chunk of 300 clips.
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
    """Describe a clip: where its samples are, and what it is."""
    plan = dataclasses.asdict(clip.plan)
    plan["sound"] = clip.plan.sound.name
    return {"first": first, "length": clip.audio.shape[1], "plan": plan, "captions": clip.captions}


def write_chunk(folder: Path, seed: int, number: int) -> None:
    """Render and write a chunk, its JSON last, so that a chunk with JSON is complete."""
    clips = chunk(seed, number, CHUNK)
    firsts = np.concatenate([[0], np.cumsum([clip.audio.shape[1] for clip in clips])])
    audio = np.concatenate([clip.audio for clip in clips], 1).T
    np.save(folder / f"{number}.npy", np.round(audio * 32767).astype(np.int16))
    write_json(
        folder / f"{number}.json", [describe(clip, int(first)) for clip, first in zip(clips, firsts, strict=False)]
    )


class Store:
    """The finished chunks of a folder: `entries`, and their samples (2, N) float32 by `audio(i)`.

    `chunks` are the samples of each chunk by the number that its file has, as `entries` name it.
    """

    def __init__(self, folder: Path) -> None:
        self.entries: list[dict[str, Any]] = []
        self.chunks: dict[int, NDArray[np.int16]] = {}
        for path in sorted(folder.glob("*.json"), key=lambda path: int(path.stem)):
            number = int(path.stem)
            self.entries += [entry | {"chunk": number} for entry in json.loads(path.read_text())]
            self.chunks[number] = np.load(path.with_suffix(".npy"), mmap_mode="r")
        if not self.entries:
            raise FileNotFoundError(f"no chunks in {folder}: run recipes/nano/store.py {folder}")

    def indices(self, number: int) -> list[int]:
        """List the clips of a chunk."""
        return [index for index, entry in enumerate(self.entries) if entry["chunk"] == number]

    def audio(self, index: int, start: int = 0, length: int | None = None) -> NDArray[np.float32]:
        """Return at most `length` samples of a clip from `start`."""
        entry = self.entries[index]
        end = entry["length"] if length is None else min(entry["length"], start + length)
        samples = self.chunks[entry["chunk"]][entry["first"] + start : entry["first"] + end]
        return samples.T.astype(np.float32) / 32767


def main() -> None:
    """Render the missing chunks."""
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
