"""The broad corpus, without the parts that FluidSynth renders."""

import random
from pathlib import Path

import broad
import numpy as np
import pytest
import store
from corpus import Clip, captions
from effects import make_effect
from sounds import EFFECTS

KINDS = ("make_one_shots", "make_synths", "make_free", "make_loops")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few clips of each kind, and effects in the place of what is rendered."""

    def make_chunk(seed: int, number: int, size: int) -> list[Clip]:
        rng = random.Random(number)
        plans = [broad.make_plan(rng, sound, (1.0, 2.0)) for sound in EFFECTS[:size]]
        return [Clip(plan, make_effect(plan), captions(plan, rng)) for plan in plans]

    monkeypatch.setattr(broad, "CLIPS", dict.fromkeys(broad.CLIPS, 2))
    monkeypatch.setattr(broad, "chunk", make_chunk)
    monkeypatch.setattr(broad, "render", lambda scores: [np.ones((2, 4410), np.float32) for _ in scores])


def test_clips_have_their_kinds_levels_and_captions(few: None) -> None:
    for name in KINDS:
        clips = list(getattr(broad, name)(random.Random(0), np.random.default_rng(0)))
        assert len(clips) == 2
        for facts, audio_CN, texts in clips:
            assert audio_CN.shape[0] == 2
            assert np.isfinite(audio_CN).all()
            peak_db = 20 * np.log10(np.abs(audio_CN).max())
            assert -25 < peak_db <= 0
            if facts.get("kind") == "one-shot":
                assert peak_db > -2
            assert len(set(texts)) == 3
            assert not any(text.startswith(("A a", "A e", "A i", "A o", "A u")) for text in texts)
            assert not facts.get("bpm") or any(f"{facts['bpm']}" in text for text in texts)


def test_held_out_instruments_are_in_no_score() -> None:
    held_out = {sound.program for sound in broad.HELD_OUT}
    assert not held_out & {facts["program"] for facts, _, _ in broad.make_program_scores(random.Random(0), 300)}


@pytest.mark.slow
def test_a_chunk_is_the_same_again_and_is_read_as_a_store(few: None, tmp_path: Path) -> None:
    for folder in ("first", "again"):
        (tmp_path / folder).mkdir()
        seconds = broad.write_chunk(tmp_path / folder, 2, broad.make_clips(0, 2))
    first, again = (store.Store(tmp_path / folder) for folder in ("first", "again"))
    assert sum(entry["length"] for entry in first.entries) == pytest.approx(seconds * 44_100)
    assert first.entries == again.entries
    assert all(np.array_equal(first.audio(i), again.audio(i)) for i in range(len(first.entries)))
