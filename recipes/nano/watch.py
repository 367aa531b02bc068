"""Evaluate how well nano-base follows prompts, on latents: without a decoder, in half a minute.

    python recipes/nano/watch.py WORK [--file base-cool.pt] [--cfg 4]     # prints and appends to WORK/watch.jsonl

A small classifier is trained on statistics of real latents, once (WORK/watch.pt), and applied to sampled ones: of their
band envelopes where `targets.py` computed them, else of the levels of `latents.py`.
Shapes: B items, C latent channels, T latent frames, E band energies of a frame.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "datasets" / "nano"))

import torch
from parts import FRAMES_PER_SECOND, Batch, Nano, load, load_silence, tokenizer_of
from sounds import NAMES
from speed import autocast
from start import LATENTS
from store import Store
from targets import ENVELOPE, FLOOR, MID_BANDS, POWER, QUARTERS, load_code
from torch import Tensor, nn

from sa3train.diffusion.samplers import sample_euler
from sa3train.diffusion.schedule import build_schedule

SECONDS, STEPS, LOOK = 3.0, 25, 48
WAVES = LATENTS[0]


def summarize_levels(z_CT: Tensor) -> Tensor:
    """Compute features of a clip's latents of `latents.py`: moments of levels, and strengths of waveforms."""
    waves, levels = z_CT[:WAVES], z_CT[WAVES:]
    step = levels.diff(dim=1)
    parts = [levels.mean(1), levels.std(1), step.clamp_min(0).mean(1), step.clamp_max(0).mean(1), levels.amax(1)]
    parts += [levels[:, :2].mean(1), waves.square().mean(1).sqrt(), (waves[:, 1:] * waves[:, :-1]).mean(1)]
    return torch.cat(parts)


def statistics(code: dict[str, Tensor], z_CT: Tensor) -> Tensor:
    """Compute the classifier's features of a clip's latents, (D,): moments of band envelopes relative to its level."""
    if not code:
        return summarize_levels(z_CT)
    bands_ET = code["envelope_back"] @ z_CT[:ENVELOPE] + code["envelope_mean"][:, None]
    bands_ET = bands_ET.clamp_min(FLOOR**POWER)
    bands_ET = bands_ET / bands_ET.square().mean().sqrt()
    mid = QUARTERS * MID_BANDS
    quarters = bands_ET[:mid].unflatten(0, (MID_BANDS, QUARTERS)).permute(0, 2, 1).flatten(1)
    step = quarters.diff(dim=1)
    side = bands_ET[mid:].mean(1)
    parts = [quarters.mean(1), quarters.std(1), step.clamp_min(0).mean(1), step.clamp_max(0).mean(1), quarters.amax(1)]
    return torch.cat([*parts, quarters[:, :8].mean(1), side, z_CT[ENVELOPE:].square().mean(1).sqrt()])


def load_classifier(work: Path, code: dict[str, Tensor]) -> dict[str, Any]:
    """Load the classifier of latents; it is trained on first use."""
    path = work / "watch.pt"
    if not path.exists():
        sets = {}
        for split in ("train", "val"):
            both = zip(load(work, split), Store(work / split).entries, strict=False)
            known = [(z, entry["plan"]["sound"]) for z, entry in both if entry["plan"]["sound"] and z.shape[1] > 3]
            known = known[: 4800 if split == "train" else 600]
            rows = torch.stack([statistics(code, z[:, :LOOK].float()) for z, _ in known])
            sets[split] = rows, torch.tensor([NAMES.index(sound) for _, sound in known])
        rows, labels = sets["train"]
        mean, spread = rows.mean(0), rows.std(0).clamp_min(1e-4)
        network = _network(rows.shape[1])
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
        for _ in range(60):
            for pick in torch.randperm(len(labels)).split(128):
                noisy = (rows[pick] - mean) / spread + 0.15 * torch.randn(len(pick), rows.shape[1])
                loss = nn.functional.cross_entropy(network(noisy), labels[pick], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        network.eval()
        held, names = sets["val"]
        right = float((network((held - mean) / spread).argmax(1) == names).float().mean())
        print(f"classifier of latents: {100 * right:.1f} % on real held-out clips")
        torch.save({"network": network.state_dict(), "mean": mean, "spread": spread, "real": right}, path)
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    network = _network(len(saved["mean"])).eval()
    network.load_state_dict(saved["network"])
    return saved | {"network": network}


def _network(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 256), nn.GELU(), nn.Dropout(0.3), nn.Linear(256, len(NAMES)))


@torch.no_grad()
def sample(
    model: Nano, tokenizer: Any, prompts: list[str], seconds: float, cfg: float, steps: int = STEPS, seed: int = 1
) -> Tensor:
    """Sample latents (B, C, T) from one seed each, with two seconds of tail."""
    frames = round(seconds * FRAMES_PER_SECOND) + 20
    tokens = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    size = len(prompts)
    channels = model.dit.config.latent_width
    noise_BCT = torch.randn(size, channels, frames, generator=torch.Generator().manual_seed(seed))
    real_BT = torch.ones(size, frames, dtype=torch.bool)
    seconds_B = torch.full((size,), seconds)
    batch = Batch(noise_BCT, real_BT, seconds_B, seconds_B, tokens.input_ids, tokens.attention_mask.bool())
    with autocast("cpu"):
        condition = model.condition(batch)

        def velocity_of(x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, local: Tensor) -> Tensor:
            kept = {"cross_attn_cond_BLD": context, "global_cond_BD": pooled, "local_add_cond_BCT": local}
            return model.dit(x, t, **kept).float()

        local_BCT = torch.zeros(size, channels + 1, frames)

        def velocity(x_BCT: Tensor, t: Tensor) -> Tensor:
            both = torch.cat([condition.cross_attn_cond_BLD, torch.zeros_like(condition.cross_attn_cond_BLD)])
            pooled = condition.global_cond_BD.repeat(2, 1)
            out = velocity_of(x_BCT.repeat(2, 1, 1), t.expand(2 * size), both, pooled, local_BCT.repeat(2, 1, 1))
            wanted, other = out.chunk(2)
            return other + cfg * (wanted - other)

        return sample_euler(velocity, noise_BCT, build_schedule(steps))


def main() -> None:
    """Sample one clip of each class and classify it."""
    parser = argparse.ArgumentParser(description="evaluate nano-base on latents")
    parser.add_argument("work", type=Path)
    parser.add_argument("--file", default="base.pt")
    parser.add_argument("--cfg", type=float, default=4.0)
    args = parser.parse_args()
    code = load_code(args.work) if (args.work / "code.safetensors").exists() else {}
    classifier = load_classifier(args.work, code)
    tokenizer = tokenizer_of(args.work)
    model = Nano(len(tokenizer), len(load_silence(args.work))).eval()
    saved = torch.load(args.work / args.file, weights_only=True, map_location="cpu")
    model.load_state_dict(saved["average"])
    latents = sample(model, tokenizer, [f"solo {name}" for name in NAMES], SECONDS, args.cfg)
    end = round(SECONDS * FRAMES_PER_SECOND)
    rows = torch.stack([statistics(code, z_CT[:, :end]) for z_CT in latents])
    order = classifier["network"]((rows - classifier["mean"]) / classifier["spread"]).argsort(1, descending=True)
    labels = torch.arange(len(NAMES))[:, None]
    figures = {
        "step": saved["step"],
        "seconds": round(saved["seconds"]),
        "cfg": args.cfg,
        "first": float((order[:, :1] == labels).any(1).float().mean()),
        "five": float((order[:, :5] == labels).any(1).float().mean()),
        "spread": float(latents[..., :end].std()),
    }
    wrong = {NAMES[i]: NAMES[int(order[i, 0])] for i in range(len(NAMES)) if int(order[i, 0]) != i}
    line = json.dumps({name: round(value, 3) for name, value in figures.items()})
    print(line, wrong)
    with (args.work / "watch.jsonl").open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
