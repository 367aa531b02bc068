"""Clips of several sources by request, and a loader of batches that can be stopped and resumed at any batch.

The order of batches depends on the seed, the data, the batch shape and the number of ranks only: neither on the number
of workers nor on when a run was interrupted.
"""

import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sa3train.core.errors import ConfigError, SA3Error
from sa3train.core.log import get_logger
from sa3train.data.loading.prompts import PromptBuilder
from sa3train.data.loading.sampler import Planner, Request, collate, crop_start, whole_seconds
from sa3train.data.shards.reader import LatentStore

_logger = get_logger(__name__)

CROPS = ("random", "start", "beat")


@dataclass(frozen=True)
class CropSettings:
    """`frames`: longest crop in latent frames (None: whole clips). `how`: where it starts. `seconds`: what the model is
    told, the crop's length or the file's.
    """

    frames: int | None = None
    how: str = "random"
    seconds: str = "crop"

    def __post_init__(self) -> None:
        if self.frames is not None and self.frames < 1:
            raise ConfigError(f"a crop of {self.frames} frames holds nothing; give at least one latent frame (93 ms).")
        if self.how not in CROPS:
            raise ConfigError(f"crop is {self.how!r}; choose one of: {', '.join(CROPS)}.")
        if self.seconds not in ("crop", "file"):
            raise ConfigError(f"seconds is {self.seconds!r}; choose crop or file.")


class Clips:
    """The clips of one split of one store, each with its takes (views)."""

    def __init__(self, store: LatentStore, split: str, views: bool = True) -> None:
        self.store = store
        takes: dict[str, list[int]] = {}
        for row in store.rows(split).tolist():
            if views or store.views[row] == "original":
                takes.setdefault(store.clips[row], []).append(row)
        self.first = np.array([rows[0] for rows in takes.values()], dtype=np.int64)
        self._takes = {number: rows for number, rows in enumerate(takes.values()) if len(rows) > 1}

    def __len__(self) -> int:
        return len(self.first)

    def row(self, clip: int, chance: random.Random) -> int:
        """The row to show of a clip: any of its takes, evenly."""
        draw = chance.random()
        rows = self._takes.get(clip)
        return rows[int(draw * len(rows))] if rows else int(self.first[clip])

    def lengths(self, longest: int | None) -> np.ndarray:
        """Crop length of each clip in frames."""
        frames: np.ndarray = self.store.frames[self.first]
        return frames if longest is None else np.minimum(frames, longest)


class ClipDataset:
    """Turns lists of requests into batches; map-style, so that any number of workers gives the same batches."""

    def __init__(
        self,
        sources: Sequence[Clips],
        crop: CropSettings,
        prompts: PromptBuilder,
        *,
        tail: int = 0,
        pack_frames: int | None = None,
        fixed_prompts: bool = False,
    ) -> None:
        self.sources, self.crop, self.prompts = list(sources), crop, prompts
        self.tail, self.pack_frames, self.fixed_prompts = tail, pack_frames, fixed_prompts
        model = self.sources[0].store.index["model"]
        self.frame_seconds = model["downsampling_ratio"] / model["sample_rate"]
        self.silence_CT = torch.from_numpy(self.sources[0].store.silence(16).astype(np.float32))

    def __getitem__(self, rows: Sequence[Sequence[Request]]) -> Any:
        """One batch; a user error comes back as a value, for the loader to raise outside the worker."""
        try:
            clips = [[self.clip(request) for request in row] for row in rows]
        except SA3Error as error:
            return error
        longest = max(request.longest for row in rows for request in row)
        return collate(clips, self.silence_CT, self.tail, self.pack_frames, longest)

    def clip(self, request: Request) -> dict[str, Any]:
        """One clip, cropped, with its prompt."""
        clips = self.sources[request.source]
        chance = random.Random(request.seed)
        row = clips.row(request.clip, chance)
        latent_CT, record = clips.store.read(row)
        free = latent_CT.shape[1] - request.frames
        start = crop_start(free, self.crop.how, chance, beats_of(record), self.frame_seconds)
        whole = float(record["seconds"])
        whole_clip = request.frames == latent_CT.shape[1]
        # The shortest duration that a generation of so many frames can have; less where the clip ends in the last.
        seconds = min((request.frames - 1 + 1e-3) * self.frame_seconds, whole - start * self.frame_seconds)
        prompt = self.prompts.fixed(record) if self.fixed_prompts else self.prompts(record, chance)
        return {
            "latent_CT": torch.from_numpy(latent_CT[:, start : start + request.frames].astype(np.float32)),
            "prompt": prompt,
            "key": record["key"],
            "seed": request.seed,
            "seconds_total": whole_seconds(whole if whole_clip or self.crop.seconds == "file" else seconds),
            "at_end": start + request.frames == latent_CT.shape[1],
        }


def beats_of(record: Mapping[str, Any]) -> list[float]:
    """A clip's beats in seconds from the start of its latents: less what `fix=trim_silence` cut off the front."""
    trimmed = (record.get("applied") or {}).get("trim_silence", [0.0])[0]
    return [beat - trimmed for beat in record.get("beats") or ()]


class LatentLoader:
    """Endless batches in epochs of `len(loader)`, continuing one order from epoch to epoch without a pause.

    `state_dict()` holds the position after the last batch yielded and is the same on every rank; after
    `load_state_dict()` the next batch is the one that would have come.
    """

    def __init__(
        self, dataset: ClipDataset, planner: Planner, identity: Mapping[str, Any], num_workers: int = 0
    ) -> None:
        self.dataset, self.planner, self.identity = dataset, planner, dict(identity)
        self.num_workers = num_workers
        self._window, self._place, self._batches, self._in_epoch = 0, 0, 0, 0
        self._resumed = False
        self._source: Generator[Any, None, None] | None = None

    def __len__(self) -> int:
        return self.planner.batches_per_cycle()

    def __iter__(self) -> Iterator[Any]:
        if not self._resumed:
            self._in_epoch = 0
        self._resumed = False
        for _ in range(len(self) - self._in_epoch % len(self)):
            if self._source is None:
                self._source = _endless(self.dataset, self.planner, self._window, self._place, self.num_workers)
            (window, place), batch = next(self._source)
            self._window, self._place = window, place + 1
            self._batches, self._in_epoch = self._batches + 1, self._in_epoch + 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {
            "window": self._window,
            "place": self._place,
            "batches": self._batches,
            "in_epoch": self._in_epoch,
            "identity": dict(self.identity),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position. If data, seed or batch shape have changed since, the position means nothing:
        then the next window after about as many clips is taken, with a warning that says what changed.
        """
        self.close()
        self._resumed = True
        self._window, self._place = int(state["window"]), int(state["place"])
        self._batches, self._in_epoch = int(state["batches"]), int(state["in_epoch"])
        saved = dict(state["identity"])
        changed = [name for name in self.identity if saved.get(name) != self.identity[name]]
        if changed:
            shown = self._batches * int(saved.get("rows", 1))
            self._window, self._place, self._in_epoch = -(-shown // self.planner.window), 0, 0
            _logger.warning(
                "the data loader does not continue exactly: %s changed since the checkpoint. It goes on after about as "
                "many clips in the new order.",
                ", ".join(f"{name} ({saved.get(name)} → {self.identity[name]})" for name in changed),
            )

    def close(self) -> None:
        """Stop the workers, if there are any; the position stays, and iterating goes on from it."""
        if self._source is not None:
            self._source.close()
            self._source = None


def _endless(
    dataset: ClipDataset, planner: Planner, window: int, place: int, num_workers: int
) -> Generator[tuple[tuple[int, int], Any], None, None]:
    """Batches from a position on, each with its own position. No method, lest the loader be in a cycle with its own
    generator: then its workers would end at the garbage collector's whim, in any thread.
    """
    from torch.utils.data import DataLoader

    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=None,
        sampler=_Places(planner, window, place),
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),  # workers' base seed: none of ours, and not the global stream
    )
    for position, batch in zip(_Places(planner, window, place).places(), loader, strict=False):
        if isinstance(batch, SA3Error):
            raise batch
        yield position, batch


class _Places:
    """Every batch from a position on: as requests for the workers, or as (window, place) for the loader."""

    def __init__(self, planner: Planner, window: int, place: int) -> None:
        self.planner, self.window, self.place = planner, window, place

    def __iter__(self) -> Iterator[list[list[Request]]]:
        for _, rows in self._walk():
            yield rows

    def places(self) -> Iterator[tuple[int, int]]:
        for place, _ in self._walk():
            yield place

    def _walk(self) -> Iterator[tuple[tuple[int, int], list[list[Request]]]]:
        window, start = self.window, self.place
        while True:
            for place, rows in enumerate(self.planner.plan(window).batches):
                if place >= start:
                    yield (window, place), rows
            window, start = window + 1, 0


class FixedLoader:
    """The same batches in the same order each time: held-out clips, whole on every rank."""

    def __init__(self, dataset: ClipDataset, batches: Sequence[list[list[Request]]]) -> None:
        self.dataset, self.batches = dataset, list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for rows in self.batches:
            batch = self.dataset[rows]
            if isinstance(batch, SA3Error):
                raise batch
            yield batch
