"""Make nano's encoder, which computes the latents that `targets.py` defines.

    python recipes/nano/encoder.py WORK     # -> WORK/encoder.pt, WORK/seen-{train,broad}.pt

Two of its three layers are set by hand. Patches have cosine components of mid and side and short waves of the treble; a
patch attends to the three before it, and the first feed-forward computes magnitudes of waves over these four patches
(semitones, bands). A frame's new token collects from each quarter its bands, some semitones and its low components; the
second feed-forward computes magnitudes of the frame's lowest semitones, and turns the others into steps that are full
above 0.001, 0.008 and 0.03: close to a logarithm. The third learns the latents from these, from clips of the corpora,
whose encoded latents are stored for `decoder.py`. It attends to nothing.

Shapes: C latent channels, T latent frames, N samples, P patches, D width.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from parts import load
from store import Store
from targets import (
    ENVELOPE,
    FRAME,
    LATENT,
    LOWEST_KEY,
    MID_BANDS,
    RATE,
    SIDE_BANDS,
    TONES,
    WAVE,
    band_centres,
    clip,
    load_code,
    turns,
)
from torch import Tensor
from vocoder import autoencoder
from wiring import CONST, HEADS, MARK, D, FeedForward, Layer, wire_encoder

from sa3train.core.files import replace_file
from sa3train.models.autoencoder import Autoencoder

PATCH = 256
MID_COSINES, SIDE_COSINES = 40, 8
COPIED = MID_COSINES + SIDE_COSINES  # channels of a patch that later patches fetch
TREBLE = HEADS * COPIED  # first channel of the short waves, later of the magnitudes
MID_TREBLE, SIDE_TREBLE = 22, 9
LOW_TONES = 16  # semitones that only a whole frame tells apart
HIGH_TONES = TONES - LOW_TONES
LEVELS = MID_BANDS + SIDE_BANDS + HIGH_TONES  # magnitudes of a quarter: TREBLE ...
LOW = 22  # cosine components (of 1024 samples) of the mid that reach the frame's token from each quarter
PHASES = (0.0, math.pi / 3, 2 * math.pi / 3)  # |cos| at these three adds up to the same within 7 %
STEEP = 1000.0  # gate per unit of a wave: SiLU of x and of -x make |x| above -50 dB
STEPS = (2.0**-10, 2.0**-7, 2.0**-5)  # a step is full above one; powers of two, which 16 bits have
RISE = 149 / 128  # of the first step: the others, and a slope of 8 above all of them
LOW_LEVEL = 20.0  # of the lowest semitones' magnitudes, which have no steps
REACH = 0.05  # alpha of the last norm, which bends the loudest low components

BATCH = 512  # frames
KINDS = {  # of latents: which, and their weight
    "envelope": (slice(0, ENVELOPE), 1.0),
    "wave": (slice(ENVELOPE, ENVELOPE + WAVE), 1.0),
    "tones": (slice(ENVELOPE + WAVE, LATENT), 0.6),
}

Waves = list[tuple[Tensor, Tensor]]


def cosines(size: int, count: int) -> Tensor:
    """Compute orthonormal DCT-II rows (count, size)."""
    place = torch.arange(size) + 0.5
    rows = torch.cos(math.pi / size * torch.arange(count)[:, None] * place) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows


def window(size: int, hertz: float) -> tuple[Tensor, Tensor]:
    """Compute cosine and sine under a Hann window, scaled to give 1 for a partial of amplitude 1."""
    taper = torch.hann_window(size)
    angle = 2 * math.pi * hertz * torch.arange(size) / RATE
    return taper * angle.cos() * 2 / taper.sum(), taper * angle.sin() * 2 / taper.sum()


def treble_hertz(count: int, low: float) -> Tensor:
    """Compute the center frequencies of the short waves, evenly spaced, in Hz."""
    return torch.linspace(low, 15500.0, count)


def _mapping(state: dict[str, Tensor], block: str) -> None:
    rows = torch.zeros(D, 512)
    mid, side = cosines(PATCH, MID_COSINES) / 2, cosines(PATCH, SIDE_COSINES) / 2
    rows[:MID_COSINES] = torch.cat([mid, mid], 1)
    rows[MID_COSINES:COPIED] = torch.cat([side, -side], 1)
    channel = TREBLE
    for count, low, sign in ((MID_TREBLE, 3500.0, 1.0), (SIDE_TREBLE, 900.0, -1.0)):
        for hertz in treble_hertz(count, low).tolist():
            for wave in window(PATCH, hertz):
                rows[channel] = torch.cat([wave, sign * wave]) / 2
                channel += 1
    assert channel == MARK
    norm = rows.norm(dim=1).clamp_min(1e-6)
    state[f"{block}.mapping.weight_v"].copy_(rows[..., None]).add_(1e-7)
    state[f"{block}.mapping.weight_g"].copy_(state[f"{block}.mapping.weight_v"].norm(dim=(1, 2), keepdim=True))
    state[f"{block}.mapping.weight_v"][norm < 1e-5] = 1e-7
    state[f"{block}.mapping.weight_g"][[MARK, CONST]] = 0


def _seen(wave: Tensor, count: int, first: int) -> Tensor:
    """Express a wave over four patches (1024 samples) in the stream's channels of the last of them, (D,)."""
    row = torch.zeros(D)
    for back in range(HEADS):
        piece = wave[(3 - back) * PATCH : (4 - back) * PATCH]
        row[back * COPIED + first : back * COPIED + first + count] = cosines(PATCH, count) @ piece
    return row


def _magnitude(ff: FeedForward, cosine: Tensor, sine: Tensor, out: dict[int, float]) -> None:
    """Set units whose sum is the amplitude of a wave, spread over channels."""
    for phase in PHASES:
        row = math.cos(phase) * cosine + math.sin(phase) * sine
        for sign in (STEEP, -STEEP):
            ff.unit({}, sign * row, {channel: weight / 1.93 for channel, weight in out.items()}, value_bias=1 / STEEP)


def _triangles(hertz: float, bands: int) -> dict[int, float]:
    """Compute the share of each band in a wave of a frequency."""
    centres = band_centres(bands).log1p()
    place = math.log1p(hertz)
    upper = int(torch.bucketize(torch.tensor(place), centres))
    if upper in (0, bands):
        return {min(upper, bands - 1): 1.0}
    share = float((place - centres[upper - 1]) / (centres[upper] - centres[upper - 1]))
    return {upper - 1: 1 - share, upper: share}


def _first(ff: FeedForward) -> None:
    """Write magnitudes over four patches to the channels of the short waves, which are removed."""
    side = TREBLE + MID_BANDS
    for channel in range(TREBLE, TREBLE + 2 * (MID_TREBLE + SIDE_TREBLE)):
        ff.unit({channel: 1.0}, {}, {channel: -1 / 8.0}, gate_bias=8.0)
    for hertz in torch.arange(1, 37).mul(3400 / 36).tolist():
        waves = (_seen(wave, MID_COSINES, 0) for wave in window(1024, hertz))
        _magnitude(ff, *waves, {TREBLE + band: share for band, share in _triangles(hertz, MID_BANDS).items()})
    for hertz in (120.0, 300.0, 480.0, 660.0):
        waves = (_seen(wave, SIDE_COSINES, MID_COSINES) for wave in window(1024, hertz))
        _magnitude(ff, *waves, {side + band: share for band, share in _triangles(hertz, SIDE_BANDS).items()})
    channel = TREBLE
    for count, low, bands, first in (
        (MID_TREBLE, 3500.0, MID_BANDS, TREBLE),
        (SIDE_TREBLE, 900.0, SIDE_BANDS, side),
    ):
        for hertz in treble_hertz(count, low).tolist():
            cosine, sine = torch.eye(D)[channel], torch.eye(D)[channel + 1]
            _magnitude(ff, cosine, sine, {first + band: share for band, share in _triangles(hertz, bands).items()})
            channel += 2
    for tone in range(HIGH_TONES):
        hertz = 440 * 2 ** ((LOWEST_KEY + LOW_TONES + tone - 69) / 12)
        waves = (_seen(wave, MID_COSINES, 0) for wave in window(1024, hertz))
        _magnitude(ff, *waves, {side + SIDE_BANDS + tone: 1.0})


def _fetched() -> list[list[int]]:
    """List the magnitude channels that each head collects: all mid bands, and in turn the rest; half of the semitones
    twice. The last `LOW_TONES` channels of the frame's token and two more stay empty.
    """
    bands = list(range(TREBLE, TREBLE + MID_BANDS))
    tones = TREBLE + LEVELS - HIGH_TONES
    rest = list(range(TREBLE + MID_BANDS, TREBLE + LEVELS)) + list(range(tones, tones + LOW_TONES))
    room = 64 - MID_BANDS - LOW
    return [bands + rest[room * head : room * (head + 1)] for head in range(HEADS)]


def _second(layers: list[Layer], ff: FeedForward) -> None:
    """Set the second layer: the frame's token gets low components, lowest semitones, and steps of the other levels."""
    low = torch.stack([_seen(row, MID_COSINES, 0) for row in cosines(1024, LOW)])
    for head, channels in enumerate(_fetched()):
        rows = layers[1].rows(2, head)
        rows[: len(channels), channels] = torch.eye(len(channels))
        rows[len(channels) : len(channels) + LOW] = low
        kept = len(channels) + LOW
        layers[1]["self_attn.to_out.weight"][64 * head : 64 * head + kept, 64 * head : 64 * head + kept] = torch.eye(
            kept
        )
    for tone in range(LOW_TONES):
        waves = []
        for wave in window(FRAME, float(turns()[tone]) * RATE / FRAME):
            row = torch.zeros(D)
            for head, channels in enumerate(_fetched()):
                first = 64 * head + len(channels)
                row[first : first + LOW] = cosines(1024, LOW) @ wave[1024 * head : 1024 * (head + 1)]
            waves.append(row)
        _magnitude(ff, waves[0], waves[1], {D - LOW_TONES + tone: LOW_LEVEL})
    for head, channels in enumerate(_fetched()):
        for index in range(len(channels)):
            channel = 64 * head + index
            ff.unit({}, {channel: 4 / STEPS[0]}, {channel: RISE}, value_bias=0.25)
            for step in STEPS:
                ff.unit({}, {channel: 4 / step}, {channel: -1.0}, value_bias=0.25, gate_bias=-4.0)


@torch.no_grad()
def start() -> Autoencoder:
    """Make an autoencoder with the encoder described above; its latents are meaningless before `learn`."""
    torch.manual_seed(0)
    model = autoencoder()
    state, block = model.state_dict(), "encoder.layers.0"
    layers = wire_encoder(state, COPIED)
    _mapping(state, block)
    parts = [FeedForward(layer) for layer in layers]
    _first(parts[0])
    _second(layers, parts[1])
    last = Layer(state, f"{block}.transformers.2", 0.0, 0.0)
    last["ff_norm.alpha"].fill_(REACH)
    for head in range(HEADS):
        last.clear(head)
    state["bottleneck.running_std"].fill_(1)
    return model


@torch.no_grad()
def frame_tokens(model: Autoencoder, audio_CN: Tensor) -> Tensor:
    """Compute the tokens (T, D) of whole frames at the input of the last feed-forward."""
    caught: list[Tensor] = []
    last = model.encoder.resampler.transformers[-1]
    hook = last.ff_norm.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))  # type: ignore[operator]
    model.encode(audio_CN[None], noise=False)
    hook.remove()
    return torch.cat([part.flatten(0, 1) for part in caught])[1:-1]  # chunks lie half a chunk, one frame, further


def pairs(model: Autoencoder, work: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Compute the frames' tokens (F, D) and target latents (F, C) of the first `count` clips."""
    store, latents = Store(work / split), load(work, split)
    count = min(count, len(latents))
    tokens = torch.cat([frame_tokens(model, clip(store, index)) for index in range(count)])
    return tokens, torch.cat([z_CT.T.float() for z_CT in latents[:count]])


class Head(torch.nn.Module):
    """The last part of the encoder: its last feed-forward and the layer to the latents, on frames' tokens."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        layer = model.encoder.resampler.transformers[-1]
        self.norm, self.ff, self.linear = layer.ff_norm, layer.ff, model.encoder.layers[2]

    def forward(self, x_FD: Tensor) -> Tensor:
        """Compute latents (F, C)."""
        return self.linear(x_FD + self.ff(self.norm(x_FD)))


@torch.no_grad()
def solve(head: Head, x_FD: Tensor, z_FC: Tensor, ridge: float = 1e-3) -> None:
    """Fit the norm to the tokens, which then have mean 0 and spread 1, and the linear layer by least squares."""
    bent = head.norm.normalize(x_FD)
    spread = bent.std(0).clamp_min(1e-3)
    head.norm.gamma.copy_(1 / spread)
    head.norm.beta.copy_(-bent.mean(0) / spread)
    mean, scale = x_FD.mean(0), x_FD.std(0).clamp_min(1e-3)
    known = ((x_FD - mean) / scale).double()
    gram = known.T @ known / len(known) + ridge * torch.eye(D)
    weight = torch.linalg.solve(gram, known.T @ z_FC.double() / len(known)).T.float() / scale
    head.linear.weight.copy_(weight)
    head.linear.bias.copy_(z_FC.mean(0) - weight @ mean)


def learn(head: Head, x_FD: Tensor, z_FC: Tensor, bands_EC: Tensor, epochs: int) -> None:
    """Train the feed-forward by AdamW on what least squares miss: shares of each kind's variance, and of the bands'.

    Its outputs are learned as latents and then divided by the linear layer, so that all have the same scale.
    """
    solve(head, x_FD, z_FC)
    gated, units = head.ff.ff[0], torch.nn.Parameter(torch.zeros(LATENT, 3 * D))
    torch.nn.init.normal_(gated.proj.weight, std=D**-0.5)
    torch.nn.init.zeros_(gated.proj.bias)
    learned = [*gated.parameters(), units]
    optimizer = torch.optim.AdamW(learned, lr=3e-3, weight_decay=0.01, betas=(0.9, 0.99))
    kinds, variance_C = KINDS.values(), z_FC.var(0)
    weight_C = torch.cat([share / variance_C[part].sum().expand(variance_C[part].shape) for part, share in kinds])
    variance = (z_FC[:, :ENVELOPE] @ bands_EC.T).var(0).sum()
    steps = epochs * -(-len(x_FD) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.02, cycle_momentum=False)
    for pick in (pick for _ in range(epochs) for pick in torch.randperm(len(x_FD)).split(BATCH)):
        with torch.no_grad():
            known_FC = head.linear(x_FD[pick]) - z_FC[pick]
        error_FC = known_FC + gated(head.norm(x_FD[pick])) @ units.T
        loss = (error_FC.square() * weight_C).sum(1).mean()
        loss = loss + (error_FC[:, :ENVELOPE] @ bands_EC.T).square().sum(1).mean() / variance
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        head.ff.ff[2].weight.copy_(torch.linalg.pinv(head.linear.weight) @ units)


def missed(head: Head, x_FD: Tensor, z_FC: Tensor) -> dict[str, float]:
    """Compute the share of variance that the latents miss, for each kind of channel."""
    with torch.no_grad():
        error = (head(x_FD) - z_FC).square().mean(0)
    spread = z_FC.var(0)
    return {name: round(float(error[part].sum() / spread[part].sum()), 4) for name, (part, _) in KINDS.items()}


def main() -> None:
    """Make, train and save the encoder."""
    parser = argparse.ArgumentParser(description="make nano's encoder")
    parser.add_argument("work", type=Path)
    parser.add_argument("--clips", type=int, default=5400, help="at most, of each corpus")
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    model = start().requires_grad_(False)
    head, bands_EC = Head(model).requires_grad_(True), load_code(args.work)["envelope_back"]
    splits = [split for split in ("train", "broad") if (args.work / split).is_dir()]
    known = [pairs(model, args.work, split, args.clips) for split in splits]
    learn(head, *(torch.cat(parts) for parts in zip(*known, strict=True)), bands_EC, args.epochs)
    print("share of the variance that held-out clips miss:", missed(head, *pairs(model, args.work, "val", 100)))
    for split, (x_FD, _) in zip(splits, known, strict=True):
        lengths = [z_CT.shape[1] for z_CT in load(args.work, split)[: args.clips]]
        with torch.no_grad(), replace_file(args.work / f"seen-{split}.pt") as path:
            torch.save([z_FC.T.half().clone() for z_FC in head(x_FD).split(lengths)], path)
    with replace_file(args.work / "encoder.pt") as path:
        torch.save({"average": model.encoder.state_dict()}, path)


if __name__ == "__main__":
    main()
