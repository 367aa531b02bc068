"""The corpus: composed by seed, within range and time, captioned by what is in it."""

import random
import re
import stat
import sys

import captions
import composer
import corpus
import effects
import numpy as np
import pytest
import render
import score
import sounds


def plans(count: int, seed: int = 0) -> list[composer.Plan]:
    rng = random.Random(seed)
    return [composer.make_plan(rng) for _ in range(count)]


def test_there_are_enough_classes_and_some_are_held_out() -> None:
    assert len(sounds.NAMES) == len(set(sounds.NAMES)) >= 40
    known = {sound.program for sound in sounds.PITCHED}
    for sound in sounds.HELD_OUT:
        assert sound.name not in sounds.NAMES
        assert sound.program not in known


def test_same_seed_same_scores() -> None:
    first, again, other = ([composer.compose(p) for p in plans(40, s) if p.sound.kind != "effect"] for s in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("sound", [*sounds.KNOWN, *sounds.HELD_OUT], ids=lambda sound: sound.name)
def test_every_class_plays_within_its_range_and_time(sound: sounds.Sound) -> None:
    rng = random.Random(sound.name)
    for _ in range(20):
        plan = composer.make_plan(rng, sound)
        assert 1.0 <= plan.seconds <= 12.0
        if sound.kind == "effect":
            continue
        written = composer.compose(plan)
        assert written.notes
        assert all(0 <= note.start < plan.seconds and note.seconds > 0 for note in written.notes)
        assert all(1 <= note.velocity <= 127 for note in written.notes)
        if sound.kind == "pitched":
            assert all(sound.low <= note.key <= sound.high for note in written.notes)


def test_registers_differ() -> None:
    for sound in sounds.PITCHED:
        lows = [composer.register_range(sound, register)[0] for register in composer.REGISTERS]
        assert lows == sorted(lows)
        assert lows[0] < lows[2]


def test_midi_holds_every_note() -> None:
    written = [composer.compose(plan) for plan in plans(30) if plan.sound.kind != "effect"]
    starts = np.cumsum([0.1] + [each.seconds + 1 for each in written[:-1]]).tolist()
    data = score.midi_bytes(written, starts)
    assert data[:4] == b"MThd"
    assert int.from_bytes(data[18:22], "big") == len(data) - 22
    assert note_ons(data[22:]) == sum(len(each.notes) for each in written)


def note_ons(track: bytes) -> int:
    """Walk the track's events and count the notes that begin."""
    place = found = 0
    while place < len(track):
        while track[place] & 0x80:
            place += 1
        status = track[place + 1]
        found += status & 0xF0 == 0x90
        place += 2
        if status == 0xFF:
            place += 2 + track[place + 1]
        else:
            place += 1 if status & 0xF0 == 0xC0 else 2
    return found


def test_captions_name_the_sound_and_differ() -> None:
    rng = random.Random(0)
    for plan in plans(200):
        texts = captions.captions(plan, rng, 3)
        assert len(set(texts)) == 3
        assert all(plan.sound.name in text.lower() for text in texts)
        assert texts[0].startswith("TrackType: ")


def test_captions_claim_only_what_was_planned() -> None:
    rng = random.Random(0)
    for plan in plans(200):
        for text in captions.captions(plan, rng, 3):
            for register in set(composer.REGISTERS) - {plan.register}:
                assert f"{register} register" not in text
            if "bpm" in text.lower():
                assert f"{plan.bpm} BPM" in text or f"BPM: {plan.bpm}" in text
            if plan.sound.kind == "band" and " in " in text:
                assert plan.key in text
            assert not re.search(r"\b(A [aeiou8]|An [^aeiou8])", text)


@pytest.mark.parametrize("sound", sounds.EFFECTS, ids=lambda sound: sound.name)
def test_effects_are_heard_and_repeatable(sound: sounds.Sound) -> None:
    plan = composer.make_plan(random.Random(3), sound, seconds=(1.0, 3.0))
    audio = corpus.finish(plan, effects.make_effect(plan))
    assert audio.shape == (2, round(plan.seconds * render.SAMPLE_RATE))
    assert audio.dtype == np.float32
    assert np.isfinite(audio).all()
    assert 0.02 < np.abs(audio).max() <= 0.91
    np.testing.assert_array_equal(audio, corpus.finish(plan, effects.make_effect(plan)))


def test_mono_is_mono() -> None:
    noise = np.random.default_rng(0).standard_normal((2, 4410)).astype(np.float32)
    plan = composer.Plan(sounds.EFFECTS[0], 0.1, width="mono")
    made = corpus.finish(plan, noise)
    np.testing.assert_array_equal(made[0], made[1])


def test_trim_level_and_fade() -> None:
    audio = np.zeros((2, 44100), np.float32)
    audio[:, :22050] = 0.5 * np.sin(np.arange(22050) / 20)
    assert render.trim_tail(audio).shape[1] == pytest.approx(22050 + 0.05 * 44100, abs=441)
    levelled = render.level(audio, -20.0)
    active = levelled[:, :22050]
    assert 20 * np.log10(np.sqrt((active**2).mean())) == pytest.approx(-20, abs=0.5)
    assert np.abs(render.level(audio, 20.0)).max() == pytest.approx(0.9, abs=1e-3)
    faded = render.fade_ends(np.ones((2, 44100), np.float32))
    assert faded[0, 0] == faded[0, -1] == 0


FAKE = """#!{python}
import array, sys
out = sys.argv[sys.argv.index("-F") + 1]
samples = array.array("h", [n % 30000 for n in range(44100 * 8) for _ in (0, 1)])
open(out, "wb").write(samples.tobytes())
"""


def test_clips_are_cut_where_they_were_laid(tmp_path, monkeypatch) -> None:
    program = tmp_path / "fluidsynth"
    program.write_text(FAKE.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(render.shutil, "which", lambda name: str(program))
    (tmp_path / "font.sf2").touch()
    scores = [score.Score(1.0, [score.Note(0.0, 0.5, 60, 90)]), score.Score(0.5, [score.Note(0.0, 0.2, 64, 90)])]
    first, second = render.render(scores, tmp_path / "font.sf2")
    assert first.shape == (2, 44100)
    assert second.shape == (2, 22050)
    assert first[0, 0] * 32768 == pytest.approx(4410)
    assert second[0, 0] * 32768 == pytest.approx(round((0.1 + 1.0 + render.GAP) * 44100) % 30000)


def test_what_is_missing_is_named(tmp_path, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match="fluid-soundfont-gm"):
        render.find_soundfont(tmp_path / "none.sf2")
    monkeypatch.setattr(render.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="apt-get install fluidsynth"):
        render.render([])
