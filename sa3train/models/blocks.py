"""The parts both transformers are made of: norms, rotary positions, Fourier features, gated feed-forward, attention.

Shape legend: B batch, L tokens, M context tokens, H heads, D width (or head width), N differential streams.
Module and parameter names are those of the released files.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from sa3train.models import quick
from sa3train.models.attention import Pattern, attend
from sa3train.models.config import FOURIER_FEATURES, HEAD_WIDTH

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


def rotate(x_BLHD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Half-split rotation of the first 32 of each head's dimensions, in fp32."""
    cos, sin = rotary
    turned, kept = x_BLHD[..., :ROTARY_WIDTH].float(), x_BLHD[..., ROTARY_WIDTH:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.to(x_BLHD.dtype), kept), dim=-1)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / root mean square over the last dimension, kept, in fp32 without an fp32 copy of `x`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(norm.square() / x.shape[-1] + eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # one fused kernel there, a dozen operations elsewhere
            return F.rms_norm(x.float(), self.gamma.shape, self.gamma.float(), self.eps).to(x.dtype)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            out: Tensor = _Modulated.apply(x, self.gamma.float(), None, self.eps)
            return out
        return (x * inverse_rms(x, self.eps) * self.gamma.float()).to(x.dtype)

    def unit(self, x: Tensor) -> Tensor:
        """Before gamma, in fp32."""
        exact = x.float()
        return exact * inverse_rms(exact, self.eps)

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """`norm(x) * (1 + scale) + shift`, rounded once."""
        out: Tensor = _Modulated.apply(x, self.gamma.float() * (1 + scale.float()), shift.float(), self.eps)
        return out


def _modulated(sources: Sequence[Tensor]) -> Tensor:
    """x · scale · gain (+ shift), rounded once."""
    x, scale, gain, *shift = sources
    return (torch.addcmul(shift[0], x * scale, gain) if shift else x * scale * gain).to(x.dtype)


class _Modulated(Function):
    """RMS norm times `gain` plus `shift`, both broadcast over tokens; None adds nothing.

    For the backward pass it keeps x, which the residual stream keeps anyway. Autograd by itself would keep an fp32
    copy of the normed x as soon as the gain has a gradient, as it has when what makes it is adapted. From what it keeps
    its output can be made again, to the same bits: by `remake`, for a layer that needs it in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, shift: Tensor | None, eps: float) -> Tensor:
        sources = (x, inverse_rms(x, eps), gain) if shift is None else (x, inverse_rms(x, eps), gain, shift)
        ctx.save_for_backward(*sources)
        ctx.remake = _modulated
        return _modulated(sources)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, gain, *shift = ctx.saved_tensors
        wants_x, wants_gain, wants_shift, _ = ctx.needs_input_grad
        grad_x = grad_gain = grad_shift = None
        normed, grad = x * scale, grad.float()
        if wants_shift:
            grad_shift = grad.sum_to_size(shift[0].shape)
        if wants_gain:
            grad_gain = (grad * normed).sum_to_size(gain.shape)
        if wants_x:
            grad_normed = grad * gain
            share = (grad_normed * normed).mean(dim=-1, keepdim=True)
            grad_x = normed.mul_(share).sub_(grad_normed).mul_(-scale).to(x.dtype)
        return grad_x, grad_gain, grad_shift, None


class DynamicTanh(nn.Module):
    """`gamma * tanh(alpha * x) + beta`: a norm without statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 4.0))
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.gamma, self.unit(x))

    def unit(self, x: Tensor) -> Tensor:
        """Before gamma and beta."""
        scaled = self.alpha * x
        return quick.tanh(scaled) if quick.takes(scaled) else torch.tanh(scaled)


class GatedLinear(nn.Module):
    """Linear to twice the width; one half times the activation of the other."""

    def __init__(self, width: int, inner: int, activation: Literal["silu", "sine"]) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        if self.activation == "silu":
            return value * F.silu(gate, inplace=quick.takes(gate))
        return value * torch.sin(math.pi * gate)


class FeedForward(nn.Module):
    """Gated feed-forward with inner width `mult` x width."""

    def __init__(self, width: int, mult: float, activation: Literal["silu", "sine"] = "silu") -> None:
        super().__init__()
        inner = int(width * mult)
        self.ff = nn.Sequential(GatedLinear(width, inner, activation), nn.Identity(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x)


def normed_and_turned(norm: "DynamicTanh | RMSNorm", x_BLHD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """`rotate(norm(x))` of queries or keys."""
    if not quick.takes(x_BLHD):
        return rotate(norm(x_BLHD), rotary)
    unit_BLHD, beta = norm.unit(x_BLHD), norm.beta if isinstance(norm, DynamicTanh) else None
    return quick.turned(unit_BLHD, quick.turn_tables(norm.gamma, beta, rotary, unit_BLHD.dtype)).to(x_BLHD.dtype)


def normed_by_heads(norm: "RMSNorm", x_BLHD: Tensor) -> Tensor:
    """`norm(x)` of queries or keys without positions."""
    if not quick.takes(x_BLHD):
        return norm(x_BLHD)
    return quick.by_heads(norm.unit(x_BLHD).mul_(norm.gamma.float()), x_BLHD.dtype)


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

    def forward(self, x_BLD: Tensor, rotary: tuple[Tensor, Tensor], pattern: Pattern = None) -> Tensor:
        q, k, v, *second = heads(self.to_qkv(x_BLD), self.streams)
        out_BLHD = self._branch(q, k, v, rotary, pattern)
        if second:
            out_BLHD = out_BLHD - self._branch(second[0], second[1], v, rotary, pattern)
        return self.to_out(out_BLHD.flatten(2))

    def _branch(
        self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, rotary: tuple[Tensor, Tensor], pattern: Pattern
    ) -> Tensor:
        q_BLHD, k_BLHD = normed_and_turned(self.q_norm, q_BLHD, rotary), normed_and_turned(self.k_norm, k_BLHD, rotary)
        return attend(q_BLHD, k_BLHD, v_BLHD, pattern)


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
        values = quick.by_heads(values, values.dtype) if quick.takes(values) else values
        return (*(normed_by_heads(self.k_norm, key) for key in keys), values)

    def forward(self, x_BLD: Tensor, context: tuple[Tensor, ...], pattern: Pattern = None) -> Tensor:
        *keys, values = context
        queries = [normed_by_heads(self.q_norm, query) for query in heads(self.to_q(x_BLD), self.streams)]
        out_BLHD = attend(queries[0], keys[0], values, pattern)
        if len(keys) == 2:
            out_BLHD = out_BLHD - attend(queries[1], keys[1], values, pattern)
        return self.to_out(out_BLHD.flatten(2))
