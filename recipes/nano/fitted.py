"""Fit parts of nano's hand-set decoder to real clips: loudness of bands, and the bass across patches.

Shapes: B items, C latent channels, T latent frames, N samples.
"""

from __future__ import annotations

import torch
from channels import BANDS, BASS_OUT, GAINS
from targets import (
    BASS,
    ENVELOPE,
    MID_BANDS,
    PATCH_WAVE,
    QUARTER_WAVE,
    WAVE,
    Code,
    band_centres,
    bass_patches,
    energies,
)
from torch import Tensor
from vocoder import set_mapping
from wiring import HEADS

from sa3train.models.autoencoder import Autoencoder


@torch.no_grad()
def calibrate(model: Autoencoder, z_BCT: Tensor, audio_BCN: Tensor) -> Tensor:
    """Scale each band's amplitude to the mean energy of these clips, and return the corrections in dB, (BANDS,)."""
    out = model.state_dict()["decoder.layers.3.transformers.0.ff.ff.2.weight"]
    wanted, made = (torch.cat([e.mean((0, 2)) for e in energies(audio)]) for audio in (audio_BCN, model.decode(z_BCT)))
    ratio = (wanted / made.clamp_min(1e-12)).sqrt().clamp(0.1, 10)
    ratio[: int((band_centres(MID_BANDS) < BASS[1]).sum())] = 1
    out[GAINS : GAINS + BANDS] *= ratio[:, None]
    return 20 * ratio.log10()


@torch.no_grad()
def join_bass(model: Autoencoder, code: Code, z_BCT: Tensor, audio_BCN: Tensor) -> None:
    """Fit the bass of a patch to its components and its neighbors' by least squares: cut at its edges, it clicks."""
    waves = code["wave_back"] @ z_BCT[:, ENVELOPE : ENVELOPE + WAVE] + code["wave_mean"][:, None]
    quarters = waves.unflatten(1, (HEADS, QUARTER_WAVE)).permute(0, 3, 1, 2) @ code["wave_quarter"]
    patches = torch.nn.functional.pad(quarters.flatten(1).unflatten(1, (-1, PATCH_WAVE)), (0, 0, 1, 1))
    known = torch.cat([patches[:, :-2], patches[:, 1:-1], patches[:, 2:]], 2).flatten(0, 1).double()
    wanted = torch.cat([bass_patches(audio).flatten(0, 1) for audio in audio_BCN]).double()
    gram = known.T @ known
    gram += 1e-5 * gram.trace() / len(gram) * torch.eye(len(gram))
    mid, side = torch.linalg.solve(gram, known.T @ wanted).float().T.unflatten(1, (3, PATCH_WAVE)).mT.chunk(2)
    mapping = model.state_dict()["decoder.layers.3.mapping.weight_v"].clone()
    mapping[:, BASS_OUT] = torch.cat([mid + side, mid - side])
    set_mapping(model.state_dict(), mapping)
