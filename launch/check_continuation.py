"""Measure how often a continuation keeps the tempo of the part that it is given.

    python launch/check_continuation.py [--model nano] [--steps 8] [--lora FILE] [--on-frames] [--save FOLDER]

Ten drum loops of two bars, as datasets/make_sample_pack.py makes them, are continued by two bars with a prompt that
states their tempo. A continuation counts where it is heard within 2% of that tempo; it is heard without its last third
of a beat, since the estimator knows a whole loop by its length. The given parts are counted too, as they come through
the codec. `--on-frames` takes tempos of whole latent frames a beat.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sa3train.audio.analysis import RATE, estimate_tempo, measure_attacks
from sa3train.audio.io import write_audio
from sa3train.audio.resample import resample
from sa3train.inference import Generator

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "datasets"))
from make_sample_pack import RATE as SAMPLE_RATE
from make_sample_pack import Row, Truth, make_loop

TEMPOS = (84.0, 92.0, 97.0, 103.0, 110.0, 118.0, 122.0, 126.0, 140.0, 170.0)
FRAMES = (4, 5, 6, 7, 8)
BARS, NEAR = 2, 0.02


def main() -> int:
    """Continue each loop, and print what is heard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--sampler", help="as --sampler-type of sa3-generate")
    parser.add_argument("--lora")
    parser.add_argument("--on-frames", action="store_true", help="tempos of four to eight latent frames a beat, twice")
    parser.add_argument("--save", type=Path, help="folder for the audio")
    arguments = parser.parse_args()
    generator = Generator.from_pretrained(arguments.model, "cpu")
    if arguments.lora:
        generator.load_adapter(arguments.lora)
    rate, ratio = generator.facts.sample_rate, generator.facts.downsampling_ratio
    tempos = [60 * rate / ratio / frames for frames in FRAMES] * 2 if arguments.on_frames else TEMPOS
    kept = {"given": 0, "continued": 0}
    for number, bpm in enumerate(tempos):
        given_CN = make_drums(bpm, number)
        start = given_CN.shape[1] / rate
        output = generator.generate(
            f"house drum loop, {bpm:g} BPM",
            duration=2 * start,
            inpaint_audio=(rate, given_CN),
            inpaint_mask_start_seconds=start,
            inpaint_mask_end_seconds=2 * start,
            seed=number,
            steps=arguments.steps,
            sampler_type=arguments.sampler,
        )
        parts = dict(zip(kept, output.audio[0].chunk(2, dim=1), strict=True))
        heard = {name: hear_tempo(part_CN, rate, bpm) for name, part_CN in parts.items()}
        for name in kept:
            kept[name] += abs(heard[name] / bpm - 1) < NEAR
        print(f"{bpm:6.1f} BPM:", ", ".join(f"{name} heard {found:.1f}" for name, found in heard.items()), flush=True)
        if arguments.save:
            write_audio(arguments.save / f"{number}-{bpm:.0f}.wav", output.audio[0], rate)
    print(", ".join(f"{name} within 2%: {count} of {len(tempos)}" for name, count in kept.items()))
    return 0


def make_drums(bpm: float, number: int) -> Tensor:
    """Make the first two bars (2, N) of a drum loop."""
    loop_N = make_loop(Truth("", Row("", 1, "drums", "drum loop"), bpm, None, number), np.random.default_rng(number))
    given_N = torch.from_numpy(loop_N[: round(BARS * 240 / bpm * SAMPLE_RATE)]).float()
    return (0.8 * given_N / given_N.abs().max()).expand(2, -1).contiguous()


def hear_tempo(audio_CN: Tensor, rate: int, bpm: float) -> float:
    """Hear the tempo of a part in beats per minute; 0 where there is none."""
    mono_N = resample(audio_CN.mean(0, keepdim=True), rate, RATE)[0]
    mono_N = mono_N[: len(mono_N) - round(RATE * 20 / bpm)]
    found = estimate_tempo(measure_attacks(mono_N), len(mono_N) / RATE)
    return found.bpm if found else 0.0


if __name__ == "__main__":
    sys.exit(main())
