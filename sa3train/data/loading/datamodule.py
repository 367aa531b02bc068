"""Latent shards as a Lightning data module, which yields `sa3train.data.loading.loader.Batch`."""

import dataclasses
import hashlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule

from sa3train.core.config import check_choice
from sa3train.core.errors import ConfigError, DataError
from sa3train.core.log import get_logger
from sa3train.data.loading.loader import CropSettings, LatentDataset, LatentLoader, SplitClips, ValidationLoader
from sa3train.data.loading.prompts import PromptBuilder, PromptSettings, list_distinct_prompts
from sa3train.data.loading.sampler import BatchSampler, BatchShape, ClipStream, SampleIndex, SourceSize
from sa3train.data.shards.index import check_autoencoder
from sa3train.data.shards.reader import LatentStore

_logger = get_logger(__name__)

SAMPLE_RATE = 44100
SAMPLES_PER_FRAME = 4096


@dataclasses.dataclass(frozen=True)
class DataSource:
    """A source of training data.

    Attributes:
        path: Folder or URL of latent shards.
        repeats: How often each clip is drawn per pass.
        weight: Share of the source, for all sources of a role or none; None to go by sizes and repeats.
        role: "train", or "prior" for regularization.
    """

    path: str
    repeats: int = 1
    weight: float | None = None
    role: str = "train"

    def __post_init__(self) -> None:
        check_choice(f"role of source {self.path}", self.role, ("train", "prior"))
        if self.repeats < 1:
            raise ConfigError(f"source {self.path} has repeats={self.repeats}; it must be at least 1.")

    @classmethod
    def parse_all(
        cls, sources: "str | DataSource | Sequence[str | DataSource | Mapping[str, Any]]"
    ) -> "list[DataSource]":
        """Parse one or several sources.

        Args:
            sources: One source or several, as `parse` takes them.

        Returns:
            The sources.

        Raises:
            ConfigError: When there is none.
        """
        parsed = [cls.parse(source) for source in ([sources] if isinstance(sources, str | DataSource) else sources)]
        if not parsed:
            raise ConfigError("no data source given: name a folder of latent shards.")
        return parsed

    @classmethod
    def parse(cls, source: "str | DataSource | Mapping[str, Any]") -> "DataSource":
        """Parse a source as configurations give it.

        Args:
            source: A path, a source, or a mapping with its fields.

        Returns:
            The source.

        Raises:
            ConfigError: For unknown fields, or none for the path.
        """
        if isinstance(source, DataSource):
            return source
        if isinstance(source, str):
            return cls(source)
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(source) - known)
        if unknown or "path" not in source:
            raise ConfigError(
                f"a data source has the keys {', '.join(sorted(known))} (path is required), not {unknown}."
            )
        return cls(**source)


class LatentDataModule(LightningDataModule):
    """Batches of latents with prompts, from one or several sources.

    Attributes:
        sources: The sources.
        stores: Their shards, once set up.
        train_clips: Their training clips, once set up.
        builder: Builds prompts, once set up.
        batch_size: Rows per rank.
        pack_frames: Length of a packed row in latent frames; None for one clip per row.
        crop: How clips are cropped.
        crop_setting: The setting that limits the length: "crop_frames" or "crop_seconds".
        tail: Latent frames of silence after the longest clip of an unpacked batch.
        seed: Seed of everything drawn.
    """

    def __init__(
        self,
        sources: str | DataSource | Sequence[str | DataSource | Mapping[str, Any]],
        batch_size: int = 4,
        *,
        crop_seconds: float | None = None,
        crop_frames: int | None = None,
        crop: str = "random",
        seconds: str = "crop",
        silence_tail_seconds: float = 0.0,
        pack_frames: int | None = None,
        prompts: PromptSettings | None = None,
        prior_share: float = 0.0,
        pool: int = 32,
        heldout_clips: int = 256,
        seed: int = 0,
        num_workers: int = 0,
        verify: str = "size",
        allow_damaged: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """Define the data; `setup` opens it. A `ConfigError` is raised for inconsistent settings.

        Args:
            sources: Folders or URLs of latent shards, or sources.
            batch_size: Rows per rank.
            crop_seconds: Longest crop in seconds; None for whole clips.
            crop_frames: Longest crop in latent frames, instead of `crop_seconds`.
            crop: Where crops start: "random", "start" or "beat".
            seconds: Duration that the model is conditioned on: of the "crop" or of the "file".
            silence_tail_seconds: Latents of silence after the longest clip of an unpacked batch, room for the loss to
                extend clips into silence.
            pack_frames: Length of a row into which clips are packed, in latent frames; None for one clip per row.
            prompts: How prompts are built.
            prior_share: Share of the clips from prior sources.
            pool: Number of batches that are sorted by length or packed at a time.
            heldout_clips: Number of held-out clips for validation.
            seed: Seed of everything drawn.
            num_workers: Number of worker processes.
            verify: What to check of the shards: "size", "hash" or "none".
            allow_damaged: Leave damaged shards out, instead of raising an error.
            rank: This rank; None for the trainer's.
            world_size: Number of ranks; None for the trainer's.
        """
        super().__init__()
        self.sources = DataSource.parse_all(sources)
        self.batch_size, self.pack_frames, self.seed = batch_size, pack_frames, seed
        self._prompt_settings = prompts or PromptSettings()
        self._prior_share, self._pool, self._heldout_clips = prior_share, pool, heldout_clips
        self._num_workers, self._verify, self._allow_damaged = num_workers, verify, allow_damaged
        self._rank, self._world_size = rank, world_size
        self.crop = CropSettings(_convert_crop(crop_seconds, crop_frames, crop), crop, seconds)
        self.crop_setting = "crop_frames" if crop_frames is not None else "crop_seconds"
        if silence_tail_seconds < 0 or (silence_tail_seconds and pack_frames):
            raise ConfigError("silence_tail_seconds must not be negative, and has no effect with pack_frames.")
        self.tail = round(silence_tail_seconds * SAMPLE_RATE / SAMPLES_PER_FRAME)
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
        stores = [
            LatentStore(source.path, verify=self._verify, allow_damaged=self._allow_damaged) for source in self.sources
        ]
        first = stores[0].index["model"]
        for store in stores[1:]:
            check_autoencoder(store.index, first["name"], first["fingerprint"], store.path)
        self.train_clips = [SplitClips(store, "train") for store in stores]
        for store, clips in zip(stores, self.train_clips, strict=True):
            if not len(clips):
                raise DataError(f"{store.path} has no training clips: encode more, or lower its held-out split.")
        self.builder = PromptBuilder(self._prompt_settings)
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
        rank, world_size = self._get_rank_and_world_size()
        shape = BatchShape(self.batch_size, world_size, rank, self._pool, self.pack_frames)
        sizes = [
            SourceSize(len(clips), source.repeats, source.weight, source.role == "prior")
            for source, clips in zip(self.sources, self.train_clips, strict=True)
        ]
        stream = ClipStream(sizes, self.seed, self._prior_share)
        lengths = [clips.compute_lengths(self.crop.frames) for clips in self.train_clips]
        dataset = LatentDataset(self.train_clips, self.crop, self.builder, tail=self.tail, pack_frames=self.pack_frames)
        loader = LatentLoader(dataset, BatchSampler(stream, lengths, shape, self._identify(shape)), self._num_workers)
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
        ][: self._heldout_clips]
        if not samples:
            return []
        samples.sort(key=lambda sample: -sample.frames)
        clips = [clips or training for clips, training in zip(heldout, self.train_clips, strict=True)]
        dataset = LatentDataset(clips, self.crop, self.builder, tail=self.tail, fixed_prompts=True)
        starts = range(0, len(samples), self.batch_size)
        batches = [[[sample] for sample in samples[start : start + self.batch_size]] for start in starts]
        return [ValidationLoader(dataset, batches)]

    def _get_rank_and_world_size(self) -> tuple[int, int]:
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return (
            rank if self._rank is None else self._rank,
            world_size if self._world_size is None else self._world_size,
        )

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
            "prior_share": self._prior_share,
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


def _convert_crop(seconds: float | None, frames: int | None, start: str) -> int | None:
    """The longest crop in frames, from whichever is given; seconds are rounded up to whole frames."""
    if seconds is not None and frames is not None:
        raise ConfigError(f"crop_seconds={seconds} and crop_frames={frames} exclude each other: set one.")
    if start != "random" and seconds is None and frames is None:
        raise ConfigError(f"crop={start} has no effect on whole clips: set crop_seconds or crop_frames.")
    if seconds is not None:
        if seconds <= 0:
            raise ConfigError(f"crop_seconds={seconds} must be above 0.")
        return -(-round(seconds * SAMPLE_RATE) // SAMPLES_PER_FRAME)
    return frames
