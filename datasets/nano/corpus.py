"""nano's corpus: seeded and streamed, hours of captioned clips without storing them.

    python datasets/nano/corpus.py OUT --clips 100 [--seed 0] [--held-out koto]   # a folder for sa3-encode

`stream` yields clips for ever; the same seed and chunk give the same clips in any order. Seeds 0-999 are for training,
1000 and up for validation and tests.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import soundfile
from captions import captions
from composer import Plan, compose, make_plan
from effects import make_effect
from render import SAMPLE_RATE, Audio, fade_ends, level, render
from sounds import HELD_OUT, Sound


@dataclass(frozen=True)
class Clip:
    """One clip: what was planned, its audio (2, N) float32 at 44.1 kHz, and several captions."""

    plan: Plan
    audio: Audio
    captions: list[str]


def finish(plan: Plan, audio: Audio) -> Audio:
    """Level by the plan's dynamics, mono where planned, faded ends."""
    if plan.width == "mono":
        audio = audio.mean(0, keepdims=True).repeat(2, 0)
    loudness = {"soft": -26.0, "loud": -17.0, "": -20.0}[plan.dynamics]
    return fade_ends(level(audio, loudness))


def chunk(
    seed: int,
    number: int,
    size: int = 200,
    sound: Sound | None = None,
    seconds: tuple[float, float] = (1.0, 12.0),
    caption_count: int = 3,
) -> list[Clip]:
    """Chunk `number` of a corpus: `size` clips rendered in one FluidSynth run. `sound` fixes the class."""
    rng = random.Random(f"nano/{seed}/{number}/{sound.name if sound else ''}")
    plans = [make_plan(rng, sound, seconds) for _ in range(size)]
    texts = [captions(plan, rng, caption_count) for plan in plans]
    played = iter(render([compose(plan) for plan in plans if plan.sound.kind != "effect"]))
    clips = []
    for plan, text in zip(plans, texts, strict=True):
        audio = make_effect(plan) if plan.sound.kind == "effect" else next(played)
        clips.append(Clip(plan, finish(plan, audio), text))
    return clips


def stream(seed: int, size: int = 200, first: int = 0) -> Iterator[Clip]:
    """Clips without end, from chunk `first` on."""
    number = first
    while True:
        yield from chunk(seed, number, size)
        number += 1


def main() -> None:
    """Write a folder of FLAC clips with `.txt` captions."""
    parser = argparse.ArgumentParser(description="write clips of nano's corpus, or of a held-out instrument")
    parser.add_argument("out", type=Path)
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", choices=[sound.name for sound in HELD_OUT])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    held_out = {sound.name: sound for sound in HELD_OUT}.get(args.held_out)
    for number, clip in enumerate(chunk(args.seed, 0, args.clips, held_out)):
        name = f"{number:05d}_{clip.plan.sound.name.replace(' ', '_')}"
        soundfile.write(args.out / f"{name}.flac", clip.audio.T, SAMPLE_RATE)
        (args.out / f"{name}.txt").write_text(clip.captions[0] + "\n", encoding="utf-8")
    print(f"{args.clips} clips in {args.out}")


if __name__ == "__main__":
    main()
