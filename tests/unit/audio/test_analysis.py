"""What is heard: on sounds made here, of known tempo and key."""

import numpy as np
import pytest

from helpers.audio import noise, tone
from sa3train.audio.analysis import AudioAnalysis, analyze_audio

RATE = 22050
HITS = {"kick": (60.0, 12.0, 1.0), "snare": (190.0, 18.0, 0.7), "hat": (0.0, 60.0, 0.25)}
"""Pitch (0: noise alone), decay per second, level."""
CHORDS = {
    "C major": ((0, 4, 7), (5, 9, 12), (7, 11, 14), (0, 4, 7)),
    "A minor": ((9, 12, 16), (2, 5, 9), (4, 8, 11), (9, 12, 16)),
}


def make_hit(kind: str) -> np.ndarray:
    pitch, decay, level = HITS[kind]
    seconds_N = np.arange(round(0.2 * RATE)) / RATE
    body_N = np.sin(2 * np.pi * pitch * seconds_N)
    noise_N = np.random.default_rng(0).normal(size=len(seconds_N))
    share = {"kick": 0.05, "snare": 0.6, "hat": 1.0}[kind]
    return level * np.exp(-decay * seconds_N) * ((1 - share) * body_N + share * 0.5 * noise_N)


def make_drums(bpm: float, bars: int = 2, cut_beats: float = 0.0) -> np.ndarray:
    """Kick on 1 and 3, snare on 2 and 4, hats in eighths; (1, N)."""
    beat = 60 / bpm
    audio_N = np.zeros(round(4 * bars * beat * RATE) + RATE)
    for bar in range(bars):
        for at, kind in [(0, "kick"), (1, "snare"), (2, "kick"), (3, "snare"), *((k / 2, "hat") for k in range(8))]:
            start, hit_N = round((4 * bar + at) * beat * RATE), make_hit(kind)
            audio_N[start : start + len(hit_N)] += hit_N
    return audio_N[None, : round((4 * bars - cut_beats) * beat * RATE)].astype(np.float32) * 0.5


def make_chords(key: str) -> np.ndarray:
    """Four chords of two seconds, with harmonics; (1, N)."""
    seconds_N = np.arange(2 * RATE) / RATE
    chords = [
        sum(
            np.sin(2 * np.pi * h * 261.63 * 2 ** (note / 12) * seconds_N) / h**2 for note in chord for h in (1, 2, 3, 4)
        )
        for chord in CHORDS[key]
    ]
    return 0.1 * np.concatenate(chords)[None].astype(np.float32)


@pytest.mark.parametrize("bpm", [98, 120, 133.5])
@pytest.mark.parametrize("cut_beats", [0.0, 0.4])
def test_drums(bpm: float, cut_beats: float) -> None:
    heard = analyze_audio(make_drums(bpm, 4, cut_beats), RATE)
    assert heard.bpm == pytest.approx(bpm, rel=0.0005 if not cut_beats else 0.02)
    assert heard.form == ("" if cut_beats else "loop")
    assert heard.key is None and heard.sound != "tonal"


@pytest.mark.parametrize("key", CHORDS)
def test_chords(key: str) -> None:
    heard = analyze_audio(make_chords(key), RATE)
    assert (heard.key, heard.sound, heard.form) == (key, "tonal", "")


def test_a_hit_has_no_tempo_and_no_key() -> None:
    heard = analyze_audio(np.pad(make_hit("kick"), (0, 2000))[None].astype(np.float32), RATE)
    assert (heard.bpm, heard.key, heard.form) == (None, None, "one-shot")


@pytest.mark.parametrize("audio_NC", [tone(3.0), noise(3.0), tone(0.05), noise(0.02)])
def test_what_has_no_pulse_has_no_tempo(audio_NC: np.ndarray) -> None:
    assert analyze_audio(np.ascontiguousarray(audio_NC.T), 44100).bpm is None


def test_silence_says_nothing() -> None:
    assert analyze_audio(np.zeros((2, 44100), np.float32), 44100) == AudioAnalysis()
