"""What a latent frame of nano is to hold, computed without any network, and the corpus as such frames.

    python recipes/nano/targets.py WORK      # WORK/linear from latents.py --linear -> WORK/latents

The first `ENVELOPE` channels say how loud each band is in each quarter of the frame (a PCA of compressed band energies,
mid and side); the rest are the strongest components of the waveform itself (a PCA of the linear code, so linear in the
samples). Prompts mostly ask for what the first kind holds, and a denoiser learns it within minutes because it has no
phase; the second kind carries pitch and bass. The encoder is taught to compute both, the decoder to undo them.

Shapes: B items, C latent channels, T latent frames, N samples, E band energies of a frame, W waveform components.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from safetensors.torch import load_file, save_file
from store import CHUNK, Store
from torch import Tensor

from sa3train.files import atomic_path

FRAME, WINDOW = 4096, 1024
MID_BANDS, SIDE_BANDS, QUARTERS = 28, 8, 4
ENVELOPE, WAVE = 40, 88
LATENT = ENVELOPE + WAVE
POWER = 0.15  # of energy: 0.3 of amplitude, near what loudness follows
FLOOR = 1e-14
ENVELOPE_LEVEL, WAVE_LEVEL = 1.25, 0.85  # root mean squares over the channels of each kind: 1 over both
LOUDEST = 8.0


@cache
def _bank(bands: int, low: float = 40.0, high: float = 16000.0) -> Tensor:
    """Triangular mel filters over the bins of a `WINDOW`, each summing to 1: (bands, bins)."""
    mel = 2595 * torch.log10(1 + torch.tensor([low, high], dtype=torch.float64) / 700)
    edges = 700 * (10 ** (torch.linspace(float(mel[0]), float(mel[1]), bands + 2, dtype=torch.float64) / 2595) - 1)
    bins = torch.linspace(0, 22050, WINDOW // 2 + 1, dtype=torch.float64)
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    weights = torch.minimum(rise, fall).clamp_min(0)
    return (weights / weights.sum(1, keepdim=True)).float()


def envelope(audio_BCN: Tensor) -> Tensor:
    """Compressed band energies (B, E, T) of whole frames: mid by quarters of the frame, side over the frame."""
    batch = len(audio_BCN)
    pair = torch.stack([audio_BCN.mean(1), (audio_BCN[:, 0] - audio_BCN[:, 1]) / 2], 1).flatten(0, 1)
    taper = torch.hann_window(WINDOW, device=pair.device)
    spectrum = torch.stft(pair, WINDOW, WINDOW // 2, window=taper, pad_mode="constant", return_complex=True)
    power = (spectrum.real.square() + spectrum.imag.square()) * (2 / taper.sum()) ** 2
    mid, side = power.unflatten(0, (batch, 2)).unbind(1)
    bands = torch.cat([_bank(MID_BANDS) @ mid, _bank(SIDE_BANDS) @ side], 1)
    quarters = 0.25 * bands[..., 0:-1:2] + 0.5 * bands[..., 1::2] + 0.25 * bands[..., 2::2]
    split = quarters.unflatten(-1, (-1, QUARTERS))
    fine = split[:, :MID_BANDS].permute(0, 1, 3, 2).flatten(1, 2)
    return torch.cat([fine, split[:, MID_BANDS:].mean(-1)], 1).clamp_min(FLOOR).pow(POWER)


def principal(values_EN: Tensor, count: int, power: float, level: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, forward (count, E) and back (E, count) maps; spreads follow std**power and have RMS `level`."""
    mean_E = values_EN.mean(1)
    variances, basis = torch.linalg.eigh(torch.cov(values_EN.double()))
    std = variances.flip(0)[:count].clamp_min(1e-12).sqrt()
    wanted = std.pow(power)
    wanted = level * wanted / wanted.square().mean().sqrt()
    rows = basis.flip(1)[:, :count].T
    return mean_E.float(), (rows * (wanted / std)[:, None]).float(), (rows * (std / wanted)[:, None]).T.float()


def fit(store: Store, linear: list[Tensor]) -> dict[str, Tensor]:
    """The code, from clips whose linear latents are given."""
    energies, loudness = [], []
    gram, cross = torch.zeros(257, 257).double(), torch.zeros(257, 2 * FRAME).double()
    for index, z_CT in enumerate(linear):
        audio_CN = clip(store, index, z_CT.shape[1])
        energies.append(envelope(audio_CN[None])[0])
        frames_TS = audio_CN.unflatten(1, (-1, FRAME)).transpose(0, 1).flatten(1)
        known = torch.cat([z_CT.float(), torch.ones(1, z_CT.shape[1])])
        weight = float(0.1 / (audio_CN.square().mean().sqrt() + 1e-3))  # every clip counts alike, as its SI-SDR does
        loudness.append(weight)
        gram += (weight**2 * known @ known.T).double()
        cross += (weight**2 * known @ frames_TS).double()
    back = torch.linalg.solve(gram + 1e-6 * gram.diagonal().mean() * torch.eye(257), cross)[:256]
    metric = back @ back.T  # energy of the audio per product of linear channels
    factor = torch.linalg.cholesky(metric + 1e-9 * metric.diagonal().mean() * torch.eye(256)).T.float()
    heard = factor @ torch.cat([weight * z_CT.float() for weight, z_CT in zip(loudness, linear, strict=True)], 1)
    _, wave, wave_back = principal(heard, WAVE, 0.5, WAVE_LEVEL)
    code = {"wave_mean": torch.cat(linear, 1).float().mean(1)}
    code |= {"wave": wave @ factor, "wave_back": torch.linalg.solve(factor, wave_back)}
    parts = principal(torch.cat(energies, 1), ENVELOPE, 0.4, ENVELOPE_LEVEL)
    return code | dict(zip(("envelope_mean", "envelope", "envelope_back"), parts, strict=True))


def clip(store: Store, index: int, frames: int) -> Tensor:
    """A clip's audio followed by silence to whole frames, (2, N)."""
    audio = torch.from_numpy(store.audio(index))
    return torch.nn.functional.pad(audio, (0, frames * FRAME - audio.shape[1]))


def latents_of(code: dict[str, Tensor], audio_CN: Tensor, linear_CT: Tensor) -> Tensor:
    """What the encoder is to give for whole frames of audio whose linear latents are given, (C, T)."""
    shape = code["envelope"] @ (envelope(audio_CN[None])[0] - code["envelope_mean"][:, None])
    wave = code["wave"] @ (linear_CT.float() - code["wave_mean"][:, None])
    return torch.cat([shape, wave]).clamp(-LOUDEST, LOUDEST)


def silence(code: dict[str, Tensor]) -> Tensor:
    """The latent frame of silence, (C,)."""
    quiet = torch.full_like(code["envelope_mean"], FLOOR**POWER)
    return torch.cat([code["envelope"] @ (quiet - code["envelope_mean"]), -code["wave"] @ code["wave_mean"]])


def load_code(work: Path) -> dict[str, Tensor]:
    """What `main` fitted."""
    return load_file(work / "code.safetensors")


def main() -> None:
    """Fit on the first chunk, then encode what is not there yet."""
    parser = argparse.ArgumentParser(description="nano's latents, computed")
    parser.add_argument("work", type=Path)
    parser.add_argument("--linear", type=Path, help="folder of linear latents (default WORK/linear)")
    args = parser.parse_args()
    linear = args.linear or args.work / "linear"
    if not (args.work / "code.safetensors").exists():
        code = fit(Store(args.work / "train"), torch.load(linear / "train-0.pt", weights_only=True))
        with atomic_path(args.work / "code.safetensors") as path:
            save_file({name: tensor.contiguous() for name, tensor in code.items()}, path)
    code = load_code(args.work)
    (args.work / "latents").mkdir(exist_ok=True)
    for split in ("val", "train"):
        store = Store(args.work / split)
        for number in range(len(store.entries) // CHUNK):
            path = args.work / "latents" / f"{split}-{number}.pt"
            if path.exists():
                continue
            known = torch.load(linear / path.name, weights_only=True)
            made = [
                latents_of(code, clip(store, number * CHUNK + i, z.shape[1]), z).half() for i, z in enumerate(known)
            ]
            with atomic_path(path) as temporary:
                torch.save(made, temporary)
            print(path.name, flush=True)


if __name__ == "__main__":
    main()
