"""The inner loop of an encode: batches of tasks to latents with their records, or to the reason why not."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sa3train.audio.edit import gain, to_channels
from sa3train.audio.io import read_audio
from sa3train.audio.resample import resample
from sa3train.core.log import progress
from sa3train.data.audit.audit import UNREADABLE
from sa3train.data.audit.checks import content_hash, finding
from sa3train.data.encode.encoder import Encoder
from sa3train.data.encode.fixes import apply_fixes
from sa3train.data.encode.plan import EncodePlan, Kept, Task
from sa3train.data.shards.writer import MADE, read_array
from sa3train.data.sources.listing import Clip

Record = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One take: its latents and record, or (latents None) the finding that says why there are none."""

    record: Record
    latent_CT: np.ndarray | None
    fault: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Loaded:
    """A clip's audio (2, N) as it goes into the autoencoder, what the fixes did, or why it cannot be had."""

    audio_CN: torch.Tensor | None
    applied: dict[str, Any]
    fault: dict[str, Any] | None = None


class EncodeRun:
    """Encodes what is neither `done` nor `kept`, and counts. `encoded` and `reused` are takes; `seconds` audio encoded;
    `elapsed` seconds spent in the autoencoder.
    """

    def __init__(
        self, plan: EncodePlan, encoder: Encoder, clips: dict[str, Clip], done: set[str], kept: dict[str, Kept]
    ) -> None:
        self.plan, self.encoder, self.clips, self.done, self.kept = plan, encoder, clips, done, kept
        self.encoded = self.reused = 0
        self.seconds = self.elapsed = 0.0
        self._real = self._computed = 0

    @property
    def padding(self) -> float:
        """Share of the computed frames' samples that belong to no clip."""
        computed = self._computed * self.encoder.autoencoder.downsampling_ratio
        return 1 - self._real / computed if computed else 0.0

    def outcomes(self, batches: Sequence[Sequence[Task]]) -> Iterator[Outcome]:
        """Every take that is still to be written, batch by batch; audio is read one batch ahead."""
        with ThreadPoolExecutor(self.plan.settings.threads) as pool:
            waiting: tuple[list[list[Record]], list[Future[_Loaded]]] | None = None
            for batch in progress(batches, "encode", total=len(batches), unit="batch"):
                tasks = self._unfinished(batch)
                following = (tasks, [pool.submit(self._load, task) for task in tasks]) if tasks else None
                if waiting:
                    yield from self._encode(*waiting)
                waiting = following
            if waiting:
                yield from self._encode(*waiting)

    def _unfinished(self, batch: Sequence[Task]) -> list[list[Record]]:
        """Planned records of each task of a batch, all of it or (when all is done) nothing: a batch that was cut short
        is computed whole, so that its bits do not depend on where it was cut.
        """
        tasks = [[record for number in task.clips for record in self.plan.records(number)] for task in batch]
        if all(record["key"] in self.done for task in tasks for record in task):
            return []
        for record in (record for task in tasks for record in task):
            kept = self.kept.get(record["latent_hash"])
            if kept is not None and read_array(Path(kept.path), kept.entry) is None:
                del self.kept[record["latent_hash"]]  # damaged since: compute it
        return tasks

    def _encode(self, tasks: list[list[Record]], loading: list[Future[_Loaded]]) -> Iterator[Outcome]:
        loaded = [future.result() for future in loading]
        takes: list[tuple[int, str, torch.Tensor]] = []
        for number, (task, clip) in enumerate(zip(tasks, loaded, strict=True)):
            if clip.audio_CN is not None:
                views = {record["view"]: None for record in task if record["latent_hash"] not in self.kept}
                takes += [(number, view, _viewed(clip.audio_CN, view, task[0]["content_hash"])[0]) for view in views]
        started = time.perf_counter()
        latents = self.encoder.encode(
            [take[2] for take in takes], [_seed(tasks[take[0]][0], take[1]) for take in takes]
        )
        self.elapsed += time.perf_counter() - started
        made = {(number, view): latent_CT for (number, view, _), latent_CT in zip(takes, latents, strict=True)}
        for number, (task, clip) in enumerate(zip(tasks, loaded, strict=True)):
            for record in task:
                if record["key"] not in self.done:
                    yield self._outcome(record, clip, made.get((number, record["view"])))

    def _outcome(self, record: Record, clip: _Loaded, latent_CT: np.ndarray | None) -> Outcome:
        kept = self.kept.get(record["latent_hash"])
        if kept is not None and (stored := read_array(Path(kept.path), kept.entry)) is not None:
            self.reused += 1
            made = {name: value for name, value in kept.entry.record.items() if name in MADE}
            return Outcome(record | made, stored)
        if clip.audio_CN is None:
            return Outcome(record, None, clip.fault)
        if latent_CT is None:
            return Outcome(record, None, finding("bad_latent", self.encoder.precision))
        samples = clip.audio_CN.shape[1]
        applied = clip.applied | _viewed(clip.audio_CN[:, :1], record["view"], record["content_hash"])[1]
        self._count(samples)
        seconds = round(samples / self.encoder.autoencoder.sample_rate, 6)
        return Outcome({**record, "seconds": seconds, **({"applied": applied} if applied else {})}, latent_CT)

    def _count(self, samples: int) -> None:
        self.encoded += 1
        self.seconds += samples / self.encoder.autoencoder.sample_rate
        self._real += samples
        self._computed += self.encoder.computed_frames(samples)

    def _load(self, task: list[Record]) -> _Loaded:
        """Read, check, mix, resample and mend the sound of a task; nothing when all its latents are there already."""
        if all(record["latent_hash"] in self.kept for record in task):
            return _Loaded(None, {})
        record = task[0]
        clip, rate = self.clips[record["source"]], self.encoder.autoencoder.sample_rate
        try:
            audio_CN, own_rate = read_audio(clip.audio.local_path() or clip.audio.read())
            if content_hash(audio_CN.numpy(), own_rate) != record["content_hash"]:
                return _Loaded(None, {}, finding("changed"))
            stereo_CN = resample(to_channels(audio_CN, 2), own_rate, rate)
            mended_CN, applied = apply_fixes(stereo_CN, rate, self.plan.settings.fix)
        except UNREADABLE as error:
            return _Loaded(None, {}, finding("unreadable", str(error) or type(error).__name__))
        if mended_CN.shape[1] < self.encoder.autoencoder.downsampling_ratio:
            return _Loaded(
                None, applied, finding("too_short", f"{mended_CN.shape[1] / rate * 1000:.0f} ms once mended")
            )
        return _Loaded(mended_CN, applied)


def _viewed(audio_CN: torch.Tensor, view: str, content: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """A take of the audio, and what was done to it; the gain belongs to the clip."""
    if view == "polarity":
        return -audio_CN, {"polarity": -1}
    if view == "gain":
        decibels = -3.0 - 6.0 * (int(content[:8], 16) / 0xFFFFFFFF)
        return gain(audio_CN, decibels), {"gain": round(decibels, 3)}
    return audio_CN, {}


def _seed(record: Record, view: str) -> int:
    """The seed of what the model draws at random for a take: from its content, and nothing else."""
    digest = hashlib.sha256(f"{record['content_hash']} {view}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
