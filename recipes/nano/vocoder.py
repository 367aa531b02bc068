"""nano's decoder set by hand to undo the latents of `targets.py`: the waveform part linearly, the envelopes as noise.

Each output token fetches its quarter of the frame: 26 waveform components, the levels of 28 mid and 8 side bands. The
first feed-forward turns compressed levels into amplitudes (a curve of SiLUs per band). The last one picks the patch's
place for the waveform part, and multiplies the new tokens' own noise by the amplitudes; the mapping, a convolution over
three patches, makes a windowed wave of each noise channel. So pitch and bass are kept and the rest is hiss of the
right colour, loudness and timing before any training.

Shapes: B items, C latent channels, T latent frames, D = 256 stream, R waveform components of a quarter.
"""

from __future__ import annotations

import math
from pathlib import Path

import scipy.optimize
import torch
from safetensors.torch import load_file
from shape import MASK_NOISE, autoencoder
from targets import ENVELOPE, MID_BANDS, POWER, SIDE_BANDS, envelope
from torch import Tensor

from sa3train.models.autoencoder import Autoencoder
from sa3train.models.linear_code import CONST, GATE, HEADS, KEPT, MARK, PATCH_OUT, SLOPE, D, _Layer, _see_frame

R, PATCH, PATCH_WAVE = 26, 256, 20
BANDS = MID_BANDS + SIDE_BANDS
LEVELS, LATER, MIDDLE, GAINS, WAVE_OUT, NOISE = R, 66, 67, 68, 104, 124  # first channels of the stream's parts
MID_NOISE, SIDE_NOISE = 100, 30
KNOTS, STEEP, GAIN = 16, 60.0, 300.0
LOUDEST_WAVE, LEVEL, OUT = 10.0, 4.0, 10.0  # stream units: far above the noise of the new tokens
LOUD = 10.0  # gate per stream unit of amplitude x GAIN: SiLU is linear above -60 dB
HISS = 100.0  # keeps the products of noise and amplitude near 1
BASS = (250.0, 500.0)  # where the waveform part hands over to noise, Hz

State = dict[str, Tensor]


def frequencies(count: int, low: float = 300.0, high: float = 20000.0) -> Tensor:
    """Noise channels' centres in Hz, denser below."""
    return 2500 * torch.expm1(torch.linspace(math.log1p(low / 2500), math.log1p(high / 2500), count))


def band_centres(count: int, low: float = 40.0, high: float = 16000.0) -> Tensor:
    """Centres in Hz of the mel bands of `targets.envelope`."""
    edges = torch.linspace(math.log1p(low / 700), math.log1p(high / 700), count + 2)
    return 700 * torch.expm1(edges)[1:-1]


def expansion() -> tuple[Tensor, Tensor]:
    """Thresholds and weights (none below 0: the curve is convex, and bf16 forgives no cancellation) of SiLUs whose sum
    is GAIN times the amplitude of a compressed level, level ** (1 / (2 POWER)).
    """
    thresholds = 0.02 + 0.98 * torch.linspace(0, 1, KNOTS) ** 1.5
    level = torch.linspace(0.0, 1.05, 800)
    wanted = GAIN * level ** (1 / (2 * POWER))
    weight = 1 / (wanted + GAIN * 1e-4)
    units = torch.nn.functional.silu(STEEP * (level[:, None] - thresholds)) * weight[:, None]
    weights, _ = scipy.optimize.nnls(units.numpy(), (wanted * weight).numpy())
    return thresholds, torch.from_numpy(weights).float()


def quarter_basis(known: State, code: State, z_BCT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The waveform part by quarters: (4, R, C) from latents, (4, PATCH_WAVE, R) to a place's patch components, and
    (512, PATCH_WAVE) to its samples.
    """
    weight = known["decoder.layers.1.weight"] * known["bottleneck.running_std"]
    into = known["decoder.layers.3.transformers.2.ff.ff.0.proj.weight"][: 4 * PATCH_OUT, :KEPT].unflatten(0, (4, -1))
    mapping = known["decoder.layers.3.mapping.weight_v"]
    mapping = mapping * (known["decoder.layers.3.mapping.weight_g"] / mapping.norm(dim=(1, 2), keepdim=True))
    samples = mapping[:, 128 : 128 + PATCH_OUT, 1]
    linear = torch.stack([weight[64 * q : 64 * q + KEPT] @ code["wave_back"] for q in range(4)])  # (4, 62, W)
    y_WN = z_BCT[:, ENVELOPE:].transpose(0, 1).flatten(1)
    s_SN = torch.cat([linear[q] @ y_WN for q in range(4)], 1)
    heard = torch.cat([samples @ into[place] for place in range(4)])
    factor = torch.linalg.cholesky((heard.T @ heard).double() + 1e-9 * heard.square().sum() * torch.eye(KEPT)).T.float()
    basis = torch.linalg.eigh(torch.cov((factor @ s_SN).double())).eigenvectors.flip(1)[:, :R].float()
    down, up = basis.T @ factor, torch.linalg.solve(factor, basis)
    scale = LOUDEST_WAVE / (down @ s_SN).std(1).amax()
    patches = torch.stack([into[place] @ up for place in range(4)])
    made = torch.cat([samples @ patches[place] for place in range(4)], 1)
    spot = torch.linalg.svd(made, full_matrices=False).U[:, :PATCH_WAVE]
    return scale * (down @ linear), (spot.T @ samples) @ patches / scale, spot


def _attention(layers: list[_Layer]) -> None:
    for head in range(HEADS):
        _see_frame(layers[0], head, 4 * head + 2.5)
        _see_frame(layers[1], head, 4 * head + 3.5)
        _see_frame(layers[2], head, 4 * head + 2.5)
        layers[0].rows(2, head)[:KEPT, 64 * head : 64 * head + KEPT] = torch.eye(KEPT)
        layers[0]["self_attn.to_out.weight"][:KEPT, 64 * head : 64 * head + KEPT] = torch.eye(KEPT)
        for layer, channel in ((layers[1], LATER), (layers[2], MIDDLE)):
            layer["self_attn.to_out.weight"][channel, 64 * head + 63] = 1
            torch.nn.init.normal_(layer.rows(2, head)[:63], std=0.02)


def _amplitudes(layer: _Layer) -> None:
    into, bias, out = layer["ff.ff.0.proj.weight"], layer["ff.ff.0.proj.bias"], layer["ff.ff.2.weight"]
    thresholds, weights = expansion()
    for band in range(BANDS):
        units = slice(KNOTS * band, KNOTS * (band + 1))
        gates = slice(3 * D + units.start, 3 * D + units.stop)
        into[units], into[gates], bias[units] = 0, 0, 1 / STEEP  # so that what is trained stays near 1
        into[gates, LEVELS + band] = STEEP / LEVEL
        bias[gates] = -STEEP * thresholds
        out[GAINS + band, units] = STEEP * weights


def _last(layer: _Layer, patches: Tensor) -> None:
    into, bias, out = layer["ff.ff.0.proj.weight"], layer["ff.ff.0.proj.bias"], layer["ff.ff.2.weight"]
    for place in range(4):
        units = slice(PATCH_WAVE * place, PATCH_WAVE * (place + 1))
        gates = slice(3 * D + units.start, 3 * D + units.stop)
        into[units], into[gates], bias[units] = 0, 0, 0
        into[units, :R] = patches[place]
        level = -3.0
        for flag, raised in ((LATER, place in (2, 3)), (MIDDLE, place in (1, 2))):
            into[gates, flag] = GATE * (2.0 if raised else -2.0) * SLOPE / math.tanh(SLOPE)
            level += 0.0 if raised else 2.0
        bias[gates] = GATE * level
        out[WAVE_OUT : WAVE_OUT + PATCH_WAVE, units] = OUT / GATE * torch.eye(PATCH_WAVE)
    kinds = ((MID_NOISE, MID_BANDS, GAINS, 0), (SIDE_NOISE, SIDE_BANDS, GAINS + MID_BANDS, MID_NOISE))
    for count, bands, gains, first in kinds:
        hertz, centres = frequencies(count), band_centres(bands)
        place = torch.bucketize(hertz, centres).clamp(1, bands - 1)
        share = ((hertz - centres[place - 1]) / (centres[place] - centres[place - 1])).clamp(0, 1)
        hand_over = ((hertz.log() - math.log(BASS[0])) / math.log(BASS[1] / BASS[0])).clamp(0.05, 1)
        for index in range(count):
            channel = NOISE + first + index
            unit = 4 * PATCH_WAVE + first + index
            into[unit], into[3 * D + unit], bias[unit], bias[3 * D + unit] = 0, 0, 0, 0
            into[unit, channel] = 1 / MASK_NOISE / HISS
            into[3 * D + unit, gains + int(place[index]) - 1] = LOUD * (1 - share[index])
            into[3 * D + unit, gains + int(place[index])] = LOUD * share[index]
            out[channel, unit] = HISS / LOUD * hand_over[index]


def _calm(layer: _Layer, taken: int) -> None:
    """Let the units that are free to learn see every channel at a spread near 1."""
    spread = torch.ones(D)
    spread[:R], spread[LEVELS : LEVELS + BANDS], spread[GAINS : GAINS + BANDS] = LOUDEST_WAVE, LEVEL, GAIN / 10
    for units in (slice(taken, 3 * D), slice(3 * D + taken, 6 * D)):
        layer["ff.ff.0.proj.weight"][units] /= spread


def _mapping(state: State, block: str, spot: Tensor) -> None:
    mapping = 1e-6 * torch.randn(512, D, 3)
    mapping[:, WAVE_OUT : WAVE_OUT + PATCH_WAVE, 1] += spot / OUT
    time = torch.arange(3 * PATCH)
    for count, first, sign in ((MID_NOISE, 0, 1.0), (SIDE_NOISE, MID_NOISE, -1.0)):
        hertz = frequencies(count)
        width = torch.gradient(hertz)[0]
        waves = torch.cos(2 * math.pi * (hertz[:, None] * time / 44100 + torch.rand(count, 1)))
        waves = waves * torch.hann_window(3 * PATCH) * (width[:, None] / 44100).sqrt() * 0.15 * 100 / GAIN
        taps = waves.unflatten(1, (3, PATCH)).flip(1).permute(2, 0, 1)  # tap 2 looks at the next token
        mapping[:, NOISE + first : NOISE + first + count] += torch.cat([taps, sign * taps])
    state[f"{block}.mapping.weight_v"].copy_(mapping)
    state[f"{block}.mapping.weight_g"].copy_(mapping.norm(dim=(1, 2), keepdim=True))
    state[f"{block}.mapping.bias"].zero_()


@torch.no_grad()
def start(work: Path, code: State, z_BCT: Tensor) -> Autoencoder:
    """The autoencoder with that decoder; `z_BCT`: some latents, for the waveform's components."""
    torch.manual_seed(0)
    model = autoencoder()
    state, known = model.state_dict(), load_file(work / "ae.safetensors")
    block = "decoder.layers.3"
    for index in range(3):
        for name in ("pre_norm", "ff_norm", "self_attn.q_norm", "self_attn.k_norm"):
            for part in ("alpha", "beta", "gamma"):
                key = f"{block}.transformers.{index}.{name}.{part}"
                state[key].copy_(known[key])
    layers = []
    for index in range(3):
        gains = [known[f"{block}.transformers.{index}.self_attn.q_norm.gamma"][k] * math.tanh(2.0) for k in (0, 40)]
        layers.append(_Layer(state, f"{block}.transformers.{index}", float(gains[0]), float(gains[1])))
    down, patches, spot = quarter_basis(known, code, z_BCT)
    weight, bias = state["decoder.layers.1.weight"].zero_(), state["decoder.layers.1.bias"].zero_()
    for quarter in range(4):
        weight[64 * quarter : 64 * quarter + R, ENVELOPE:] = down[quarter]
        rows = [band * 4 + quarter for band in range(MID_BANDS)] + [4 * MID_BANDS + band for band in range(SIDE_BANDS)]
        spots = slice(64 * quarter + LEVELS, 64 * quarter + LEVELS + BANDS)
        weight[spots, :ENVELOPE] = LEVEL * code["envelope_back"][rows]
        bias[spots] = LEVEL * code["envelope_mean"][rows]
    bias[MARK], bias[CONST] = 1, 0
    state[f"{block}.new_tokens"].zero_()
    _attention(layers)
    _amplitudes(layers[0])
    _last(layers[2], patches)
    for layer, taken in zip(layers, (KNOTS * BANDS, 0, 4 * PATCH_WAVE + MID_NOISE + SIDE_NOISE), strict=True):
        _calm(layer, taken)
    _mapping(state, block, spot)
    model.load_state_dict(state)
    return model


@torch.no_grad()
def calibrate(model: Autoencoder, z_BCT: Tensor, audio_BCN: Tensor) -> Tensor:
    """Scale each band's amplitude to the mean energy of these clips; gives the corrections in dB, (BANDS,)."""
    out = model.state_dict()["decoder.layers.3.transformers.0.ff.ff.2.weight"]
    wanted, made = (_energies(each) for each in (audio_BCN, model.decode(z_BCT)))
    ratio = (wanted / made.clamp_min(1e-12)).sqrt().clamp(0.1, 10)
    ratio[: int((band_centres(MID_BANDS) < BASS[1]).sum())] = 1
    out[GAINS : GAINS + BANDS] *= ratio[:, None]
    return 20 * ratio.log10()


def _energies(audio_BCN: Tensor) -> Tensor:
    bands = envelope(audio_BCN).pow(0.5 / POWER).mean((0, 2))
    return torch.cat([bands[: 4 * MID_BANDS].unflatten(0, (MID_BANDS, 4)).mean(1), bands[4 * MID_BANDS :]])
