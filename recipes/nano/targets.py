"""Compute nano's latents from audio by formula, and encode the corpus with it.

    python recipes/nano/targets.py WORK      # WORK/{train,val,broad} -> WORK/code.safetensors, WORK/latents

Three kinds of channels: `ENVELOPE` principal components of the loudness of each band in each quarter of the frame;
`WAVE` of the waveform below `BASS` Hz; `TONES` shares, one per semitone from A3 upwards: the amplitude of its partial
relative to its band. The first and the last have no phase, so a denoiser learns them within minutes; the second has
what is too low to distinguish semitones within a frame. The encoder computes all three, the decoder inverts them.

Shapes: B items, C latent channels, T latent frames, N samples, E band energies of a frame, S semitones.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from store import CHUNK, Store
from torch import Tensor

from sa3train.core.files import replace_file
from sa3train.core.safetensors_file import write_tensors
from sa3train.models.nano import LATENT_WIDTH

RATE, FRAME, WINDOW = 44_100, 4096, 1024
MID_BANDS, SIDE_BANDS, QUARTERS = 24, 6, 4
ENVELOPE, WAVE, TONES = 40, 40, 48
LATENT = ENVELOPE + WAVE + TONES
assert LATENT == LATENT_WIDTH, "nano's latents are of another width"
POWER = 0.15  # of energy: 0.3 of amplitude, near what loudness follows
FLOOR = 1e-14
FAINT = 1e-4  # amplitude of a band under which a share means nothing
MOST = 2.5  # the largest share
BASS = (220.0, 320.0)  # where the waveform hands over to semitones, Hz
PATCH_WAVE, QUARTER_WAVE = 10, 15  # components of the bass in a patch and in a quarter
ENVELOPE_LEVEL, WAVE_LEVEL, TONE_LEVEL = 1.25, 0.85, 0.85  # root mean squares over the channels of each kind
LOUDEST = 8.0
LOWEST_KEY = 57  # A3

Code = dict[str, Tensor]


@cache
def _bank(bands: int, low: float = 40.0, high: float = 16000.0) -> Tensor:
    """Compute triangular mel filters over the bins of a `WINDOW`, each with sum 1: (bands, bins)."""
    mel = 2595 * torch.log10(1 + torch.tensor([low, high], dtype=torch.float64) / 700)
    edges = 700 * (10 ** (torch.linspace(float(mel[0]), float(mel[1]), bands + 2, dtype=torch.float64) / 2595) - 1)
    bins = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    weights = torch.minimum(rise, fall).clamp_min(0)
    return (weights / weights.sum(1, keepdim=True)).float()


def band_centres(bands: int, low: float = 40.0, high: float = 16000.0) -> Tensor:
    """Compute the centers in Hz of the bands of `energies`, (bands,)."""
    edges = torch.linspace(math.log1p(low / 700), math.log1p(high / 700), bands + 2)
    return 700 * torch.expm1(edges)[1:-1]


@cache
def turns() -> Tensor:
    """Compute each semitone's whole turns per frame, (S,), so that each frame starts at the same phase."""
    return (440 * 2 ** ((LOWEST_KEY + torch.arange(TONES) - 69) / 12) * FRAME / RATE).round()


def band_shares(hertz: Tensor, bands: int) -> tuple[Tensor, Tensor]:
    """Compute the band below each frequency, and the share in [0, 1] of the next one above."""
    centres = band_centres(bands)
    upper = torch.bucketize(hertz, centres).clamp(1, bands - 1)
    share = (hertz - centres[upper - 1]) / (centres[upper] - centres[upper - 1])
    return upper - 1, share.clamp(0, 1)


def energies(audio_BCN: Tensor) -> tuple[Tensor, Tensor]:
    """Compute band energies of whole frames: mid by quarters (B, MID_BANDS, 4 T), side by frames (B, SIDE_BANDS, T)."""
    batch = len(audio_BCN)
    pair = torch.stack([audio_BCN.mean(1), (audio_BCN[:, 0] - audio_BCN[:, 1]) / 2], 1).flatten(0, 1)
    taper = torch.hann_window(WINDOW, device=pair.device)
    spectrum = torch.stft(pair, WINDOW, WINDOW // 2, window=taper, pad_mode="constant", return_complex=True)
    power = (spectrum.real.square() + spectrum.imag.square()) * (2 / taper.sum()) ** 2
    mid, side = power.unflatten(0, (batch, 2)).unbind(1)
    bands = torch.cat([_bank(MID_BANDS) @ mid, _bank(SIDE_BANDS) @ side], 1)
    quarters = 0.25 * bands[..., 0:-1:2] + 0.5 * bands[..., 1::2] + 0.25 * bands[..., 2::2]
    return quarters[:, :MID_BANDS], quarters[:, MID_BANDS:].unflatten(-1, (-1, QUARTERS)).mean(-1)


def envelope(audio_BCN: Tensor) -> Tensor:
    """Compute compressed band energies (B, E, T) of whole frames: quarters of the mid bands, then the side bands."""
    mid, side = energies(audio_BCN)
    fine = mid.unflatten(-1, (-1, QUARTERS)).permute(0, 1, 3, 2).flatten(1, 2)
    return torch.cat([fine, side], 1).clamp_min(FLOOR).pow(POWER)


def tones(audio_CN: Tensor) -> Tensor:
    """Compute each semitone's amplitude in the mid signal relative to its band's over the frame, (S, T)."""
    mono_N, frames = audio_CN.mean(0), audio_CN.shape[1] // FRAME
    taper = torch.hann_window(2 * FRAME)
    stretches = F.pad(mono_N, (FRAME // 2, FRAME // 2)).unfold(0, 2 * FRAME, FRAME)
    power_TF = (torch.fft.rfft(stretches * taper).abs() / FRAME).square()  # a partial of amplitude a peaks at a²/4
    hertz = turns() * RATE / FRAME
    middles = (hertz[1:] * hertz[:-1]).sqrt()
    edges = torch.cat([hertz[:1] * 2 ** (-1 / 24), middles, hertz[-1:] * 2 ** (1 / 24)]) * 2 * FRAME / RATE
    owner = torch.bucketize(torch.arange(power_TF.shape[1], dtype=torch.float32), edges) - 1
    inside = (owner >= 0) & (owner < TONES)
    energy_TS = torch.zeros(frames, TONES).index_add_(1, owner[inside], power_TF[:frames, inside])
    amplitude_ST = (energy_TS * 4 / 1.5).sqrt().T  # the taper spreads a peak over bins whose squares add up to 1.5
    below, share = band_shares(hertz, MID_BANDS)
    band = energies(audio_CN[None])[0][0].sqrt()
    gain = band[below] * (1 - share)[:, None] + band[below + 1] * share[:, None]
    loudness_ST = gain.unflatten(-1, (-1, QUARTERS)).square().mean(-1).sqrt()
    return (amplitude_ST / (loudness_ST + FAINT)).clamp_max(MOST)


def bass(audio_CN: Tensor) -> Tensor:
    """Low-pass mid and side at `BASS`, (2, N): half the energy of 265 Hz passes."""
    pair = torch.stack([audio_CN.mean(0), (audio_CN[0] - audio_CN[1]) / 2])
    size = pair.shape[1] + 4096
    hertz = torch.fft.rfftfreq(size, 1 / RATE)
    passed = 1 / (1 + (hertz / math.sqrt(BASS[0] * BASS[1])) ** 12).sqrt()
    return torch.fft.irfft(torch.fft.rfft(pair, size) * passed, size)[:, : pair.shape[1]]


def bass_patches(audio_CN: Tensor) -> Tensor:
    """Split the bass into frames and patches, (T, 16, 512): 256 samples of mid, then of side."""
    return bass(audio_CN).unflatten(1, (-1, 16, 256)).permute(1, 2, 0, 3).flatten(2)


def _strongest(rows_NK: Tensor, count: int) -> Tensor:
    """Compute the orthonormal rows (count, K) with most of the energy."""
    vectors = torch.linalg.eigh(rows_NK.double().T @ rows_NK.double()).eigenvectors
    return vectors.flip(1)[:, :count].T.float()


def _scaled(values_EN: Tensor, basis_KE: Tensor, power: float, level: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean (E,), forward (K, E) and inverse (E, K) maps; spreads follow std**power with RMS `level`."""
    mean_E = values_EN.mean(1)
    std = (basis_KE @ (values_EN - mean_E[:, None])).std(1).clamp_min(1e-6)
    wanted = std.pow(power)
    wanted = level * wanted / wanted.square().mean().sqrt()
    return mean_E, basis_KE * (wanted / std)[:, None], (basis_KE * (std / wanted)[:, None]).T


def fit(clips: list[Tensor]) -> Code:
    """Fit the code to clips (2, N) of whole frames. Each clip has the same weight in the waveform's components."""
    shapes = torch.cat([envelope(audio[None])[0] for audio in clips], 1)
    weights = [0.1 / (float(audio.square().mean().sqrt()) + 1e-3) for audio in clips]
    patches = torch.cat([w * bass_patches(audio) for w, audio in zip(weights, clips, strict=True)])
    patch = _strongest(patches.flatten(0, 1), PATCH_WAVE)
    quarter_rows = (patches @ patch.T).unflatten(1, (QUARTERS, -1)).flatten(2)
    quarter = _strongest(quarter_rows.flatten(0, 1), QUARTER_WAVE)
    frames = (quarter_rows @ quarter.T).flatten(1).T
    shares = torch.cat([tones(audio) for audio in clips], 1)
    code = {"wave_patch": patch, "wave_quarter": quarter}
    centred = shapes - shapes.mean(1, keepdim=True)
    for name, values, basis, power, level in (
        ("envelope", shapes, _strongest(centred.T, ENVELOPE), 0.4, ENVELOPE_LEVEL),
        ("wave", frames, _strongest(frames.T, WAVE), 0.5, WAVE_LEVEL),
        ("tones", shares, torch.eye(TONES), 0.5, TONE_LEVEL),
    ):
        code |= dict(zip((f"{name}_mean", name, f"{name}_back"), _scaled(values, basis, power, level), strict=True))
    return code


def clip(store: Store, index: int) -> Tensor:
    """Pad a clip's audio with silence to an even number of frames, (2, N)."""
    audio = torch.from_numpy(store.audio(index))
    return F.pad(audio, (0, -audio.shape[1] % (2 * FRAME)))


def latents_of(code: Code, audio_CN: Tensor) -> Tensor:
    """Compute the target latents of whole frames of audio, (C, T)."""
    patches = bass_patches(audio_CN) @ code["wave_patch"].T
    frames = (patches.unflatten(1, (QUARTERS, -1)).flatten(2) @ code["wave_quarter"].T).flatten(1).T
    parts = (("envelope", envelope(audio_CN[None])[0]), ("wave", frames), ("tones", tones(audio_CN)))
    z_CT = torch.cat([code[name] @ (values - code[f"{name}_mean"][:, None]) for name, values in parts])
    return z_CT.clamp(-LOUDEST, LOUDEST)


def silence(code: Code) -> Tensor:
    """Compute the latent frame of silence, (C,)."""
    return latents_of(code, torch.zeros(2, 2 * FRAME))[:, 0]


def load_code(work: Path) -> Code:
    """Load the code that `main` fitted."""
    return load_file(work / "code.safetensors")


def main() -> None:
    """Fit to the first chunk, then encode the missing ones."""
    parser = argparse.ArgumentParser(description="nano's latents, computed")
    parser.add_argument("work", type=Path)
    args = parser.parse_args()
    if not (args.work / "code.safetensors").exists():
        store = Store(args.work / "train")
        code = fit([clip(store, index) for index in range(CHUNK)])
        write_tensors(args.work / "code.safetensors", {name: tensor.contiguous() for name, tensor in code.items()})
    code = load_code(args.work)
    (args.work / "latents").mkdir(exist_ok=True)
    for split in ("val", "train", "broad"):
        if split == "broad" and not (args.work / split).is_dir():
            continue
        store = Store(args.work / split)
        for number in store.chunks:
            path = args.work / "latents" / f"{split}-{number}.pt"
            if path.exists():
                continue
            made = [latents_of(code, clip(store, index)).half() for index in store.indices(number)]
            with replace_file(path) as temporary:
                torch.save(made, temporary)
            print(path.name, flush=True)


if __name__ == "__main__":
    main()
