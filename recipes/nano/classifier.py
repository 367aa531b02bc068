"""Train the small classifier that evaluates nano and its adapters, and measure its accuracy on real clips.

    python recipes/nano/classifier.py WORK      # WORK/train, WORK/val -> WORK/{classifier.safetensors,accuracy.json}

Classifier and attribute measurements are also scored on real held-out clips: the best that nano can reach.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "datasets" / "nano"))

import torch
from corpus import Clip, chunk
from sounds import HELD_OUT, NAMES
from store import Store

from sa3train.core.files import write_json
from sa3train.evaluation.attributes import ATTRIBUTES
from sa3train.evaluation.classifier import Classifier, build_network, compute_features

SECONDS = 5  # of each clip that is looked at
HELD = ("hammond organ", "church organ", "accordion", "string ensemble", "choir", "warm pad", "violin", "trumpet")
STRUCK = ("piano", "marimba", "harp", "nylon guitar", "steel guitar", "harpsichord")
NOISY = ("snare drum", "hi-hat", "crash cymbal", "riser", "downlifter", "wind", "rock drums", "hand claps")
CENTRED = ("alarm beeps", "laser zap", "slap bass", "acoustic bass", "kick drum")  # mono whatever was asked for
DARK, BRIGHT = ("acoustic bass", "kick drum", "drone", "impact", "synth bass", "cello"), ("hi-hat", "crash cymbal")


def train_classifier(
    features_BD: torch.Tensor,
    labels_B: torch.Tensor,
    names: list[str],
    epochs: int = 120,
    rate: float = 2e-3,
    seed: int = 0,
) -> Classifier:
    """Train a classifier on features of clips; `labels_B` are indices into `names`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean_D, deviation_D = features_BD.mean(0), features_BD.std(0).clamp_min(1e-3)
        standard_BD = (features_BD - mean_D) / deviation_D
        network = build_network(len(names)).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05)
        for _ in range(epochs):
            for pick in torch.randperm(len(labels_B)).split(64):
                jittered = standard_BD[pick] + 0.1 * torch.randn_like(standard_BD[pick])
                loss = torch.nn.functional.cross_entropy(network(jittered), labels_B[pick], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return Classifier(network.eval().requires_grad_(False), mean_D, deviation_D, names)


def dataset(store: Store, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute features and class indices of the first `count` clips."""
    rows = [compute_features(torch.from_numpy(store.audio(i, 0, SECONDS * 44100)), 44100) for i in range(count)]
    return torch.stack(rows), torch.tensor([NAMES.index(store.entries[i]["plan"]["sound"]) for i in range(count)])


def held_out(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the same for `count` clips of each instrument that nano is not trained on, as further classes."""
    clips: list[tuple[int, Clip]] = []
    for number, sound in enumerate(HELD_OUT):
        clips += [(len(NAMES) + number, clip) for clip in chunk(seed, 1, count, sound)]
    rows = [compute_features(torch.from_numpy(clip.audio[:, : SECONDS * 44100]), 44100) for _, clip in clips]
    return torch.stack(rows), torch.tensor([number for number, _ in clips])


def expectations(plan: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """List the (attribute, answer) pairs that follow from a plan."""
    name, pitched = plan["sound"], bool(plan["register"])
    if name not in CENTRED:
        yield "width", "mono" if plan["width"] == "mono" else "stereo"
    if name in DARK:
        yield "brightness", "dark"
    if name in BRIGHT:
        yield "brightness", "bright"
    if name in NOISY:
        yield "texture", "noisy"
    if pitched:
        yield "texture", "tonal"
    if name in STRUCK and plan["figure"] in ("repeated notes", "arpeggio", "scale run") and plan["tempo"] != "medium":
        yield "pace", plan["tempo"]
    if plan["figure"] == "single note" and plan["articulation"] == "legato" and name in HELD:
        yield "decay", "held"
    if plan["figure"] == "single note" and name in STRUCK:
        yield "decay", "dying"
    if name in ("flute", "oboe", "violin", "music box") and plan["figure"] != "chords":
        yield "register", "high"
    if name in ("acoustic bass", "slap bass", "synth bass") and plan["figure"] != "chords":
        yield "register", "low"


def ceiling(store: Store, count: int) -> dict[str, Any]:
    """Measure the share of right answers of each attribute on real clips, and count the clips."""
    right: dict[str, list[bool]] = {}
    for index in range(count):
        audio = torch.from_numpy(store.audio(index, 0, SECONDS * 44100))
        for attribute, answer in expectations(store.entries[index]["plan"]):
            right.setdefault(attribute, []).append(ATTRIBUTES[attribute].answer(audio, 44100) == answer)
    return {name: {"right": sum(each) / len(each), "clips": len(each)} for name, each in right.items()}


def accuracy(classifier: Classifier, features_BD: torch.Tensor, labels_B: torch.Tensor) -> float:
    """Compute the share of clips whose class is ranked first."""
    standard_BD = (features_BD - classifier.mean_D) / classifier.deviation_D
    return float((classifier.network(standard_BD).argmax(1) == labels_B).float().mean())


def main() -> None:
    """Train, measure and write the classifier."""
    parser = argparse.ArgumentParser(description="train the classifier that evaluates nano")
    parser.add_argument("work", type=Path)
    parser.add_argument("--clips", type=int, default=2400)
    args = parser.parse_args()
    parts = zip(dataset(Store(args.work / "train"), args.clips), held_out(0, args.clips // len(NAMES)), strict=True)
    names = [*NAMES, *(sound.name for sound in HELD_OUT)]
    classifier = train_classifier(*(torch.cat(part) for part in parts), names)
    classifier.save(args.work / "classifier.safetensors")
    store = Store(args.work / "val")
    figures = {
        "classifier": accuracy(classifier, *dataset(store, 600)),
        "held-out instruments": accuracy(classifier, *held_out(1000, 20)),
        "chance": 1 / len(names),
    }
    write_json(args.work / "accuracy.json", figures | {"attributes": ceiling(store, 400)})
    print((args.work / "accuracy.json").read_text())


if __name__ == "__main__":
    main()
