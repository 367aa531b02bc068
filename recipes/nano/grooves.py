"""Compose loops whose tempo is heard: at any whole number of beats per minute, whole bars long, starting on a beat.

Half of them are classes of `datasets/nano` playing on a beat; half are grooves on the soundfont's kits or synthesized
drums. Beats lie off the 10.77 frames a second of nano's latents at nearly all of these tempi,
so a model cannot do with hits at the starts of frames. Shapes: N samples.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import synthesis
from captions import add_article, captions
from composer import Plan, compose, make_plan
from corpus import finish as finish_clip
from render import render
from score import DRUMS, Note, Score
from sounds import KNOWN
from synthesis import F64, RATE

SLOWEST, FASTEST = 62, 180  # beats per minute
KITS = {0: "acoustic", 8: "room", 16: "power", 24: "electronic", 25: "808", 32: "jazz"}
BEAT, BACK, OFFBEAT, EIGHTHS = (0, 4, 8, 12), (4, 12), (2, 6, 10, 14), (0, 2, 4, 6, 8, 10, 12, 14)
GROOVES: dict[str, dict[int, tuple[int, ...]]] = {  # places of percussion keys in a bar of sixteen steps
    "house beat": {36: BEAT, 39: BACK, 46: OFFBEAT},
    "techno beat": {36: BEAT, 42: OFFBEAT, 38: (4, 12)},
    "four-on-the-floor beat": {36: BEAT, 42: EIGHTHS},
    "disco beat": {36: BEAT, 38: BACK, 46: OFFBEAT, 42: BEAT},
    "rock beat": {36: (0, 8), 38: BACK, 42: EIGHTHS},
    "funk beat": {36: (0, 6, 8), 38: BACK, 42: tuple(range(16))},
    "hip hop beat": {36: (0, 7, 10), 38: BACK, 42: EIGHTHS},
    "breakbeat": {36: (0, 10), 38: (4, 7, 12), 42: EIGHTHS},
    "electronic beat": {36: (0, 4, 8, 11), 39: BACK, 42: OFFBEAT},
    "percussion loop": {63: BEAT, 62: (3, 6, 11, 14), 70: EIGHTHS},
    "kick drum loop": {36: BEAT},
    "hi-hat loop": {42: EIGHTHS, 46: (0, 8)},
    "click track": {37: BEAT},
}
VOICES = {36: "kick", 38: "snare", 37: "tom", 39: "clap", 42: "hi-hat", 46: "hi-hat"}  # keys that are synthesized
Groove = tuple[dict[str, Any], F64, list[str]]  # facts, audio (2, N), captions


def draw_bars(rng: random.Random, bpm: int) -> float:
    """Draw a length of whole bars between 2 s and 12 s, in seconds."""
    bar = 240 / bpm
    return bar * rng.choice([bars for bars in (1, 2, 4, 8) if 1.9 < bars * bar < 12])


def plan_class(rng: random.Random) -> Plan:
    """Plan a known class on a beat: drums and bands half of the time."""
    kinds = ("drum", "band") if rng.random() < 0.5 else ("pitched",)
    plan = make_plan(rng, rng.choice([sound for sound in KNOWN if sound.kind in kinds]))
    bpm = rng.randint(SLOWEST, FASTEST)
    word = "slow" if bpm < 90 else "medium" if bpm < 125 else "fast"
    figure = "loop" if plan.sound.kind == "drum" else plan.figure
    if figure == "single note":
        figure = rng.choice(("repeated notes", "arpeggio", "scale run"))
    return replace(plan, bpm=bpm, tempo=word, figure=figure, seconds=draw_bars(rng, bpm))


def plan_groove(rng: random.Random) -> tuple[str, int, float, list[tuple[float, int, int]]]:
    """Plan a groove: its name, tempo and seconds, and (time, key, velocity) of its strokes."""
    name, bpm = rng.choice(list(GROOVES)), rng.randint(SLOWEST, FASTEST)
    seconds, step, strokes = draw_bars(rng, bpm), 15 / bpm, []
    for key, places in GROOVES[name].items():
        loud = rng.randint(75, 120)
        for bar in range(round(seconds / (16 * step))):
            for place in places:
                accent = loud if place % 4 == 0 else loud - rng.randint(5, 30)
                strokes.append(((16 * bar + place) * step, key, accent))
    return name, bpm, seconds, strokes


def synthesize(noise: np.random.Generator, seconds: float, strokes: list[tuple[float, int, int]]) -> F64:
    """Play strokes with synthesized drums, one sound for each key."""
    x = np.zeros((2, round(seconds * RATE)))
    kinds = {key: VOICES.get(key, "tom") for _, key, _ in strokes}
    hits = {
        key: np.broadcast_to(hit := synthesis.DRUMS[kind](noise, 0.6), (2, hit.shape[-1]))
        for key, kind in kinds.items()
    }
    gains = {key: noise.uniform(0.3, 1) / (np.abs(hit).max() + 1e-9) for key, hit in hits.items()}
    for at, key, velocity in strokes:
        part = x[:, round(at * RATE) :][:, : hits[key].shape[1]]
        part += hits[key][:, : part.shape[1]] * gains[key] * velocity / 127
    return x


def write_captions(rng: random.Random, kind: str, name: str, bpm: int) -> list[str]:
    """Write three captions that say the tempo."""
    head, mood = rng.choice(("", "dry ", "punchy ", "simple ")), rng.choice(("", ", loop", ", drums"))
    what = add_article(f"{head}{name}")
    sentence = rng.choice((f"{what} at {bpm} BPM.", f"{bpm} BPM {head}{name}.", f"{what}, {bpm} BPM."))
    return [
        f"TrackType: {kind}, Instruments: {name.capitalize()}, BPM: {bpm}",
        sentence,
        f"{head}{name}{mood}, {bpm} BPM",
    ]


def make_grooves(rng: random.Random, noise: np.random.Generator, count: int) -> Iterator[Groove]:
    """Compose and render `count` loops, the scored ones in one run of FluidSynth."""
    plans = [plan_class(rng) for _ in range(count // 2)]
    drums = [plan_groove(rng) for _ in range(count - len(plans))]
    scored = [rng.random() < 0.6 for _ in drums]
    kits = [rng.choice(list(KITS)) if is_scored else None for is_scored in scored]
    scores = [compose(plan) for plan in plans]
    for kit, (_, _, seconds, strokes) in zip(kits, drums, strict=True):
        if kit is not None:
            notes = [Note(at, 0.2, key, velocity, DRUMS) for at, key, velocity in strokes]
            scores.append(Score(seconds, notes, {DRUMS: kit}))
    played = iter(render(scores))
    for plan in plans:
        x = finish_clip(plan, next(played)).astype(np.float64)
        yield asdict(plan) | {"sound": plan.sound.name}, x, captions(plan, rng)
    for kit, (name, bpm, seconds, strokes) in zip(kits, drums, strict=True):
        x = synthesize(noise, seconds, strokes) if kit is None else next(played).astype(np.float64)
        x = np.tanh(1.5 * x / (np.abs(x).max() + 1e-9)) * 10 ** (noise.uniform(-8, -1) / 20)
        kind = "SFX" if name == "click track" else "Drums"
        if kit is not None and rng.random() < 0.3 and KITS[kit] not in name:
            name = f"{KITS[kit]} {name}"
        yield {"kind": "loop", "bpm": bpm, "type": kind, "sound": ""}, x, write_captions(rng, kind, name, bpm)
