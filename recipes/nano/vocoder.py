"""nano's decoder set by hand to undo the latents of `targets.py` before any training.

Each output token fetches its quarter of the frame (bass components, band levels), one layer later the frame's shares
of the semitones, and in the last layer its place in the frame. The first feed-forward turns compressed levels into
amplitudes (a curve of SiLUs per band); the second multiplies shares by amplitudes; the last one, sinusoidal, turns each
partial by its place (the sine of place times frequency: an oscillator), picks the patch's place for the bass, and
multiplies bounded noise, the sine of the new tokens' own, by amplitudes. Shares of a tone are few and large, those of
noise many and middling: where their mean is high, noise fades in and partials fade out. The mapping, a convolution over
three patches, makes windowed waves of all of that. Partials make whole turns a frame, so they go on smoothly from frame
to frame without any phase in the latents.

Shapes: B items, C latent channels, T latent frames, D = 256 stream, S semitones, P places (16) in a frame.
"""

from __future__ import annotations

import math

import torch
from channels import (
    ALL_NOISE,
    AMPLITUDES,
    BANDS,
    BASS_OUT,
    FETCHED,
    GAIN,
    GAINS,
    LEVEL,
    LEVELS,
    LOUD,
    MID_NOISE,
    NOISE,
    NOISINESS,
    NOISY,
    NOISY_SLOTS,
    PATCH,
    PLACE,
    PLACE_GAIN,
    PLACES,
    QUIET,
    REGIONS,
    SHARE,
    SHARES,
    SIDE_NOISE,
    SLIGHT,
    SLOTS,
    STEEP,
    TAKEN,
    WAVE_OUT,
    WIDE,
)
from targets import (
    BASS,
    ENVELOPE,
    FRAME,
    MID_BANDS,
    PATCH_WAVE,
    QUARTER_WAVE,
    RATE,
    SIDE_BANDS,
    TONES,
    WAVE,
    Code,
    band_centres,
    band_shares,
    turns,
)
from torch import Tensor
from waves import expansion, fit_place, high_turns, noise_atoms, noise_centres, oscillators, regions_of
from wiring import CONST, HEADS, MARK, MARKED, D, FeedForward, Layer, see_frame

from sa3train.models.autoencoder import Autoencoder
from sa3train.models.nano import MASK_NOISE, build_nano_config
from sa3train.models.parse import parse_model

State = dict[str, Tensor]


def _calm(ff: FeedForward) -> None:
    """Scale the free units' inputs so that each channel has a spread near 1."""
    spread = torch.ones(D)
    spread[LEVELS : LEVELS + BANDS], spread[PLACE] = LEVEL, 5.0
    spread[GAINS : GAINS + BANDS] = spread[AMPLITUDES : AMPLITUDES + TONES] = GAIN / 10
    spread[SHARES : SHARES + TONES] = SHARE
    for units in (slice(ff.taken, 3 * D), slice(3 * D + ff.taken, 6 * D)):
        ff.into[units] /= spread


def _frame(state: State, code: Code) -> None:
    """Set the linear layer from latents to the frame's token."""
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
        regions = slice(TONES, TONES + len(NOISY_SLOTS))
        layers[1].rows(2, head)[regions, NOISY_SLOTS] = torch.eye(len(NOISY_SLOTS))
        to_out = layers[1]["self_attn.to_out.weight"][:, 64 * head : 64 * head + 64]
        to_out[NOISY : NOISY + len(NOISY_SLOTS), regions] = torch.eye(len(NOISY_SLOTS))


def _place(layer: Layer, before: Layer) -> None:
    """Set the last layer's attention: it writes the token's position. The feed-forward before writes the constant."""
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
    """Set the first feed-forward: amplitudes of the bands, and on the frame's token the noise share of each region."""
    thresholds, weights = expansion()
    for band in range(BANDS):
        for threshold, weight in zip(thresholds.tolist(), weights.tolist(), strict=True):
            gate, out = {LEVELS + band: STEEP / LEVEL}, {GAINS + band: STEEP * weight}
            ff.unit({}, gate, out, value_bias=1 / STEEP, gate_bias=-STEEP * threshold)
    for region, slot in enumerate(NOISY_SLOTS):
        inside = [tone for tone, place in enumerate(regions_of(turns() * RATE / FRAME)) if place == region]
        mean = {SLOTS[tone]: STEEP / len(inside) / ALL_NOISE[region] / SHARE for tone in inside}
        for threshold, sign in zip(NOISINESS, (1.0, -1.0), strict=True):
            out = {slot: sign * SHARE / (NOISINESS[1] - NOISINESS[0])}
            ff.unit({}, mean, out, value_bias=1 / STEEP, gate_bias=-STEEP * threshold)
    for channel in range(GAINS, GAINS + BANDS):
        ff.unit({channel: 1}, {}, {channel: -1 / 8}, gate_bias=8.0)  # the new tokens' noise would be heard as loudness


def _second(ff: FeedForward) -> None:
    """Set the second feed-forward: amplitudes of partials (band times share), and the quiet bass.

    A denoiser's latents are never exact, so small values become zero. Then the bands' amplitudes keep the noise, and
    the oscillators above the semitones get the rest of theirs.
    """
    hertz = turns() * RATE / FRAME
    below, upper = band_shares(hertz, MID_BANDS)
    passed = 1 / (1 + (hertz / math.sqrt(BASS[0] * BASS[1])) ** 12)
    regions = regions_of(hertz)
    for tone in range(TONES):
        band, share = int(below[tone]), float(upper[tone])
        value = {GAINS + band: 1 - share, GAINS + band + 1: share}
        gate = {SHARES + tone: LOUD / SHARE, NOISY + regions[tone]: -LOUD / SHARE}
        weight = float((1 - passed[tone]).sqrt()) / LOUD
        ff.unit(value, gate, {AMPLITUDES + tone: weight * (1 + SLIGHT)}, gate_bias=-LOUD * SLIGHT)
    bands = regions_of(band_centres(MID_BANDS))
    for band in range(MID_BANDS):
        ff.unit({GAINS + band: 1}, {NOISY + bands[band]: LOUD / SHARE}, {GAINS + band: 1 / LOUD})
        ff.unit({GAINS + band: 1}, {}, {GAINS + band: -1 / 8}, gate_bias=8.0)
    for channel in range(LEVELS, LEVELS + BANDS):
        ff.unit({channel: 1}, {}, {channel: -1 / 8}, gate_bias=8.0)
    high = high_turns() * RATE / FRAME
    for index, (band, share) in enumerate(zip(*band_shares(high, MID_BANDS), strict=True)):
        value = {GAINS + int(band): float(1 - share), GAINS + int(band) + 1: float(share)}
        apart = float(high[index]) * (high[1] / high[0] - 1)  # Hz to the next one; a bin is 43 Hz, a peak is 1.5 bins
        loud = float((apart / (1.5 * RATE / 1024)).sqrt())
        gate = {NOISY + len(REGIONS) - 2: -LOUD / SHARE}
        ff.unit(value, gate, {LEVELS + index: loud / LOUD}, gate_bias=LOUD)
    for wave in range(QUARTER_WAVE):
        for level, sign in ((QUIET[1], -1.0), (QUIET[0], 1.0)):
            gate = {LEVELS + band: -STEEP / LEVEL / 2 for band in range(2)}
            slope = sign / STEEP / (QUIET[1] - QUIET[0])
            ff.unit({wave: 1.0}, gate, {wave: slope}, gate_bias=STEEP * level)


def _last(ff: FeedForward, code: Code) -> None:
    for turn, cosine, sine in oscillators():  # the cosine's channel holds the amplitude until here
        step = 2 * ((turn + 8) % 16 - 8) / PLACES  # half turns a patch
        ff.unit({cosine: 1}, {PLACE: step}, {cosine: 1}, gate_bias=0.5 + 7.5 * step)
        ff.unit({cosine: 1}, {}, {cosine: -1}, gate_bias=0.5)
        ff.unit({cosine: 1}, {PLACE: step}, {sine: 1}, gate_bias=7.5 * step)
        ff.unit({sine: 1}, {}, {sine: -1}, gate_bias=0.5)
    place = torch.arange(4)
    waves = ((0.0, 0.5), (0.5, 0.5), (0.5, 0.0), (1.0, 0.5))  # (half turns a patch, phase) of functions of four places
    table = torch.stack([torch.sin(math.pi * (step * place + phase)) for step, phase in waves], 1)
    patches = code["wave_quarter"].T.unflatten(0, (4, PATCH_WAVE))  # (4, PATCH_WAVE, QUARTER_WAVE)
    parts = torch.linalg.solve(table, patches.flatten(1)).unflatten(1, (PATCH_WAVE, -1))
    for (step, phase), part in zip(waves, parts.tolist(), strict=True):
        for index, row in enumerate(part):
            gate = {PLACE: step} if step else {}
            ff.unit(dict(enumerate(row)), gate, {WAVE_OUT + index: 1}, gate_bias=phase + 7.5 * step)
    side = (SIDE_NOISE, SIDE_BANDS, GAINS + MID_BANDS, MID_NOISE)
    for count, bands, gains, first in ((MID_NOISE, MID_BANDS, GAINS, 0), side):
        for index, (band, share) in enumerate(zip(*band_shares(noise_centres(count), bands), strict=True)):
            channel, low_band = NOISE + first + index, gains + int(band)
            value = {low_band: float(1 - share), low_band + 1: float(share)}
            ff.unit(value, {channel: 1 / MASK_NOISE}, {channel: math.sqrt(2)})  # of an even loudness: its sine
    for channel in (*range(WAVE_OUT, NOISE), *range(NOISE, NOISE + MID_NOISE + SIDE_NOISE)):
        ff.unit({channel: 1}, {}, {channel: -1}, gate_bias=0.5)  # noise that no amplitude asks for


def _mapping(state: State, block: str, code: Code) -> None:
    mapping = 1e-6 * torch.randn(512, D, 3)
    low_mid, low_side = code["wave_patch"].T.chunk(2)
    mapping[:, BASS_OUT, 1] += torch.cat([low_mid + low_side, low_mid - low_side])
    time, window = torch.arange(-PATCH, 2 * PATCH), torch.hann_window(3 * PATCH)
    turn, cosine, sine = (torch.tensor(part) for part in zip(*oscillators(), strict=True))
    angle = 2 * math.pi * (turn[:, None] * time / FRAME + torch.rand(len(turn), 1))
    mid = torch.arange(NOISE, NOISE + MID_NOISE)
    side = torch.arange(NOISE + MID_NOISE, NOISE + MID_NOISE + SIDE_NOISE)
    for channels, waves, sign in (
        (sine, -angle.sin() * window / 1.5, 1.0),
        (cosine, angle.cos() * window / 1.5, 1.0),
        (mid, 32 * noise_atoms(noise_centres(MID_NOISE)), 1.0),
        (side, 32 * noise_atoms(noise_centres(SIDE_NOISE)), -1.0),
    ):
        taps = (waves / GAIN).unflatten(1, (3, PATCH)).flip(1).permute(2, 0, 1)  # tap 2 looks at the next token
        mapping[:, channels] += torch.cat([taps, sign * taps])
    set_mapping(state, mapping)
    state[f"{block}.mapping.bias"].zero_()


def set_mapping(state: State, mapping: Tensor) -> None:
    state["decoder.layers.3.mapping.weight_v"].copy_(mapping)
    state["decoder.layers.3.mapping.weight_g"].copy_(mapping.norm(dim=(1, 2), keepdim=True))


def autoencoder() -> Autoencoder:
    """Make nano's untrained autoencoder."""
    return Autoencoder(parse_model(build_nano_config("rectified_flow"), "nano").autoencoder)


@torch.no_grad()
def start(code: Code) -> Autoencoder:
    """Make the autoencoder with the decoder set by hand."""
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
