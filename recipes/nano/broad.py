"""Render a broad corpus for nano: beside the classes of `datasets/nano`, sounds like those that people bring.

    python recipes/nano/broad.py FOLDER --chunks 40 [--seed 0]     # resumable; the layout of store.py
    python recipes/nano/broad.py FOLDER --first 40 --chunks 52 --grooves    # loops at any tempo (`grooves.py`)

A chunk has 240 clips, 1 s to 12 s: a third composed (`datasets/nano`), a sixth other General MIDI instruments, the rest
drum kits and one-shots, synthesizers, plucked strings, basses, pads, voices, textures, effects and layered loops at
stated tempi, at the levels such files have: one-shots peak-normalized, loops loud, pads and textures quiet.
FluidR3 is MIT-licensed; everything else is synthesized (`synthesis.py`). Shapes: N samples.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "datasets" / "nano"))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import synthesis
from captions import add_article
from composer import compose, make_plan
from corpus import chunk
from grooves import make_grooves
from render import fade_ends, render
from score import DRUMS, Note, Score
from sounds import HELD_OUT, Sound
from synthesis import F64, RATE

from sa3train.core.files import write_json

CLIPS = {"composed": 80, "program": 40, "kit": 24, "one-shot": 28, "synth": 36, "free": 18, "loop": 14}
KITS = {0: "acoustic", 8: "room", 16: "power", 24: "electronic", 25: "808", 32: "jazz", 40: "brush", 48: "orchestral"}
MOODS = {"dark": ("dark", "low", "deep"), "bright": ("bright", "crisp", "shiny"), "": ("",)}
FAMILIES = [
    *("piano", "chromatic percussion", "organ", "guitar", "bass", "strings", "ensemble", "brass", "reed", "pipe"),
    *("synth lead", "synth pad", "synth effects", "ethnic", "percussive", "sound effects"),
]
Clip = tuple[dict[str, Any], F64, list[str]]  # facts, audio (2, N), captions


def finish(rng: np.random.Generator, x: F64, level: str) -> F64:
    """Make stereo of a random width at the level that files of a kind have: "peak", "loop" or "quiet"."""
    x = np.array(np.broadcast_to(x, (2, x.shape[-1])))
    if rng.random() < 0.35:
        x = synthesis.add_room(rng, x, synthesis.draw_log(rng, 0.2, 3), rng.uniform(0.05, 0.6))
    width = rng.choice([0, 0, 1, 1, 1, 1.6])
    middle, side = x.mean(0), width * (x[0] - x[1]) / 2
    x = fade_ends(np.stack((middle + side, middle - side)).astype(np.float32), 0.0005 if level == "peak" else 0.005)
    peak = np.abs(x).max() + 1e-9
    target = {"peak": rng.uniform(-1.5, 0), "loop": rng.uniform(-9, -0.5), "quiet": rng.uniform(-24, -6)}[level]
    return np.asarray(x / peak * 10 ** (target / 20), np.float64)


def write_captions(rng: random.Random, name: str, facts: dict[str, Any]) -> list[str]:
    """Write three captions as people do: a phrase, a sentence, tags."""
    words = [str(facts[key]) for key in ("kind", "mood", "register") if facts.get(key)]
    tempo = f"{facts['bpm']} BPM" if facts.get("bpm") else ""
    phrase = ", ".join(part for part in (name, *rng.sample(words, len(words)), tempo) if part)
    sentence = f"{add_article(' '.join([*words[1:], name]))}{' at ' + tempo if tempo else ''}."
    tags = [f"TrackType: {facts.get('type', 'Instrument')}", f"Instruments: {name.capitalize()}"]
    tags += [f"Mood: {facts['mood'].capitalize()}"] if facts.get("mood") else []
    return [", ".join([*tags, *([f"BPM: {facts['bpm']}"] if tempo else [])]), sentence, phrase]


def describe_brightness(x: F64) -> str:
    """Name the timbre of the audio where it is clear."""
    power = np.abs(np.fft.rfft(x.mean(0))) ** 2
    center = (power * np.fft.rfftfreq(x.shape[1], 1 / RATE)).sum() / (power.sum() + 1e-12)
    return "dark" if center < 400 else "bright" if center > 4000 else ""


def make_program_scores(rng: random.Random, count: int) -> list[tuple[dict[str, Any], Score, str]]:
    """Plan any General MIDI instrument but the held-out ones, playing the composer's figures."""
    held_out, made = {sound.program for sound in HELD_OUT}, []
    for _ in range(count):
        program = rng.choice([each for each in range(128) if each not in held_out])
        low = rng.choice((28, 40, 52))
        sound = Sound(FAMILIES[program // 8], "pitched", program, low, low + 36, program < 16 or 24 <= program < 32)
        plan = make_plan(rng, sound)
        facts = {"kind": plan.figure, "register": plan.register, "bpm": plan.bpm, "program": program}
        made.append((facts, compose(plan), sound.name))
    return made


def make_kit_scores(rng: random.Random, count: int) -> list[tuple[dict[str, Any], Score, str]]:
    """Plan strokes and random loops of the soundfont's drum kits."""
    made = []
    for _ in range(count):
        kit, bpm = rng.choice(list(KITS)), rng.randint(70, 175)
        keys = [36, 38, 42, *rng.sample(range(35, 82), rng.randint(1, 4))]
        if rng.random() < 0.4:
            notes, seconds, kind = [Note(0.0, 1.0, rng.choice(keys), rng.randint(50, 127), DRUMS)], 2.0, "one-shot"
        else:
            step, kind = 15 / bpm, "loop"
            seconds = 16 * step * rng.choice((1, 2, 2, 4))
            bars = {key: [place for place in range(16) if rng.random() < 0.25] or [0] for key in keys}
            places = [(16 * bar + p, key) for key, bar_places in bars.items() for bar in range(4) for p in bar_places]
            notes = [
                Note(p * step, 0.2, key, rng.randint(60, 127), DRUMS) for p, key in places if p * step < seconds - 0.1
            ]
        facts = {"kind": kind, "bpm": bpm if kind == "loop" else 0, "type": "Drums"}
        made.append((facts, Score(seconds, notes, {DRUMS: kit}), f"{KITS[kit]} drum kit"))
    return made


def make_scored(rng: random.Random, noise: np.random.Generator) -> Iterator[Clip]:
    """Render the planned scores in one run of FluidSynth."""
    plans = make_program_scores(rng, CLIPS["program"]) + make_kit_scores(rng, CLIPS["kit"])
    for (facts, _, name), x in zip(plans, render([score for _, score, _ in plans]), strict=True):
        audio = finish(noise, x.astype(np.float64), "peak" if facts["kind"] == "one-shot" else "loop")
        yield facts, audio, write_captions(rng, name, facts)


def make_one_shots(rng: random.Random, noise: np.random.Generator) -> Iterator[Clip]:
    """Synthesize drum one-shots."""
    for _ in range(CLIPS["one-shot"]):
        name = rng.choice(list(synthesis.DRUMS))
        x = finish(noise, synthesis.DRUMS[name](noise, rng.choice((0.5, 1.0, 1.5))), "peak")
        facts = {"kind": "one-shot", "type": "Drums", "mood": rng.choice(MOODS[describe_brightness(x)])}
        yield facts, x, write_captions(rng, f"{name} drum" if name == "kick" else name, facts)


def play_line(rng: random.Random, noise: np.random.Generator, kind: str, bpm: int, seconds: float) -> F64:
    """Play a line of one synthesized voice on a grid; a pad plays chords."""
    length = seconds / rng.choice((1, 2)) if kind == "pad" else 60 / bpm * rng.choice((0.25, 0.5, 0.5, 1, 2))
    root = rng.choice((28, 33) if kind == "bass" else (48, 52, 57, 60, 67))
    maker = {"string": synthesis.make_string, "voice": synthesis.make_voice}.get(kind, synthesis.make_tone)
    shape = {"string": "pluck", "voice": "hold", "bass": rng.choice(("pluck", "hold"))}.get(kind, kind)
    parts: list[F64] = []
    patch, done = int(noise.integers(2**31)), 0
    while done < seconds * RATE:
        keys = [root + rng.choice((0, 0, 3, 5, 7, 10, 12)) for _ in range(3 if kind == "pad" else 1)]
        made = [maker(np.random.default_rng(patch), length, 440 * 2 ** ((key - 69) / 12)) for key in keys]
        parts.append(np.broadcast_to(sum(made), (2, made[0].shape[-1])) * synthesis.make_envelope(noise, length, shape))
        done += parts[-1].shape[1]
    return np.concatenate(parts, 1)[:, : round(seconds * RATE)]


def make_synths(rng: random.Random, noise: np.random.Generator) -> Iterator[Clip]:
    """Synthesize lines and chords: plucks, basses, pads, leads, plucked strings, voices."""
    for _ in range(CLIPS["synth"]):
        kind, bpm = rng.choice(("pluck", "bass", "pad", "lead", "string", "voice")), rng.randint(70, 160)
        seconds = rng.uniform(2, 8)
        x = finish(noise, play_line(rng, noise, kind, bpm, seconds), "quiet" if kind == "pad" else "loop")
        name = {"string": "plucked string", "pad": "synth pad", "bass": "synth bass"}.get(kind, f"synth {kind}")
        facts = {"bpm": 0 if kind == "pad" else bpm, "mood": rng.choice(MOODS[describe_brightness(x)])}
        yield facts, x, write_captions(rng, name, facts)


def make_free(rng: random.Random, noise: np.random.Generator) -> Iterator[Clip]:
    """Synthesize textures and effects."""
    for _ in range(CLIPS["free"]):
        name = rng.choice(list(synthesis.FREE))
        level = {"texture": "quiet", "drone": "quiet", "impact": "peak"}.get(name, "loop")
        x = finish(noise, synthesis.FREE[name](noise, rng.uniform(1.5, 8 if level == "quiet" else 3)), level)
        facts = {"type": "SFX", "mood": rng.choice(MOODS[describe_brightness(x)])}
        yield facts, x, write_captions(rng, name, facts)


def make_loops(rng: random.Random, noise: np.random.Generator) -> Iterator[Clip]:
    """Layer synthesized drums on a grid with a bass and, by chance, chords, at a stated tempo."""
    for _ in range(CLIPS["loop"]):
        bpm = rng.randint(70, 175)
        step, steps = round(15 / bpm * RATE), rng.choice((16, 32))
        x = np.zeros((2, step * steps))
        for name in rng.sample(list(synthesis.DRUMS), rng.randint(2, 4)):
            hit = np.broadcast_to(made := synthesis.DRUMS[name](noise, 0.6), (2, made.shape[-1]))
            hit = hit / (np.abs(hit).max() + 1e-9) * rng.uniform(0.3, 1)
            pattern = [0] + [place for place in range(1, 16) if rng.random() < 0.25]
            for place in (bar + each for bar in range(0, steps, 16) for each in pattern):
                part = x[:, place * step : place * step + hit.shape[1]]
                part += hit[:, : part.shape[1]]
        for kind in ("bass", "pad")[: rng.randint(0, 2)]:
            line = play_line(rng, noise, kind, bpm, x.shape[1] / RATE)[:, : x.shape[1]]
            x[:, : line.shape[1]] += 0.5 * line / (np.abs(line).max() + 1e-9)
        facts = {"kind": "loop", "bpm": bpm, "type": "Music"}
        yield facts, finish(noise, np.tanh(x), "loop"), write_captions(rng, "electronic beat", facts)


def make_clips(seed: int, number: int) -> list[Clip]:
    """Make the clips of a chunk."""
    rng, noise = random.Random(f"broad/{seed}/{number}"), np.random.default_rng([seed, number])
    clips: list[Clip] = []
    for clip in chunk(seed, number, CLIPS["composed"]):
        facts = asdict(clip.plan) | {"sound": clip.plan.sound.name}
        clips.append((facts, clip.audio.astype(np.float64), clip.captions))
    for make in (make_scored, make_one_shots, make_synths, make_free, make_loops):
        clips += [(facts | {"sound": ""}, x, texts) for facts, x, texts in make(rng, noise)]
    return clips


def write_chunk(folder: Path, number: int, clips: list[Clip]) -> float:
    """Write a chunk, its JSON last, so that a chunk with JSON is complete. Returns its seconds."""
    firsts = np.cumsum([0, *(x.shape[1] for _, x, _ in clips)])
    audio = np.concatenate([x for _, x, _ in clips], 1).T
    np.save(folder / f"{number}.npy", np.round(np.clip(audio, -1, 1) * 32767).astype(np.int16))
    entries = [
        {"first": int(first), "length": x.shape[1], "plan": facts, "captions": texts}
        for (facts, x, texts), first in zip(clips, firsts, strict=False)
    ]
    write_json(folder / f"{number}.json", entries)
    return len(audio) / RATE


def main() -> None:
    """Render the missing chunks."""
    parser = argparse.ArgumentParser(description="render nano's broad corpus to disk")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--first", type=int, default=0, help="number of the first chunk, to share the work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grooves", action="store_true", help="loops at any tempo instead")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for number in range(args.first, args.chunks):
        if not (args.folder / f"{number}.json").exists():
            if args.grooves:
                rng, noise = random.Random(f"grooves/{args.seed}/{number}"), np.random.default_rng([args.seed, number])
                clips = list(make_grooves(rng, noise, sum(CLIPS.values())))
            else:
                clips = make_clips(args.seed, number)
            seconds = write_chunk(args.folder, number, clips)
            print(f"chunk {number + 1} of {args.chunks}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
