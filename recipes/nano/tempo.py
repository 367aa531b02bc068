"""Hear whether loops of nano-base keep the tempo that their prompt states: decoded, by the estimator of `sa3-data`.

    python recipes/nano/tempo.py WORK [--file base-cool.pt] [--cfg 4]    # after latents.py; prints, WORK/tempo.jsonl

The estimator knows a loop by its length, so loops of other lengths are asked for: six seconds. It hears some real loops
at half or double tempo: `real` is its share of right answers on held-out longer loops, cut to that length.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from latents import load_codec
from parts import Nano, load_silence, tokenizer_of
from store import Store
from torch import Tensor
from watch import sample

from sa3train.audio.analysis import RATE, estimate_tempo, measure_attacks
from sa3train.audio.resample import resample

KINDS = ("house drums", "rock drums", "techno loop", "house beat", "techno beat", "rock beat", "four-on-the-floor beat")
TEMPI = (88, 97, 109, 118, 126, 137, 149)
SECONDS, NEAR = 6.0, 0.04


def hear_tempo(audio_CN: Tensor) -> float:
    """Estimate the tempo in beats per minute; 0 if there is none."""
    mono_N = resample(audio_CN.mean(0, keepdim=True), 44_100, RATE)[0]
    found = estimate_tempo(measure_attacks(mono_N), len(mono_N) / RATE)
    return found.bpm if found else 0.0


def judge(heard: list[float], asked: list[float]) -> dict[str, float]:
    """Compute the shares of tempi within 4 % of those asked for, and of them, their halves or doubles."""
    ratios = [a / b for a, b in zip(heard, asked, strict=True)]
    near = [abs(ratio - 1) < NEAR for ratio in ratios]
    octaves = [any(abs(ratio / times - 1) < NEAR for times in (0.5, 1, 2)) for ratio in ratios]
    return {"tempo": round(sum(near) / len(near), 3), "octaves": round(sum(octaves) / len(octaves), 3)}


def hear_real(work: Path) -> dict[str, float]:
    """Judge held-out loops at tempi in the range of `TEMPI`, none of them whole."""
    store, heard, asked = Store(work / "val"), [], []
    length = round(SECONDS * 44_100)
    for index, entry in enumerate(store.entries):
        plan = entry["plan"]
        is_loop = any(kind in entry["captions"][0].lower() for kind in KINDS) and plan.get("bpm")
        if is_loop and TEMPI[0] <= plan["bpm"] <= TEMPI[-1] and entry["length"] > length:
            heard.append(hear_tempo(torch.from_numpy(store.audio(index, 0, length))))
            asked.append(plan["bpm"])
    return judge(heard, asked)


def main() -> None:
    """Sample a loop of each kind at each tempo and hear it."""
    parser = argparse.ArgumentParser(description="hear the tempo of nano-base's loops")
    parser.add_argument("work", type=Path)
    parser.add_argument("--file", default="base.pt")
    parser.add_argument("--cfg", type=float, default=4.0)
    args = parser.parse_args()
    tokenizer, codec = tokenizer_of(args.work), load_codec(args.work)
    model = Nano(len(tokenizer), len(load_silence(args.work))).eval()
    saved = torch.load(args.work / args.file, weights_only=True, map_location="cpu")
    model.load_state_dict(saved["average"])
    heard: list[float] = []
    asked = list(itertools.product(KINDS, TEMPI))
    for start in range(0, len(asked), len(TEMPI)):
        prompts = [f"{kind}, {bpm} BPM" for kind, bpm in asked[start : start + len(TEMPI)]]
        latents_BCT = sample(model, tokenizer, prompts, SECONDS, args.cfg, seed=start)
        with torch.no_grad():
            audio_BCN = codec.decode(latents_BCT)[..., : round(SECONDS * 44_100)]
        heard += [hear_tempo(audio_CN) for audio_CN in audio_BCN]
    figures = {"step": saved["step"], **judge(heard, [float(bpm) for _, bpm in asked])}
    figures["real"] = hear_real(args.work)["tempo"]
    line = json.dumps(figures)
    print(line, {f"{kind} {bpm}": round(each, 1) for (kind, bpm), each in zip(asked, heard, strict=True)})
    with (args.work / "tempo.jsonl").open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
