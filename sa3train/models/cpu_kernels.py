"""Elementwise work in fewer and faster passes, for forward passes on a CPU that need no gradient.

Same formulas as in `blocks.py`, which they are tested against: there the time goes into reading and writing, not into
arithmetic. Shape legend: B batch, L tokens, H heads, D head width (64).
"""

import functools

import torch
from torch import Tensor

Tables = tuple[Tensor, Tensor, Tensor]


def takes(x: Tensor) -> bool:
    """Whether `x` may go the quick way: on a CPU, without gradients, neither compiled nor in fp16."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and has_bf16_instructions())


@functools.cache
def has_bf16_instructions() -> bool:
    """Whether torch multiplies bf16 matrices by instructions made for it (AVX512-BF16, AMX)."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def tanh(x: Tensor) -> Tensor:
    """tanh by oneDNN: as exact as torch's own (7e-8 in fp32, the same bits in bf16) at two to four times its speed."""
    if not torch.backends.mkldnn.is_available():
        return torch.tanh(x)
    return x.to_mkldnn().tanh_().to_dense()


def turn_tables(gamma_D: Tensor, beta_D: Tensor | None, rotary: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tables:
    """`rotate(unit * gamma + beta)` as `unit * direct + swapped(unit) * crossed + offset`: the three tables.

    `direct` and `offset` (L, 1, D); `crossed` (L, 1, turned width), signs included.
    """
    cos_L1R, sin_L1R = rotary
    width = cos_L1R.shape[-1]
    gamma_D = gamma_D.float()
    direct_L1D = gamma_D.repeat(len(cos_L1R), 1, 1)
    direct_L1D[..., :width] *= cos_L1R
    signed_L1R = torch.cat((-sin_L1R[..., : width // 2], sin_L1R[..., width // 2 :]), dim=-1)
    crossed_L1R = swapped(gamma_D, width) * signed_L1R
    if beta_D is None:
        offset_L1D = torch.zeros_like(direct_L1D)
    else:
        beta_D = beta_D.float()
        offset_L1D = beta_D.repeat(len(cos_L1R), 1, 1)
        offset_L1D[..., :width] *= cos_L1R
        offset_L1D[..., :width] += swapped(beta_D, width) * signed_L1R
    return direct_L1D.to(dtype), crossed_L1R.to(dtype), offset_L1D.to(dtype)


def swapped(x: Tensor, width: int) -> Tensor:
    """The two halves of the first `width` of the last dimension in turned order."""
    half = width // 2
    return torch.cat((x[..., half:width], x[..., :half]), dim=-1)


def turned(unit_BLHD: Tensor, tables: Tables) -> Tensor:
    """Norm and rotary turn by `turn_tables`; laid out head by head in memory, as attention reads it."""
    direct_L1D, crossed_L1R, offset_L1D = tables
    batch, length, count, width = unit_BLHD.shape
    out_BLHD = unit_BLHD.new_empty(batch, count, length, width).transpose(1, 2)
    torch.addcmul(offset_L1D, unit_BLHD, direct_L1D, out=out_BLHD)
    turned_width = crossed_L1R.shape[-1]
    out_BLHD[..., :turned_width].addcmul_(swapped(unit_BLHD, turned_width), crossed_L1R)
    return out_BLHD


def by_heads(x_BLHD: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, laid out head by head in memory, so that attention does not copy it."""
    batch, length, count, width = x_BLHD.shape
    return x_BLHD.new_empty(batch, count, length, width, dtype=dtype).transpose(1, 2).copy_(x_BLHD)
