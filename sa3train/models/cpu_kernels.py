"""Elementwise work in fewer and faster passes, for forward passes on a CPU that need no gradient.

The formulas are those of `blocks.py`, against which they are tested: there the time goes into reading and writing, not
into arithmetic. Shape legend: B batch, L tokens, H heads, D head width (64).
"""

import functools

import torch
from torch import Tensor

RotationTables = tuple[Tensor, Tensor, Tensor]


def is_supported(x: Tensor) -> bool:
    """Tell whether a tensor may take the fast path.

    Args:
        x: Tensor.

    Returns:
        Whether it is on a CPU, in fp32 or in bf16 with instructions for it, without gradients, and not being compiled.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and has_bf16_instructions())


@functools.cache
def has_bf16_instructions() -> bool:
    """Tell whether torch multiplies bf16 matrices by instructions made for it (AVX512-BF16, AMX).

    Returns:
        Whether it does on this machine.
    """
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compute_tanh(x: Tensor) -> Tensor:
    """Compute tanh by oneDNN: as exact as torch's (7e-8 in fp32, the same bits in bf16) at two to four times its speed.

    Args:
        x: Tensor on the CPU.

    Returns:
        tanh(x).
    """
    if not torch.backends.mkldnn.is_available():
        return torch.tanh(x)
    return x.to_mkldnn().tanh_().to_dense()


def build_rotation_tables(
    gamma_D: Tensor, beta_D: Tensor | None, rotary: tuple[Tensor, Tensor], dtype: torch.dtype
) -> RotationTables:
    """Build tables that norm and rotate in one pass.

    `rotate(unit * gamma + beta)` is `unit * direct + swap_halves(unit) * crossed + offset`.

    Args:
        gamma_D: Weight of the norm.
        beta_D: Bias of the norm; None where it has none.
        rotary: Cos and sin.
        dtype: Dtype of the tables.

    Returns:
        `direct` (L, 1, D), `crossed` (L, 1, rotated width) with the signs, and `offset` (L, 1, D).
    """
    cos_L1R, sin_L1R = rotary
    width = cos_L1R.shape[-1]
    gamma_D = gamma_D.float()
    direct_L1D = gamma_D.repeat(len(cos_L1R), 1, 1)
    direct_L1D[..., :width] *= cos_L1R
    signed_L1R = torch.cat((-sin_L1R[..., : width // 2], sin_L1R[..., width // 2 :]), dim=-1)
    crossed_L1R = swap_halves(gamma_D, width) * signed_L1R
    if beta_D is None:
        offset_L1D = torch.zeros_like(direct_L1D)
    else:
        beta_D = beta_D.float()
        offset_L1D = beta_D.repeat(len(cos_L1R), 1, 1)
        offset_L1D[..., :width] *= cos_L1R
        offset_L1D[..., :width] += swap_halves(beta_D, width) * signed_L1R
    return direct_L1D.to(dtype), crossed_L1R.to(dtype), offset_L1D.to(dtype)


def swap_halves(x: Tensor, width: int) -> Tensor:
    """Swap the two halves of the first dimensions.

    Args:
        x: Tensor.
        width: How many of the last dimension's entries count.

    Returns:
        (…, width).
    """
    half = width // 2
    return torch.cat((x[..., half:width], x[..., :half]), dim=-1)


def apply_rotation(unit_BLHD: Tensor, tables: RotationTables) -> Tensor:
    """Apply norm and rotation by tables.

    Args:
        unit_BLHD: Values before the norm's weight.
        tables: From `build_rotation_tables`.

    Returns:
        (B, L, H, D), head by head in memory, as attention reads it.
    """
    direct_L1D, crossed_L1R, offset_L1D = tables
    batch, length, count, width = unit_BLHD.shape
    out_BLHD = unit_BLHD.new_empty(batch, count, length, width).transpose(1, 2)
    torch.addcmul(offset_L1D, unit_BLHD, direct_L1D, out=out_BLHD)
    turned_width = crossed_L1R.shape[-1]
    out_BLHD[..., :turned_width].addcmul_(swap_halves(unit_BLHD, turned_width), crossed_L1R)
    return out_BLHD


def copy_head_major(x_BLHD: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy a tensor head by head in memory, so that attention does not copy it.

    Args:
        x_BLHD: Tensor.
        dtype: Dtype of the copy.

    Returns:
        (B, L, H, D).
    """
    batch, length, count, width = x_BLHD.shape
    return x_BLHD.new_empty(batch, count, length, width, dtype=dtype).transpose(1, 2).copy_(x_BLHD)
