"""Settings of the training data, without heavy imports, for command lines and forms."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sa3train.core.config import check_choice, check_settings, setting
from sa3train.core.errors import ConfigError
from sa3train.data.loading.prompts import PromptSettings


@dataclass(frozen=True)
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
    def parse(cls, source: Mapping[str, Any]) -> "DataSource":
        """Parse a source as configurations give it.

        Args:
            source: Its fields.

        Returns:
            The source.

        Raises:
            ConfigError: For unknown fields, or none for the path.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(source) - known)
        if unknown or "path" not in source:
            raise ConfigError(
                f"a data source has the keys {', '.join(sorted(known))} (path is required), not {unknown}."
            )
        return cls(**source)


@dataclass(frozen=True)
class DataSettings:
    """Which clips to train on and how they are cropped and batched."""

    dir: str = setting(help="Latent shards made by sa3-encode: a folder, or any URL that fsspec reads.")
    repeats: int = setting(1, help="How often each clip of dir is used per epoch.", min=1)
    weight: float | None = setting(None, help="Weight of dir among the sources.", above=0)
    more: list[dict[str, Any]] = setting(
        [], help="Further sources, such as [{path: DIR, repeats: 1, weight: null, role: prior}]."
    )
    prior_share: float = setting(0.0, help="Share of clips from sources with role=prior.", min=0, below=1)
    batch_size: int = setting(4, help="Clips (or packed rows) per micro-batch on each rank.", min=1)
    crop_seconds: float | None = setting(
        None, help="Maximum crop length; null for whole clips.", unit="seconds", above=0
    )
    crop_frames: int | None = setting(None, help="The same in latent frames of 93 ms.", min=1)
    crop: Literal["random", "start", "beat"] = setting(
        "random", help="Where a crop starts; beat needs clips with a beats field."
    )
    seconds: Literal["crop", "file"] = setting("crop", help="Whose length the model is conditioned on.")
    silence_tail_seconds: float = setting(
        4.0, help="Silence behind the longest clip, for loss.silence_seconds.", unit="seconds", min=0
    )
    pack_frames: int | None = setting(
        None, help="Latent frames of a row that several clips are packed into; null: one clip per row.", min=1
    )
    pool: int = setting(32, help="Batches that are sorted by length (or packed) together.", min=1)
    heldout_clips: int = setting(256, help="Maximum held-out clips that are read.", min=0)
    num_workers: int = setting(2, help="Worker processes of the data loader on each rank.", min=0)
    verify: Literal["size", "hash", "none"] = setting("size", help="Check of the shards at startup.")
    allow_damaged: bool = setting(False, help="Skip shards that fail the check instead of stopping.")
    prompts: PromptSettings = setting(PromptSettings(), help="How captions and tags become prompts.")

    def __post_init__(self) -> None:
        check_settings(self, "data")
        if self.crop_seconds is not None and self.crop_frames is not None:
            raise ConfigError(
                f"crop_seconds={self.crop_seconds} and crop_frames={self.crop_frames} exclude each other: set one."
            )
        if self.crop != "random" and self.crop_seconds is None and self.crop_frames is None:
            raise ConfigError(f"crop={self.crop} has no effect on whole clips: set crop_seconds or crop_frames.")
        if self.silence_tail_seconds and self.pack_frames:
            raise ConfigError("silence_tail_seconds has no effect with pack_frames: set it to 0.")

    def list_sources(self) -> list[DataSource]:
        """List the sources.

        Returns:
            `dir`, then those in `more`.
        """
        return [DataSource(self.dir, self.repeats, self.weight), *map(DataSource.parse, self.more)]
