"""Load batches: crops of latents with their prompts, in an order that can be stopped and resumed at any batch.

The order depends on the seed, the data, the batch shape and the number of ranks only: neither on the number of workers
nor on when a run was interrupted.

Shapes: B rows, S clips of a batch, C latent channels, T latent frames. Without packing, each row is a clip (S = B).
"""

import math
import random
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from sa3train.core.device import limit_to_cores
from sa3train.core.errors import SA3Error
from sa3train.core.signals import follow_parent, hold_signals
from sa3train.data.loading.prompts import PromptBuilder
from sa3train.data.loading.sampler import BatchIndices, BatchSampler, SampleIndex
from sa3train.data.shards.reader import LatentStore

_SILENCE_FRAMES = 16


class Batch(TypedDict):
    """What the loader yields. T is the same on every rank, unless the data is streamed.

    Attributes:
        latents_BCT: float32: crops, followed by latents of silence.
        attention_mask_BT: True on crops.
        seconds_total_S: Duration that the model is conditioned on, in seconds.
        at_end_S: Whether the crop reaches the end of its clip, so that silence truly follows it.
        prompts: Prompt of each clip.
        keys: Key of each clip.
        seeds: Seed of each clip, different each time it is loaded; whatever is drawn for it can start there.
        segment_ids_BT: int64, in packed batches only: index of each frame's clip, 0 … S-1 in order of rows, -1 for
            padding.
    """

    latents_BCT: Tensor
    attention_mask_BT: Tensor
    seconds_total_S: Tensor
    at_end_S: Tensor
    prompts: list[str]
    keys: list[str]
    seeds: list[int]
    segment_ids_BT: NotRequired[Tensor]


@dataclass(frozen=True)
class Crop:
    """A crop of a clip's latents with its prompt; fields as in `Batch`."""

    latents_CT: Tensor
    prompt: str
    key: str
    seed: int
    seconds_total: float
    at_end: bool


@dataclass(frozen=True)
class CropSettings:
    """How clips are cropped.

    Attributes:
        frames: Longest crop in latent frames; None for whole clips.
        start: Where crops start: "random", "start" or "beat".
        seconds: Duration that the model is conditioned on: of the "crop" or of the "file".
    """

    frames: int | None = None
    start: str = "random"
    seconds: str = "crop"


class SplitClips:
    """The clips of one split of a store, each with its augmentations.

    Attributes:
        store: The store.
    """

    def __init__(self, store: LatentStore, split: str, augmentations: bool = True) -> None:
        """Group the rows of a split by clip.

        Args:
            store: The store.
            split: "train" or "heldout".
            augmentations: Include augmentations.
        """
        self.store = store
        rows_of_clip: dict[str, list[int]] = {}
        for row in store.list_rows(split).tolist():
            if augmentations or store.augmentations[row] == "original":
                rows_of_clip.setdefault(store.clips[row], []).append(row)
        self._first = np.array([rows[0] for rows in rows_of_clip.values()], dtype=np.int64)
        self._augmented = {clip: rows for clip, rows in enumerate(rows_of_clip.values()) if len(rows) > 1}

    def __len__(self) -> int:
        return len(self._first)

    def choose_row(self, clip: int, rng: random.Random) -> int:
        """Choose one of a clip's augmentations at random.

        Args:
            clip: Index of the clip.
            rng: Source of randomness; always draws once.

        Returns:
            Row number in the store.
        """
        draw = rng.random()
        rows = self._augmented.get(clip)
        return rows[int(draw * len(rows))] if rows else int(self._first[clip])

    def compute_lengths(self, longest: int | None) -> np.ndarray:
        """Compute the crop length of each clip.

        Args:
            longest: Longest crop in latent frames; None for whole clips.

        Returns:
            (n,) frames.
        """
        frames: np.ndarray = self.store.frames[self._first]
        return frames if longest is None else np.minimum(frames, longest)


class LatentDataset:
    """Turns the indices of a batch into a batch; map-style, so that any number of workers gives the same batches.

    Attributes:
        sources: Clips of each source.
        crop: How clips are cropped.
        prompts: Builds prompts.
        tail: Frames of silence after the longest crop.
        pack_frames: Length of a packed row; None for one clip per row.
        fixed_prompts: Whether prompts are those of validation, without randomness.
        silence_CT: Latents of silence, repeated behind crops.
    """

    def __init__(
        self,
        sources: Sequence[SplitClips],
        crop: CropSettings,
        prompts: PromptBuilder,
        *,
        tail: int = 0,
        pack_frames: int | None = None,
        fixed_prompts: bool = False,
    ) -> None:
        """Define a dataset.

        Args:
            sources: Clips of each source.
            crop: How to crop clips.
            prompts: Builds prompts.
            tail: Frames of silence after the longest crop.
            pack_frames: Length of a packed row; None for one clip per row.
            fixed_prompts: Use the prompts of validation, without randomness.
        """
        self.sources, self.crop, self.prompts = list(sources), crop, prompts
        self.tail, self.pack_frames, self.fixed_prompts = tail, pack_frames, fixed_prompts
        model = self.sources[0].store.index["model"]
        self._frame_seconds = model["downsampling_ratio"] / model["sample_rate"]
        self.silence_CT = torch.from_numpy(self.sources[0].store.get_silence(_SILENCE_FRAMES).astype(np.float32))

    def __getitem__(self, rows: BatchIndices) -> Batch | SA3Error:
        """Load a batch; a user error comes back as a value, for the loader to raise outside the worker."""
        try:
            crops = [[self.load_crop(sample) for sample in row] for row in rows]
        except SA3Error as error:
            return error
        longest = max(sample.longest for row in rows for sample in row)
        return collate(crops, self.silence_CT, self.tail, self.pack_frames, longest)

    def load_crop(self, sample: SampleIndex) -> Crop:
        """Load one clip, cropped, with its prompt.

        Args:
            sample: Which clip.

        Returns:
            The crop.
        """
        clips = self.sources[sample.source]
        rng = random.Random(sample.seed)
        latents_CT, record = clips.store.read(clips.choose_row(sample.clip, rng))
        return self.make_crop(latents_CT, record, sample.frames, sample.seed, rng)

    def make_crop(
        self, latents_CT: np.ndarray, record: Mapping[str, Any], frames: int, seed: int, rng: random.Random
    ) -> Crop:
        """Crop a clip's latents and build its prompt.

        Args:
            latents_CT: (C, T) latents of the clip.
            record: Its record.
            frames: Length of the crop.
            seed: Seed of whatever else is drawn for the crop.
            rng: Source of randomness of crop and prompt.

        Returns:
            The crop.
        """
        free = latents_CT.shape[1] - frames
        start = choose_crop_start(free, self.crop.start, rng, _get_beats(record), self._frame_seconds)
        whole = float(record["seconds"])
        # The shortest duration that a generation of so many frames can have; less where the clip ends in the last.
        seconds = min((frames - 1 + 1e-3) * self._frame_seconds, whole - start * self._frame_seconds)
        prompt = self.prompts.build_fixed(record) if self.fixed_prompts else self.prompts.build(record, rng)
        return Crop(
            torch.from_numpy(latents_CT[:, start : start + frames].astype(np.float32)),
            prompt,
            record["key"],
            seed,
            round_up_seconds(whole if free == 0 or self.crop.seconds == "file" else seconds),
            start + frames == latents_CT.shape[1],
        )


def choose_crop_start(free: int, start: str, rng: random.Random, beats: Sequence[float], frame_seconds: float) -> int:
    """Choose the first frame of a crop.

    Args:
        free: Last possible first frame.
        start: "start", "random", or "beat" (a random one, "random" where there is none).
        rng: Source of randomness.
        beats: Beats of the clip in seconds.
        frame_seconds: Length of a latent frame in seconds.

    Returns:
        A frame from 0 to `free`.
    """
    if free <= 0 or start == "start":
        return 0
    if start == "beat":
        frames = [frame for beat in beats if 0 <= (frame := round(beat / frame_seconds)) <= free]
        if frames:
            return frames[int(rng.random() * len(frames))]
    return int(rng.random() * (free + 1))


def round_up_seconds(seconds: float) -> float:
    """Round up to whole seconds, as the models were trained; rounding errors do not count.

    Args:
        seconds: A duration.

    Returns:
        Whole seconds.
    """
    return float(math.ceil(seconds - 1e-6))


def _get_beats(record: Mapping[str, Any]) -> list[float]:
    """A clip's beats in seconds from the start of its latents: less what `fixes=trim_silence` cut off the front."""
    trimmed = (record.get("applied") or {}).get("trim_silence", [0.0])[0]
    return [beat - trimmed for beat in record.get("beats") or ()]


def collate(
    rows: Sequence[Sequence[Crop]], silence_CT: Tensor, tail: int, pack_frames: int | None, longest: int = 0
) -> Batch:
    """Collate crops into a batch.

    Args:
        rows: Crops of each row (one, unless packed).
        silence_CT: Latents that fill the rest, repeated along T.
        tail: Frames of silence after the longest crop, without packing.
        pack_frames: Length of a packed row; None for one clip per row.
        longest: Longest crop on all ranks, where another rank has a longer one.

    Returns:
        The batch.
    """
    crops = [crop for row in rows for crop in row]
    frames = pack_frames or max(longest, *(sum(crop.latents_CT.shape[1] for crop in row) for row in rows)) + tail
    times = math.ceil(frames / silence_CT.shape[1])
    latents_BCT = silence_CT.float().repeat(1, times)[:, :frames].expand(len(rows), -1, -1).clone()
    segment_ids_BT = torch.full((len(rows), frames), -1, dtype=torch.int64)
    number = 0
    for row, crops_of_row in enumerate(rows):
        start = 0
        for crop in crops_of_row:
            end = start + crop.latents_CT.shape[1]
            latents_BCT[row, :, start:end] = crop.latents_CT
            segment_ids_BT[row, start:end] = number
            start, number = end, number + 1
    batch = Batch(
        latents_BCT=latents_BCT,
        attention_mask_BT=segment_ids_BT >= 0,
        seconds_total_S=torch.tensor([crop.seconds_total for crop in crops], dtype=torch.float32),
        at_end_S=torch.tensor([crop.at_end for crop in crops], dtype=torch.bool),
        prompts=[crop.prompt for crop in crops],
        keys=[crop.key for crop in crops],
        seeds=[crop.seed for crop in crops],
    )
    if pack_frames:
        batch["segment_ids_BT"] = segment_ids_BT
    return batch


class LatentLoader:
    """Endless batches in epochs of `len(loader)`, continuing one order from epoch to epoch without a pause.

    `state_dict()` holds the position after the last batch yielded, that of the `BatchSampler`.

    Attributes:
        dataset: Loads batches.
        sampler: The order, and the position in it.
        num_workers: Number of worker processes.
    """

    def __init__(
        self, dataset: LatentDataset | Iterable[Batch | SA3Error], sampler: BatchSampler, num_workers: int = 0
    ) -> None:
        """Prepare to load; workers start with the first batch.

        Args:
            dataset: Loads the batches of the sampler, or streams batches itself.
            sampler: The order, and the position in it.
            num_workers: Number of worker processes; 0 loads in this process.
        """
        self.dataset, self.sampler = dataset, sampler
        self.num_workers = limit_to_cores("data.num_workers", num_workers, per_core=2)
        self._batches: Generator[Batch, None, None] | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.sampler.start_epoch()):
            if self._batches is None:
                self._batches = _iterate_batches(self.dataset, self.sampler, self.num_workers)
            batch = next(self._batches)
            self.sampler.advance()
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the same on every rank.

        Returns:
            Values for a checkpoint.
        """
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a position.

        Args:
            state: What `state_dict` returned.
        """
        self.close()
        self.sampler.load_state_dict(state)

    def close(self) -> None:
        """Stop the workers, if there are any; the position stays, and iterating continues from it."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def _iterate_batches(
    dataset: LatentDataset | Iterable[Batch | SA3Error], sampler: BatchSampler, num_workers: int
) -> Generator[Batch, None, None]:
    """Load the batches of a sampler, or of a dataset that streams them itself.

    Not a method, lest the loader be in a reference cycle with its own generator: then its workers would end whenever
    the garbage collector runs, in any thread.
    """
    from torch.utils.data import DataLoader

    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=None,
        sampler=sampler if isinstance(dataset, LatentDataset) else None,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),  # workers' base seed: none of ours, and not the global stream
        worker_init_fn=_start_worker,
    )
    with hold_signals():
        batches = iter(loader)
    yield from map(_raise_error, batches)


def _start_worker(worker: int) -> None:
    follow_parent()


def _raise_error(batch: Batch | SA3Error) -> Batch:
    if isinstance(batch, SA3Error):
        raise batch
    return batch


class ValidationLoader:
    """The same batches in the same order each time, whole on every rank.

    Attributes:
        dataset: Loads batches.
        batches: Indices of the batches.
    """

    def __init__(self, dataset: LatentDataset, batches: Sequence[BatchIndices]) -> None:
        """Define the batches.

        Args:
            dataset: Loads batches.
            batches: Indices of the batches.
        """
        self.dataset, self.batches = dataset, list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for rows in self.batches:
            yield _raise_error(self.dataset[rows])
