"""Attention by fused kernels over flat tokens and cumulative lengths: torch's varlen_attn or flash-attn (CUDA, 16-bit).

Shape legend: L query tokens, M key tokens, H heads, D head width.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from sa3train.models.patterns import Packed, Padded, Pattern, Window
from sa3train.transfer import to_device

VarlenKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, int], Tensor]


def _torch_kernel(
    q_LHD: Tensor,
    k_MHD: Tensor,
    v_MHD: Tensor,
    bounds_q: Tensor,
    bounds_k: Tensor,
    longest_q: int,
    longest_k: int,
    radius: int,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    window = (radius, radius)
    out = varlen_attn(q_LHD, k_MHD, v_MHD, bounds_q, bounds_k, longest_q, longest_k, window_size=window)
    return out if isinstance(out, Tensor) else out[0]


def _flash_kernel(
    q_LHD: Tensor,
    k_MHD: Tensor,
    v_MHD: Tensor,
    bounds_q: Tensor,
    bounds_k: Tensor,
    longest_q: int,
    longest_k: int,
    radius: int,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    window = (radius, radius)
    out: Tensor = flash_attn_varlen_func(
        q_LHD, k_MHD, v_MHD, bounds_q, bounds_k, longest_q, longest_k, window_size=window
    )
    return out


#: Fused kernels by backend name; `radius` -1 = no window.
VARLEN_KERNELS: dict[str, VarlenKernel] = {"varlen": _torch_kernel, "flash": _flash_kernel}


@functools.lru_cache(
    maxsize=32
)  # let go of in time: nothing that CUDA graphs record may read them (see inference.graphs)
@torch.inference_mode(mode=False)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return to_device(torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32), device)


def varlen_attention(name: str, q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, pattern: Pattern) -> Tensor:
    (rows, length), keys, device = q_BLHD.shape[:2], k_BMHD.shape[1], q_BLHD.device
    radius, longest_q, longest_k = -1, length, keys
    match pattern:
        case Padded():
            if length != keys:
                raise ValueError(f"a padded pattern is for self-attention, not {length} queries over {keys} keys")
            bounds_q = bounds_k = pattern.bounds
        case Packed(query_lengths, key_lengths):
            bounds_q, bounds_k = _bounds(query_lengths, device), _bounds(key_lengths, device)
            longest_q, longest_k = max(query_lengths), max(key_lengths)
        case Window(lengths, radius):
            bounds_q = bounds_k = _bounds(lengths, device)
            longest_q = longest_k = max(lengths)
        case _:
            bounds_q, bounds_k = _bounds((length,) * rows, device), _bounds((keys,) * rows, device)
    q_LHD, k_MHD, v_MHD = (x.flatten(0, 1).contiguous() for x in (q_BLHD, k_BMHD, v_BMHD))
    out_LHD = VARLEN_KERNELS[name](q_LHD, k_MHD, v_MHD, bounds_q, bounds_k, longest_q, longest_k, radius)
    return out_LHD.view(q_BLHD.shape)
