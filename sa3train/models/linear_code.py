"""A linear code as SAME weights: nano's autoencoder set by hand to compute a block PCA, before any training.

A frame of 4096 samples is four quarters of four patches. The encoder's first layer lets every patch fetch its three
predecessors (three heads that look 1, 2 and 3 tokens back), its second lets the frame's new token fetch the four
quarters' 62 to 64 principal components. The decoder's first layer hands each output token its quarter's components,
the second and third add where in the quarter the token stands, and the last feed-forward picks one of sixteen maps
back to a patch. What is not needed starts at zero output and can learn. Two stream channels are taken: CONST (a one,
from the norm's beta) and MARK (new or frame token).

Shapes: F frames, S patches of a frame, P patch values, N patches, D = 256 stream, 4 heads of 64, C latent channels.
State names are those of released SAME files; the architecture is nano's (encoder depth 2, decoder depth 3).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

D, HEADS, PATCH_DIMS, KEPT, PATCH_OUT = 256, 4, 64, 62, 48
MARK, CONST = 254, 255
LOUD = 3.0  # spread of the strongest component in the stream: far above the 0.01 of noise in new tokens
SLOPE = 0.006  # alpha of the norms: small enough that tanh is near linear for loud drums too
MARKED = math.tanh(SLOPE) / SLOPE  # the norm's output where the stream holds a 1
THETA = 10000.0 ** (-torch.arange(16, dtype=torch.float64) / 16)
GATE = 6.0  # what a feed-forward's gate gets where it is to be open; its negative shuts it

State = dict[str, Tensor]


@dataclass
class Code:
    """The block PCA: `patch` (64, 512) and `quarter` (64, 256) orthonormal rows, with the spread of their outputs."""

    patch: Tensor
    patch_std: Tensor
    quarter: Tensor
    quarter_std: Tensor

    @property
    def patch_scale(self) -> Tensor:
        """Stream value per patch component: half whitened, so that weak ones are heard by what learns later."""
        return LOUD / (self.patch_std * self.patch_std[0]).sqrt()

    @property
    def quarter_scale(self) -> Tensor:
        """Stream value per quarter component, likewise."""
        return LOUD / (self.quarter_std * self.quarter_std[0]).sqrt()


def fit(patches_FSP: Tensor) -> Code:
    """The code of frames of 16 patches, (F, 16, 512), each clip scaled to one loudness beforehand."""
    x_NP = patches_FSP.reshape(-1, 512).double()
    values, vectors = torch.linalg.eigh(x_NP.T @ x_NP / len(x_NP))
    patch = vectors.flip(1)[:, :PATCH_DIMS].T
    coefficients = (x_NP @ patch.T).view(-1, 4, 4, PATCH_DIMS).flip(2)  # newest patch first, as the stream holds them
    coefficients[:, :, 3, PATCH_DIMS - 2 :] = 0  # these two channels are MARK and CONST
    y_ND = coefficients.reshape(-1, D)
    spread, basis = torch.linalg.eigh(y_ND.T @ y_ND / len(y_ND))
    quarter = basis.flip(1)[:, :PATCH_DIMS].T
    tiny = 1e-12
    return Code(
        patch,
        values.flip(0)[:PATCH_DIMS].clamp_min(tiny).sqrt(),
        quarter,
        spread.flip(0)[:PATCH_DIMS].clamp_min(tiny).sqrt(),
    )


def _look_back(offset: float, strength: float, pairs: slice = slice(0, 16)) -> tuple[Tensor, Tensor]:
    """Query and key (before their norm, over the 32 rotary channels) whose product peaks `offset` tokens back."""
    query, key, reach = torch.zeros(32).double(), torch.zeros(32).double(), math.tanh(2.0) * strength
    query[:16][pairs] = math.atanh(reach)
    key[:16][pairs] = torch.atanh(reach * torch.cos(THETA * offset))[pairs]
    key[16:][pairs] = torch.atanh(reach * torch.sin(THETA * offset))[pairs]
    return query, key


class _Layer:
    """Writes one transformer layer's tensors in place. Row blocks of to_qkv: q, k, v, q', k'."""

    def __init__(self, state: State, prefix: str, rotary_gain: float, mark_gain: float) -> None:
        self.prefix, self.state = prefix, state
        for norm in ("pre_norm", "ff_norm"):
            self[f"{norm}.alpha"].fill_(SLOPE)
            self[f"{norm}.gamma"].fill_(1 / SLOPE)
            self[f"{norm}.beta"].zero_()
        self["pre_norm.gamma"][CONST], self["pre_norm.beta"][CONST] = 0, 1
        for norm in ("q_norm", "k_norm"):
            self[f"self_attn.{norm}.alpha"].fill_(1)
            self[f"self_attn.{norm}.gamma"][:32] = rotary_gain / math.tanh(2.0)
            self[f"self_attn.{norm}.gamma"][40] = mark_gain / math.tanh(2.0)
        self["self_attn.to_qkv.weight"].mul_(0.02)  # a little of the random start stays, to break ties
        self["self_attn.to_out.weight"].zero_()
        self["ff.ff.2.weight"].zero_()
        self["ff.ff.2.bias"].zero_()

    def __getitem__(self, name: str) -> Tensor:
        return self.state[f"{self.prefix}.{name}"]

    def rows(self, part: int, head: int) -> Tensor:
        """The (64, D) rows of part 0..4 (q, k, v, q', k') of one head."""
        start = part * D + 64 * head
        return self["self_attn.to_qkv.weight"][start : start + 64]

    def clear(self, head: int) -> None:
        """No random part in this head's attention: it is set by hand."""
        for part in range(5):
            self.rows(part, head).zero_()


def _encoder(state: State, code: Code, prefix: str) -> None:
    block = f"{prefix}layers.0"
    weight = code.patch * code.patch_scale[:, None]
    state[f"{block}.mapping.weight_g"].zero_()
    state[f"{block}.mapping.weight_g"][:PATCH_DIMS, 0, 0] = weight.norm(dim=1).float()
    state[f"{block}.mapping.weight_v"][:PATCH_DIMS, :, 0] = weight.float()
    state[f"{block}.mapping.bias"].zero_()
    state[f"{block}.new_tokens"].zero_()[..., MARK] = 1
    first, second = (_Layer(state, f"{block}.transformers.{i}", 7.5, 10.0) for i in range(2))
    for head in range(HEADS):
        for layer, offset in ((first, head + 1), (second, 13 - 4 * head)):
            layer.clear(head)
            query, key = _look_back(offset, 1.0)
            layer.rows(0, head)[:32, CONST] = query.float()
            layer.rows(1, head)[:32, CONST] = key.float()
            layer.rows(3, head)[40, CONST] = 2  # the subtracted branch looks at new tokens, which hold nothing
            layer.rows(4, head)[40, MARK] = 2 / MARKED
        first.rows(0, head)[:32, MARK] = -first.rows(0, head)[:32, CONST] / MARKED  # new tokens fetch nothing yet
        first.rows(0, head)[40, MARK] = first.rows(1, head)[40, MARK] = 2 / MARKED
        kept = PATCH_DIMS if head < 2 else KEPT
        if head < 3:
            first.rows(2, head)[:, :PATCH_DIMS] = torch.eye(PATCH_DIMS)
            first["self_attn.to_out.weight"][64 * (head + 1) :, 64 * head :][:kept, :kept] = torch.eye(kept)
        else:
            torch.nn.init.normal_(first.rows(2, head), std=0.02)
        scale = code.patch_scale.repeat(4)
        take = code.quarter * code.quarter_scale[:, None] / scale
        take[:, [MARK, CONST]] = 0
        second.rows(2, head).copy_(take.float())
        kept = PATCH_DIMS if head < 3 else KEPT
        second["self_attn.to_out.weight"][64 * head :, 64 * head :][:kept, :kept] = torch.eye(kept)
    spread = code.quarter_std * code.quarter_scale
    state[f"{prefix}layers.2.weight"].copy_(torch.diag(1 / spread.repeat(4)).float())
    state[f"{prefix}layers.2.weight"][:, [MARK, CONST]] = 0
    state[f"{prefix}layers.2.bias"].zero_()


def _gate_weights(place: int) -> tuple[Tensor, float]:
    """Weights of the six flags (four quarters, later half, middle) and bias: +GATE at `place` 0..15, else at most
    -GATE.
    """
    weights, bias = torch.zeros(6), -5.0
    weights[place // 4] = 2
    for flag, raised in ((4, place % 4 in (2, 3)), (5, place % 4 in (1, 2))):
        weights[flag] = 2 if raised else -2
        bias += 0 if raised else 2
    return GATE * weights, GATE * bias


def _see_frame(layer: _Layer, head: int, centre: float) -> None:
    """This head sees the frame token from places within its band round `centre`, and nothing from elsewhere."""
    layer.clear(head)
    query, key = _look_back(centre, 1.0)
    layer.rows(0, head)[:32, CONST], layer.rows(1, head)[:32, MARK] = query.float(), key.float() / MARKED
    layer.rows(0, head)[40, CONST], layer.rows(1, head)[40, MARK] = 2, -2 / MARKED
    layer.rows(3, head)[40, CONST], layer.rows(4, head)[40, MARK] = 2, -2 / MARKED  # q'k': never the frame
    layer.rows(2, head)[63, MARK] = 1 / MARKED


def _decoder(state: State, code: Code, prefix: str) -> None:
    block = f"{prefix}layers.3"
    spread = (code.quarter_std * code.quarter_scale).repeat(4)
    state[f"{prefix}layers.1.weight"].copy_(torch.diag(spread).float())
    state[f"{prefix}layers.1.weight"][[MARK, CONST]] = 0
    state[f"{prefix}layers.1.bias"].zero_()[MARK] = 1
    state[f"{block}.new_tokens"].zero_()
    wide, narrow = (math.sqrt(8 * 6.7), math.sqrt(8 * 88.6)), (math.sqrt(8 * 8.8), math.sqrt(8 * 130.2))
    first, second, third = (
        _Layer(state, f"{block}.transformers.{i}", *gain) for i, gain in enumerate((wide, narrow, narrow))
    )
    for head in range(HEADS):
        _see_frame(first, head, 4 * head + 2.5)  # its quarter
        _see_frame(second, head, 4 * head + 3.5)  # the later half of a quarter
        _see_frame(third, head, 4 * head + 2.5)  # the middle of a quarter
        first.rows(2, head)[:KEPT, 64 * head : 64 * head + KEPT] = torch.eye(KEPT)
        first["self_attn.to_out.weight"][:KEPT, 64 * head : 64 * head + KEPT] = torch.eye(KEPT)
        for layer, channel in ((first, 64 + head), (second, 68), (third, 69)):
            layer["self_attn.to_out.weight"][channel, 64 * head + 63] = 1
        for layer in (second, third):
            torch.nn.init.normal_(layer.rows(2, head)[:63], std=0.02)
    into, into_bias, out = third["ff.ff.0.proj.weight"], third["ff.ff.0.proj.bias"], third["ff.ff.2.weight"]
    into.zero_()
    into_bias.zero_()
    for place in range(16):
        units = slice(PATCH_OUT * place, PATCH_OUT * (place + 1))
        slot = PATCH_DIMS * (3 - place % 4)
        back = code.quarter[:KEPT, slot : slot + PATCH_OUT].T / code.quarter_scale[:KEPT]
        into[units, :KEPT] = (back * code.patch_scale[:PATCH_OUT, None]).float()
        weights, bias = _gate_weights(place)
        into[3 * D :][units, 64:70] = weights * SLOPE / math.tanh(SLOPE)  # the norm bends a flag of 1 a little
        into_bias[3 * D :][units] = bias
        out[128 : 128 + PATCH_OUT, units] = torch.eye(PATCH_OUT) / GATE
    mapping = torch.zeros(512, D, 3, dtype=torch.float64)
    mapping[:, 128 : 128 + PATCH_OUT, 1] = (code.patch[:PATCH_OUT] / code.patch_scale[:PATCH_OUT, None]).T
    mapping += 1e-6 * torch.randn_like(mapping)
    state[f"{block}.mapping.weight_v"].copy_(mapping.float())
    state[f"{block}.mapping.weight_g"].copy_(mapping.norm(dim=(1, 2), keepdim=True).float())
    state[f"{block}.mapping.bias"].zero_()


@torch.no_grad()
def start_linear(state: State, code: Code) -> None:
    """Overwrite a SAME state dict (chunked, width 256, encoder depth 2, decoder depth 3, latents 256) in place."""
    _encoder(state, code, "encoder.")
    _decoder(state, code, "decoder.")


@torch.no_grad()
def fold_scale(state: State, gain_C: Tensor, mean_C: Tensor) -> None:
    """Shift latents by -mean and scale them by gain in the bottleneck, and undo both in the decoder's first layer."""
    state["bottleneck.scaling_factor"].copy_(gain_C[None, :, None])
    state["bottleneck.bias"].copy_((-mean_C * gain_C)[None, :, None])
    weight, bias = state["decoder.layers.1.weight"], state["decoder.layers.1.bias"]
    bias += weight @ mean_C
    weight /= gain_C[None, :]


@torch.no_grad()
def load_linear_code(state: State, path: Path) -> None:
    """`start_linear` and `fold_scale` with the components and scales kept in a file of a tenth of a megabyte."""
    kept = {name: tensor.float() for name, tensor in load_file(path).items()}
    parts = ("patch", "patch_std", "quarter", "quarter_std")
    start_linear(state, Code(*(kept[name].double() for name in parts)))
    gain_C = kept["scaling_factor"]
    fold_scale(state, gain_C, -kept["bias"] / gain_C)
    state["bottleneck.running_std"].copy_(kept["running_std"])
