"""Set the start of nano's autoencoder: a linear code of low frequencies, and levels of bands that shape what is above.

A patch of 1024 samples has `LOW` main components below 1 kHz, and bounded components of bands above, two for each of
`NARROW` narrow ones. The encoder's first feed-forward makes levels (roots of amplitudes) of these by least squares: of
`WIDE` bands for each patch, and of the narrow ones, of which each of the four heads fetches a quarter, averaged over
the frame. The decoder's heads bring both back: a head sees the frame's token wholly from one of its four new tokens
and by a third from the others, which the map from latents undoes. Levels become amplitudes, and the last, sinusoidal
feed-forward multiplies them with noise or with nothing but a steady phase.

Everything is linear or smooth, and the norms' outputs are of size 1, so that training end to end can begin at once.

Shapes: B items, N samples, L patches, K samples of both channels of a patch, D = 256 stream, W latents.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from sa3train.models.autoencoder import Autoencoder, patchify
from sa3train.models.blocks import compute_rotary_frequencies
from sa3train.models.config import AutoencoderConfig, StackConfig
from sa3train.models.resampler import Resampler, ResamplerLayer

RATE, FRAME, PATCH, STRIDE = 44_100, 4096, 1024, 4
D, HEADS, INNER = 256, 4, 768
LOW, WIDE, NARROW = 42, 8, 48
LATENTS = (160, 24, 40)  # of waveforms, wide bands, narrow bands
WIDE_AT, NARROW_AT, PLACE_AT = LOW, LOW + WIDE, LOW + WIDE + NARROW  # channels of the stream
HIGH, TOP, MARK, CONST = PLACE_AT + HEADS, 254, 254, 255
USED = LOW + WIDE + NARROW // HEADS  # of a head's 64 channels
OWNER = torch.arange(NARROW) % HEADS  # the head of a narrow band
PLAYED = {2: 12, 3: 12, 4: 12, 5: 6, 6: 6, 7: 6}  # wide bands that are played, and atoms of each
ATOMS = 2 * NARROW + sum(PLAYED.values())
CANCEL = 2 * ATOMS - NARROW  # first of the units that remove the noise itself
ALPHA, LAST_ALPHA, MASK_NOISE, NOISY = 0.03, 0.012, 0.001, 0.4
LOUD, LEVEL, MARKED, PLACED = 2.0, 5.0, 30.0, 8.0  # sizes in the stream
OWN, OTHERS = 0.9, 0.3  # shares of attention in the decoder
CUT = 1000.0  # Hz: up to here waveforms are played
STEP = RATE / PATCH
MID_EDGES, SIDE_EDGES = (600.0, 1500.0, 5000.0, 8200.0, 12000.0, 18500.0), (100.0, 1500.0, 5000.0, 16000.0)
EVEN = [(13.5 + i) * STEP for i in range(13)]  # a bin each, then three quarters of a semitone
NARROW_EDGES = (*EVEN, *(EVEN[-1] * (5000 / EVEN[-1]) ** (i / 36) for i in range(1, 37)))
GAINS = torch.cat([torch.full((LOW,), 8.0), torch.full((WIDE + NARROW,), 3.3)])  # of norms: about 0.5 comes out
TILED = torch.cat([torch.full((LOW,), 8.0), torch.full((64 - LOW,), 3.3)]).repeat(HEADS)


def build_codec() -> Autoencoder:
    """Build the autoencoder with random weights."""
    shared = {"width": D, "latent_width": sum(LATENTS), "chunk_size": 2 * STRIDE, "stride": STRIDE}
    encoder = StackConfig(depth=2, **shared)  # type: ignore[arg-type]
    decoder = StackConfig(depth=2, mask_noise=MASK_NOISE, sinusoidal_blocks=2, conv_mapping=True, **shared)  # type: ignore[arg-type]
    return Autoencoder(AutoencoderConfig(encoder, decoder, sum(LATENTS), patch_size=PATCH))


# Least squares, bands and components


def solve(design: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Solve least squares with a ridge relative to the mean square of the design."""
    x = design.double()
    gram = x.T @ x / len(x)
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=x.dtype)
    return torch.linalg.solve(gram, x.T @ targets.double() / len(x)).float()


def split_mid_side(patches_LK: Tensor) -> Tensor:
    """Split patches into mid and side (2, L, K / 2)."""
    left, right = patches_LK.chunk(2, dim=1)
    return torch.stack([left + right, left - right]) / 2**0.5


def list_bands(edges: tuple[float, ...], size: int) -> Tensor:
    """List which bins of a spectrum of `size` samples are in each band (bins, bands)."""
    f = torch.arange(size // 2 + 1) * RATE / size
    return torch.stack([((f >= a) & (f < b)).float() for a, b in itertools.pairwise(edges)], 1)


def make_taper() -> Tensor:
    """Make a window that is flat but for 160 samples at its ends."""
    n = torch.arange(PATCH) + 0.5
    return (torch.minimum(n, PATCH - n) / 160).clamp(max=1).mul(math.pi / 2).sin().square()


def compute_levels(patches_LK: Tensor) -> Tensor:
    """Compute amplitudes of patches (L, 56): of five wide bands of the mid, three of the side, and the narrow ones."""
    both = split_mid_side(patches_LK)
    wide = torch.fft.rfft(both * make_taper(), norm="ortho").abs().square()
    fine = torch.fft.rfft(both[0] * torch.hann_window(PATCH) * 1.63, n=4 * PATCH).abs().square() / (2 * PATCH)
    parts = (wide[0] @ list_bands(MID_EDGES, PATCH), wide[1] @ list_bands(SIDE_EDGES, PATCH))
    return torch.cat([*parts, fine @ list_bands(NARROW_EDGES, 4 * PATCH)], 1).sqrt()


def find_low(patches_LK: Tensor) -> Tensor:
    """Find the main components (LOW, K) of mid and side together."""
    both = split_mid_side(patches_LK)
    values, vectors = torch.linalg.eigh(both.mT @ both / both.shape[1])
    least = values.flatten().topk(LOW).values[-1]
    mid, side = (vector[:, value >= least].T for vector, value in zip(vectors, values, strict=True))
    return torch.cat([torch.cat([mid, mid], 1), torch.cat([side, -side], 1)]) / 2**0.5


def mix_waves(f: Tensor, window: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Mix windowed waves at frequencies at random into `count` atoms of norm 1."""
    t = torch.arange(len(window)) / RATE
    angles = 2 * math.pi * (f[:, None] * t + torch.rand(len(f), 1, generator=rng))
    waves = torch.cat([angles.cos(), angles.sin()]) * window
    atoms = torch.linalg.qr(torch.randn(len(waves), count, generator=rng)).Q.T @ waves
    return atoms / atoms.norm(dim=1, keepdim=True)


def make_atoms(narrow_window: Tensor, wide_window: Tensor, grid: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Make what measures or plays bands, (ATOMS, 2, N), and the channel of each one's level.

    On the `grid` of patches a wave of the same size in each patch is steady.
    """
    rng = torch.Generator().manual_seed(seed)
    size = len(narrow_window)
    t = (torch.arange(size) + 0.5 - size / 2) / RATE
    rows = []
    for low, high in itertools.pairwise(NARROW_EDGES):
        if grid:
            f = torch.arange(round(low / STEP + 0.499), round(high / STEP + 0.499)) * STEP
            f = f if len(f) else torch.tensor([round((low + high) / 2 / STEP) * STEP])
        else:
            f = torch.arange(low + STEP / 4, high, STEP / 2)
        phases = torch.rand(len(f), 1, generator=rng)
        for shift in (0.0, 0.25):
            atom = torch.cos(2 * math.pi * (f[:, None] * t + phases + shift)).sum(0) * narrow_window
            rows.append(atom / atom.norm())
    edges = [*itertools.pairwise(MID_EDGES), *itertools.pairwise(SIDE_EDGES)]
    for band, count in PLAYED.items():
        f = torch.arange(*edges[band], RATE / size / 2)
        rows += list(mix_waves(f, wide_window, count, rng))
    owners = [NARROW_AT + n for n in range(NARROW) for _ in range(2)]
    owners += [WIDE_AT + band for band, count in PLAYED.items() for _ in range(count)]
    signs = torch.tensor([-1.0 if WIDE_AT + 5 <= owner < NARROW_AT else 1.0 for owner in owners])
    mid = torch.stack(rows)
    return torch.stack([mid, mid * signs[:, None]], 1) / 2**0.5, torch.tensor(owners)


# Attention


@torch.enable_grad()
def fit_keys(logits: dict[int, float], others: list[int], top: float) -> Tensor:
    """Find a key (32,) with which raw tokens at distances have given logits, and low ones at `others`.

    Logits by distance are sums of the rotary waves.
    """
    goal = torch.tensor(list(logits.values()), dtype=torch.float64)
    theta = compute_rotary_frequencies("cpu").double()
    angles = torch.tensor([*logits, *others], dtype=torch.float64)[:, None] * theta
    waves = top / 8 * torch.cat([angles.cos(), angles.sin()], 1)
    free = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=3000, tolerance_grad=1e-12, tolerance_change=1e-14, history_size=50)
    optimizer.param_groups[0]["line_search_fn"] = "strong_wolfe"

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        made = waves @ (top * torch.tanh(free))
        known, low = made[: len(goal)] - goal, (made[len(goal) :] + 7).clamp(min=0)
        loss = known.square().sum() + low.square().sum() + 1e-7 * free.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(evaluate)  # type: ignore[arg-type]
    return (top * torch.tanh(free.detach())).float()


def set_gather(layer: ResamplerLayer, shares: Tensor, values: Tensor, outs: Tensor) -> None:
    """Set attention from new tokens (numbered j) to raw ones (r) of their group: shares[j, h, r] of head h.

    The subtracted branch sees new tokens alone, which hold nothing. `values` (heads, 64, D), `outs` (heads, D, 64).
    """
    attention, top, gain = layer.self_attn, 19.0, 20.0
    for norm in (attention.q_norm, attention.k_norm):
        norm.gamma.fill_(gain)
        norm.alpha.fill_(1)
    news, heads, raws = shares.shape
    whole = float(shares[0, 0].sum()) > 0.99
    reach = math.atanh(top / gain)
    query, raw, new, raw_2 = (torch.zeros(heads, 64) for _ in range(4))
    query[:, :16], query[:, 40] = reach, reach
    raw_2[:, 40] = math.atanh(-0.9)
    new[:, 40] = math.atanh(-0.9) if whole else 0.0
    for head in range(heads):
        rest = 1.0 if whole else 2 * STRIDE / (1 - shares[:, head].sum(1, keepdim=True))  # to new tokens, of logit 0
        wanted = (shares[:, head] * rest).log()
        near = {raws + j - r: float(wanted[j, r]) for j in range(news) for r in range(raws)}
        others = [distance + side for distance in near for side in (-STRIDE - 1, STRIDE + 1)]
        key = fit_keys(near, [distance for distance in others if distance not in near], top)
        raw[head, :32] = torch.atanh(key / gain)
    weight = attention.to_qkv.weight.view(5, heads, 64, D).zero_()
    weight[0, :, :, CONST], weight[3, :, 40, CONST] = query, reach
    weight[1, :, :, CONST], weight[1, :, :, MARK] = raw, new - raw
    weight[4, :, :, CONST], weight[4, :, :, MARK] = raw_2, -raw_2
    weight[2] = values
    attention.to_out.weight.copy_(outs.permute(1, 0, 2).flatten(1))


# Both stacks


def set_neutral(layer: ResamplerLayer, before: tuple[Tensor, float], inside: tuple[Tensor, float]) -> None:
    """Set a layer that changes nothing yet: norms with gains and that of the other channels, outputs of zero."""
    for norm, (gains, other) in ((layer.pre_norm, before), (layer.ff_norm, inside)):
        norm.alpha.fill_(ALPHA)
        norm.beta.zero_()
        norm.gamma.fill_(other)
        norm.gamma[: len(gains)] = gains
        norm.gamma[MARK] = 1 / math.tanh(ALPHA * MARKED)
    layer.pre_norm.gamma[CONST], layer.pre_norm.beta[CONST] = 0, 1
    for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
        norm.alpha.fill_(1)
    layer.self_attn.to_qkv.weight.mul_(0.3)
    layer.self_attn.to_out.weight.zero_()
    into, out = layer.ff.ff[0].proj, layer.ff.ff[2]
    nn.init.normal_(into.weight, std=0.1)  # type: ignore[arg-type]
    nn.init.normal_(into.bias, std=0.3)  # type: ignore[arg-type]
    out.weight.zero_()  # type: ignore[operator]
    out.bias.zero_()  # type: ignore[operator]


def set_mapping(stack: Resampler, weight_OIK: Tensor) -> None:
    """Set a weight-normed mapping; what is nothing gets a little, since it has a direction too."""
    rng = torch.Generator().manual_seed(5)
    weight = weight_OIK + 1e-6 * torch.randn(weight_OIK.shape, generator=rng)
    norm = weight.norm(dim=(1, 2), keepdim=True)
    stack.mapping.weight_g.copy_(norm)
    stack.mapping.weight_v.copy_(weight / norm)
    stack.mapping.bias.zero_()


def set_levels(layer: ResamplerLayer, patches_LD: Tensor, targets: Tensor) -> None:
    """Set a feed-forward that makes levels: magnitudes and squares of components, weighted by least squares."""
    into, out, at = layer.ff.ff[0].proj, layer.ff.ff[2], 0
    channels = HIGH + torch.arange(ATOMS)
    for sign in (1.0, -1.0):
        for square in (False, True):
            rows = torch.arange(ATOMS) + at
            at += ATOMS
            for part in (rows, INNER + rows):
                into.weight[part], into.bias[part] = 0, 0  # type: ignore[index]
            into.weight[INNER + rows, channels] = sign * (6.0 if square else 24.0)  # type: ignore[index]
            if square:
                into.weight[rows, channels] = sign * 2.0  # type: ignore[index]
            else:
                into.bias[rows] = 0.3  # type: ignore[index]
    units = layer.ff.ff[0](layer.ff_norm(patches_LD))
    scale = units.square().mean(0).sqrt() + 1e-6
    design = torch.cat([units / scale, torch.ones(len(units), 1)], 1)
    for number, target in enumerate(targets.T):
        weight = 1 / (target + 2)[:, None]  # quiet levels count more
        solved = solve(design * weight, target[:, None] * weight, 2e-3)[:, 0]
        out.weight[WIDE_AT + number] = solved[:-1] / scale  # type: ignore[index]
        out.bias[WIDE_AT + number] = solved[-1]  # type: ignore[index]


def set_encoder(model: Autoencoder, patches_LK: Tensor, even_LK: Tensor, low_LK: Tensor, loud: Tensor) -> None:
    """Set the encoder but for its last map; `even_LK` are patches of clips at one level."""
    stack = model.encoder.resampler
    first, second = stack.transformers
    atoms, _ = make_atoms(torch.hann_window(PATCH), make_taper(), grid=False, seed=1)
    atoms = atoms.flatten(1)
    steps = [0.5, 2.0] * NARROW + [(0.7, 3.0, 15.0)[n % 3] for count in PLAYED.values() for n in range(count)]
    usual = 0.1 * (even_LK @ atoms.T).square().mean(0).sqrt() + 1e-6
    rows = torch.zeros(D, 2 * PATCH)
    rows[:LOW] = low_LK
    rows[HIGH : HIGH + ATOMS] = atoms * (torch.tensor(steps) / usual / ALPHA)[:, None]
    set_mapping(stack, rows[..., None])
    stack.new_tokens.zero_()[..., MARK] = MARKED
    set_neutral(first, (GAINS, 0.5), (GAINS, 0.5))  # type: ignore[arg-type]
    set_neutral(second, (GAINS, 0.02), (TILED, 1.0))  # type: ignore[arg-type]
    picks = torch.randperm(len(patches_LK), generator=torch.Generator().manual_seed(0))[:14_000]
    targets = LEVEL * (compute_levels(patches_LK[picks]) / loud).sqrt()
    set_levels(first, stack.mapping(patches_LK[picks]), targets)  # type: ignore[arg-type]
    values, outs = torch.zeros(HEADS, 64, D), torch.zeros(HEADS, D, 64)
    for head in range(HEADS):
        seen = torch.cat([torch.arange(NARROW_AT), NARROW_AT + (head == OWNER).nonzero()[:, 0]])
        values[head, torch.arange(USED), seen] = 1 / (4 * ALPHA * GAINS[seen])
        outs[head, 64 * head : 64 * head + USED, :USED] = 4 * torch.eye(USED)
    set_gather(second, (torch.full((HEADS, 4), 0.2) + 0.2 * torch.eye(4))[None], values, outs)  # type: ignore[arg-type]


class Units:
    """Writes units of a feed-forward, one after the other, by stream channel and in stream units."""

    def __init__(self, layer: ResamplerLayer) -> None:
        self.into, self.out, self.at = layer.ff.ff[0].proj, layer.ff.ff[2], 0
        self.read = 1 / (layer.ff_norm.alpha * layer.ff_norm.gamma)

    def add(self, value: dict[int, float], gate: dict[int, float], out: dict[int, float], bias: float = 0.0) -> None:
        """Set one unit: out += value x * act(gate x + bias)."""
        for row, weights in ((self.at, value), (INNER + self.at, gate)):
            self.into.weight[row], self.into.bias[row] = 0, 0  # type: ignore[index]
            for channel, weight in weights.items():
                self.into.weight[row, channel] = weight * self.read[channel]  # type: ignore[index]
        self.into.bias[INNER + self.at] = bias  # type: ignore[index]
        for channel, weight in out.items():
            self.out.weight[channel, self.at] = weight  # type: ignore[index]
        self.at += 1


def set_amplitudes(layer: ResamplerLayer) -> None:
    """Set a feed-forward: levels become amplitudes in place, about the square over `LEVEL`.

    What a head brings is `OWN` or `OTHERS` of a level; which of both, its place channel says.
    Deviations of the wide bands below 5 kHz from the frame's mean move the gates of the narrow ones.
    """
    units, steep = Units(layer), 50 / PLACED
    square, linear = 1 / 0.12 / LEVEL, -1 / 0.2 / 1.7616
    for number in range(NARROW):
        channel, place = NARROW_AT + number, PLACE_AT + int(OWNER[number])
        wide = WIDE_AT + int(NARROW_EDGES[number] > 1490)
        for share, sign, bias in ((OWN, 1, -50 * OWN), (OTHERS, -1, 50 * OTHERS)):
            gate = {channel: 0.6 / share, wide: 0.6, place: sign * steep}
            units.add({channel: 0.2 / share}, gate, {channel: square}, bias)
        units.add({channel: 0.2}, {}, {channel: linear}, 2.0)
    for band in PLAYED:
        units.add({WIDE_AT + band: 0.2}, {WIDE_AT + band: 0.6}, {WIDE_AT + band: square})
        units.add({WIDE_AT + band: 0.2}, {}, {WIDE_AT + band: linear}, 2.0)


def set_sounds(layer: ResamplerLayer, owners: Tensor) -> None:
    """Set a sinusoidal feed-forward: amplitudes times noise, or of each narrow band's first atom times a steady phase.

    The last units remove the noise itself.
    """
    units, rng = Units(layer), torch.Generator().manual_seed(0)
    for atom, owner in enumerate(owners.tolist()):
        steady = atom < 2 * NARROW and atom % 2 == 0
        for _ in range(1 if steady else 2):
            dims = HIGH + torch.randperm(TOP - HIGH, generator=rng)[:6]
            signs = torch.randint(2, (6,), generator=rng) * 2 - 1
            strength = 0.6 * NOISY / MASK_NOISE * (0.05 if steady else 1.0)
            gate = {int(dim): strength * int(sign) for dim, sign in zip(dims, signs, strict=True)}
            bias = 0.5 if steady else 2 * float(torch.rand((), generator=rng))
            units.add({owner: 0.15}, gate, {HIGH + atom: 1 / 0.15}, bias)
    for atom in range(ATOMS):
        units.add({HIGH + atom: 1.0}, {}, {HIGH + atom: -1.0}, 0.5)


def set_decoder(model: Autoencoder, owners: Tensor) -> Tensor:
    """Set the decoder but for both its maps. Returns the shares of attention (new token, head)."""
    stack = model.decoder.resampler
    first, last = stack.transformers
    stack.new_tokens.zero_()[..., MARK] = MARKED
    set_neutral(first, (TILED, 1.0), (GAINS, 0.02))  # type: ignore[arg-type]
    set_neutral(last, (GAINS, 0.02), (GAINS, 0.02))  # type: ignore[arg-type]
    shares = torch.full((HEADS, HEADS), OTHERS) + (OWN - OTHERS) * torch.eye(HEADS)
    values, outs = torch.zeros(HEADS, 64, D), torch.zeros(HEADS, D, 64)
    for head in range(HEADS):
        channels = 64 * head + torch.arange(USED)
        values[head, torch.arange(USED), channels] = 1 / (4 * ALPHA * TILED[channels])
        values[head, USED, CONST], values[head, USED, MARK] = 1, -1  # a one for frame tokens
        outs[head, :NARROW_AT, :NARROW_AT] = 4 * torch.eye(NARROW_AT)
        outs[head, NARROW_AT + (head == OWNER).nonzero()[:, 0], torch.arange(NARROW_AT, USED)] = 4
        outs[head, PLACE_AT + head, USED] = PLACED
    set_gather(first, shares[..., None], values, outs)  # type: ignore[arg-type]
    first.ff_norm.gamma[PLACE_AT:HIGH] = 4
    set_amplitudes(first)  # type: ignore[arg-type]
    last.ff_norm.alpha.fill_(LAST_ALPHA)
    last.ff_norm.gamma[:HIGH], last.ff_norm.gamma[HIGH:TOP] = 4, NOISY / MASK_NOISE / LAST_ALPHA
    set_sounds(last, owners)  # type: ignore[arg-type]
    for layer in (first, last):  # silence stays silent: values have no biases, and read neither constants nor noise
        into = layer.ff.ff[0].proj
        kept = into.weight[CANCEL : CANCEL + ATOMS].clone()
        into.weight[:INNER, PLACE_AT:], into.bias[:INNER] = 0, 0
        if layer is last:
            into.weight[CANCEL : CANCEL + ATOMS] = kept
    last.self_attn.to_qkv.weight[2 * D : 3 * D, PLACE_AT:] = 0
    return shares


def set_latents(model: Autoencoder, frames_BTD: Tensor, tokens_L4D: Tensor, shares: Tensor) -> None:
    """Set the maps to and from latents: main components of each kind, and what the decoder's attention has to find."""
    into, out = model.encoder.layers[2], model.decoder.layers[1]
    for parameter in (*into.parameters(), *out.parameters()):
        parameter.zero_()
    wide, narrow = tokens_L4D[..., WIDE_AT:NARROW_AT].clone(), tokens_L4D[..., NARROW_AT:PLACE_AT].mean(1)
    wide[..., :2] -= wide[..., :2].mean(1, keepdim=True)
    inverse = torch.linalg.inv(shares)
    targets = [torch.einsum("hj,tjc->thc", inverse, x).flatten(1) for x in (tokens_L4D[..., :LOW], wide)]
    targets.append(torch.cat([narrow[:, head == OWNER] for head in range(HEADS)], 1))
    at = 0
    bounds = ((0, LOW), (WIDE_AT, NARROW_AT), (NARROW_AT, USED))
    for (low, high), count, target in zip(bounds, LATENTS, targets, strict=True):
        places = torch.tensor([64 * head + channel for head in range(HEADS) for channel in range(low, high)])
        rows_BTK = frames_BTD[..., places]
        mean = rows_BTK.mean((0, 1)) * (low > 0)
        rows_BTK = rows_BTK - mean
        loud = rows_BTK.square().mean((1, 2), keepdim=True).sqrt() + 0.1 if low == 0 else 1.0
        flat = (rows_BTK / loud).flatten(0, 1)
        main = torch.linalg.eigh(flat.T @ flat / len(flat)).eigenvectors.flip(1)[:, :count].T
        scale = (rows_BTK @ main.T).square().mean((0, 1)).sqrt()
        scale = scale**0.8 * scale.max() ** 0.2
        latents = slice(at, at + count)
        into.weight[latents, places] = main / scale[:, None]
        into.bias[latents] = -(main / scale[:, None]) @ mean
        z = rows_BTK.flatten(0, 1) @ (main / scale[:, None]).T
        weight = 1 / (target.square().mean(1, keepdim=True).sqrt() + 0.3) if low == 0 else 1.0
        design = torch.cat([z, torch.full((len(z), 1), float(low > 0))], 1)
        solved = solve(design * weight, target * weight, 1e-5)
        out.weight[places, latents], out.bias[places] = solved[:-1].T, solved[-1]
        at += count


def set_output(model: Autoencoder, audio_BCN: Tensor, low_LK: Tensor, atoms: Tensor, owners: Tensor) -> None:
    """Set what the decoder plays: waveforms fitted over three patches, and the bands' atoms at their levels."""
    stack, patches_LK = model.decoder.resampler, patchify(audio_BCN, PATCH).flatten(0, 1)
    lows = (patches_LK @ low_LK.T).unflatten(0, (len(audio_BCN), -1))
    padded = nn.functional.pad(lows, (0, 0, 1, 1))
    weight_B11 = 1 / (audio_BCN.square().mean((1, 2), keepdim=True).sqrt() + 1e-2)
    design = (torch.cat([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], -1) * weight_B11).flatten(0, 1)
    solved = solve(design, patchify(audio_BCN * weight_B11, PATCH).flatten(0, 1), 1e-4)
    waves = solved.unflatten(0, (3, LOW)).unflatten(2, (2, PATCH)).flip(0).permute(1, 2, 0, 3).flatten(2)
    n = torch.arange(513) - 256  # the edges of patches would be heard above the low frequencies
    kernel = torch.sinc(2 * CUT / RATE * n) * torch.kaiser_window(513, False, 6.0)
    kernel = (kernel / kernel.sum())[None, None]
    waves = nn.functional.conv1d(waves.flatten(0, 1)[:, None], kernel, padding="same").view(LOW, 2, -1)
    levels = compute_levels(patches_LK).sqrt().mean(0)
    for _ in range(4):
        weight = torch.zeros(2 * PATCH, D, 3)
        for tap in range(3):
            part = slice((2 - tap) * PATCH, (3 - tap) * PATCH)
            weight[:, :LOW, tap] = waves[..., part].flatten(1).T
            weight[:, HIGH : HIGH + ATOMS, tap] = atoms[..., part].flatten(1).T
        set_mapping(stack, weight)
        made_BCN = model.decode(model.encode(audio_BCN), generator=torch.Generator().manual_seed(0))
        found = compute_levels(patchify(made_BCN, PATCH).flatten(0, 1)).sqrt().mean(0)
        atoms = atoms * (levels / found).square().clamp(0.3, 3)[owners - WIDE_AT][:, None, None]


@torch.no_grad()
def set_start(model: Autoencoder, audio_BCN: Tensor) -> None:
    """Set an autoencoder of `build_codec` by components and least squares of some audio."""
    even_BCN = audio_BCN / (audio_BCN.square().mean((1, 2), keepdim=True).sqrt() + 1e-2)
    patches_LK, even_LK = (patchify(x, PATCH).flatten(0, 1) for x in (audio_BCN, even_BCN))
    low_LK = find_low(even_LK)
    low_LK = low_LK * LOUD / (patches_LK @ low_LK.T).square().mean().sqrt()
    loud = 0.1 * compute_levels(even_LK).square().mean(0).sqrt() + 1e-6
    set_encoder(model, patches_LK, even_LK, low_LK, loud)
    n = torch.arange(3 * PATCH) + 0.5
    sine = torch.sin(math.pi * (n / PATCH - 0.5) / 2) * ((n > PATCH / 2) & (n < 2.5 * PATCH))
    atoms, owners = make_atoms(sine.square(), sine, grid=True, seed=2)
    shares = set_decoder(model, owners)
    stack = model.encoder.resampler
    tokens_LD = stack.mapping(patches_LK)
    tokens_LD = tokens_LD + stack.transformers[0].ff(stack.transformers[0].ff_norm(tokens_LD))
    shape = (len(audio_BCN), audio_BCN.shape[-1] // FRAME)
    frames_LD = stack(patches_LK, (shape[1],) * shape[0], None)
    set_latents(model, frames_LD.unflatten(0, shape), tokens_LD.unflatten(0, (-1, STRIDE)), shares)
    counts = torch.tensor([2.0] * 2 * NARROW + [float(n) for n in PLAYED.values() for _ in range(n)])
    atoms = atoms * (loud[owners - WIDE_AT] / LEVEL / counts.sqrt())[:, None, None]
    set_output(model, audio_BCN, low_LK, atoms, owners)
