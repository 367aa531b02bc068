"""Settings of an encode, without heavy imports, for command lines and forms."""

import os
from dataclasses import dataclass
from typing import Literal

from sa3train.core.config import check_settings, setting
from sa3train.core.errors import ConflictError
from sa3train.data.captioning.template import DEFAULT_TEMPLATE, check_template

FIX_NAMES = ("dc", "trim_silence", "loudness")
"""In the order in which they are applied."""

AUGMENTATIONS = ("polarity", "gain")


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """What to encode, and how."""

    fixes: list[str] = setting(
        [],
        help="Fixes applied while encoding, never to the sources: dc, trim_silence, loudness (-14 LUFS, peaks at most "
        "-1 dBFS).",
        choices=FIX_NAMES,
    )
    augmentations: list[str] = setting(
        [],
        help="Further versions of each training clip: polarity (inverted), gain (3 to 9 dB softer).",
        choices=AUGMENTATIONS,
    )
    split: float | str = setting(
        0.05,
        help="Share to hold out (by content, so that similar clips stay together), or the path of a list of sources.",
        min=0,
        below=1,
        text="path",
    )
    duplicates: Literal["keep", "drop"] = setting(
        "keep",
        help="Clips with the same audio: keep, or drop all but one, if possible one with a caption and no copy's name.",
    )
    captions: Literal["required", "optional", "auto"] = setting(
        "required",
        help="Clips without a caption: reject them (required), encode them with an empty one (optional; they train on "
        "the empty prompt, or on a template of their tags), or with one composed of tags, name and sound (auto).",
    )
    caption_template: str = setting(
        DEFAULT_TEMPLATE,
        help="How captions=auto composes: text with fields in braces; what stands between commas is dropped where none "
        "of its fields has a value.",
    )
    allow_promotional: bool = setting(
        False, help="Use tags inside audio files that read like an advertisement or a web address."
    )
    max_rejected: float = setting(
        0.1, help="Stop with exit code 1 when more than this share of the clips is rejected.", min=0, max=1
    )
    batch_seconds: float | None = setting(
        None, help="Audio encoded at a time; null: as memory allows.", unit="seconds", min=0.1, max=36_000
    )
    shard_mb: int = setting(512, help="Largest shard.", unit="megabytes", min=1, max=512)
    threads: int | None = setting(
        None, help="Threads per process that read and measure audio; null: as many as cores, up to 8.", min=1, max=1024
    )
    reuse: str | None = setting(
        None,
        help="Another folder of shards whose latents are reused where audio, fixes, weights and precision are equal.",
        text="path",
    )
    overwrite: bool = setting(False, help="Replace what the output folder contains if it was made with other settings.")

    def __post_init__(self) -> None:
        check_settings(self)
        check_template(self.caption_template)
        if self.caption_template != DEFAULT_TEMPLATE and self.captions != "auto":
            raise ConflictError(
                "caption_template has no effect without captions=auto.",
                {"caption_template": DEFAULT_TEMPLATE, "captions": "auto"},
            )

    def count_threads(self) -> int:
        """Count the threads to use.

        Returns:
            `threads`, or the number of cores up to 8.
        """
        return self.threads or min(os.cpu_count() or 1, 8)
