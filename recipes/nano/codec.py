"""Train an autoencoder for nano end to end on a corpus of `broad.py` in WORK/train.

    python recipes/nano/codec.py WORK --minutes 180        # resumes WORK/codec.pt; minutes of a core, over all runs
    python recipes/nano/codec.py WORK --minutes 30 --cool  # trains a copy down to rate 0: WORK/codec-cool.pt
    python recipes/nano/codec.py WORK --packs FOLDER       # logs level, log-mel and SI-SDR of FOLDER/PACK/*.wav too

It starts from a linear code (`start.py`). What would make quiet sounds loud stays as it is set there: where attention
fetches from, and constants in the decoder, where every value is multiplied with amplitudes. Gradients that change no
more than the phases of noise are left out: they were the largest, and Muon would follow them.

Shapes: B items, C channels, T latent frames, N samples, F bins, M bands.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import soundfile
import torch
from parts import Average, set_rate, state_of
from speed import autocast, fast_cpu_muon
from start import ATOMS, CANCEL, FRAME, HIGH, INNER, MARK, PLACE_AT, RATE, TOP, D, build_codec, set_start
from store import Store
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from sa3train.audio.metrics import compute_log_mel_distance
from sa3train.audio.spectrum import compute_stft
from sa3train.core.files import replace_file
from sa3train.models import blocks
from sa3train.models.attention import Pattern
from sa3train.models.autoencoder import Autoencoder

SAVE_SECONDS, LOG_STEPS, CHECK_STEPS = 240.0, 20, 200
ITEMS, FRAMES, FIRST = 12, 16, 160  # of a batch; excerpts of half the length that the start is fitted to
MIXES = torch.tensor([[0.5, 0.5], [0.5, -0.5], [1.0, 0.0], [0.0, 1.0]])  # mid, side, left, right
MIX_SHARES = torch.tensor([0.55, 0.15, 0.15, 0.15])
SCALES = ((2048, 128), (512, 48), (1024, 80), (4096, 160))  # window, mel bands
FLOOR, QUIET = 3e-9, 1e-7  # powers below which cells and clips count as silent
WEIGHTS = {"mel": 1.0, "bins": 0.3, "energy": 0.8, "wave": 1.0, "level": 2.0, "scale": 0.02, "again": 1.0}
NOISE, LARGEST = 0.15, 6.0  # noise on latents, which have unit scale; what is beyond is penalized
GATHERS = ("encoder.layers.0.transformers.1.", "decoder.layers.3.transformers.0.")


def attend_short(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, pattern: Pattern = None) -> Tensor:
    """Compute attention over ten tokens as two products in fp32."""
    with torch.autocast(q_BLHD.device.type, enabled=False):
        q, k, v = (x.float().transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
        return (((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v).transpose(1, 2)


class Excerpts:
    """Random excerpts of a corpus at random levels, by chance mixed or made mono; a 25th is silence."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.store, self.rng = Store(folder), np.random.default_rng(seed)

    def draw(self, frames: int) -> Tensor:
        """Draw one excerpt (2, N); half of them start where the clip starts, at any place of the excerpt."""
        rng, size = self.rng, frames * FRAME
        pick = int(rng.integers(len(self.store.entries)))
        length = self.store.entries[pick]["length"]
        start = 0 if rng.random() < 0.5 else int(rng.integers(max(1, length - size // 2)))
        before = int(rng.integers(size // 2)) if start == 0 and rng.random() < 0.6 else 0
        found = torch.from_numpy(self.store.audio(pick, start, size - before))
        audio_CN = torch.zeros(2, size)
        audio_CN[:, before : before + found.shape[1]] = found
        if rng.random() < 0.1:
            audio_CN = audio_CN.mean(0, keepdim=True).repeat(2, 1)
        gain_db = rng.uniform(-24, 0) if rng.random() < 0.4 else 0.0
        order = [1, 0] if rng.random() < 0.5 else [0, 1]
        return audio_CN[order] * (10 ** (gain_db / 20) * rng.choice((-1.0, 1.0)))

    def batch(self, size: int, frames: int) -> Tensor:
        """Draw a batch (B, 2, N)."""
        rows = [self.draw(frames) for _ in range(size)]
        for row in range(size):
            if self.rng.random() < 0.1:
                rows[row] = (rows[row] + rows[row - 1]) / 2
            if self.rng.random() < 0.04:
                rows[row] = torch.zeros_like(rows[row])
        return torch.stack(rows).float()


def make_filters(window: int, bands: int) -> Tensor:
    """Make mel filters (F, M) that average."""
    filters_FM = melscale_fbanks(window // 2 + 1, 20.0, RATE / 2, bands, RATE, norm="slaney", mel_scale="slaney")
    return filters_FM / filters_FM.sum(0).clamp_min(1e-9)


def compare(real: Tensor, made: Tensor, floor_B11: Tensor, heard: bool = True) -> Tensor:
    """Compare powers (B, F, T) in nats of magnitude; cells that are no louder than the floor count a tenth."""
    error = 0.5 * ((real + floor_B11).log() - (made + floor_B11).log()).abs()
    weight = (real > floor_B11).float() * 0.9 + 0.1 if heard else torch.ones_like(real)
    return (error * weight).sum() / weight.sum()


def compute_loss(real_BCN: Tensor, made_BCN: Tensor, pick: torch.Generator) -> dict[str, Tensor]:
    """Compute the loss terms, none of which divides by what may be small.

    Mel bands at two scales, bins at one, mean energies by band over eighths of a second and over all (cells compared
    in decibels alone make noise as quiet as its median), likeness of the waveform at any level, and level.
    """
    terms = {name: real_BCN.new_zeros(()) for name in ("mel", "energy", "bins")}
    real_B, made_B = real_BCN.square().mean((1, 2)), made_BCN.square().mean((1, 2))
    for turn, number in enumerate((0, 1 + int(torch.randint(3, (), generator=pick)))):
        window, bands = SCALES[number]
        mid = turn == 0 and float(torch.rand((), generator=pick)) < 0.6
        mix = MIXES[0 if mid else int(torch.multinomial(MIX_SHARES, 1, generator=pick))]
        both = torch.cat([(mix[:, None] * x_BCN).sum(1) for x_BCN in (real_BCN, made_BCN)])
        spectrum = compute_stft(both, window, window // 4, "constant")
        power = (spectrum.real.square() + spectrum.imag.square()) / torch.hann_window(window).square().sum()
        mel = make_filters(window, bands).T @ power
        real, made = mel.chunk(2)
        floor_B11 = (torch.maximum(real.amax((1, 2)), real_B) * 1e-6 + FLOOR)[:, None, None]
        terms["mel"] = terms["mel"] + compare(real, made, floor_B11) / 2
        if turn:
            terms["bins"] = compare(*power.chunk(2), floor_B11, heard=False)
        slow = nn.functional.avg_pool1d(mel, max(1, RATE // 8 // (window // 4)), ceil_mode=True)
        for part in (slow, mel.mean(2, keepdim=True)):
            terms["energy"] = terms["energy"] + compare(*part.chunk(2), floor_B11) / 2
    product_B = (real_BCN * made_BCN).mean((1, 2))
    terms["wave"] = (1.05 - product_B.square() / ((real_B + QUIET) * (made_B + QUIET))).log().mean()
    terms["level"] = 0.5 * ((made_B + QUIET) / (real_B + QUIET)).log().abs().mean()
    return terms


def penalize_scale(z_BCT: Tensor) -> Tensor:
    """Penalize latents whose mean or spread by channel is not 0 and 1, and those beyond `LARGEST`."""
    mean_C, variance_C = z_BCT.mean((0, 2)), z_BCT.var((0, 2)) + 1e-3
    divergence = 0.5 * (mean_C.square() + variance_C - variance_C.log() - 1).clamp(max=5).mean()
    return divergence + (z_BCT.abs() - LARGEST).clamp(min=0, max=50).mean()


def run_codec(model: Autoencoder, audio_BCN: Tensor, pick: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Encode, add noise to the latents of half of the items, decode. Returns latents, audio and its latents."""
    with autocast("cpu"):
        z_BCT = model.encode(audio_BCN).float()
        strength = NOISE * (2 * torch.rand(len(z_BCT), 1, 1, generator=pick) - 1).clamp_min(0)
        made_BCN = model.decode(z_BCT + strength * torch.randn(z_BCT.shape, generator=pick))
        again_BCT = model.encode(made_BCN).float()
    return z_BCT, made_BCN.float(), again_BCT


@torch.no_grad()
def measure(model: Autoencoder, paths: list[Path]) -> dict[str, float]:
    """Measure medians over files: level and its 10 % and 90 %, log-mel distance, SI-SDR (as `sa3-bench nano`)."""
    levels, mels, ratios = [], [], []
    for path in paths:
        real_CN = torch.from_numpy(soundfile.read(path, frames=3 * RATE, dtype="float32", always_2d=True)[0].T.copy())
        energy = float(real_CN.square().sum())
        if energy == 0:
            continue
        rng = torch.Generator().manual_seed(0)
        made_CN = model.decode(model.encode(real_CN[None]), generator=rng)[0, :, : real_CN.shape[1]]
        levels.append(10 * math.log10(float(made_CN.square().sum()) / energy + 1e-12))
        mels.append(compute_log_mel_distance(real_CN, made_CN, RATE))
        scale = (real_CN * made_CN).sum() / made_CN.square().sum().clamp_min(1e-12)
        ratios.append(-10 * math.log10(float((real_CN - scale * made_CN).square().sum()) / energy + 1e-12))
    low, middle, high = np.percentile(levels, (10, 50, 90))
    figures = {"level": middle, "low": low, "high": high, "mel": np.median(mels), "sdr": np.median(ratios)}
    return {name: round(float(value), 2) for name, value in figures.items()}


def make_optimizers(model: Autoencoder, held: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Make Muon for the layers' matrices and AdamW for the rest, which moves in proportion to its size.

    Norms move a tenth of that. `held` gets the projections of which only the values may move.
    """
    matrices, groups = [], []
    for name, parameter in model.named_parameters():
        gathers = name.startswith(GATHERS)
        size = parameter.detach().abs()
        fetching = gathers and any(norm in name for norm in ("pre_norm", "q_norm", "k_norm"))
        if fetching or name.startswith("bottleneck") or name.endswith("alpha"):
            parameter.requires_grad_(False)
        elif gathers and "to_qkv" in name:
            held.append(parameter)
            groups.append({"params": [parameter], "share": 0.1})
        elif parameter.ndim == 2 and "transformers" in name:
            matrices.append(parameter)
        elif "norm" in name or "weight_g" in name:
            groups.append({"params": [parameter], "share": 0.1 * float(size.median().clamp(0.003, 4))})
        else:
            groups.append({"params": [parameter], "share": float(size.square().mean().sqrt().clamp(0.003, 1))})
    fast_cpu_muon()
    muon = torch.optim.Muon([{"params": matrices, "share": 1.0}], weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-12, weight_decay=0.0)]


def find_fixed(model: Autoencoder) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
    """Find what of the decoder stays, so that silence is silent: parameter, mask and values."""
    block, found = model.decoder.resampler, []
    for number, layer in enumerate(block.transformers):
        into, out, qkv = layer.ff.ff[0].proj, layer.ff.ff[2], layer.self_attn.to_qkv
        weight, bias, values = (torch.zeros_like(x, dtype=torch.bool) for x in (into.weight, into.bias, qkv.weight))
        weight[:INNER, PLACE_AT:], bias[:INNER] = True, True
        values[2 * D : 3 * D, PLACE_AT if number else MARK :] = True
        if number:
            for start in (CANCEL, INNER + CANCEL):
                weight[start : start + ATOMS], bias[start : start + ATOMS] = True, True
        found += [(into.weight, weight), (into.bias, bias), (qkv.weight, values)]
        found.append((out.bias, torch.ones_like(out.bias, dtype=torch.bool)))
    found.append((block.mapping.bias, torch.ones_like(block.mapping.bias, dtype=torch.bool)))
    return [(parameter, mask, parameter.detach().clone()) for parameter, mask in found]


class Run:
    """A resumable run with a time limit in minutes."""

    def __init__(self, work: Path, minutes: float, rate: float, muon: float, cool: bool, packs: Path | None) -> None:
        self.work, self.rates, self.cool, self.packs = work, (muon, rate), cool, packs
        blocks.attend = attend_short
        self.model = build_codec()
        self.path = work / ("codec-cool.pt" if cool else "codec.pt")
        start = self.path if self.path.exists() else work / "codec.pt"
        saved = torch.load(start, weights_only=True) if start.exists() else None
        torch.manual_seed(0)
        if saved is None:
            set_start(self.model, Excerpts(work / "train", 0).batch(FIRST, FRAMES // 2))
        self.held: list[nn.Parameter] = []
        self.optimizers = make_optimizers(self.model, self.held)
        self.average = Average(self.model, 0.998)
        self.step, self.seconds, self.began = 0, 0.0, 0.0
        if saved is not None:
            self.model.load_state_dict(saved["model"])
            for number, optimizer in enumerate(self.optimizers):
                optimizer.load_state_dict(saved[f"optimizer{number}"])
            self.average.state, self.average.count = saved["average"], saved["count"]
            self.step, self.seconds = saved["step"], saved["seconds"]
            self.began = saved["began"] if start == self.path else self.seconds
        self.fixed = find_fixed(self.model)
        self.total = (self.began if cool else 0.0) + 60 * minutes

    def save(self) -> None:
        """Save everything needed to resume."""
        parts = {"model": self.model} | {f"optimizer{i}": each for i, each in enumerate(self.optimizers)}
        saved = state_of(**parts) | {"average": self.average.state, "count": self.average.count, "step": self.step}
        with replace_file(self.path) as path:
            torch.save(saved | {"seconds": self.seconds, "began": self.began}, path)

    def log(self, **values: object) -> None:
        """Log a line to the screen and to WORK/codec.jsonl."""
        line = json.dumps({"step": self.step, "cpu_seconds": round(self.seconds), **values})
        print(line, flush=True)
        with (self.work / "codec.jsonl").open("a") as file:
            file.write(line + "\n")

    def check(self) -> None:
        """Log the figures of the averaged weights by pack."""
        averaged = build_codec()
        averaged.load_state_dict(self.average.state)
        for pack in sorted(self.packs.iterdir()) if self.packs else []:
            self.log(pack=pack.name, **measure(averaged, sorted(pack.glob("*.wav"))[:12]))

    @torch.no_grad()
    def advance(self) -> Tensor:
        """Take a step of the optimizers. Returns the norm of the gradients."""
        for parameter in self.held:
            assert parameter.grad is not None
            parameter.grad.view(5, D, D)[[0, 1, 3, 4]] = 0
        block = self.model.decoder.resampler
        first, last = block.transformers
        for rows in (first.ff.ff[2].weight, first.self_attn.to_out.weight, last.self_attn.to_out.weight):
            rows.grad[HIGH:TOP] = 0
        assert block.new_tokens.grad is not None
        block.new_tokens.grad[..., HIGH:TOP] = 0
        norm = nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        if bool(norm.isfinite()):
            for optimizer in self.optimizers:
                optimizer.step()
            for parameter, mask, kept in self.fixed:
                parameter.copy_(torch.where(mask, kept, parameter))
            self.average.update(self.model)
        return norm

    def get_share(self) -> float:
        """Compute the factor of the rate: warm-up over 100 steps, then constant; linear down when cooling."""
        if self.cool:
            return max(0.01, (self.total - self.seconds) / (self.total - self.began))
        return min(1.0, (self.step + 1) / 100)

    def train(self) -> None:
        """Train until the time is over; a later start with more minutes resumes."""
        excerpts = Excerpts(self.work / "train", 1000 + self.step)
        pick = torch.Generator().manual_seed(self.step)
        mark, saved_at = time.process_time(), time.monotonic()
        sums: dict[str, list[float]] = {}
        while self.seconds < self.total:
            for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
                set_rate(optimizer, rate * self.get_share())
                optimizer.zero_grad(set_to_none=True)
            real_BCN = excerpts.batch(ITEMS, FRAMES)
            z_BCT, made_BCN, again_BCT = run_codec(self.model, real_BCN, pick)
            terms = compute_loss(real_BCN, made_BCN, pick) | {"scale": penalize_scale(z_BCT)}
            terms["again"] = nn.functional.smooth_l1_loss(again_BCT, z_BCT.detach(), beta=0.3)
            total = sum((WEIGHTS[name] * term for name, term in terms.items()), torch.zeros(()))
            total.backward()  # type: ignore[no-untyped-call]
            terms["norm"] = self.advance()
            self.step += 1
            for name, term in terms.items():
                sums.setdefault(name, []).append(float(term.detach()))
            now = time.process_time()
            self.seconds, mark = self.seconds + now - mark, now
            if self.step % LOG_STEPS == 0:
                self.log(**{name: round(sum(values) / len(values), 3) for name, values in sums.items()})
                sums = {}
            if self.step % CHECK_STEPS == 0:
                self.check()
                mark = time.process_time()
            if time.monotonic() - saved_at > SAVE_SECONDS or self.seconds >= self.total:
                self.save()
                saved_at = time.monotonic()


def main() -> None:
    """Train, or resume training."""
    parser = argparse.ArgumentParser(description="train nano's autoencoder end to end")
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=60, help="of a core, all runs together")
    parser.add_argument("--rate", type=float, default=2e-4, help="of AdamW, relative to each parameter's size")
    parser.add_argument("--muon", type=float, default=2e-4)
    parser.add_argument("--cool", action="store_true")
    parser.add_argument("--packs", type=Path)
    Run(**vars(parser.parse_args())).train()


if __name__ == "__main__":
    main()
