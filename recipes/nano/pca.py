"""Measure what a linear code of the same width reaches: PCA of 4096-sample stereo frames, next to nano's autoencoder.

    python recipes/nano/pca.py WORK     # prints median SI-SDR at widths 64 and 256, and the autoencoder's

Mid and side are nearly uncorrelated, so their components are computed separately and the strongest of both are used.
Shapes: F frames, N samples of a frame.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from export import load_autoencoder
from store import Store
from torch import Tensor

from sa3train.audio.metrics import compute_si_sdr

FRAME = 4096


def mid_side(store: Store, index: int) -> Tensor:
    """Split mid and side of a clip into whole frames, (2, F, N)."""
    audio = torch.from_numpy(store.audio(index))
    audio = audio[:, : audio.shape[1] // FRAME * FRAME]
    return torch.stack([audio[0] + audio[1], audio[0] - audio[1]]).unflatten(1, (-1, FRAME)) / 2**0.5


def components(store: Store, clips: int) -> tuple[Tensor, Tensor]:
    """Compute variances (2, N) and components (2, N, N) of mid and side, each clip scaled to the same loudness."""
    covariance = torch.zeros(2, FRAME, FRAME)
    for index in range(clips):
        frames = mid_side(store, index)
        frames = frames / frames.square().mean().sqrt().clamp_min(1e-4)
        covariance += frames.mT @ frames
    return torch.linalg.eigh(covariance)


def main() -> None:
    """Fit to training clips and measure on held-out ones."""
    parser = argparse.ArgumentParser(description="measure the linear code")
    parser.add_argument("work", type=Path)
    parser.add_argument("--clips", type=int, default=600)
    args = parser.parse_args()
    held_out = Store(args.work / "val")
    values, vectors = components(Store(args.work / "train"), args.clips)
    kept = range(300)
    for width in (64, 256):
        least = values.flatten().topk(width).values[-1]
        bases = [each[:, value >= least] for each, value in zip(vectors, values, strict=True)]
        ratios = []
        for index in kept:
            frames = mid_side(held_out, index)
            made = torch.stack([part @ basis @ basis.T for part, basis in zip(frames, bases, strict=True)])
            ratios.append(compute_si_sdr(frames, made))
        print(f"PCA, width {width}: median SI-SDR {np.median(ratios):.2f} dB", flush=True)
    model, ratios = load_autoencoder(args.work), []
    with torch.no_grad():
        for index in kept:
            real = torch.from_numpy(held_out.audio(index))
            ratios.append(
                compute_si_sdr(real, model.decode(model.encode(real[None]), noise=False)[0, :, : real.shape[1]])
            )
    print(f"nano's autoencoder: median SI-SDR {np.median(ratios):.2f} dB")


if __name__ == "__main__":
    main()
