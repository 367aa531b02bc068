"""Train nano's decoder on computed latents (see `targets.py`).

    python recipes/nano/decoder.py WORK --minutes 60     # resumes WORK/decoder.pt; --cool as in base.py
    python recipes/nano/decoder.py WORK --match          # at last: loudness of the bands -> WORK/decoder-cool.pt

It starts as a vocoder set by hand (`vocoder.py`). Loss: log magnitudes at one random resolution and channel mix per
step, alternating between bins and mel bands, the texture of bands, and the error of the waveform relative to the
signal. Latents are jittered, since those of a denoiser are never exact, and half of them come from the encoder.
Shapes: B items, C channels, T latent frames, N samples, D width.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from channels import HIGH, LEVELS, MID_NOISE, NOISE, PLACE, SHARES, SIDE_NOISE, TAKEN
from fitted import calibrate, join_bass, match_levels
from parts import Average, latest, load, set_rate, state_of
from sound_losses import spectral_loss, texture_loss, wave_loss
from speed import autocast, fast_cpu_layers
from store import Store
from targets import FRAME, LATENT, LOUDEST, load_code, silence
from torch import Tensor, nn
from vocoder import autoencoder, start

from sa3train.core.files import replace_file
from sa3train.models.autoencoder import Autoencoder

FRAMES, BATCH = 8, 16
WINDOWS = (256, 512, 1024, 2048)
MIXES = torch.tensor([[0.5, 0.5], [0.5, -0.5], [1.0, 0.0], [0.0, 1.0]])  # mid, side, left, right
MIX_SHARES = torch.tensor([0.55, 0.15, 0.15, 0.15])
JITTER = 0.3
HUM = 0.1  # weight of what silence becomes
SEEN = 0.5  # share of stretches whose latents are the encoder's, where it has written them (WORK/seen.pt)
SAVE_SECONDS = 240.0


class Pairs:
    """Random excerpts of `FRAMES` latent frames with their audio: (B, C, T) and (B, 2, N)."""

    def __init__(self, work: Path, split: str, seed: int) -> None:
        self.sources = []
        for name in (split, "broad") if split == "train" and (work / "broad").is_dir() else (split,):
            seen, latents = work / f"seen-{name}.pt", load(work, name)
            encoded = torch.load(seen, weights_only=True) if seen.exists() else latents
            self.sources.append((Store(work / name), latents, encoded))
        self.silence_C, self.rng = silence(load_code(work)), np.random.default_rng(seed)

    def batch(self, size: int = BATCH, frames: int = FRAMES, seen: float = SEEN) -> tuple[Tensor, Tensor]:
        """Draw a batch: half from the start of clips, where the attacks are; an eighth is silence."""
        latents, audio = torch.zeros(size, LATENT, frames), torch.zeros(size, 2, frames * FRAME)
        latents[:] = self.silence_C[:, None]
        for row in range(size - size // 8):
            store, computed, encoded = self.sources[int(self.rng.integers(len(self.sources)))]
            source = encoded if self.rng.random() < seen else computed
            pick = int(self.rng.integers(len(source)))
            slack = max(0, source[pick].shape[1] - frames) // 2
            first = 0 if self.rng.random() < 0.3 else 2 * int(self.rng.integers(slack + 1))
            z_CT = source[pick][:, first : first + frames].float().clamp(-LOUDEST, LOUDEST)
            latents[row, :, : z_CT.shape[1]] = z_CT
            known = torch.from_numpy(store.audio(pick, first * FRAME, frames * FRAME))
            audio[row, :, : known.shape[1]] = known
        return latents, audio


def step_loss(
    model: Autoencoder, z_BCT: Tensor, real_BCN: Tensor, wave: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Compute the loss terms of a batch; `total` is minimized."""
    device = z_BCT.device
    silent_B = real_BCN.abs().amax((1, 2)) == 0
    jitter = JITTER * torch.rand(len(z_BCT), 1, 1, generator=generator) * (1 - 0.6 * silent_B.cpu()[:, None, None])
    z_BCT = z_BCT + (jitter * torch.randn(z_BCT.shape, generator=generator)).to(device)
    with autocast(device.type):
        made_BCN = model.decode(z_BCT).float()
    window = WINDOWS[int(torch.randint(len(WINDOWS), (), generator=generator))]
    mix = MIXES[int(torch.multinomial(MIX_SHARES, 1, generator=generator))].to(device)
    mel = bool(torch.rand((), generator=generator) < 0.5)
    level_B = real_BCN.pow(2).mean((1, 2)).sqrt() + 1e-3
    mixed = [(mix[:, None] * x_BCN).sum(1) for x_BCN in (real_BCN, made_BCN)]
    terms = {"wave": wave_loss(real_BCN, made_BCN)}
    spectral = spectral_loss(mixed[0], mixed[1], window, level_B, mel)
    terms["mel" if mel else "bins"] = spectral
    terms["texture"] = texture_loss(mixed[0], mixed[1], 2048, level_B)
    # What silence becomes, in nats of energy above -90 dB:
    terms["hum"] = (made_BCN.square().mean((1, 2)) / 1e-9).log1p()[silent_B].sum() / silent_B.sum().clamp_min(1)
    terms["total"] = spectral + terms["texture"] + wave * terms["wave"] + HUM * terms["hum"]
    return terms


def learning(model: Autoencoder) -> list[tuple[str, nn.Parameter, Tensor]]:
    """List what is trained, each with a mask: free units, the linear layer, the sounds of the mapping.

    The rest stays as set: it carries large values, and a thousandth of them is audible elsewhere.
    """
    found = []
    for name, parameter in model.decoder.named_parameters():
        free = torch.ones_like(parameter)
        layer = int(name.split(".")[3]) if "transformers" in name else -1
        if "norm" in name or name.endswith("new_tokens") or "to_qkv" in name or "to_out" in name:
            continue
        if name.endswith("weight_v"):
            free.zero_()[:, SHARES : NOISE + MID_NOISE + SIDE_NOISE] = 1
            free[:, LEVELS : LEVELS + 2 * HIGH] = 1  # by then the high oscillators; what is left is no sound
        elif ".ff.0." in name:
            free.unflatten(0, (2, -1))[:, : TAKEN[layer]] = 0
        elif layer >= 0 and ".ff.2." in name:
            free[PLACE] = 0
            if name.endswith("weight"):
                free[:, : TAKEN[layer]] = 0
        found.append((name, parameter, free))
    return found


def decoder_optimizers(model: Autoencoder, rate: float) -> list[torch.optim.Optimizer]:
    """Make AdamW optimizers: Muon's even steps undo what is set by hand."""
    groups: dict[float, list[nn.Parameter]] = {1.0: [], 0.1: []}
    for name, parameter, free in learning(model):
        parameter.register_hook(lambda gradient, free=free: gradient * free)
        groups[0.1 if "mapping" in name else 1.0].append(parameter)
    return [
        torch.optim.AdamW(
            [{"params": each, "share": share} for share, each in groups.items()],
            lr=rate,
            betas=(0.9, 0.99),
            weight_decay=0.0,
        )
    ]


def first(work: Path) -> Autoencoder:
    """Load the decoder set by hand (`vocoder.py`), with bands calibrated on 48 excerpts, from WORK/vocoder.pt."""
    path = work / "vocoder.pt"
    if not path.exists():
        pairs = Pairs(work, "train", 0).batch(48)
        code = load_code(work)
        model = start(code)
        join_bass(model, code, *pairs)
        for _ in range(3):
            calibrate(model, *pairs)
        torch.save(model.state_dict(), path)
    model = autoencoder()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def match(work: Path) -> None:
    """Give the trained decoder the levels of clips of the corpora."""
    model, saved = first(work), latest(work, "decoder")
    if saved is None:
        raise FileNotFoundError(f"no decoder.pt in {work}: train one first")
    model.decoder.load_state_dict(saved["average"])
    latents_BCT, audio_BCN = Pairs(work, "train", 0).batch(114, 16, seen=0.0)
    heard = audio_BCN.square().mean((1, 2)) > 1e-9
    print("dB by band:", match_levels(model, load_code(work), latents_BCT[heard], audio_BCN[heard]))
    with replace_file(work / "decoder-cool.pt") as path:
        torch.save(saved | {"average": model.decoder.state_dict()}, path)


class Run:
    """A resumable run with a time limit in minutes."""

    def __init__(self, work: Path, minutes: float, rate: float, wave: float, cool: bool) -> None:
        self.work, self.rate, self.wave, self.cool = work, rate, wave, cool
        torch.manual_seed(0)
        self.model = first(work)
        self.model.encoder.requires_grad_(False)
        self.model.bottleneck.requires_grad_(False)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        if self.device.type == "cpu":
            fast_cpu_layers(self.model.decoder.layers[3].transformers)  # type: ignore[arg-type]
        self.optimizers = decoder_optimizers(self.model, rate)
        self.average = Average(self.model.decoder, 0.998)
        self.step, self.seconds, self.began = 0, 0.0, 0.0
        self.path = work / ("decoder-cool.pt" if cool else "decoder.pt")
        start = self.path if self.path.exists() else work / "decoder.pt"
        if start.exists():
            saved = torch.load(start, weights_only=True, map_location=self.device)
            self.model.decoder.load_state_dict(saved["model"])
            for number, optimizer in enumerate(self.optimizers):
                optimizer.load_state_dict(saved[f"optimizer{number}"])
            self.average.state, self.average.count = saved["average"], saved["count"]
            self.step, self.seconds = saved["step"], saved["seconds"]
            self.began = saved["began"] if start == self.path else self.seconds
        self.total = (self.began if cool else 0.0) + 60 * minutes

    def save(self) -> None:
        """Save everything needed to resume."""
        parts = {"model": self.model.decoder} | {f"optimizer{i}": each for i, each in enumerate(self.optimizers)}
        saved = state_of(**parts) | {"average": self.average.state, "count": self.average.count, "step": self.step}
        with replace_file(self.path) as path:
            torch.save(saved | {"seconds": self.seconds, "began": self.began}, path)

    def log(self, **values: float) -> None:
        """Log a line to the screen and to WORK/decoder.jsonl."""
        line = json.dumps({"step": self.step, "seconds": round(self.seconds), **values})
        print(line, flush=True)
        with (self.work / "decoder.jsonl").open("a") as file:
            file.write(line + "\n")

    def share(self) -> float:
        """Compute the factor of the rate: warm-up over 100 steps, then constant; linear down when cooling."""
        if self.cool:
            return max(0.01, (self.total - self.seconds) / (self.total - self.began))
        return min(1.0, (self.step + 1) / 100)

    def train(self) -> None:
        """Train until the time is over; a later start with more minutes resumes."""
        pairs = Pairs(self.work, "train", 1000 + self.step)
        generator = torch.Generator().manual_seed(self.step)
        mark, saved_at = time.monotonic(), self.seconds
        sums: dict[str, list[float]] = {}
        while self.seconds < self.total:
            for optimizer in self.optimizers:
                set_rate(optimizer, self.rate * self.share())
                optimizer.zero_grad(set_to_none=True)
            z_BCT, real_BCN = (part.to(self.device) for part in pairs.batch())
            terms = step_loss(self.model, z_BCT, real_BCN, self.wave, generator)
            terms["total"].backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.decoder.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.average.update(self.model.decoder)
            self.step += 1
            for name, term in terms.items():
                sums.setdefault(name, []).append(float(term.detach()))
            now = time.monotonic()
            self.seconds, mark = self.seconds + min(60.0, now - mark), now
            if self.step % 50 == 0:
                self.log(**{name: round(sum(values) / len(values), 4) for name, values in sums.items()})
                sums = {}
            if self.seconds - saved_at > SAVE_SECONDS or self.seconds >= self.total:
                self.save()
                saved_at = self.seconds


def main() -> None:
    """Train, or resume training."""
    parser = argparse.ArgumentParser(description="train nano's decoder")
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--wave", type=float, default=0.2, help="weight of the waveform's error")
    parser.add_argument("--cool", type=float, help="minutes of training a copy with a falling rate")
    parser.add_argument("--match", action="store_true", help="set the loudness of the bands")
    args = parser.parse_args()
    if args.match:
        return match(args.work)
    Run(args.work, args.cool or args.minutes, args.rate, args.wave, args.cool is not None).train()


if __name__ == "__main__":
    main()
