"""The parts that both transformers are made of: rotary positions, Fourier features, gated feed-forward, attention.

Formulas: docs/model.md, sections 2 to 4. Module and parameter names are those of the released files.
Shape legend: B batch, L tokens, M context tokens, H heads, D width (or head width), N differential streams.
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


def compute_fourier_features(t_B: Tensor, width: int = FOURIER_FEATURES) -> Tensor:
    """Compute cos and sin at `width / 2` frequencies from 0.5 to 10 000, evenly spaced in log.

    The order of operations is the released one: others differ by up to 1e-2 in fp32.

    Args:
        t_B: Numbers from 0 to 1.
        width: Features, half of them cosines.

    Returns:
        (B, width) in fp32.
    """
    low, high = math.log(0.5), math.log(10_000.0)
    ramp = torch.linspace(0, 1, width // 2, device=t_B.device, dtype=torch.float32)
    frequencies = torch.exp(ramp * (high - low) + low)
    arguments = (t_B.float()[:, None] * frequencies) * 2 * math.pi
    return torch.cat((arguments.cos(), arguments.sin()), dim=-1)


class FourierFeatures(nn.Module):
    """`compute_fourier_features` as a step of an `nn.Sequential`."""

    def __init__(self, width: int = FOURIER_FEATURES) -> None:
        super().__init__()
        self.width = width

    def forward(self, t_B: Tensor) -> Tensor:
        return compute_fourier_features(t_B, self.width)


def compute_rotary_frequencies(device: torch.device | str | None = None) -> Tensor:
    """Compute the frequencies of rotary positions.

    Args:
        device: Where they are needed.

    Returns:
        (16,) in fp32.
    """
    exponents = torch.arange(0, ROTARY_WIDTH, 2, device=device, dtype=torch.float32) / ROTARY_WIDTH
    return 1.0 / ROTARY_BASE**exponents


class Rotary(nn.Module):
    """Rotary positions over the first half of each head (Su et al. 2021).

    The buffer exists because the released files contain it. Angles come from the constant instead, so that a module
    cast to 16 bits keeps exact positions. Its output is cos and sin, each (L, 1, 32) in fp32, for broadcasting over
    heads.
    """

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        # On the meta device `arange` would import torch's compiler: seconds at every start.
        self.register_buffer("inv_freq", compute_rotary_frequencies("cpu").to(torch.get_default_device()))

    def forward(self, positions_L: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions_L.float()[:, None] * compute_rotary_frequencies(positions_L.device)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos(), angles.sin()


def expand_to_head(rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Expand rotary tables to all dimensions of a head, which `rotate` applies in fewer passes.

    Args:
        rotary: Cos and sin, each (L, 1, 32).

    Returns:
        Cos and signed sin, each (L, 1, 64): 1 and 0 at the dimensions that are not rotated.
    """
    cos_L1R, sin_L1R = rotary
    rest = HEAD_WIDTH - ROTARY_WIDTH
    signed_L1R = torch.cat((-sin_L1R[..., : ROTARY_WIDTH // 2], sin_L1R[..., ROTARY_WIDTH // 2 :]), dim=-1)
    return F.pad(cos_L1R, (0, rest), value=1.0), F.pad(signed_L1R, (0, rest))


def rotate(x_BLHD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first 32 dimensions of each head, half-split, in fp32.

    Args:
        x_BLHD: Queries or keys; more dimensions may stand between L and D.
        rotary: Tables of `Rotary`, or those of `expand_to_head`.

    Returns:
        Rotated values in the dtype of `x_BLHD`.
    """
    cos, sin = rotary
    if cos.shape[-1] == HEAD_WIDTH:
        between = (1,) * (x_BLHD.ndim - 3)
        cos, sin = (table.view(-1, *between, HEAD_WIDTH) for table in rotary)
        half = ROTARY_WIDTH // 2
        swapped = (x_BLHD[..., half:ROTARY_WIDTH], x_BLHD[..., :half], x_BLHD[..., ROTARY_WIDTH:])
        return torch.addcmul(x_BLHD * cos, torch.cat(swapped, dim=-1), sin).to(x_BLHD.dtype)
    rotated, rest = x_BLHD[..., :ROTARY_WIDTH].float(), x_BLHD[..., ROTARY_WIDTH:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated.to(x_BLHD.dtype), rest), dim=-1)


class GatedLinear(nn.Module):
    """A linear map to twice the width; one half times the activation of the other (Shazeer 2020)."""

    def __init__(self, width: int, inner: int, activation: Literal["silu", "sine"]) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        if self.activation == "silu":
            return value * F.silu(gate, inplace=cpu_kernels.is_supported(gate))
        return value * torch.sin(math.pi * gate)


class FeedForward(nn.Module):
    """Gated feed-forward with inner width `mult` x width."""

    def __init__(self, width: int, mult: float, activation: Literal["silu", "sine"] = "silu") -> None:
        super().__init__()
        inner = int(width * mult)
        self.ff = nn.Sequential(GatedLinear(width, inner, activation), nn.Identity(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x)


def _norm_and_rotate_pair(
    q_norm: RMSNorm, k_norm: RMSNorm, x_BLNHD: Tensor, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Normalize and rotate queries and keys, (B, L, 2, H, D), in one go by tables of `expand_to_head`."""
    gamma_N1D = torch.stack((q_norm.gamma, k_norm.gamma))[:, None]
    unit_BLNHD = F.rms_norm(x_BLNHD, (HEAD_WIDTH,), None, q_norm.eps).to(x_BLNHD.dtype)
    return rotate(unit_BLNHD * gamma_N1D.to(x_BLNHD.dtype), rotary).unbind(dim=2)


def normalize_and_rotate(norm: "DynamicTanh | RMSNorm", x_BLHD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Compute `rotate(norm(x))` of queries or keys, by the fast CPU path where it applies.

    Args:
        norm: Norm over the head dimension.
        x_BLHD: Queries or keys.
        rotary: Tables of `Rotary`.

    Returns:
        (B, L, H, D).
    """
    if not cpu_kernels.is_supported(x_BLHD):
        return rotate(norm(x_BLHD), rotary)
    unit_BLHD, beta = norm.normalize(x_BLHD), norm.beta if isinstance(norm, DynamicTanh) else None
    tables = cpu_kernels.build_rotation_tables(norm.gamma, beta, rotary, unit_BLHD.dtype)
    return cpu_kernels.apply_rotation(unit_BLHD, tables).to(x_BLHD.dtype)


def _norm_head_major(norm: "RMSNorm", x_BLHD: Tensor) -> Tensor:
    """Compute `norm(x)` of queries or keys without positions."""
    if not cpu_kernels.is_supported(x_BLHD):
        return norm(x_BLHD)
    return cpu_kernels.copy_head_major(norm.normalize(x_BLHD).mul_(norm.gamma.float()), x_BLHD.dtype)


def split_heads(x_BLC: Tensor, streams: int) -> tuple[Tensor, ...]:
    """Split the output of a projection into streams and heads.

    Args:
        x_BLC: (B, L, streams * H * 64).
        streams: Number of streams, such as 3 for q, k and v.

    Returns:
        Streams, each (B, L, H, 64).
    """
    return x_BLC.unflatten(-1, (streams, -1, HEAD_WIDTH)).unbind(dim=2)


class SelfAttention(nn.Module):
    """Rotary self-attention, plain or differential (the first attention minus the second; Ye et al. 2024).

    `to_qkv` has q, k, v or q, k, v, q', k'. One query norm and one key norm serve both branches. Given `kept`, only
    these tokens are returned.
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
        streams_BLNHD = self.to_qkv(x_BLD).unflatten(-1, (self.streams, -1, HEAD_WIDTH))
        v_BLHD = streams_BLNHD[:, :, 2]
        branch = self._branch if kept is None else functools.partial(self._branch_kept, kept)
        out_BLHD = branch(streams_BLNHD[:, :, :2], v_BLHD, rotary, pattern)
        if self.streams == 5:
            out_BLHD = out_BLHD - branch(streams_BLNHD[:, :, 3:], v_BLHD, rotary, pattern)
        return self.to_out(out_BLHD.flatten(2))

    def _branch(self, pair_BLNHD: Tensor, v_BLHD: Tensor, rotary: tuple[Tensor, Tensor], pattern: Pattern) -> Tensor:
        """Attend by one pair of queries and keys, N = 2."""
        q_norm, k_norm = self.q_norm, self.k_norm
        if rotary[0].shape[-1] == HEAD_WIDTH and isinstance(q_norm, RMSNorm) and isinstance(k_norm, RMSNorm):
            q_BLHD, k_BLHD = _norm_and_rotate_pair(q_norm, k_norm, pair_BLNHD, rotary)
        else:
            q_BLHD, k_BLHD = pair_BLNHD.unbind(dim=2)
            q_BLHD, k_BLHD = normalize_and_rotate(q_norm, q_BLHD, rotary), normalize_and_rotate(k_norm, k_BLHD, rotary)
        return attend(q_BLHD, k_BLHD, v_BLHD, pattern)

    def _branch_kept(
        self, kept: slice, pair_BLNHD: Tensor, v_BLHD: Tensor, rotary: tuple[Tensor, Tensor], pattern: Pattern
    ) -> Tensor:
        """Attend for the kept queries only; a pattern is of all queries, so there they are picked afterwards."""
        if pattern is not None:
            return self._branch(pair_BLNHD, v_BLHD, rotary, pattern)[:, kept]
        cos, sin = rotary
        q_BLHD = normalize_and_rotate(self.q_norm, pair_BLNHD[:, kept, 0], (cos[kept], sin[kept]))
        return attend(q_BLHD, normalize_and_rotate(self.k_norm, pair_BLNHD[:, :, 1], rotary), v_BLHD)


class CrossAttention(nn.Module):
    """Attention from tokens to a context, plain or differential, without positions.

    `to_q` has q or q, q'; `to_kv` has k, v or k, k', v. Keys and values depend on the context alone, so
    `project_context` computes them once for a whole generation.
    """

    def __init__(self, width: int, norm: "functools.partial[RMSNorm]", differential: bool) -> None:
        super().__init__()
        self.streams = 2 if differential else 1
        self.to_q = nn.Linear(width, self.streams * width, bias=False)
        self.to_kv = nn.Linear(width, (self.streams + 1) * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = norm(HEAD_WIDTH)
        self.k_norm = norm(HEAD_WIDTH)

    def project_context(self, context_BMD: Tensor) -> tuple[Tensor, ...]:
        """Compute keys and values.

        Args:
            context_BMD: Context tokens.

        Returns:
            Normalized keys (one or two) and values, each (B, M, H, 64).
        """
        *keys, values = split_heads(self.to_kv(context_BMD), self.streams + 1)
        values = cpu_kernels.copy_head_major(values, values.dtype) if cpu_kernels.is_supported(values) else values
        return (*(_norm_head_major(self.k_norm, key) for key in keys), values)

    def forward(self, x_BLD: Tensor, context: tuple[Tensor, ...], pattern: Pattern = None) -> Tensor:
        *keys, values = context
        queries = [_norm_head_major(self.q_norm, query) for query in split_heads(self.to_q(x_BLD), self.streams)]
        out_BLHD = attend(queries[0], keys[0], values, pattern)
        if len(keys) == 2:
            out_BLHD = out_BLHD - attend(queries[1], keys[1], values, pattern)
        return self.to_out(out_BLHD.flatten(2))
