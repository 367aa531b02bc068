"""Latent shards as a Lightning data module, which yields `sa3train.data.loading.loader.Batch`."""

import dataclasses
import hashlib
import weakref
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningDataModule

from sa3train.core.errors import ConfigError, DataError
from sa3train.core.log import get_logger
from sa3train.data.loading.loader import CropSettings, LatentDataset, LatentLoader, SplitClips, ValidationLoader
from sa3train.data.loading.prompts import PromptBuilder, list_distinct_prompts
from sa3train.data.loading.sampler import BatchSampler, BatchShape, ClipStream, SampleIndex, SourceSize
from sa3train.data.loading.settings import DataSettings
from sa3train.data.loading.stream import StreamDataset, StreamSampler
from sa3train.data.shards.index import check_autoencoder
from sa3train.data.shards.reader import LatentStore

_logger = get_logger(__name__)

SAMPLE_RATE = 44100
SAMPLES_PER_FRAME = 4096


class LatentDataModule(LightningDataModule):
    """Batches of latents with prompts, from one or several sources.

    Attributes:
        settings: The settings.
        sources: The sources.
        stores: Their shards, once set up.
        train_clips: Their training clips, once set up.
        builder: Builds prompts, once set up.
        crop: How clips are cropped.
        tail: Latent frames of silence after the longest clip of an unpacked batch.
        seed: Seed of everything drawn.
    """

    def __init__(
        self, settings: DataSettings, *, seed: int = 0, rank: int | None = None, world_size: int | None = None
    ) -> None:
        """Define the data; `setup` opens it.

        Args:
            settings: What to load, and how.
            seed: Seed of everything drawn.
            rank: This rank; None for the trainer's.
            world_size: Number of ranks; None for the trainer's.
        """
        super().__init__()
        self.settings, self.seed, self._rank, self._world_size = settings, seed, rank, world_size
        self.sources = settings.list_sources()
        frames = settings.count_crop_frames(SAMPLE_RATE, SAMPLES_PER_FRAME)
        self.crop = CropSettings(frames, settings.crop, settings.seconds)
        self.tail = round(settings.silence_tail_seconds * SAMPLE_RATE / SAMPLES_PER_FRAME)
        self.stores: list[LatentStore] = []
        self._loaders: weakref.WeakSet[LatentLoader] = weakref.WeakSet()

    def setup(self, stage: str | None = None) -> None:
        """Set up: open and check every source; further calls do nothing.

        Args:
            stage: Ignored.

        Raises:
            DataError: When a source cannot be read or has no training clips, or autoencoders differ.
        """
        if self.stores:
            return
        checks = {name: getattr(self.settings, name) for name in ("verify", "allow_damaged")}
        stores = [LatentStore(source.path, **checks) for source in self.sources]
        first = stores[0].index["model"]
        for store in stores[1:]:
            check_autoencoder(store.index, first["name"], first["fingerprint"], store.path)
        self.train_clips = [SplitClips(store, "train") for store in stores]
        for store, clips in zip(stores, self.train_clips, strict=True):
            if not len(clips):
                raise DataError(f"{store.path} has no training clips: encode more, or lower its held-out split.")
        self.builder = PromptBuilder(self.settings.prompts)
        self.stores = stores
        self.builder.check(self.iterate_records())
        self._check_beats()

    def limit_frames(self, max_frames: int) -> None:
        """Limit crops to the model's longest, where the settings allow more.

        Args:
            max_frames: Longest crop in latent frames.
        """
        frames = self.crop.frames
        self.crop = dataclasses.replace(self.crop, frames=max_frames if frames is None else min(frames, max_frames))

    @property
    def longest_crop(self) -> int:
        """Latent frames of the longest training clip, cropped, without the tail."""
        return max(int(clips.compute_lengths(self.crop.frames).max()) for clips in self.train_clips)

    def iterate_records(self) -> Iterator[dict[str, Any]]:
        """Iterate over the records of all sources.

        Yields:
            Each record, training and held-out.
        """
        for store in self.stores:
            for _, record in store.iterate_records():
                yield record

    def list_prompts(self) -> list[str] | None:
        """List every prompt that can occur, so that embeddings can be computed beforehand.

        Returns:
            The prompts; None when they cannot be listed.
        """
        return list_distinct_prompts(self.builder, self.iterate_records())

    def sample_prompts(self, count: int, longest: int = 500) -> list[str]:
        """Sample prompts of training clips, evenly over the set, each as validation builds it.

        Args:
            count: Most prompts.
            longest: Most characters; longer prompts are left out.

        Returns:
            Distinct prompts, none of them empty.
        """
        self.setup()
        prompts: dict[str, None] = {}
        for source, store in zip(self.sources, self.stores, strict=True):
            rows = set(store.list_rows("train").tolist()) if source.role == "train" else ()
            records = (record for row, record in store.iterate_records() if row in rows)
            prompts |= dict.fromkeys(map(self.builder.build_fixed, records))
        usable = [prompt for prompt in prompts if 0 < len(prompt) <= longest]
        return usable[:: max(1, -(-len(usable) // max(1, count)))][:count]

    def check_autoencoder(self, name: str, fingerprint: str) -> None:
        """Check that every source was encoded by an autoencoder; a `DataError` names both models.

        Args:
            name: Name of the model.
            fingerprint: Fingerprint of its autoencoder.
        """
        for store in self.stores:
            check_autoencoder(store.index, name, fingerprint, store.path)

    @property
    def manifest(self) -> str:
        """Hash of every clip of every source, for an adapter's provenance."""
        manifests = [store.index["manifest"] for store in self.stores]
        return manifests[0] if len(manifests) == 1 else hashlib.sha256("".join(manifests).encode()).hexdigest()

    def train_dataloader(self) -> LatentLoader:
        """Build this rank's loader.

        Returns:
            Endless, resumable batches.
        """
        self.setup()
        settings, trainer = self.settings, self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        rank = rank if self._rank is None else self._rank
        world_size = world_size if self._world_size is None else self._world_size
        shape = BatchShape(settings.batch_size, world_size, rank, settings.pool, settings.pack_frames)
        sizes = [
            SourceSize(len(clips), source.repeats, source.weight, source.role == "prior")
            for source, clips in zip(self.sources, self.train_clips, strict=True)
        ]
        stream = ClipStream(sizes, self.seed, settings.prior_share)
        lengths = [clips.compute_lengths(self.crop.frames) for clips in self.train_clips]
        dataset = LatentDataset(
            self.train_clips, self.crop, self.builder, tail=self.tail, pack_frames=settings.pack_frames
        )
        if settings.stream:
            position = StreamSampler(stream, lengths, shape, self._identify(shape))
            loader = LatentLoader(StreamDataset(dataset, position, stream), position, settings.num_workers)
        else:
            sampler = BatchSampler(stream, lengths, shape, self._identify(shape))
            loader = LatentLoader(dataset, sampler, settings.num_workers)
        self._loaders.add(loader)
        return loader

    def teardown(self, stage: str | None = None) -> None:
        """Stop the workers of this module's loaders; Lightning calls this at the end of a fit.

        Args:
            stage: Ignored.
        """
        for loader in self._loaders:
            loader.close()

    def val_dataloader(self) -> list[ValidationLoader]:
        """Build the validation loader: held-out clips of training sources, with fixed crops and prompts.

        Returns:
            One loader, the same on every rank; an empty list when nothing is held out.
        """
        self.setup()
        heldout = [
            SplitClips(store, "heldout", augmentations=False) if source.role == "train" else None
            for source, store in zip(self.sources, self.stores, strict=True)
        ]
        samples = [
            SampleIndex(source, clip, int(frames), clip)
            for source, clips in enumerate(heldout)
            if clips is not None
            for clip, frames in enumerate(clips.compute_lengths(self.crop.frames))
        ][: self.settings.heldout_clips]
        if not samples:
            return []
        samples.sort(key=lambda sample: -sample.frames)
        clips = [clips or training for clips, training in zip(heldout, self.train_clips, strict=True)]
        dataset = LatentDataset(clips, self.crop, self.builder, tail=self.tail, fixed_prompts=True)
        rows, size = [[sample] for sample in samples], self.settings.batch_size
        return [ValidationLoader(dataset, [rows[start : start + size] for start in range(0, len(rows), size)])]

    def _identify(self, shape: BatchShape) -> dict[str, Any]:
        """What a position in the order depends on, the same on every rank."""
        order = [
            [store.index["manifest"], source.repeats, source.weight, source.role, sorted(store.damaged)]
            for source, store in zip(self.sources, self.stores, strict=True)
        ]
        return {
            "data": hashlib.sha256(repr(order).encode()).hexdigest()[:16],
            "seed": self.seed,
            "rows": shape.rows,
            "pool": shape.pool,
            "pack_frames": shape.pack_frames,
            "crop": [self.crop.frames, self.crop.start],
            "prior_share": self.settings.prior_share,
        }

    def _check_beats(self) -> None:
        if self.crop.start != "beat":
            return
        without = [str(record.get("source")) for record in self.iterate_records() if not record.get("beats")]
        if len(without) == sum(len(store) for store in self.stores):
            raise ConfigError(
                "crop=beat has no effect: no clip has a `beats` field (a list of seconds in its .json or manifest)."
            )
        if without:
            _logger.warning(
                "crop=beat: %d clips have no `beats`, such as %s; their crops start anywhere.", len(without), without[0]
            )
