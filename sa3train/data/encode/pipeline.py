"""The inner loop of an encode: from batches of clips to latents with their records, or to the reason for failure."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sa3train.audio.edit import apply_gain, mix_channels
from sa3train.audio.io import read_whole
from sa3train.audio.resample import resample
from sa3train.core.log import track_progress
from sa3train.data.audit.audit import READ_ERRORS
from sa3train.data.audit.checks import hash_audio, make_finding
from sa3train.data.encode.encoder import Encoder
from sa3train.data.encode.fixes import apply_fixes
from sa3train.data.encode.plan import ClipGroup, EncodePlan, StoredLatents
from sa3train.data.shards.shard_file import ENCODED_FIELDS
from sa3train.data.sources.latents import ImportedLatents, read_imported_latents
from sa3train.data.sources.listing import Clip

Record = dict[str, Any]


@dataclass(frozen=True)
class EncodedClip:
    """One augmentation of a clip, encoded.

    Attributes:
        record: Its record, as planned and completed by what the encoder did.
        latents_CF: Its latents; None when it could not be encoded.
        finding: Why it could not be encoded.
    """

    record: Record
    latents_CF: np.ndarray | None
    finding: dict[str, Any] | None = None


@dataclass(frozen=True)
class _LoadedClip:
    """Audio (2, N) as the autoencoder takes it, and what the fixes did; latents; or why it cannot be loaded."""

    audio_CN: torch.Tensor | None
    applied: dict[str, Any]
    finding: dict[str, Any] | None = None
    latents_CF: np.ndarray | None = None


class EncodePipeline:
    """Encodes what is neither done nor reusable, and counts.

    Attributes:
        encoded: Number of latents computed.
        reused: Number of latents copied from an earlier run.
        seconds: Audio encoded, in seconds.
        elapsed: Wall time spent in the autoencoder, in seconds.
    """

    def __init__(
        self,
        plan: EncodePlan,
        encoder: Encoder,
        clips: dict[str, Clip],
        done: set[str],
        reusable: dict[str, StoredLatents],
    ) -> None:
        """Prepare an encode.

        Args:
            plan: What to encode.
            encoder: The encoder.
            clips: Clips by source.
            done: Keys of the records that are already in shards.
            reusable: Latents of earlier runs by their hash.
        """
        self.plan, self.encoder, self.clips, self.done, self.reusable = plan, encoder, clips, done, reusable
        self.encoded = self.reused = 0
        self.seconds = self.elapsed = 0.0
        self._samples = self._computed_samples = 0

    @property
    def padding(self) -> float:
        """Share of the computed samples that belong to no clip."""
        return 1 - self._samples / self._computed_samples if self._computed_samples else 0.0

    def run(self, batches: Sequence[Sequence[ClipGroup]]) -> Iterator[EncodedClip]:
        """Encode batch by batch; audio is read one batch ahead.

        Args:
            batches: Clips to encode together.

        Yields:
            Everything that is to be written to shards or reported as failed.
        """
        with ThreadPoolExecutor(self.plan.settings.count_threads()) as pool:
            waiting: tuple[list[list[Record]], list[Future[_LoadedClip]]] | None = None
            for batch in track_progress(batches, "encode", total=len(batches), unit="batch"):
                groups = self._plan_batch(batch)
                following = (groups, [pool.submit(self._load, records) for records in groups]) if groups else None
                if waiting:
                    yield from self._encode(*waiting)
                waiting = following
            if waiting:
                yield from self._encode(*waiting)

    def _plan_batch(self, batch: Sequence[ClipGroup]) -> list[list[Record]]:
        """Planned records of each group; none when all are done. An interrupted batch is computed whole, so that its
        bits do not depend on where it was interrupted.
        """
        groups = [[record for index in group.clips for record in self.plan.plan_records(index)] for group in batch]
        if all(record["key"] in self.done for records in groups for record in records):
            return []
        for record in (record for records in groups for record in records):
            stored = self.reusable.get(record["latent_hash"])
            if stored is not None and stored.read() is None:
                del self.reusable[record["latent_hash"]]  # damaged since: compute it
        return groups

    def _encode(self, groups: list[list[Record]], loading: list[Future[_LoadedClip]]) -> Iterator[EncodedClip]:
        loaded = [future.result() for future in loading]
        audio: dict[tuple[int, str], torch.Tensor] = {}
        for number, (records, clip) in enumerate(zip(groups, loaded, strict=True)):
            if clip.audio_CN is None:
                continue
            for record in records:
                key = number, record["augmentation"]
                if record["latent_hash"] not in self.reusable and key not in audio:
                    audio[key] = _augment(clip.audio_CN, record["augmentation"], records[0]["content_hash"])[0]
        seeds = [_derive_seed(groups[number][0], augmentation) for number, augmentation in audio]
        started = time.perf_counter()
        latents = dict(zip(audio, self.encoder.encode(list(audio.values()), seeds), strict=True))
        self.elapsed += time.perf_counter() - started
        for number, (records, clip) in enumerate(zip(groups, loaded, strict=True)):
            for record in records:
                if record["key"] not in self.done:
                    yield self._finish(record, clip, latents.get((number, record["augmentation"])))

    def _finish(self, record: Record, clip: _LoadedClip, latents_CF: np.ndarray | None) -> EncodedClip:
        """Complete a record from its stored or computed latents."""
        stored = self.reusable.get(record["latent_hash"])
        if stored is not None and (stored_CF := stored.read()) is not None:
            self.reused += 1
            made = {name: value for name, value in stored.entry.record.items() if name in ENCODED_FIELDS}
            return EncodedClip(record | made, stored_CF)
        if clip.latents_CF is not None:
            self.reused += 1
            return EncodedClip({**record, "seconds": record["original"]["seconds"]}, clip.latents_CF)
        if clip.audio_CN is None:
            return EncodedClip(record, None, clip.finding)
        if latents_CF is None:
            return EncodedClip(record, None, make_finding("bad_latent", self.encoder.precision))
        autoencoder, samples = self.encoder.autoencoder, clip.audio_CN.shape[1]
        seconds = samples / autoencoder.sample_rate
        self.encoded, self.seconds, self._samples = self.encoded + 1, self.seconds + seconds, self._samples + samples
        self._computed_samples += autoencoder.count_frames(samples) * autoencoder.downsampling_ratio
        applied = clip.applied | _augment(clip.audio_CN[:, :1], record["augmentation"], record["content_hash"])[1]
        extra = {"applied": applied} if applied else {}
        return EncodedClip({**record, "seconds": round(seconds, 6), **extra}, latents_CF)

    def _load(self, records: list[Record]) -> _LoadedClip:
        """Read, check, mix, resample and fix the audio of a group; nothing when all its latents are reusable."""
        if all(record["latent_hash"] in self.reusable for record in records):
            return _LoadedClip(None, {})
        record = records[0]
        clip, rate = self.clips[record["source"]], self.encoder.autoencoder.sample_rate
        try:
            if clip.is_latents and clip.fields is not None:
                return self._load_latents(read_imported_latents(clip.audio, clip.fields), record)
            decoded = read_whole(clip.audio.local_path() or clip.audio.read())
            audio_CN, own_rate = decoded.audio_CN, decoded.sample_rate
            if hash_audio(audio_CN.numpy(), own_rate, decoded.speakers) != record["content_hash"]:
                return _LoadedClip(None, {}, make_finding("changed"))
            stereo_CN = resample(mix_channels(audio_CN, 2, decoded.speakers), own_rate, rate)
            fixed_CN, applied = apply_fixes(stereo_CN, rate, self.plan.settings.fixes)
        except READ_ERRORS as error:
            return _LoadedClip(None, {}, make_finding("unreadable", str(error) or type(error).__name__))
        return _LoadedClip(fixed_CN, applied)

    def _load_latents(self, imported: ImportedLatents, record: Record) -> _LoadedClip:
        channels, expected = len(imported.latents_CF), self.encoder.autoencoder.latent_channels
        if imported.content != record["content_hash"]:
            return _LoadedClip(None, {}, make_finding("changed"))
        if channels != expected:
            return _LoadedClip(None, {}, make_finding("bad_imported", f"{channels} channels, not {expected}"))
        return _LoadedClip(None, {}, latents_CF=imported.latents_CF.astype(np.float16))


def _augment(audio_CN: torch.Tensor, augmentation: str, content_hash: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """Augment audio; returns it and what was done. The gain depends on the clip alone."""
    if augmentation == "polarity":
        return -audio_CN, {"polarity": -1}
    if augmentation == "gain":
        decibels = -3.0 - 6.0 * (int(content_hash[:8], 16) / 0xFFFFFFFF)
        return apply_gain(audio_CN, decibels), {"gain": round(decibels, 3)}
    return audio_CN, {}


def _derive_seed(record: Record, augmentation: str) -> int:
    """The seed of what the model draws, from the clip's content and augmentation alone."""
    digest = hashlib.sha256(f"{record['content_hash']} {augmentation}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
