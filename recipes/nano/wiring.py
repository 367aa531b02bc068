"""Attention by hand in a SAME chunk: layers that fetch from given places, and an encoder wired that way.

A frame of 4096 samples is four quarters of four patches. The encoder's first layer lets every patch fetch its three
predecessors (three heads that look 1, 2 and 3 tokens back), its second lets the frame's new token fetch from the last
patch of each quarter. What is not needed starts at zero output and can learn. Two stream channels are taken: CONST (a
one, from the norm's beta) and MARK (new or frame token).

Shapes: D = 256 stream, 4 heads of 64. State names are those of released SAME files; the architecture is nano's (encoder
depth 2, decoder depth 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

D, HEADS = 256, 4
MARK, CONST = 254, 255
SLOPE = 0.006  # alpha of the norms: small enough that tanh is near linear for loud drums too
MARKED = math.tanh(SLOPE) / SLOPE  # the norm's output where the stream holds a 1
THETA = 10000.0 ** (-torch.arange(16, dtype=torch.float64) / 16)

State = dict[str, Tensor]


def look_back(offset: float) -> tuple[Tensor, Tensor]:
    """Compute query and key (before their norm, over 32 rotary channels) whose product peaks `offset` tokens back."""
    query, key, reach = torch.zeros(32), torch.zeros(32), math.tanh(2.0)
    query[:16] = math.atanh(reach)
    key[:16] = torch.atanh(reach * torch.cos(THETA * offset))
    key[16:] = torch.atanh(reach * torch.sin(THETA * offset))
    return query, key


class Layer:
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
        """Return the (64, D) rows of part 0..4 (q, k, v, q', k') of a head."""
        start = part * D + 64 * head
        return self["self_attn.to_qkv.weight"][start : start + 64]

    def clear(self, head: int) -> None:
        """Clear the random initialization of a head's attention, which is set by hand."""
        for part in range(5):
            self.rows(part, head).zero_()


class FeedForward:
    """A layer's gated feed-forward, whose units are set one after the other."""

    def __init__(self, layer: Layer) -> None:
        self.into, self.bias = layer["ff.ff.0.proj.weight"], layer["ff.ff.0.proj.bias"]
        self.out, self.taken = layer["ff.ff.2.weight"], 0

    def unit(
        self,
        value: Tensor | dict[int, float],
        gate: Tensor | dict[int, float],
        out: dict[int, float],
        value_bias: float = 0.0,
        gate_bias: float = 0.0,
    ) -> None:
        """Set one unit: out += (value x + value_bias) * act(gate x + gate_bias), by stream channel."""
        unit, inner = self.taken, 3 * D
        self.taken += 1
        for row, weights, bias in ((unit, value, value_bias), (inner + unit, gate, gate_bias)):
            self.into[row] = weights if isinstance(weights, Tensor) else _row(weights)
            self.bias[row] = bias
        self.out[:, unit] = _row(out)


def _row(weights: dict[int, float]) -> Tensor:
    row = torch.zeros(D)
    for channel, weight in weights.items():
        row[channel] = weight
    return row


def see_frame(layer: Layer, head: int, centre: float) -> None:
    """Let a head attend to the frame token from positions in its band around `centre`, and to nothing from others."""
    layer.clear(head)
    query, key = look_back(centre)
    layer.rows(0, head)[:32, CONST], layer.rows(1, head)[:32, MARK] = query, key / MARKED
    layer.rows(0, head)[40, CONST], layer.rows(1, head)[40, MARK] = 2, -2 / MARKED
    layer.rows(3, head)[40, CONST], layer.rows(4, head)[40, MARK] = 2, -2 / MARKED  # q'k': never the frame
    layer.rows(2, head)[63, MARK] = 1 / MARKED


def wire_encoder(state: State, copied: int, prefix: str = "encoder.layers.0") -> list[Layer]:
    """Both layers' attention in place: a patch's first `copied` channels are fetched 1, 2 and 3 patches later (behind
    the patch's own), and head h of the second layer sees the last patch of quarter h, its values left to be set.
    """
    state[f"{prefix}.mapping.bias"].zero_()
    state[f"{prefix}.new_tokens"].zero_()[..., MARK] = 1
    first, second = (Layer(state, f"{prefix}.transformers.{index}", 7.5, 10.0) for index in range(2))
    for head in range(HEADS):
        for layer, offset in ((first, head + 1), (second, 13 - 4 * head)):
            layer.clear(head)
            query, key = look_back(offset)
            layer.rows(0, head)[:32, CONST] = query
            layer.rows(1, head)[:32, CONST] = key
            layer.rows(3, head)[40, CONST] = 2  # the subtracted branch looks at new tokens, which hold nothing
            layer.rows(4, head)[40, MARK] = 2 / MARKED
        first.rows(0, head)[:32, MARK] = -first.rows(0, head)[:32, CONST] / MARKED  # new tokens fetch nothing yet
        first.rows(0, head)[40, MARK] = first.rows(1, head)[40, MARK] = 2 / MARKED
        if head < 3:
            first.rows(2, head)[:copied, :copied] = torch.eye(copied)
            spots = slice(copied * (head + 1), copied * (head + 2))
            first["self_attn.to_out.weight"][spots, 64 * head : 64 * head + copied] = torch.eye(copied)
        else:
            torch.nn.init.normal_(first.rows(2, head), std=0.02)
    return [first, second]
