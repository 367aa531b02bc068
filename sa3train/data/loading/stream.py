"""Stream batches from shards read from start to end: for sets in an object store that are too large to cache.

Random access asks the server for every clip; a stream asks for whole shards, one after another, through webdataset.
Each pass has the shards in a fresh order; they are dealt to the workers of all ranks in turn, and each worker shuffles
what it has read. The same seed, ranks and workers give the same batches. A resumed stream continues with about the
next shard, since what the workers held is not saved.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from sa3train.core.errors import DataError, SA3Error
from sa3train.core.log import get_logger
from sa3train.data.loading.loader import Batch, Crop, LatentDataset, collate
from sa3train.data.loading.sampler import BatchSampler, ClipStream, SampleIndex, pack_clips
from sa3train.data.shards.reader import LatentStore

_logger = get_logger(__name__)

_BUFFER = 256
"""Crops that a worker shuffles before it groups them into batches, `data.pool` at a time."""

_ATTEMPTS = 4
"""How often a shard is opened before a broken connection ends the training."""


class StreamSampler(BatchSampler):
    """The position in a stream: how many batches were loaded. A `StreamDataset` makes the batches itself."""

    @property
    def clips(self) -> int:
        """Clips loaded on all ranks, about."""
        return round(self._batches * self.shape.rows * self._clips_per_row)

    @property
    def clips_per_pool(self) -> int:
        """Clips that a worker sorts by length, or packs, together."""
        return max(1, int(self.shape.pool * self.shape.batch_size * self._clips_per_row))

    def advance(self) -> None:
        """Move the position past the next batch."""
        self._batches, self._in_epoch = self._batches + 1, self._in_epoch + 1

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a position, with a warning that it is not exact.

        Args:
            state: What `state_dict` returned.
        """
        super().load_state_dict(state)
        _logger.warning(
            "data.stream=true does not resume exactly: it continues with the next shard after about %d clips.",
            self.clips,
        )


class StreamDataset(IterableDataset[Batch | SA3Error]):
    """The endless batches of one rank, or of one of its workers.

    Attributes:
        dataset: Crops clips and builds prompts.
        sampler: The position to start from, and the shape of batches.
        order: Shares of the sources and the seed.
    """

    def __init__(self, dataset: LatentDataset, sampler: StreamSampler, order: ClipStream) -> None:
        """Define a stream.

        Args:
            dataset: Crops clips and builds prompts.
            sampler: The position to start from, and the shape of batches.
            order: Shares of the sources and the seed.
        """
        self.dataset, self.sampler, self.order = dataset, sampler, order
        self._shards = [np.unique(clips.store.shard[clips.store.list_rows("train")]) for clips in dataset.sources]
        self._copies = [_count_augmentations(clips.store) for clips in dataset.sources]

    def __iter__(self) -> Iterator[Batch | SA3Error]:
        """Stream batches; a user error comes as a value, for the loader to raise outside the worker."""
        try:
            yield from self._iterate_batches()
        except SA3Error as error:
            yield error

    def _iterate_batches(self) -> Iterator[Batch]:
        from webdataset.filters import shuffle

        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        shape = self.sampler.shape
        readers, reader = shape.world_size * workers, shape.rank * workers + number
        rng = random.Random(repr((self.order.seed, readers, reader, self.sampler.clips)))
        sources = [self._iterate_source(source, readers, reader, rng) for source in range(len(self._shards))]
        crops = iter(shuffle(_BUFFER, initial=_BUFFER, rng=rng)(self._mix(sources, rng)))
        dataset = self.dataset
        while True:
            for rows in self._group(list(itertools.islice(crops, self.sampler.clips_per_pool)), rng):
                yield collate(rows, dataset.silence_CT, dataset.tail, dataset.pack_frames)

    def _mix(self, sources: Sequence[Iterator[Crop]], rng: random.Random) -> Iterator[Crop]:
        while True:
            yield next(rng.choices(sources, self.order.counts.tolist())[0])

    def _iterate_source(self, source: int, readers: int, reader: int, rng: random.Random) -> Iterator[Crop]:
        """The crops of one reader from one source: every `readers`-th shard of an endless order of passes."""
        store, shards, longest = self.dataset.sources[source].store, self._shards[source], self.dataset.crop.frames
        drawn = self.sampler.clips * self.order.counts[source] / self.order.cycle
        first = math.ceil(drawn / (len(store.list_rows("train")) / len(shards)))
        for position in itertools.count(first + reader, readers):
            number, turn = divmod(position, len(shards))
            shard = np.random.default_rng([self.order.seed, 4, source, number]).permutation(shards)[turn]
            for row, latents_CT, record in _read_shard(store, int(shard)):
                if rng.random() * self._copies[source].get(store.clips[row], 1) < 1:  # one of a clip's augmentations
                    seed, frames = rng.getrandbits(62), latents_CT.shape[1]
                    frames = frames if longest is None else min(frames, longest)
                    yield self.dataset.make_crop(latents_CT, record, frames, seed, random.Random(seed))

    def _group(self, crops: Sequence[Crop], rng: random.Random) -> list[list[list[Crop]]]:
        """Group crops into batches of rows, of similar lengths or packed, in random order."""
        size, capacity = self.sampler.shape.batch_size, self.dataset.pack_frames
        if capacity is None:
            rows = [[crop] for crop in sorted(crops, key=lambda crop: crop.latents_CT.shape[1])]
            batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        else:
            samples = [SampleIndex(0, number, crop.latents_CT.shape[1], 0) for number, crop in enumerate(crops)]
            rows = [[crops[sample.clip] for sample in row] for row in pack_clips(samples, capacity, size)]
            batches = [rows[start :: len(rows) // size] for start in range(len(rows) // size)]
        rng.shuffle(batches)
        return batches


def _count_augmentations(store: LatentStore) -> dict[str, int]:
    """Number of augmentations of each clip that has several."""
    counts = Counter(store.clips[row] for row in store.list_rows("train"))
    return {clip: count for clip, count in counts.items() if count > 1}


def _read_shard(store: LatentStore, shard: int) -> Iterator[tuple[int, np.ndarray, dict[str, Any]]]:
    """Read a shard, opened again where a broken connection ended it."""
    last = -1
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            for row, latents_CT, record in store.iterate_shard(shard):
                if row > last:
                    yield row, latents_CT, record
                    last = row
            return
        except DataError as error:
            if attempt == _ATTEMPTS:
                raise
            _logger.warning("Read again after an error: %s", error)
