"""Fit parts of nano's hand-set decoder to real clips: loudness of bands, and the bass across patches.

Shapes: B items, C latent channels, T latent frames, N samples.
"""

from __future__ import annotations

import torch
from channels import BANDS, BASS_OUT, GAINS, TAKEN
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
    silence,
)
from torch import Tensor
from vocoder import set_mapping
from wiring import HEADS, D

from sa3train.models.autoencoder import Autoencoder

MOST_GAIN = 8.0  # dB, of a band


@torch.no_grad()
def calibrate(model: Autoencoder, z_BCT: Tensor, audio_BCN: Tensor) -> Tensor:
    """Scale each band's amplitude to the mean energy of these clips, and return the corrections in dB, (BANDS,)."""
    wanted, made = (torch.cat([e.mean((0, 2)) for e in energies(audio)]) for audio in (audio_BCN, model.decode(z_BCT)))
    ratio = (wanted / made.clamp_min(1e-12)).sqrt().clamp(0.1, 10)
    ratio[: int((band_centres(MID_BANDS) < BASS[1]).sum())] = 1
    _scale_bands(model, ratio, torch.zeros(3 * D))
    return 20 * ratio.log10()


def _scale_bands(model: Autoencoder, ratio: Tensor, still: Tensor) -> None:
    """Scale the bands' amplitudes, but what the units `still` (3 D,) give, and what takes out the new tokens' noise."""
    layer = model.decoder.resampler.transformers[0].ff.ff[2]
    rows, noise = slice(GAINS, GAINS + BANDS), slice(TAKEN[0] - BANDS, TAKEN[0])
    before = layer.weight[rows].clone()
    layer.weight[rows] *= ratio[:, None]
    layer.weight[rows, noise] = before[:, noise]
    layer.bias[rows] += (before - layer.weight[rows]) @ still


@torch.no_grad()
def match_levels(model: Autoencoder, code: Code, z_BCT: Tensor, audio_BCN: Tensor, rounds: int = 4) -> Tensor:
    """Give the bands of a trained decoder the energy of these clips in the median, (BANDS,) in dB; silence stays.

    Training for the waveform's error made all that it cannot predict quieter, and the waveforms of the bass too, which
    get the code's own scale back. A clip counts by the root of its share in a band. The lowest band is all bass.
    """
    into = model.decoder.layers[1]
    for quarter in range(HEADS):
        spots, part = (slice(size * quarter, size * quarter + QUARTER_WAVE) for size in (64, QUARTER_WAVE))
        into.weight[spots] = 0
        into.weight[spots, ENVELOPE : ENVELOPE + WAVE] = code["wave_back"][part]
        into.bias[spots] = code["wave_mean"][part]
    caught: list[Tensor] = []
    layer = model.decoder.resampler.transformers[0].ff.ff[2]
    hook = layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].flatten(0, -2)))
    model.decode(silence(code)[None, :, None].repeat(1, 1, 8), noise=False)
    hook.remove()
    still = torch.cat(caught).unflatten(0, (-1, 17))[:, 1:].mean((0, 1))
    wanted_BE, total = _measure_bands(audio_BCN), torch.zeros(BANDS)
    weight_BE = (wanted_BE / wanted_BE.sum(1, keepdim=True)).sqrt()
    for _ in range(rounds):
        made_BE = torch.cat([_measure_bands(model.decode(part)) for part in z_BCT.split(8)])
        short_BE = 10 * ((wanted_BE + 1e-12) / (made_BE + 1e-12)).log10().clamp(-3, 3)
        order = short_BE.argsort(0)
        summed = weight_BE.gather(0, order).cumsum(0)
        middle = (summed >= summed[-1:] / 2).float().argmax(0)
        step = 0.8 * short_BE.gather(0, order.gather(0, middle[None]))[0].clamp(-5, 5)
        step = torch.minimum(step, MOST_GAIN - total)
        step[0] = 0
        total += step
        _scale_bands(model, 10 ** (step / 20), still)
    return total


def _measure_bands(audio_BCN: Tensor) -> Tensor:
    """Compute the mean energy of the bands of mid and side, (B, BANDS)."""
    return torch.cat([energy.mean(2) for energy in energies(audio_BCN)], 1)


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
