"""Spectra for losses, whose gradients cost no more than they do.

Shape legend: B signals, N samples, F frequencies, T frames, W samples of a frame.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override


class _RealFourier(torch.autograd.Function):
    """`torch.fft.rfft` with a real transform backwards: torch's own is a complex one of zero-padded gradients."""

    @override
    @staticmethod
    def forward(ctx: Any, frames_BTW: Tensor) -> Tensor:
        return torch.fft.rfft(frames_BTW)

    @override
    @staticmethod
    def backward(ctx: Any, gradient_BTF: Tensor) -> Tensor:
        # irfft adds each wave and its conjugate, except for the first and the last.
        halved_BTF = torch.cat([gradient_BTF[..., :1], gradient_BTF[..., 1:-1] / 2, gradient_BTF[..., -1:]], dim=-1)
        return torch.fft.irfft(halved_BTF, norm="forward")


def compute_stft(audio_BN: Tensor, size: int, hop: int, pad_mode: Literal["reflect", "constant"] = "reflect") -> Tensor:
    """Compute what `torch.stft(..., return_complex=True)` does with a Hann window, with a faster gradient.

    Args:
        audio_BN: Real signals, longer than half a window.
        size: Length of the window, an even number of samples.
        hop: Samples from frame to frame.
        pad_mode: What half a window at each end sees.

    Returns:
        Complex spectra (B, F, T).
    """
    padded_BN = torch.nn.functional.pad(audio_BN, (size // 2, size // 2), mode=pad_mode)
    window_W = torch.hann_window(size, dtype=audio_BN.dtype, device=audio_BN.device)
    spectrum_BTF: Tensor = _RealFourier.apply(padded_BN.unfold(1, size, hop) * window_W)
    return spectrum_BTF.mT
