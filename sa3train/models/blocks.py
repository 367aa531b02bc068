"""The parts both transformers are made of: rotary positions, Fourier features, gated feed-forward, attention.

Shape legend: B batch, L tokens, M context tokens, H heads, D width (or head width), N differential streams.
Module and parameter names are those of the released files.
"""

import functools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3train.models import cpu_kernels
from sa3train.models.attention import Pattern, attend
from sa3train.models.config import FOURIER_FEATURES, HEAD_WIDTH
from sa3train.models.norms import DynamicTanh, RMSNorm

ROTARY_WIDTH = HEAD_WIDTH // 2
ROTARY_BASE = 10_000.0


def fourier_features(t_B: Tensor, width: int = FOURIER_FEATURES) -> Tensor:
    """cos and sin of `t` at `width / 2` frequencies from 0.5 to 10 000, evenly spaced in log; (B, width) fp32.

    The order of operations is the released one: others differ by up to 1e-2 in fp32.
    """
    low, high = math.log(0.5), math.log(10_000.0)
    ramp = torch.linspace(0, 1, width // 2, device=t_B.device, dtype=torch.float32)
    frequencies = torch.exp(ramp * (high - low) + low)
    arguments = (t_B.float()[:, None] * frequencies) * 2 * math.pi
    return torch.cat((arguments.cos(), arguments.sin()), dim=-1)


class FourierFeatures(nn.Module):
    """`fourier_features` as a step of an `nn.Sequential`."""

    def __init__(self, width: int = FOURIER_FEATURES) -> None:
        super().__init__()
        self.width = width

    def forward(self, t_B: Tensor) -> Tensor:
        return fourier_features(t_B, self.width)


def inverse_frequencies(device: torch.device | str | None = None) -> Tensor:
    """Rotary frequencies (16,) fp32."""
    exponents = torch.arange(0, ROTARY_WIDTH, 2, device=device, dtype=torch.float32) / ROTARY_WIDTH
    return 1.0 / ROTARY_BASE**exponents


class Rotary(nn.Module):
    """Rotary positions over the first half of each head.

    The buffer is there because the released files hold it. Angles come from the constant instead, so that a module
    cast to 16 bits keeps exact positions.
    """

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        # On the meta device `arange` would import torch's compiler: seconds at every start.
        self.register_buffer("inv_freq", inverse_frequencies("cpu").to(torch.get_default_device()))

    def forward(self, positions_L: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each (L, 1, 32) fp32, ready to broadcast over heads."""
        angles = positions_L.float()[:, None] * inverse_frequencies(positions_L.device)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos(), angles.sin()


def whole_head(rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """cos and sin for all of a head's dimensions, (L, 1, 64), which turn it in fewer passes (`rotate`).

    Signs are in the sine; the dimensions that are not turned have cosine 1 and sine 0.
    """
    cos_L1R, sin_L1R = rotary
    rest = HEAD_WIDTH - ROTARY_WIDTH
    signed_L1R = torch.cat((-sin_L1R[..., : ROTARY_WIDTH // 2], sin_L1R[..., ROTARY_WIDTH // 2 :]), dim=-1)
    return F.pad(cos_L1R, (0, rest), value=1.0), F.pad(signed_L1R, (0, rest))


def rotate(x_BLHD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Half-split rotation of the first 32 of each head's dimensions, in fp32; the tables may be those of `whole_head`.

    Any number of dimensions may lie between L and D.
    """
    cos, sin = rotary
    if cos.shape[-1] == HEAD_WIDTH:
        between = (1,) * (x_BLHD.ndim - 3)
        cos, sin = (table.view(-1, *between, HEAD_WIDTH) for table in rotary)
        half = ROTARY_WIDTH // 2
        swapped = (x_BLHD[..., half:ROTARY_WIDTH], x_BLHD[..., :half], x_BLHD[..., ROTARY_WIDTH:])
        return torch.addcmul(x_BLHD * cos, torch.cat(swapped, dim=-1), sin).to(x_BLHD.dtype)
    turned, kept = x_BLHD[..., :ROTARY_WIDTH].float(), x_BLHD[..., ROTARY_WIDTH:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.to(x_BLHD.dtype), kept), dim=-1)


class GatedLinear(nn.Module):
    """Linear to twice the width; one half times the activation of the other."""

    def __init__(self, width: int, inner: int, activation: Literal["silu", "sine"]) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        if self.activation == "silu":
            return value * F.silu(gate, inplace=cpu_kernels.takes(gate))
        return value * torch.sin(math.pi * gate)


class FeedForward(nn.Module):
    """Gated feed-forward with inner width `mult` x width."""

    def __init__(self, width: int, mult: float, activation: Literal["silu", "sine"] = "silu") -> None:
        super().__init__()
        inner = int(width * mult)
        self.ff = nn.Sequential(GatedLinear(width, inner, activation), nn.Identity(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x)


def turned_pair(q_norm: RMSNorm, k_norm: RMSNorm, x_BLNHD: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Queries and keys, (B, L, 2, H, D), normed and turned in one go by tables of `whole_head`: two (B, L, H, D)."""
    gamma_N1D = torch.stack((q_norm.gamma, k_norm.gamma))[:, None]
    unit_BLNHD = F.rms_norm(x_BLNHD, (HEAD_WIDTH,), None, q_norm.eps).to(x_BLNHD.dtype)
    return rotate(unit_BLNHD * gamma_N1D.to(x_BLNHD.dtype), rotary).unbind(dim=2)


def normed_and_turned(norm: "DynamicTanh | RMSNorm", x_BLHD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """`rotate(norm(x))` of queries or keys."""
    if not cpu_kernels.takes(x_BLHD):
        return rotate(norm(x_BLHD), rotary)
    unit_BLHD, beta = norm.unit(x_BLHD), norm.beta if isinstance(norm, DynamicTanh) else None
    tables = cpu_kernels.turn_tables(norm.gamma, beta, rotary, unit_BLHD.dtype)
    return cpu_kernels.turned(unit_BLHD, tables).to(x_BLHD.dtype)


def normed_by_heads(norm: "RMSNorm", x_BLHD: Tensor) -> Tensor:
    """`norm(x)` of queries or keys without positions."""
    if not cpu_kernels.takes(x_BLHD):
        return norm(x_BLHD)
    return cpu_kernels.by_heads(norm.unit(x_BLHD).mul_(norm.gamma.float()), x_BLHD.dtype)


def heads(x_BLC: Tensor, streams: int) -> tuple[Tensor, ...]:
    """Split (B, L, streams * H * 64) into `streams` tensors (B, L, H, 64)."""
    return x_BLC.unflatten(-1, (streams, -1, HEAD_WIDTH)).unbind(dim=2)


class SelfAttention(nn.Module):
    """Rotary self-attention, plain or differential (the first attention minus the second).

    `to_qkv` holds q, k, v or q, k, v, q', k'. One q norm and one k norm serve both branches.
    """

    def __init__(self, width: int, norm: "type[DynamicTanh] | functools.partial[RMSNorm]", differential: bool) -> None:
        super().__init__()
        self.streams = 5 if differential else 3
        self.to_qkv = nn.Linear(width, self.streams * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = norm(HEAD_WIDTH)
        self.k_norm = norm(HEAD_WIDTH)

    def forward(
        self, x_BLD: Tensor, rotary: tuple[Tensor, Tensor], pattern: Pattern = None, kept: slice | None = None
    ) -> Tensor:
        """Of all tokens, or of those in `kept` alone."""
        streams_BLNHD = self.to_qkv(x_BLD).unflatten(-1, (self.streams, -1, HEAD_WIDTH))
        v_BLHD = streams_BLNHD[:, :, 2]
        branch = self._branch if kept is None else functools.partial(self._kept, kept)
        out_BLHD = branch(streams_BLNHD[:, :, :2], v_BLHD, rotary, pattern)
        if self.streams == 5:
            out_BLHD = out_BLHD - branch(streams_BLNHD[:, :, 3:], v_BLHD, rotary, pattern)
        return self.to_out(out_BLHD.flatten(2))

    def _branch(self, pair_BLNHD: Tensor, v_BLHD: Tensor, rotary: tuple[Tensor, Tensor], pattern: Pattern) -> Tensor:
        """Attention by a pair of queries and keys, N = 2."""
        q_norm, k_norm = self.q_norm, self.k_norm
        if rotary[0].shape[-1] == HEAD_WIDTH and isinstance(q_norm, RMSNorm) and isinstance(k_norm, RMSNorm):
            q_BLHD, k_BLHD = turned_pair(q_norm, k_norm, pair_BLNHD, rotary)
        else:
            q_BLHD, k_BLHD = pair_BLNHD.unbind(dim=2)
            q_BLHD, k_BLHD = normed_and_turned(q_norm, q_BLHD, rotary), normed_and_turned(k_norm, k_BLHD, rotary)
        return attend(q_BLHD, k_BLHD, v_BLHD, pattern)

    def _kept(
        self, kept: slice, pair_BLNHD: Tensor, v_BLHD: Tensor, rotary: tuple[Tensor, Tensor], pattern: Pattern
    ) -> Tensor:
        """`_branch` for the kept queries; a pattern is of all queries, so there they are picked from its outcome."""
        if pattern is not None:
            return self._branch(pair_BLNHD, v_BLHD, rotary, pattern)[:, kept]
        cos, sin = rotary
        q_BLHD = normed_and_turned(self.q_norm, pair_BLNHD[:, kept, 0], (cos[kept], sin[kept]))
        return attend(q_BLHD, normed_and_turned(self.k_norm, pair_BLNHD[:, :, 1], rotary), v_BLHD)


class CrossAttention(nn.Module):
    """Attention from tokens to a context, plain or differential, without positions.

    `to_q` holds q or q, q'; `to_kv` holds k, v or k, k', v. Keys and values depend on the context alone, so `context`
    gives them once for a whole generation.
    """

    def __init__(self, width: int, norm: "functools.partial[RMSNorm]", differential: bool) -> None:
        super().__init__()
        self.streams = 2 if differential else 1
        self.to_q = nn.Linear(width, self.streams * width, bias=False)
        self.to_kv = nn.Linear(width, (self.streams + 1) * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = norm(HEAD_WIDTH)
        self.k_norm = norm(HEAD_WIDTH)

    def context(self, context_BMD: Tensor) -> tuple[Tensor, ...]:
        """Normed keys (one or two) and values, each (B, M, H, 64)."""
        *keys, values = heads(self.to_kv(context_BMD), self.streams + 1)
        values = cpu_kernels.by_heads(values, values.dtype) if cpu_kernels.takes(values) else values
        return (*(normed_by_heads(self.k_norm, key) for key in keys), values)

    def forward(self, x_BLD: Tensor, context: tuple[Tensor, ...], pattern: Pattern = None) -> Tensor:
        *keys, values = context
        queries = [normed_by_heads(self.q_norm, query) for query in heads(self.to_q(x_BLD), self.streams)]
        out_BLHD = attend(queries[0], keys[0], values, pattern)
        if len(keys) == 2:
            out_BLHD = out_BLHD - attend(queries[1], keys[1], values, pattern)
        return self.to_out(out_BLHD.flatten(2))
