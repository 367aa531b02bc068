"""Latent shards as a Lightning data module. The batch dict is described in `sa3train.data.loading.sampler`."""

import dataclasses
import hashlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule

from sa3train.core.errors import ConfigError, DataError
from sa3train.core.log import get_logger
from sa3train.data.loading.loader import ClipDataset, Clips, CropSettings, FixedLoader, LatentLoader
from sa3train.data.loading.prompts import PromptBuilder, PromptSettings, distinct_prompts
from sa3train.data.loading.sampler import SAMPLES_PER_FRAME, ClipStream, Planner, Request, Shape, SourceSize
from sa3train.data.shards.index import check_autoencoder
from sa3train.data.shards.reader import LatentStore

_logger = get_logger(__name__)

SAMPLE_RATE = 44100
ROLES = ("train", "prior")


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder or URL of latent shards. Each clip is shown `repeats` times a pass; `weight` (for all sources of a role,
    or none) sets the source's share instead. `role`: `train`, or `prior` for regularisation.
    """

    path: str
    repeats: int = 1
    weight: float | None = None
    role: str = "train"

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ConfigError(f"source {self.path} has role {self.role!r}; choose one of: {', '.join(ROLES)}.")
        if self.repeats < 1:
            raise ConfigError(f"source {self.path} has repeats={self.repeats}; give 1 or more.")


class LatentDataModule(LightningDataModule):
    """Batches of latents with prompts, from one or several sources.

    Lengths are in seconds (`crop_seconds`, `tail_seconds`) or latent frames (`crop_frames`, `pack_frames`);
    `limit` crops to the model's longest. `tail_seconds` of silence latents follow the longest clip of an unpacked
    batch, room for the objective to extend clips into silence. `pool` batches are sorted by length or packed at a time.
    `rank` and `world` come from the trainer unless given. Raises `ConfigError` and `DataError` in `setup`.
    """

    def __init__(
        self,
        sources: str | Source | Sequence[str | Source | Mapping[str, Any]],
        batch_size: int = 4,
        *,
        crop_seconds: float | None = None,
        crop_frames: int | None = None,
        crop: str = "random",
        seconds: str = "crop",
        tail_seconds: float = 0.0,
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
        world: int | None = None,
    ) -> None:
        super().__init__()
        self.sources = [_source(source) for source in ([sources] if isinstance(sources, str | Source) else sources)]
        if not self.sources:
            raise ConfigError("no data source given: name a folder of latent shards.")
        self.prompt_settings = prompts or PromptSettings()
        self.batch_size, self.pack_frames, self.prior_share, self.pool = batch_size, pack_frames, prior_share, pool
        self.heldout_clips, self.seed, self.num_workers = heldout_clips, seed, num_workers
        self.verify, self.allow_damaged = verify, allow_damaged
        self.rank, self.world = rank, world
        self.crop = CropSettings(_crop_frames(crop_seconds, crop_frames), crop, seconds)
        self.cut_by = "crop_frames" if crop_frames is not None else "crop_seconds"
        if crop != "random" and crop_seconds is None and crop_frames is None:
            raise ConfigError(f"crop={crop} has no effect on whole clips: give crop_seconds or crop_frames.")
        if tail_seconds < 0 or (tail_seconds and pack_frames):
            raise ConfigError("tail_seconds must not be negative, and has no effect with pack_frames: leave one out.")
        self.tail = round(tail_seconds * SAMPLE_RATE / SAMPLES_PER_FRAME)
        self.stores: list[LatentStore] = []
        self._loaders: weakref.WeakSet[LatentLoader] = weakref.WeakSet()

    def setup(self, stage: str | None = None) -> None:
        """Open and check every source; further calls do nothing."""
        if self.stores:
            return
        stores = [
            LatentStore(source.path, verify=self.verify, allow_damaged=self.allow_damaged) for source in self.sources
        ]
        first = stores[0].index["model"]
        for store in stores[1:]:
            check_autoencoder(store.index, first["name"], first["fingerprint"], store.path)
        self.train_clips = [Clips(store, "train") for store in stores]
        for store, clips in zip(stores, self.train_clips, strict=True):
            if not len(clips):
                raise DataError(f"{store.path} holds no training clips: encode more, or lower its held-out split.")
        self.builder = PromptBuilder(self.prompt_settings)
        self.stores = stores
        self.builder.check(self.records())
        self._check_beats()

    def limit(self, max_frames: int) -> None:
        """Crop to `max_frames` latent frames, the model's longest, where the settings allow more."""
        frames = self.crop.frames
        self.crop = dataclasses.replace(self.crop, frames=max_frames if frames is None else min(frames, max_frames))

    @property
    def longest_crop(self) -> int:
        """Latent frames of the longest training clip, cropped; without the tail."""
        return max(int(clips.lengths(self.crop.frames).max()) for clips in self.train_clips)

    def records(self) -> Iterator[dict[str, Any]]:
        """Every record of every source, train and held out."""
        for store in self.stores:
            for _, record in store.records():
                yield record

    def distinct_prompts(self) -> list[str] | None:
        """Every prompt that can be asked for, so that their embeddings can be made beforehand; None if not listable."""
        return distinct_prompts(self.builder, self.records())

    def check_autoencoder(self, name: str, fingerprint: str) -> None:
        """Raise `DataError`, naming both models, unless every source was encoded by this autoencoder."""
        for store in self.stores:
            check_autoencoder(store.index, name, fingerprint, store.path)

    @property
    def manifest(self) -> str:
        """A hash of every clip of every source: for an adapter's provenance."""
        manifests = [store.index["manifest"] for store in self.stores]
        return manifests[0] if len(manifests) == 1 else hashlib.sha256("".join(manifests).encode()).hexdigest()

    def train_dataloader(self) -> LatentLoader:
        """This rank's endless, resumable batches."""
        self.setup()
        rank, world = self._place()
        shape = Shape(self.batch_size, world, rank, self.pool, self.pack_frames)
        sizes = [
            SourceSize(len(clips), source.repeats, source.weight, source.role == "prior")
            for source, clips in zip(self.sources, self.train_clips, strict=True)
        ]
        stream = ClipStream(sizes, self.seed, self.prior_share)
        lengths = [clips.lengths(self.crop.frames) for clips in self.train_clips]
        dataset = ClipDataset(self.train_clips, self.crop, self.builder, tail=self.tail, pack_frames=self.pack_frames)
        planner = Planner(stream, lengths, shape, self.seed)
        loader = LatentLoader(dataset, planner, self._identity(shape), self.num_workers)
        self._loaders.add(loader)
        return loader

    def teardown(self, stage: str | None = None) -> None:
        """Stop the workers of this module's loaders; Lightning calls this at the end of a fit."""
        for loader in self._loaders:
            loader.close()

    def val_dataloader(self) -> list[FixedLoader]:
        """The held-out clips of training sources (the first `heldout_clips`), the same on every rank, with fixed crops
        and prompts; an empty list when nothing is held out.
        """
        self.setup()
        held = [
            Clips(store, "heldout", views=False) if source.role == "train" else None
            for source, store in zip(self.sources, self.stores, strict=True)
        ]
        requests = [
            Request(number, clip, int(frames), clip)
            for number, clips in enumerate(held)
            if clips is not None
            for clip, frames in enumerate(clips.lengths(self.crop.frames))
        ][: self.heldout_clips]
        if not requests:
            return []
        requests.sort(key=lambda request: -request.frames)
        chosen = [clips or training for clips, training in zip(held, self.train_clips, strict=True)]
        dataset = ClipDataset(chosen, self.crop, self.builder, tail=self.tail, fixed_prompts=True)
        starts = range(0, len(requests), self.batch_size)
        return [FixedLoader(dataset, [[[r] for r in requests[at : at + self.batch_size]] for at in starts])]

    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        rank = self.rank if self.rank is not None else (trainer.global_rank if trainer else 0)
        world = self.world if self.world is not None else (trainer.world_size if trainer else 1)
        return rank, world

    def _identity(self, shape: Shape) -> dict[str, Any]:
        """What a position in the order depends on, the same on every rank."""
        order = [
            [store.path, store.index["manifest"], source.repeats, source.weight, source.role, sorted(store.damaged)]
            for source, store in zip(self.sources, self.stores, strict=True)
        ]
        return {
            "data": hashlib.sha256(repr([entry[1:] for entry in order]).encode()).hexdigest()[:16],
            "seed": self.seed,
            "rows": shape.rows,
            "pool": shape.pool,
            "pack_frames": shape.pack_frames,
            "crop": [self.crop.frames, self.crop.how],
            "prior_share": self.prior_share,
        }

    def _check_beats(self) -> None:
        if self.crop.how != "beat":
            return
        without = [str(record.get("source")) for record in self.records() if not record.get("beats")]
        if len(without) == sum(len(store) for store in self.stores):
            raise ConfigError(
                "crop=beat has no effect: no clip has a `beats` field (a list of seconds in its .json or manifest)."
            )
        if without:
            _logger.warning(
                "crop=beat: %d takes have no `beats`, such as %s; their crops begin anywhere.", len(without), without[0]
            )


def _source(source: str | Source | Mapping[str, Any]) -> Source:
    if isinstance(source, Source):
        return source
    if isinstance(source, str):
        return Source(source)
    known = {field.name for field in dataclasses.fields(Source)}
    unknown = sorted(set(source) - known)
    if unknown or "path" not in source:
        raise ConfigError(f"a data source has the keys {', '.join(sorted(known))} (path is needed), not {unknown}.")
    return Source(**source)


def _crop_frames(seconds: float | None, frames: int | None) -> int | None:
    """The longest crop in frames, from whichever is given; a crop in seconds is rounded up to whole frames."""
    if seconds is not None and frames is not None:
        raise ConfigError(f"crop_seconds={seconds} and crop_frames={frames} say the same thing: give one.")
    if seconds is not None:
        if seconds <= 0:
            raise ConfigError(f"crop_seconds is {seconds}; give more than 0.")
        return -(-round(seconds * SAMPLE_RATE) // SAMPLES_PER_FRAME)
    return frames
