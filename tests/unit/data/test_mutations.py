"""Damaged files of every kind: no crash, no hang; each is encoded or listed with a reason."""

import io
import random
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.audio import encode, noise
from helpers.shards import mutate
from sa3train.data.audit.audit import AuditRules
from sa3train.data.encode.encode import encode_dataset
from sa3train.data.encode.encoder import Encoder
from sa3train.data.encode.settings import EncodeSettings
from sa3train.data.shards.reader import LatentStore
from sa3train.data.sources.listing import list_source

LONGEST_SECONDS = 2.0
KINDS: list[tuple[str, str, str | None]] = [
    (".wav", "WAV", "PCM_16"),
    (".wav", "WAV", "FLOAT"),
    (".wav", "WAV", "PCM_U8"),
    (".flac", "FLAC", None),
    (".ogg", "OGG", "VORBIS"),
    (".opus", "OGG", "OPUS"),
    (".mp3", "MP3", None),
    (".aiff", "AIFF", None),
]


def encoded(kind: str, subtype: str | None, seed: int) -> bytes:
    return encode(noise(0.15, 48000, seed=seed, peak=0.3), kind, subtype, 48000)


def mutated_header(content: bytes, rng: random.Random) -> bytes:
    """A few bytes of the first 64 changed: where sizes, rates and channel counts stand."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        out[rng.randrange(min(64, len(out)))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    return bytes(out)


def sources_listed(out: Path) -> set[str]:
    import json

    lines = (out / "rejected.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(row["reason"] for row in rows)
    return {row["source"] for row in rows}


def slowest(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of processor time that each clip takes in the audit and in loading for the autoencoder."""
    import sa3train.data.audit.audit as audit
    from sa3train.data.encode.pipeline import EncodePipeline

    taken: list[float] = []

    def timed(function: Any) -> Any:
        def run(*args: Any) -> Any:
            started = time.thread_time()
            result = function(*args)
            taken.append(time.thread_time() - started)
            return result

        return run

    monkeypatch.setattr(audit, "audit_clip", timed(audit.audit_clip))
    monkeypatch.setattr(EncodePipeline, "_load", timed(EncodePipeline._load))
    return taken


@pytest.mark.slow
def test_1000_mutated_audio_files(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "set", tmp_path / "out"
    source.mkdir()
    originals = [encoded(kind, subtype, seed) for seed, (_, kind, subtype) in enumerate(KINDS)]
    for seed in range(1000):
        rng, (suffix, _, _) = random.Random(seed), KINDS[seed % len(KINDS)]
        change = mutated_header if rng.random() < 0.4 else mutate
        (source / f"{seed:04d}{suffix}").write_bytes(change(originals[seed % len(KINDS)], rng))
        (source / f"{seed:04d}.txt").write_text("damaged")
    taken = slowest(monkeypatch)
    encode_dataset(str(source), out, encoder, EncodeSettings(max_rejected=1.0, threads=1), AuditRules())
    listed = sources_listed(out)
    store = LatentStore(out)
    stored = {record["source"] for _, record in store.iterate_records()}
    assert len(stored) + len(listed) == 1000
    assert not stored & listed
    assert len(listed) > 200
    assert len(stored) > 200
    assert len(taken) >= 1000
    assert max(taken) < LONGEST_SECONDS
    assert all(np.isfinite(store.read_latents(row)).all() for row in range(len(store)))


@pytest.mark.slow
def test_500_mutated_tars(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "set"
    source.mkdir()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number, (suffix, kind, subtype) in enumerate(KINDS[3:6]):
            for ending, content in ((suffix, encoded(kind, subtype, number)), (".txt", b"in a tar")):
                header = tarfile.TarInfo(f"{'long/' * 25 if number else ''}{number}{ending}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    whole, taken, listings = buffer.getvalue(), slowest(monkeypatch), []
    clips = problems = 0
    for seed in range(500):
        path = source / f"{seed:03d}.tar"
        path.write_bytes(mutate(whole, random.Random(seed)))
        started = time.thread_time()
        listing = list_source(str(path))
        listings.append(time.thread_time() - started)
        clips, problems = clips + len(listing.clips), problems + len(listing.problems)
        assert len(listing.clips) == 3 or listing.problems or listing.skipped, "what is missing is named"
    out = tmp_path / "out"
    encode_dataset(str(source), out, encoder, EncodeSettings(max_rejected=1.0, threads=1), AuditRules())
    stored = {record["source"] for _, record in LatentStore(out).iterate_records()}
    listed = sources_listed(out)
    assert not stored & listed
    assert len(stored) + len(listed) == clips + problems
    assert min(len(stored), len(listed)) > 200
    assert max(*taken, *listings) < LONGEST_SECONDS
