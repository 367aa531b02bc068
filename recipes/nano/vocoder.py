"""nano's decoder set by hand to undo the latents of `targets.py` before any training.

Each output token fetches its quarter of the frame (bass components, band levels), one layer later the frame's shares
of the semitones, and in the last layer its place in the frame. The first feed-forward turns compressed levels into
amplitudes (a curve of SiLUs per band); the second multiplies shares by amplitudes; the last one, sinusoidal, turns each
partial by its place (the sine of place times frequency: an oscillator), picks the patch's place for the bass, and
multiplies the new tokens' own noise by the amplitudes above the semitones. The mapping, a convolution over three
patches, makes windowed waves of all of that. Partials make whole turns a frame, so they go on smoothly from frame to
frame without any phase in the latents.

Shapes: B items, C latent channels, T latent frames, D = 256 stream, S semitones, P places (16) in a frame.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from targets import (
    BASS,
    ENVELOPE,
    FRAME,
    MID_BANDS,
    PATCH_WAVE,
    POWER,
    QUARTER_WAVE,
    RATE,
    SIDE_BANDS,
    TONES,
    WAVE,
    Code,
    band_centres,
    band_shares,
    energies,
    turns,
)
from torch import Tensor
from wiring import CONST, HEADS, MARK, MARKED, D, FeedForward, Layer, see_frame

from sa3train.models.autoencoder import Autoencoder
from sa3train.models.nano import MASK_NOISE, nano_config
from sa3train.models.parse import parse_model

PATCH, PLACES = 256, 16
BANDS = MID_BANDS + SIDE_BANDS
FETCHED = QUARTER_WAVE + BANDS  # channels of a quarter in the frame's token
LEVELS, PLACE = QUARTER_WAVE, FETCHED  # first channels of the stream's parts
GAINS = 64
SHARES = GAINS + BANDS
AMPLITUDES = SHARES + TONES
WAVE_OUT = AMPLITUDES + TONES
NOISE = WAVE_OUT + PATCH_WAVE
MID_NOISE, SIDE_NOISE = 28, 20
# Where the shares travel in the frame's token: channels of later quarters that the first layer does not write.
SLOTS = [64 * quarter + spare for quarter in (1, 2, 3) for spare in range(FETCHED, 64)]
SLOTS = [slot for slot in SLOTS if slot >= SHARES and slot not in (MARK, CONST)][:TONES]
KNOTS, STEEP, GAIN = 16, 60.0, 60.0
LEVEL, SHARE = 4.0, 4.0  # stream units: far above the noise of the new tokens
LOUD = 40.0  # gate per share: SiLU bends within a fortieth
SLIGHT = 0.15  # a share under which there is no partial
QUIET = (0.2, 0.33)  # compressed levels of the lowest two bands between which the bass fades in: -47 and -32 dB
HISS = 100.0  # keeps the products of noise and amplitude near 1
BEND = 0.12  # gate of the sine at full amplitude, where it is still linear
PLACE_REACH, PLACE_GAIN = 8.0, 8.5  # largest factor of a logit, and the gain of queries and keys that reaches it
# Units of each feed-forward:
TAKEN = (KNOTS * BANDS, TONES + 2 * QUARTER_WAVE, 4 * TONES + 4 * PATCH_WAVE + MID_NOISE + SIDE_NOISE)
WIDE = (math.sqrt(8 * 6.7), math.sqrt(8 * 88.6))  # gains of queries and keys: a window of a quarter

State = dict[str, Tensor]


def noise_centres(count: int, low: float, high: float = 18000.0) -> Tensor:
    """Noise channels' centres in Hz, denser below."""
    return 2500 * torch.expm1(torch.linspace(math.log1p(low / 2500), math.log1p(high / 2500), count))


def noise_atoms(hertz: Tensor) -> Tensor:
    """Windowed pieces of noise, each as wide as the distance to its neighbours, of unit energy: (count, 3 PATCH)."""
    width = torch.gradient(hertz)[0]
    draw = torch.randn(len(hertz), 8 * PATCH)
    bins = torch.fft.rfftfreq(8 * PATCH, 1 / RATE)
    band = torch.exp(-0.5 * ((bins - hertz[:, None]) / (0.5 * width[:, None])) ** 4)
    pieces = torch.fft.irfft(torch.fft.rfft(draw) * band)[:, : 3 * PATCH] * torch.hann_window(3 * PATCH)
    return pieces / pieces.norm(dim=1, keepdim=True)


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


def _calm(ff: FeedForward) -> None:
    """Let the units that are free to learn see every channel at a spread near 1."""
    spread = torch.ones(D)
    spread[LEVELS : LEVELS + BANDS], spread[PLACE] = LEVEL, 5.0
    spread[GAINS : GAINS + BANDS] = spread[AMPLITUDES : AMPLITUDES + TONES] = GAIN / 10
    spread[SHARES : SHARES + TONES] = SHARE
    for units in (slice(ff.taken, 3 * D), slice(3 * D + ff.taken, 6 * D)):
        ff.into[units] /= spread


def _frame(state: State, code: Code) -> None:
    """The linear layer from latents to the frame's token."""
    weight, bias = state["decoder.layers.1.weight"].zero_(), state["decoder.layers.1.bias"].zero_()
    waves, levels = slice(ENVELOPE, ENVELOPE + WAVE), slice(0, ENVELOPE)
    for quarter in range(HEADS):
        part = slice(QUARTER_WAVE * quarter, QUARTER_WAVE * (quarter + 1))
        spots = slice(64 * quarter, 64 * quarter + QUARTER_WAVE)
        weight[spots, waves], bias[spots] = code["wave_back"][part], code["wave_mean"][part]
        rows = [band * HEADS + quarter for band in range(MID_BANDS)] + [
            HEADS * MID_BANDS + i for i in range(SIDE_BANDS)
        ]
        spots = slice(64 * quarter + LEVELS, 64 * quarter + FETCHED)
        weight[spots, levels] = LEVEL * code["envelope_back"][rows]
        bias[spots] = LEVEL * code["envelope_mean"][rows]
    weight[SLOTS, ENVELOPE + WAVE :] = SHARE * code["tones_back"]
    bias[SLOTS] = SHARE * code["tones_mean"]
    bias[MARK], bias[CONST] = 1, 0


def _attention(layers: list[Layer]) -> None:
    for head in range(HEADS):
        for layer in layers[:2]:
            see_frame(layer, head, 4 * head + 2.5)
        columns, rows = layers[0]["self_attn.to_out.weight"], layers[0].rows(2, head)
        rows[:FETCHED, 64 * head : 64 * head + FETCHED] = torch.eye(FETCHED)
        columns[:FETCHED, 64 * head : 64 * head + FETCHED] = torch.eye(FETCHED)
        layers[1].rows(2, head)[:TONES, SLOTS] = torch.eye(TONES)
        layers[1]["self_attn.to_out.weight"][SHARES : SHARES + TONES, 64 * head : 64 * head + TONES] = torch.eye(TONES)


def fit_place() -> tuple[Tensor, Tensor, float]:
    """Four windows on the frame's token whose weighted sum is a token's place in the frame, -7.5 to 7.5.

    Gives their logits' factors at the rotary frequencies (HEADS, 32: cosines, sines), the weights (HEADS,), and a
    constant. A chunk holds two frames: 16 or 17 tokens before or behind its own frame's token a token sees the other's.
    """
    theta = 10000.0 ** (-np.arange(16) / 16)

    def waves(back: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([np.cos(np.outer(back, theta)), np.sin(np.outer(back, theta))], 1)

    back, wanted = np.arange(1.0, PLACES + 1), np.tile(np.arange(PLACES) - 7.5, 2)
    own = np.concatenate([waves(back), waves(back)])
    other = np.concatenate([waves(back - 17), waves(back + 17)])

    def factors(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return PLACE_REACH * np.tanh(x[: 32 * HEADS].reshape(HEADS, 32))

    def misses(x: NDArray[np.float64]) -> NDArray[np.float64]:
        seen = np.exp(own @ factors(x).T) + np.exp(other @ factors(x).T)
        made = (seen / (seen + 2 * PLACES)) @ x[32 * HEADS : -1] + x[-1]
        return np.concatenate([made - wanted, 0.003 * x[: 32 * HEADS]])

    draw = np.random.default_rng(1)
    guess = np.concatenate([0.1 * draw.standard_normal(32 * HEADS), np.full(HEADS, 10 / HEADS), [0.0]])
    found = scipy.optimize.least_squares(misses, guess, max_nfev=400, x_scale="jac").x
    weights = torch.from_numpy(found[32 * HEADS : -1]).float()
    return torch.from_numpy(factors(found)).float(), weights, float(found[-1])


def _place(layer: Layer, before: Layer) -> None:
    """The last layer's attention writes the token's place; the constant comes from the feed-forward before it."""
    factors, weights, constant = fit_place()
    before["ff.ff.2.bias"][PLACE] = constant
    for head in range(HEADS):
        see_frame(layer, head, 0.0)
        layer.rows(0, head)[40, CONST] = 0  # no mark: the windows alone decide
        layer.rows(0, head)[:16, CONST] = 2.0
        layer.rows(1, head)[:32, MARK] = torch.atanh(math.tanh(2.0) * factors[head] * 8 / PLACE_GAIN**2) / MARKED
        layer["self_attn.to_out.weight"][PLACE, 64 * head + 63] = weights[head]
        torch.nn.init.normal_(layer.rows(2, head)[:63], std=0.02)


def _first(ff: FeedForward) -> None:
    """Amplitudes of the bands."""
    thresholds, weights = expansion()
    for band in range(BANDS):
        for threshold, weight in zip(thresholds.tolist(), weights.tolist(), strict=True):
            gate, out = {LEVELS + band: STEEP / LEVEL}, {GAINS + band: STEEP * weight}
            ff.unit({}, gate, out, value_bias=1 / STEEP, gate_bias=-STEEP * threshold)


def _second(ff: FeedForward) -> None:
    """Amplitudes of the partials: their band's times the share, small shares left out; and the bass where it is quiet.

    A denoiser's latents are never exact: what is a little off nothing is to be nothing.
    """
    hertz = turns() * RATE / FRAME
    below, upper = band_shares(hertz, MID_BANDS)
    passed = 1 / (1 + (hertz / math.sqrt(BASS[0] * BASS[1])) ** 12)
    for tone in range(TONES):
        band, share = int(below[tone]), float(upper[tone])
        value = {GAINS + band: 1 - share, GAINS + band + 1: share}
        gate, weight = {SHARES + tone: LOUD / SHARE}, float((1 - passed[tone]).sqrt()) / LOUD
        ff.unit(value, gate, {AMPLITUDES + tone: weight * (1 + SLIGHT)}, gate_bias=-LOUD * SLIGHT)
    for wave in range(QUARTER_WAVE):
        for level, sign in ((QUIET[1], -1.0), (QUIET[0], 1.0)):
            gate = {LEVELS + band: -STEEP / LEVEL / 2 for band in range(2)}
            slope = sign / STEEP / (QUIET[1] - QUIET[0])
            ff.unit({wave: 1.0}, gate, {wave: slope}, gate_bias=STEEP * level)


def _last(ff: FeedForward, code: Code) -> None:
    for tone, turn in enumerate(turns().tolist()):
        step = 2 * ((turn + 8) % 16 - 8) / PLACES  # half turns a patch
        amplitude, share = AMPLITUDES + tone, SHARES + tone
        ff.unit({amplitude: 1}, {PLACE: step}, {amplitude: 1}, gate_bias=0.5 + 7.5 * step)
        ff.unit({amplitude: 1}, {}, {amplitude: -1}, gate_bias=0.5)
        ff.unit({amplitude: 1}, {PLACE: step}, {share: 1}, gate_bias=7.5 * step)
        ff.unit({share: 1}, {}, {share: -1}, gate_bias=0.5)
    place = torch.arange(4)
    waves = ((0.0, 0.5), (0.5, 0.5), (0.5, 0.0), (1.0, 0.5))  # (half turns a patch, phase) of functions of four places
    table = torch.stack([torch.sin(math.pi * (step * place + phase)) for step, phase in waves], 1)
    patches = code["wave_quarter"].T.unflatten(0, (4, PATCH_WAVE))  # (4, PATCH_WAVE, QUARTER_WAVE)
    parts = torch.linalg.solve(table, patches.flatten(1)).unflatten(1, (PATCH_WAVE, -1))
    for (step, phase), part in zip(waves, parts.tolist(), strict=True):
        for index, row in enumerate(part):
            gate = {PLACE: step} if step else {}
            ff.unit(dict(enumerate(row)), gate, {WAVE_OUT + index: 1}, gate_bias=phase + 7.5 * step)
    kinds = ((MID_NOISE, MID_BANDS, GAINS, 0, _top()), (SIDE_NOISE, SIDE_BANDS, GAINS + MID_BANDS, MID_NOISE, 300.0))
    for count, bands, gains, first, low in kinds:
        for index, (band, share) in enumerate(zip(*band_shares(noise_centres(count, low), bands), strict=True)):
            channel = NOISE + first + index
            slope, low_band = BEND / GAIN, gains + int(band)
            gate = {low_band: slope * float(1 - share), low_band + 1: slope * float(share)}
            ff.unit({channel: 1 / MASK_NOISE / HISS}, gate, {channel: HISS / slope / math.pi})


def _top() -> float:
    """Where the semitones end and noise takes over, Hz."""
    return float(turns()[-1]) * RATE / FRAME * 2 ** (1 / 12)


def _mapping(state: State, block: str, code: Code) -> None:
    mapping = 1e-6 * torch.randn(512, D, 3)
    mid, side = code["wave_patch"].T.chunk(2)
    mapping[:, WAVE_OUT : WAVE_OUT + PATCH_WAVE, 1] += torch.cat([mid + side, mid - side])
    time, window = torch.arange(-PATCH, 2 * PATCH), torch.hann_window(3 * PATCH)
    angle = 2 * math.pi * (turns()[:, None] * time / FRAME + torch.rand(TONES, 1))
    noise = [noise_atoms(noise_centres(MID_NOISE, _top())), noise_atoms(noise_centres(SIDE_NOISE, 300.0))]
    atoms = ((SHARES, -angle.sin() * window / 1.5, 1.0), (AMPLITUDES, angle.cos() * window / 1.5, 1.0))
    for first, waves, sign in (*atoms, (NOISE, 32 * noise[0], 1.0), (NOISE + MID_NOISE, 32 * noise[1], -1.0)):
        taps = (waves / GAIN).unflatten(1, (3, PATCH)).flip(1).permute(2, 0, 1)  # tap 2 looks at the next token
        mapping[:, first : first + len(waves)] += torch.cat([taps, sign * taps])
    state[f"{block}.mapping.weight_v"].copy_(mapping)
    state[f"{block}.mapping.weight_g"].copy_(mapping.norm(dim=(1, 2), keepdim=True))
    state[f"{block}.mapping.bias"].zero_()


def autoencoder() -> Autoencoder:
    """nano's autoencoder, untrained."""
    return Autoencoder(parse_model(nano_config("rectified_flow"), "nano").autoencoder)


@torch.no_grad()
def start(code: Code) -> Autoencoder:
    """The autoencoder with that decoder."""
    torch.manual_seed(0)
    model = autoencoder()
    state, block = model.state_dict(), "decoder.layers.3"
    gains = (WIDE, WIDE, (PLACE_GAIN, WIDE[1]))
    layers = [Layer(state, f"{block}.transformers.{index}", *gain) for index, gain in enumerate(gains)]
    _frame(state, code)
    state[f"{block}.new_tokens"].zero_()
    _attention(layers)
    _place(layers[2], layers[1])
    parts = [FeedForward(layer) for layer in layers]
    _first(parts[0])
    _second(parts[1])
    _last(parts[2], code)
    assert tuple(part.taken for part in parts) == TAKEN
    for part in parts:
        _calm(part)
    _mapping(state, block, code)
    return model


@torch.no_grad()
def calibrate(model: Autoencoder, z_BCT: Tensor, audio_BCN: Tensor) -> Tensor:
    """Scale each band's amplitude to the mean energy of these clips; gives the corrections in dB, (BANDS,)."""
    out = model.state_dict()["decoder.layers.3.transformers.0.ff.ff.2.weight"]
    wanted, made = (torch.cat([e.mean((0, 2)) for e in energies(audio)]) for audio in (audio_BCN, model.decode(z_BCT)))
    ratio = (wanted / made.clamp_min(1e-12)).sqrt().clamp(0.1, 10)
    ratio[: int((band_centres(MID_BANDS) < BASS[1]).sum())] = 1
    out[GAINS : GAINS + BANDS] *= ratio[:, None]
    return 20 * ratio.log10()
