"""Train nano's autoencoder (chunked SAME, latent width 256) on the rendered corpus.

    python recipes/nano/autoencoder.py WORK --steps 3000     # WORK/train and WORK/val from store.py; resumes WORK/ae.pt
    python recipes/nano/autoencoder.py WORK --decoder-only   # after latents.py, which freezes the code; WORK/decoder.pt

It starts at a linear code (`sa3train.models.linear_code`) and learns to be better. Once latents.py has frozen the code
and the DiT is trained on it, the decoder alone may still improve. Loss: waveform error relative to the signal, one
random STFT resolution of one random channel mix a step, a pull of each latent channel to unit spread. Shapes: B items,
N samples, C channels, T latent frames.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from safetensors.torch import load_file
from speed import fast_cpu_attention
from store import Store
from torch import Tensor, nn

from sa3train.files import atomic_path
from sa3train.models.autoencoder import Autoencoder
from sa3train.models.config import AutoencoderConfig, StackConfig
from sa3train.models.linear_code import fit, start_linear

FRAME, FRAMES, BATCH = 4096, 4, 32
WINDOWS = (256, 512, 1024, 2048, 4096)
MIXES = torch.tensor([[0.5, 0.5], [0.5, -0.5], [1.0, 0.0], [0.0, 1.0]])  # mid, side, left, right


def build() -> Autoencoder:
    """The untrained autoencoder, 5.6 M parameters."""
    encoder = StackConfig(width=256, depth=2, latent_width=256, chunk_size=32)
    decoder = StackConfig(width=256, depth=3, latent_width=256, chunk_size=32, mask_noise=0.01, conv_mapping=True)
    return Autoencoder(AutoencoderConfig(encoder, decoder, latent_width=256))


class Crops:
    """Random crops of `FRAMES` latent frames, (B, 2, N); clips shorter than that are followed by silence."""

    def __init__(self, store: Store, seed: int) -> None:
        self.store, self.rng = store, np.random.default_rng(seed)

    def one(self) -> Tensor:
        """A crop that is not silent, at a random level near its own."""
        crop = np.zeros((2, FRAME * FRAMES), np.float32)
        while np.abs(crop).max() < 1e-2:
            index = int(self.rng.integers(len(self.store.entries)))
            slack = self.store.entries[index]["length"] - crop.shape[1]
            audio = self.store.audio(index, int(self.rng.integers(max(1, slack + 1))), crop.shape[1])
            crop[:, : audio.shape[1]] = audio * self.rng.uniform(0.5, 1.0)
        return torch.from_numpy(crop)

    def batch(self, size: int = BATCH) -> Tensor:
        """(size, 2, N)."""
        return torch.stack([self.one() for _ in range(size)])


def start(store: Store, seed: int = 0) -> Autoencoder:
    """An autoencoder set to the block PCA of crops that are each scaled to one loudness."""
    torch.manual_seed(seed)
    crops = Crops(store, seed).batch(4000)
    crops = 0.1 * crops / crops.pow(2).mean((1, 2), keepdim=True).sqrt()
    patches_FSP = crops.unflatten(-1, (-1, 16, 256)).permute(0, 2, 3, 1, 4).flatten(0, 1).flatten(2)
    model = build()
    state = model.state_dict()
    start_linear(state, fit(patches_FSP))
    model.load_state_dict(state)
    return model


def stft_loss(real_BN: Tensor, made_BN: Tensor, window: int, level_B: Tensor) -> Tensor:
    """Spectral convergence plus the mean difference of log magnitudes (in nats, floored 70 dB under the item's peak).

    `level_B` is the item's RMS over both channels: a mix that holds next to nothing of it (the side of a mono clip) is
    measured against a tenth of it instead of against itself.
    """
    taper = torch.hann_window(window, device=real_BN.device)
    real, made = (
        torch.stft(x_BN, window, window // 4, window=taper, return_complex=True).abs() for x_BN in (real_BN, made_BN)
    )
    energy_B = level_B * (taper.pow(2).sum() * real[0].numel()).sqrt()  # of noise at that level
    convergence = (real - made).norm(dim=(1, 2)) / torch.maximum(real.norm(dim=(1, 2)), 0.1 * energy_B)
    floor = torch.maximum(real.amax((1, 2)), level_B)[:, None, None] * 10 ** (-70 / 20)
    return (convergence + ((real + floor).log() - (made + floor).log()).abs().mean((1, 2))).mean()


def wave_loss(real_BCN: Tensor, made_BCN: Tensor) -> Tensor:
    """Log of the error's energy relative to the signal's: each item counts by its decibels, whatever its level."""
    error, energy = (real_BCN - made_BCN).pow(2).sum((1, 2)), real_BCN.pow(2).sum((1, 2))
    return (error / (energy + 1e-3) + 3e-3).log().mean()


def step_loss(model: Autoencoder, real_BCN: Tensor, spectral: float, generator: torch.Generator) -> dict[str, Tensor]:
    """All loss terms of one batch; `total` is what is minimised."""
    with torch.autocast(real_BCN.device.type, torch.bfloat16):
        z_BCT = model.encode(real_BCN)
        jitter = 0.15 * torch.rand(z_BCT.shape[0], 1, 1, device=z_BCT.device)
        made_BCN = model.decode(z_BCT + jitter * torch.randn_like(z_BCT)).float()
    spread = z_BCT.float().pow(2).mean((0, 2)).add(1e-4).log().pow(2).mean()
    terms = {"wave": wave_loss(real_BCN, made_BCN), "spread": spread}
    window = WINDOWS[int(torch.randint(len(WINDOWS), (), generator=generator))]
    mix = MIXES[int(torch.randint(len(MIXES), (), generator=generator))].to(real_BCN.device)
    level_B = real_BCN.pow(2).mean((1, 2)).sqrt() + 1e-3
    terms["stft"] = stft_loss(*((mix[:, None] * x_BCN).sum(1) for x_BCN in (real_BCN, made_BCN)), window, level_B)
    terms["total"] = terms["wave"] + spectral * terms["stft"] + 0.003 * terms["spread"]
    return terms


def si_sdr(real: Tensor, made: Tensor) -> float:
    """Scale-invariant signal-to-distortion ratio of two equal shapes, in dB."""
    scaled = (real * made).sum() / real.pow(2).sum().clamp_min(1e-12) * real
    return float(10 * torch.log10(scaled.pow(2).sum() / (made - scaled).pow(2).sum().clamp_min(1e-12) + 1e-12))


@torch.no_grad()
def validate(model: Autoencoder, store: Store, count: int = 80) -> dict[str, float]:
    """Median SI-SDR and mean STFT loss over the first clips of the validation store."""
    ratios, spectral = [], []
    for index in range(count):
        real = torch.from_numpy(store.audio(index, 0, 30 * FRAME))[None]
        made = model.decode(model.encode(real), noise=False)[..., : real.shape[-1]]
        ratios.append(si_sdr(real, made))
        if real.shape[-1] > 4096:
            level_B = real.pow(2).mean((1, 2)).sqrt() + 1e-3
            spectral.append(float(stft_loss(real.mean(1), made.mean(1), 1024, level_B)))
    return {"si_sdr": float(np.median(ratios)), "stft": float(np.mean(spectral))}


class Run:
    """A resumable training run in `work`."""

    def __init__(self, work: Path, steps: int, rate: float, spectral: float, decoder_only: bool = False) -> None:
        self.work, self.steps, self.rate, self.spectral = work, steps, rate, spectral
        self.name = "decoder" if decoder_only else "ae"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            fast_cpu_attention()
        self.store, self.held_out = Store(work / "train"), Store(work / "val")
        self.path = work / f"{self.name}.pt"
        self.model = build() if decoder_only or self.path.exists() else start(self.store)
        if decoder_only:
            self.model.load_state_dict(load_file(work / "ae.safetensors"))
            self.model.encoder.requires_grad_(False)
        self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(self._learning(), betas=(0.9, 0.98), weight_decay=0.0)
        self.average = torch.optim.swa_utils.AveragedModel(
            self.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995), use_buffers=True
        )
        self.step, self.seconds = 0, 0.0
        if self.path.exists():
            self._load(torch.load(self.path, weights_only=True, map_location=self.device))
        else:
            self.save()

    def _learning(self) -> list[nn.Parameter]:
        """All but what the linear start sets to see by place alone: queries and keys keep their hand-set patterns."""
        learning = []
        for name, parameter in self.model.named_parameters():
            if "q_norm" in name or "k_norm" in name or "bottleneck" in name or not parameter.requires_grad:
                continue
            if "to_qkv" in name:
                third = parameter.shape[0] // 5
                values = torch.zeros(len(parameter), 1, device=self.device)
                values[2 * third : 3 * third] = 1
                parameter.register_hook(lambda gradient, values=values: gradient * values)
            learning.append(parameter)
        return learning

    def _load(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds = saved["step"], saved["seconds"]

    def save(self) -> None:
        """Everything that resuming needs, whole or not at all."""
        parts = {"model": self.model, "average": self.average, "optimizer": self.optimizer}
        saved = {name: part.state_dict() for name, part in parts.items()}
        with atomic_path(self.path) as path:
            torch.save(saved | {"step": self.step, "seconds": self.seconds}, path)

    def _log(self, **values: float) -> None:
        line = json.dumps({"step": self.step, "seconds": round(self.seconds), **values})
        print(line, flush=True)
        with (self.work / f"{self.name}.jsonl").open("a") as file:
            file.write(line + "\n")

    def train(self) -> None:
        """To the last step: warm-up of 50 steps, then a cosine to a twentieth of the rate."""
        crops = Crops(self.store, 1000 + self.step)
        generator = torch.Generator().manual_seed(self.step)
        sums: dict[str, float] = {}
        mark = time.monotonic()
        while self.step < self.steps:
            cosine = 0.525 + 0.475 * math.cos(math.pi * self.step / self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * min(1.0, (self.step + 1) / 50) * cosine
            terms = step_loss(self.model, crops.batch().to(self.device), self.spectral, generator)
            self.optimizer.zero_grad(set_to_none=True)
            terms["total"].backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.average.update_parameters(self.model)
            self.step += 1
            sums = {name: sums.get(name, 0.0) + float(term.detach()) for name, term in terms.items()}
            if self.step % 50 == 0:
                now = time.monotonic()
                self.seconds, mark = self.seconds + now - mark, now
                self._log(**{name: round(value / 50, 4) for name, value in sums.items()})
                sums = {}
            if self.step % 100 == 0 or self.step == self.steps:
                average = self.average.module
                assert isinstance(average, Autoencoder)
                self._log(
                    **{f"held_out_{k}": round(v, 3) for k, v in validate(average.to("cpu"), self.held_out).items()}
                )
                average.to(self.device)
                self.save()


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(description="train nano's autoencoder")
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--spectral", type=float, default=0.15)
    parser.add_argument("--decoder-only", action="store_true", help="train the decoder of WORK/ae.safetensors")
    args = parser.parse_args()
    Run(args.work, args.steps, args.rate, args.spectral, args.decoder_only).train()


if __name__ == "__main__":
    main()
