"""Write the sample data set: 36 short clips of koto, shamisen, shakuhachi and taiko with captions, for demos and tests.

    python datasets/make_sample.py [OUT] [--seed 20]

The scores are composed here (same seed, same scores) and played by FluidSynth with the MIT-licensed FluidR3 soundfont
(Debian: fluidsynth, fluid-soundfont-gm). The instruments are ones that nano has never heard, so an adapter has
something to learn; the scales, the slow pace and the room are shared, so the set has one style.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "nano"))

import numpy as np
import soundfile
from render import SAMPLE_RATE, Audio, fade_ends, level, render, trim_tail
from score import CHORUS, PAN, REVERB, Note, Score

SCALES = {  # semitones above the root
    "hirajoshi": (0, 2, 3, 7, 8),
    "in-sen": (0, 1, 5, 7, 10),
    "iwato": (0, 1, 5, 6, 10),
    "yo": (0, 2, 5, 7, 9),
}
ROOTS = {"D": 50, "E": 52, "G": 55, "A": 57}
PROGRAMS = {"koto": 107, "shamisen": 106, "shakuhachi": 77, "taiko": 116}
PANS = {"koto": 52, "shamisen": 76, "shakuhachi": 66, "taiko": 60}
MOODS = {
    "hirajoshi": "melancholic, meditative",
    "in-sen": "mysterious, calm",
    "iwato": "tense, ancient",
    "yo": "bright, serene",
}


@dataclass(frozen=True)
class Piece:
    """Plan of one clip. `beats` is its length in beats of 60 / bpm seconds, without the tail."""

    instruments: tuple[str, ...]
    figure: str
    scale: str
    root: str
    bpm: int
    beats: int


def list_scale_keys(scale: str, root: str, low: int, high: int) -> list[int]:
    """List the MIDI keys of a scale between two keys, both included."""
    return [key for key in range(low, high + 1) if (key - ROOTS[root]) % 12 in SCALES[scale]]


def compose_koto(piece: Piece, rng: random.Random, channel: int) -> list[Note]:
    """Compose koto figures: a walking melody, a falling glissando, an arpeggio over a bass string, or octaves."""
    beat, keys = 60 / piece.bpm, list_scale_keys(piece.scale, piece.root, 50, 81)
    notes: list[Note] = []
    place, at = len(keys) // 2 + rng.randint(-2, 2), 0.0
    if piece.figure == "glissando":
        for step, key in enumerate(reversed(keys[2:])):
            notes.append(Note(0.055 * step, 1.2, key, 96 - step, channel))
        at = 2.0
    while at < piece.beats - 0.51:
        if piece.figure == "arpeggio":
            chord = [keys[min(len(keys) - 1, place + jump)] for jump in (-4, 0, 2, 4)]
            for step, key in enumerate(chord):
                notes.append(Note((at + step / 2) * beat, 1.5, key, rng.randint(74, 96), channel))
            at, place = at + 2, max(4, min(len(keys) - 5, place + rng.choice((-2, -1, 1, 2))))
            continue
        length = rng.choice((0.5, 0.5, 1.0, 1.0, 1.5))
        place = max(0, min(len(keys) - 1, place + rng.choice((-2, -1, -1, 1, 1, 2))))
        notes.append(Note(at * beat, 1.4, keys[place], rng.randint(78, 108), channel))
        if piece.figure == "octaves" and keys[place] - 12 >= 48:
            notes.append(Note(at * beat + 0.02, 1.4, keys[place] - 12, rng.randint(70, 90), channel))
        elif piece.figure == "tremolo" and length >= 1:
            notes += [
                Note((at + k / 4) * beat, 0.6, keys[place], 88 - 6 * k, channel) for k in range(1, int(4 * length))
            ]
        at += length
    notes.append(Note(piece.beats * beat, 2.0, keys[max(0, place - place % 5)], 84, channel))
    return notes


def compose_shamisen(piece: Piece, rng: random.Random, channel: int) -> list[Note]:
    """Compose short struck phrases: accelerating repeated notes, then a rest."""
    beat, keys = 60 / piece.bpm, list_scale_keys(piece.scale, piece.root, 52, 74)
    notes: list[Note] = []
    place, at = len(keys) // 2, 0.0
    while at < piece.beats:
        for length in rng.choice(((0.5, 0.25, 0.25, 0.5, 0.5), (1.0, 0.5, 0.5), (0.25,) * 4 + (1.0,))):
            if at >= piece.beats:
                break
            notes.append(Note(at * beat, 0.7 * length * beat + 0.15, keys[place], rng.randint(80, 112), channel))
            place = max(0, min(len(keys) - 1, place + rng.choice((-2, -1, 0, 1, 1))))
            at += length
    return notes


def compose_shakuhachi(piece: Piece, rng: random.Random, channel: int) -> list[Note]:
    """Compose long breaths: slow notes, sometimes with a grace note."""
    beat, keys = 60 / piece.bpm, list_scale_keys(piece.scale, piece.root, 62, 81)
    notes: list[Note] = []
    place, at = rng.randrange(2, len(keys) - 2), 0.0
    while at < piece.beats:
        length = min(rng.choice((1.5, 2.0, 3.0)), piece.beats - at + 0.5)
        start = at * beat
        if rng.random() < 0.4 and place + 1 < len(keys):
            notes.append(Note(start, 0.12, keys[place + 1], 70, channel))
            start += 0.12
        notes.append(Note(start, length * beat * 0.94, keys[place], rng.randint(76, 100), channel))
        place = max(0, min(len(keys) - 1, place + rng.choice((-2, -1, 1, 2))))
        at += length
    return notes


def compose_taiko(piece: Piece, rng: random.Random, channel: int) -> list[Note]:
    """Compose a sparse pulse of low drum strokes with softer strokes between."""
    beat = 60 / piece.bpm
    accents = rng.choice(((0, 1.5, 2), (0, 0.5, 2, 3), (0, 2, 2.5, 3.5)))
    notes: list[Note] = []
    for bar in range(0, piece.beats + 1, 4):
        for place in accents:
            if bar + place <= piece.beats:
                strong = place == 0
                velocity = 116 if strong else rng.randint(70, 96)
                notes.append(Note((bar + place) * beat, 0.8, 41 if strong else rng.choice((45, 48)), velocity, channel))
    return notes


PLAYERS: dict[str, Callable[[Piece, random.Random, int], list[Note]]] = {
    "koto": compose_koto,
    "shamisen": compose_shamisen,
    "shakuhachi": compose_shakuhachi,
    "taiko": compose_taiko,
}


def plan_pieces(seed: int) -> list[Piece]:
    """Plan the 36 pieces: 18 for koto alone, 6 each for shamisen and shakuhachi, 2 for taiko, 4 duets."""
    rng = random.Random(seed)
    figures = ["melody", "arpeggio", "glissando", "octaves", "tremolo", "melody"] * 3
    groups: list[tuple[tuple[str, ...], str]] = [(("koto",), figure) for figure in figures]
    groups += [(("shamisen",), "phrases")] * 6 + [(("shakuhachi",), "long notes")] * 6 + [(("taiko",), "pulse")] * 2
    groups += [(("shakuhachi", "koto"), "arpeggio"), (("shakuhachi", "koto"), "melody")]
    groups += [(("shamisen", "taiko"), "phrases"), (("koto", "taiko"), "octaves")]
    pieces = []
    for number, (instruments, figure) in enumerate(groups):
        scale, root = list(SCALES)[number % len(SCALES)], rng.choice(list(ROOTS))
        bpm = rng.choice((60, 66, 72, 80) if instruments == ("shakuhachi",) else (72, 80, 88, 96))
        pieces.append(Piece(instruments, figure, scale, root, bpm, rng.choice((4, 4, 6))))
    return pieces


def compose(piece: Piece, rng: random.Random) -> Score:
    """Compose the score of a piece; the last note rings for up to 1.6 s, and no clip exceeds 7.9 s."""
    score = Score(seconds=min(7.9, piece.beats * 60 / piece.bpm + 1.6))
    for channel, name in enumerate(piece.instruments):
        score.programs[channel] = PROGRAMS[name]
        score.controls[channel] = {PAN: PANS[name], REVERB: 80, CHORUS: 0}
        score.notes += [note for note in PLAYERS[name](piece, rng, channel) if note.start < score.seconds - 0.3]
    return score


def write_caption(piece: Piece, number: int) -> str:
    """Write the caption: tags for every other clip, a plain sentence for the rest, as users write both."""
    who, mood = " and ".join(piece.instruments), MOODS[piece.scale]
    pitched = piece.instruments != ("taiko",)
    if number % 2 == 0:
        key = f", Key: {piece.root} {piece.scale}" if pitched else ""
        return (
            f"TrackType: {'Duet' if len(piece.instruments) > 1 else 'Solo instrument'}, Genre: Japanese traditional, "
            f"Instruments: {', '.join(name.capitalize() for name in piece.instruments)}, Mood: {mood}, "
            f"BPM: {piece.bpm}{key}"
        )
    key = f" in {piece.root} {piece.scale}" if pitched else ""
    return f"Japanese traditional music, {who} playing {piece.figure}{key}, {mood}, {piece.bpm} BPM, in a quiet hall"


def render_clips(seed: int) -> list[tuple[str, Audio, str]]:
    """Render every clip: (name, audio (2, N), caption)."""
    pieces = plan_pieces(seed)
    scores = [compose(piece, random.Random(f"{seed}/{number}")) for number, piece in enumerate(pieces)]
    clips = []
    for number, (piece, audio) in enumerate(zip(pieces, render(scores), strict=True)):
        name = f"{number:02d}_{'_'.join(piece.instruments)}_{piece.figure.replace(' ', '_')}_{piece.bpm}bpm"
        clips.append((name, fade_ends(level(trim_tail(audio), rms_db=-19.0, peak=0.84)), write_caption(piece, number)))
    return clips


def main() -> None:
    """Write OGG Vorbis clips and their `.txt` captions."""
    parser = argparse.ArgumentParser(description="write the sample data set")
    parser.add_argument("out", nargs="?", type=Path, default=Path(__file__).parent / "sample")
    parser.add_argument("--seed", type=int, default=20)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, audio, text in render_clips(args.seed):
        with soundfile.SoundFile(
            args.out / f"{name}.ogg", "w", SAMPLE_RATE, 2, subtype="VORBIS", compression_level=0.4
        ) as file:
            for start in range(0, audio.shape[1], SAMPLE_RATE):  # libvorbis wants no large writes
                file.write(np.ascontiguousarray(audio[:, start : start + SAMPLE_RATE].T))
        (args.out / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
        print(f"{name}: {audio.shape[1] / SAMPLE_RATE:.2f} s, {text}")


if __name__ == "__main__":
    main()
