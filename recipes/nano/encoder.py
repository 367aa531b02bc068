"""Teach nano's encoder to compute the latents that `targets.py` defines.

    python recipes/nano/encoder.py WORK --minutes 20     # resumes WORK/encoder.pt; --cool as in base.py

It starts from the linear code's attention patterns: each patch fetches its three predecessors' values, each frame's new
token fetches its four quarters. A patch's 62 values are its 16 strongest components and 46 windowed waves, whose
magnitudes the first feed-forward takes (SiLU of x plus SiLU of -x); the rest is regression.
Shapes: B items, C channels, T latent frames, N samples, D width.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from decoder import Pairs
from parts import Average, set_rate, state_of
from safetensors.torch import load_file
from shape import autoencoder
from speed import fast_cpu_layers
from targets import ENVELOPE
from torch import Tensor, nn

from sa3train.files import atomic_path
from sa3train.models.autoencoder import Autoencoder
from sa3train.models.linear_code import CONST, MARK, D

COMPONENTS, MID_WAVES, SIDE_WAVES = 16, 36, 10
PATCH = 256
SAVE_SECONDS = 240.0


def waves(count: int, low: float = 150.0, high: float = 15000.0) -> Tensor:
    """Hann-windowed waves of a patch, their frequencies evenly spaced in mel, phases by turns: (count, PATCH)."""
    mel = torch.linspace(math.log1p(low / 700), math.log1p(high / 700), count)
    hertz = 700 * torch.expm1(mel)
    turns = hertz[:, None] * torch.arange(PATCH) / 44100 + 0.25 * (torch.arange(count)[:, None] % 2)
    rows = torch.hann_window(PATCH).clamp_min(0.05) * torch.cos(2 * math.pi * turns)
    return rows / rows.norm(dim=1, keepdim=True)


@torch.no_grad()
def start(work: Path) -> Autoencoder:
    """An autoencoder whose encoder routes and rectifies as described above."""
    torch.manual_seed(0)
    model = autoencoder()
    state, known = model.state_dict(), load_file(work / "ae.safetensors")
    for name, tensor in known.items():
        if name.startswith("encoder") and state[name].shape == tensor.shape:
            state[name].copy_(tensor)
    block = "encoder.layers.0"
    mid, side = waves(MID_WAVES), waves(SIDE_WAVES)
    rows = torch.cat([torch.cat([mid, mid], 1), torch.cat([side, -side], 1)]) / math.sqrt(2)
    gain = state[f"{block}.mapping.weight_g"][0, 0, 0] * torch.linspace(1.0, 4.0, MID_WAVES)  # the treble is weak
    rows = rows * torch.cat([gain, gain[:SIDE_WAVES] * 2])[:, None]
    spot = slice(COMPONENTS, COMPONENTS + len(rows))
    state[f"{block}.mapping.weight_v"][spot, :, 0] = rows
    state[f"{block}.mapping.weight_g"][spot, 0, 0] = rows.norm(dim=1)
    into, bias, out = (
        state[f"{block}.transformers.0.ff.ff.{name}"] for name in ("0.proj.weight", "0.proj.bias", "2.weight")
    )
    inner = 3 * D
    unit = 0
    for copy in range(4):
        for wave in range(len(rows)):
            channel = 64 * copy + COMPONENTS + wave
            if channel in (MARK, CONST):
                continue
            for sign in (1.0, -1.0):
                into[unit].zero_()
                into[inner + unit].zero_()
                bias[unit], bias[inner + unit] = 0.25, 0
                into[inner + unit, channel] = 4 * sign
                out[:, unit] = 0
                out[COMPONENTS + wave, unit] = 1.0
                unit += 1
    second = f"{block}.transformers.1"
    values = state[f"{second}.self_attn.to_qkv.weight"][2 * D : 3 * D]
    values.add_(0.03 * torch.randn_like(values))
    state["encoder.layers.2.weight"].normal_(std=0.02)
    state["encoder.layers.2.bias"].zero_()
    state["bottleneck.running_std"].fill_(1)
    model.load_state_dict(state)
    return model


def optimizers(model: Autoencoder, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest; the hand-set queries and keys stay."""
    named = [(name, p) for name, p in model.encoder.named_parameters() if "q_norm" not in name and "k_norm" not in name]
    for name, parameter in named:
        if "to_qkv" in name:
            values = torch.zeros(len(parameter), 1, device=parameter.device)
            values[2 * D : 3 * D] = 1
            parameter.register_hook(lambda gradient, values=values: gradient * values)
    matrices = [p for name, p in named if p.ndim == 2 and "transformers" in name and "to_qkv" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW([{"params": others, "share": 1.0}], lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]


class Run:
    """A resumable run that lasts a number of minutes."""

    def __init__(self, work: Path, minutes: float, rate: float, cool: bool) -> None:
        self.work, self.rate, self.cool = work, rate, cool
        self.model = start(work)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        self.optimizers = optimizers(self.model, rate)
        if self.device.type == "cpu":
            fast_cpu_layers(self.model.encoder.layers[0].transformers)  # type: ignore[arg-type]
        self.average = Average(self.model.encoder, 0.998)
        self.step, self.seconds, self.began = 0, 0.0, 0.0
        self.path = work / ("encoder-cool.pt" if cool else "encoder.pt")
        first = self.path if self.path.exists() else work / "encoder.pt"
        if first.exists():
            saved = torch.load(first, weights_only=True, map_location=self.device)
            self.model.encoder.load_state_dict(saved["model"])
            for number, optimizer in enumerate(self.optimizers):
                optimizer.load_state_dict(saved[f"optimizer{number}"])
            self.average.state, self.average.count = saved["average"], saved["count"]
            self.step, self.seconds = saved["step"], saved["seconds"]
            self.began = saved["began"] if first == self.path else self.seconds
        self.total = (self.began if cool else 0.0) + 60 * minutes

    def save(self) -> None:
        """Everything that resuming needs."""
        parts = {"model": self.model.encoder} | {f"optimizer{i}": each for i, each in enumerate(self.optimizers)}
        saved = state_of(**parts) | {"average": self.average.state, "count": self.average.count, "step": self.step}
        with atomic_path(self.path) as path:
            torch.save(saved | {"seconds": self.seconds, "began": self.began}, path)

    def share(self) -> float:
        """Of the rate: warm-up over 100 steps, then level; a line down when cooling."""
        if self.cool:
            return max(0.01, (self.total - self.seconds) / (self.total - self.began))
        return min(1.0, (self.step + 1) / 100)

    def errors(self, pairs: Pairs, size: int = 32) -> tuple[Tensor, Tensor]:
        """Squared errors and squared targets by channel, (C,) each."""
        z_BCT, audio_BCN = (part.to(self.device) for part in pairs.batch(size))
        with torch.autocast(self.device.type, torch.bfloat16):
            made_BCT = self.model.encode(audio_BCN).float()
        return (made_BCT - z_BCT).square().mean((0, 2)), z_BCT.square().mean((0, 2))

    def train(self) -> None:
        """Until the minutes are over; a later start with more minutes goes on from there."""
        pairs = Pairs(self.work, "train", 5000 + self.step)
        mark, saved_at = time.monotonic(), self.seconds
        recent: list[Tensor] = []
        while self.seconds < self.total:
            for optimizer in self.optimizers:
                set_rate(optimizer, self.rate * self.share())
                optimizer.zero_grad(set_to_none=True)
            error_C, power_C = self.errors(pairs)
            (error_C.mean() + 0.2 * (error_C / (power_C + 0.05)).mean()).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.encoder.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.average.update(self.model.encoder)
            self.step += 1
            recent.append(torch.stack([error_C.detach(), power_C]))
            now = time.monotonic()
            self.seconds, mark = self.seconds + min(60.0, now - mark), now
            if self.step % 50 == 0:
                error_C, power_C = torch.stack(recent).mean(0).cpu()
                recent = []
                parts = {"envelope": slice(ENVELOPE), "wave": slice(ENVELOPE, None)}
                shares = {name: float(error_C[part].sum() / power_C[part].sum()) for name, part in parts.items()}
                line = {"step": self.step, "seconds": round(self.seconds), "error": float(error_C.mean())} | shares
                text = json.dumps({name: round(value, 4) for name, value in line.items()})
                print(text, flush=True)
                with (self.work / "encoder.jsonl").open("a") as file:
                    file.write(text + "\n")
            if self.seconds - saved_at > SAVE_SECONDS or self.seconds >= self.total:
                self.save()
                saved_at = self.seconds


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(description="train nano's encoder")
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--cool", type=float, help="minutes in which the rate falls, on a copy")
    args = parser.parse_args()
    Run(args.work, args.cool or args.minutes, args.rate, args.cool is not None).train()


if __name__ == "__main__":
    main()
