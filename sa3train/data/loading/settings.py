"""Settings of the training data, without heavy imports, for command lines and forms."""

from dataclasses import dataclass
from typing import Literal

from sa3train.core.config import MAX_COUNT, check_settings, setting
from sa3train.core.errors import ConfigError, ConflictError
from sa3train.data.loading.prompts import PromptSettings


@dataclass(frozen=True)
class DataSource:
    """A source of training data."""

    path: str = setting(help="Folder or URL of latent shards.", text="path")
    repeats: int = setting(1, help="How often each clip is drawn per pass.", min=1, max=10_000)
    weight: float | None = setting(
        None,
        help="Share of the source, for all sources of a role or none; null: by sizes and repeats.",
        above=0,
        max=1e6,
    )
    role: Literal["train", "prior"] = setting("train", help="train, or prior for regularization.")

    def __post_init__(self) -> None:
        check_settings(self, "data.more")


@dataclass(frozen=True)
class DataSettings:
    """Which clips to train on and how they are cropped and batched."""

    dir: str = setting(help="Latent shards made by sa3-encode: a folder, or any URL that fsspec reads.", text="path")
    repeats: int = setting(1, help="How often each clip of dir is used per epoch.", min=1, max=10_000)
    weight: float | None = setting(None, help="Weight of dir among the sources.", above=0, max=1e6)
    more: list[DataSource] = setting(
        [], help="Further sources, such as [{path: DIR, repeats: 1, weight: null, role: prior}].", items=(0, 1000)
    )
    prior_share: float = setting(0.0, help="Share of clips from sources with role=prior.", min=0, max=0.99)
    batch_size: int = setting(4, help="Clips (or packed rows) per micro-batch on each rank.", min=1, max=65_536)
    crop_seconds: float | None = setting(
        None, help="Maximum crop length; null for whole clips.", unit="seconds", min=0.1, max=36_000
    )
    crop_frames: int | None = setting(None, help="The same in latent frames of 93 ms.", min=1, max=400_000)
    crop: Literal["random", "start", "beat"] = setting(
        "random", help="Where a crop starts; beat needs clips with a beats field."
    )
    seconds: Literal["crop", "file"] = setting("crop", help="Whose length the model is conditioned on.")
    silence_tail_seconds: float = setting(
        4.0, help="Silence behind the longest clip, for loss.silence_seconds.", unit="seconds", min=0, max=600
    )
    pack_frames: int | None = setting(
        None,
        help="Latent frames of a row that several clips are packed into; null: one clip per row.",
        min=1,
        max=400_000,
    )
    pool: int = setting(32, help="Batches that are sorted by length (or packed) together.", min=1, max=10_000)
    heldout_clips: int = setting(256, help="Maximum held-out clips that are read.", min=0, max=MAX_COUNT)
    num_workers: int = setting(
        2, help="Worker processes of the data loader on each rank, at most two per core.", min=0, max=1024
    )
    stream: bool = setting(
        False,
        help="Read whole shards in turn instead of single clips, for sets in an object store that no disk holds. "
        "Such a run does not resume exactly.",
    )
    verify: Literal["size", "hash", "none"] = setting("size", help="Check of the shards at startup.")
    allow_damaged: bool = setting(False, help="Skip shards that fail the check instead of stopping.")
    prompts: PromptSettings = setting(PromptSettings(), help="How captions and tags become prompts.")
    shared_prompts: int = setting(
        12,
        help="Prompts of training clips that the adapter carries, as prompts to try. 0: none, as captions may be "
        "private.",
        min=0,
        max=64,
    )

    def __post_init__(self) -> None:
        check_settings(self, "data")
        if self.crop_seconds is not None and self.crop_frames is not None:
            raise ConflictError(
                f"crop_seconds={self.crop_seconds} and crop_frames={self.crop_frames} exclude each other: set one.",
                {"data.crop_seconds": None, "data.crop_frames": None},
            )
        if self.crop != "random" and self.crop_seconds is None and self.crop_frames is None:
            raise ConflictError(
                f"crop={self.crop} has no effect on whole clips: set crop_seconds or crop_frames.",
                {"data.crop": "random", "data.crop_seconds": ..., "data.crop_frames": ...},
            )
        if self.silence_tail_seconds and self.pack_frames:
            raise ConflictError(
                "silence_tail_seconds has no effect with pack_frames: set it to 0.",
                {"data.silence_tail_seconds": 0.0, "data.pack_frames": None},
            )
        if self.allow_damaged and self.verify == "none":
            raise ConfigError("data.allow_damaged has no effect with data.verify=none. Set verify=size or hash.")

    def list_sources(self) -> list[DataSource]:
        """List the sources.

        Returns:
            `dir`, then those in `more`.
        """
        return [DataSource(self.dir, self.repeats, self.weight), *self.more]

    def count_crop_frames(self, sample_rate: int, samples_per_frame: int) -> int | None:
        """Count the latent frames of the longest crop.

        Args:
            sample_rate: Samples per second.
            samples_per_frame: Samples per latent frame.

        Returns:
            The frames; None for whole clips.
        """
        if self.crop_seconds is None:
            return self.crop_frames
        return -(-round(self.crop_seconds * sample_rate) // samples_per_frame)
