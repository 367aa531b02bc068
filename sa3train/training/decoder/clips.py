"""Clips of a folder as audio: read once, split as `sa3-encode` splits them, and cropped at random.

Shape legend: B clips, C channels, N samples.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sa3train.audio.edit import fit
from sa3train.audio.io import load_audio
from sa3train.audio.metrics import is_silent
from sa3train.core.errors import AudioError, DataError
from sa3train.core.log import get_logger, track_progress
from sa3train.core.seeds import derive_seed
from sa3train.data.audit.checks import hash_audio
from sa3train.data.encode.encode import list_clips
from sa3train.data.encode.plan import make_clip_key, select_heldout
from sa3train.data.sources.captions import read_clip_text
from sa3train.data.sources.listing import Clip
from sa3train.data.sources.storage import AUDIO_LIMIT

_logger = get_logger(__name__)

CHANNELS = 2
CACHE_BYTES = 2**30
"""Decoded clips that are held in memory; what is beyond is read again when it is drawn."""
DRAWS_VERSION = 1
"""Version of the random draws: raise it with any change to which crops and noise a step gets for a seed."""


@dataclass(frozen=True)
class AudioClip:
    """A clip that can be read.

    Attributes:
        clip: Where it is.
        content: Hash of its samples.
        samples: Its length at the model's sample rate.
        caption: Its caption; empty where there is none.
    """

    clip: Clip
    content: str
    samples: int
    caption: str

    @property
    def keys(self) -> tuple[str]:
        """Its key, from its path."""
        return (make_clip_key(self.clip.source),)

    @property
    def prompts(self) -> tuple[str]:
        """Its caption, else its path."""
        return (self.caption or self.clip.source,)


class AudioClips:
    """The clips of a source, each checked by reading it.

    Args:
        source: Folder, list, tar or URL, as `sa3-encode` takes it.
        sample_rate: The model's sample rate in Hz.
        split: Share to hold out, or the path of a list of sources.

    Attributes:
        train: Clips to train on.
        heldout: Clips to validate on.
        manifest: Hash of the contents and the split.

    Raises:
        DataError: There is no clip to train on.
    """

    def __init__(self, source: str, sample_rate: int, split: float | str) -> None:
        self.source, self.sample_rate = source, sample_rate
        self._cache: dict[str, Tensor] = {}
        self._cached_bytes = 0
        listing = list_clips(source)
        clips, problems = self._check(listing.clips)
        problems += [f"{problem.source}: {problem.detail}" for problem in listing.problems]
        if problems:
            named = "\n  ".join(problems)
            _logger.warning("%s: clips that cannot be used are left out (%d):\n  %s", source, len(problems), named)
        mask = _split(clips, split)
        self.train = [clip for clip, is_heldout in zip(clips, mask, strict=True) if not is_heldout]
        self.heldout = [clip for clip, is_heldout in zip(clips, mask, strict=True) if is_heldout]
        if not self.train:
            raise DataError(f"{source} has no clip to train on: {len(clips)} of its clips can be used. Add audio.")
        lines = sorted(f"{clip.keys[0]} {clip.content} {bool(held)}" for clip, held in zip(clips, mask, strict=True))
        self.manifest = hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def read(self, clip: AudioClip) -> Tensor:
        """Read a clip.

        Args:
            clip: One of these clips.

        Returns:
            Stereo audio (2, N) at the model's sample rate.

        Raises:
            DataError: It has changed, or cannot be read any more.
        """
        if clip.content in self._cache:
            return self._cache[clip.content]
        audio_CN = self._decode(clip.clip)
        if _hash(audio_CN, self.sample_rate) != clip.content:
            raise DataError(f"{clip.clip.source} in {self.source} has changed since the run was started. Restore it.")
        return audio_CN

    def describe(self, model: str) -> dict[str, Any]:
        """Describe the data for `data.json`.

        Args:
            model: Name of the model whose autoencoder encodes it.

        Returns:
            Its content.
        """
        splits = {
            name: {"clips": len(clips), "seconds": sum(clip.samples for clip in clips) / self.sample_rate}
            for name, clips in (("train", self.train), ("heldout", self.heldout))
        }
        source = {"path": self.source, "role": "train", "repeats": 1, "weight": None, "model": model, "card": ""}
        source |= {"manifest": self.manifest, "splits": splits}
        return {"manifest": self.manifest, "sources": [source], "prompts": []}

    def _decode(self, clip: Clip) -> Tensor:
        return load_audio(clip.audio.local_path() or clip.audio.read(AUDIO_LIMIT), self.sample_rate, CHANNELS)

    def _check(self, listed: Sequence[Clip]) -> tuple[list[AudioClip], list[str]]:
        """Read every clip once; also returns why some cannot be used."""
        found, problems = [], []
        for clip in track_progress(listed, "reading clips", unit="clip"):
            try:
                audio_CN = self._decode(clip)
            except (AudioError, DataError) as error:
                problems.append(f"{clip.source}: {error}")
                continue
            if is_silent(audio_CN):
                problems.append(f"{clip.source}: it is silent")
                continue
            content = _hash(audio_CN, self.sample_rate)
            found.append(AudioClip(clip, content, audio_CN.shape[1], read_clip_text(clip).caption))
            if self._cached_bytes + audio_CN.nbytes <= CACHE_BYTES and content not in self._cache:
                self._cache[content] = audio_CN
                self._cached_bytes += audio_CN.nbytes
        return found, problems


def _split(clips: Sequence[AudioClip], split: float | str) -> np.ndarray:
    """Whether each clip is held out; clips of the same content stay together."""
    if not clips:
        return np.zeros(0, dtype=bool)
    contents = [clip.content for clip in clips]
    first = {content: index for index, content in reversed(list(enumerate(contents)))}
    return select_heldout(
        split,
        [clip.clip.source for clip in clips],
        np.frombuffer(bytes.fromhex("".join(contents)), dtype=np.uint8).reshape(len(clips), -1),
        np.array([first[content] for content in contents]),
        np.ones(len(clips), dtype=bool),
    )


def _hash(audio_CN: Tensor, sample_rate: int) -> str:
    return hash_audio(audio_CN.numpy(), sample_rate)


class CropLoader:
    """Endless micro-batches of random crops; each depends on seed, rank and its number alone, so any can be resumed.

    Args:
        clips: The clips.
        samples: Length of a crop.
        batch_size: Crops per micro-batch.
        seed: Seed of the run.
        rank: This process' rank.
    """

    def __init__(self, clips: AudioClips, samples: int, batch_size: int, seed: int, rank: int) -> None:
        self.clips, self.samples, self.batch_size, self.seed, self.rank = clips, samples, batch_size, seed, rank
        self.number = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            rng = random.Random(derive_seed(self.seed, "crops", self.rank, self.number))
            self.number += 1
            yield {"audio_BCN": torch.stack([self._draw(rng) for _ in range(self.batch_size)])}

    def state_dict(self) -> dict[str, int]:
        """Get the position.

        Returns:
            The number of the next micro-batch.
        """
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore a position.

        Args:
            state: What `state_dict` returned.
        """
        self.number = state["number"]

    def _draw(self, rng: random.Random) -> Tensor:
        audio_CN = self.clips.read(rng.choice(self.clips.train))
        start = rng.randint(0, max(0, audio_CN.shape[1] - self.samples))
        return fit(audio_CN[:, start : start + self.samples], self.samples)
