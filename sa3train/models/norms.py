"""The norms of both transformers: RMS norm, with and without modulation, and the dynamic tanh of SAME.

Shape legend: B batch, L tokens, D width. On a GPU every pass over a tensor is a kernel launch, and launches take most
of the time there; `uses_fused_kernel` says where torch's fused kernel is used instead.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from sa3train.models import cpu_kernels


def uses_fused_kernel(x: Tensor) -> bool:
    """Tell whether a tensor is normalized by torch's fused kernel.

    Args:
        x: Tensor.

    Returns:
        Whether it is on a GPU.
    """
    return x.is_cuda


def _compute_inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Compute 1 / root mean square over the last dimension, kept, in fp32 without an fp32 copy of `x`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(norm.square() / x.shape[-1] + eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if uses_fused_kernel(x):
            return self._norm_fused(x)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            out: Tensor = _ModulatedNorm.apply(x, self.gamma.float(), None, self.eps)
            return out
        return (x * _compute_inverse_rms(x, self.eps) * self.gamma.float()).to(x.dtype)

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize without the weight.

        Args:
            x: Tensor.

        Returns:
            Values in fp32, before gamma.
        """
        exact = x.float()
        return exact * _compute_inverse_rms(exact, self.eps)

    def modulate(self, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        """Compute `norm(x) * gain + shift`.

        Args:
            x: Tensor.
            gain: Factor, broadcast over tokens.
            shift: Summand, broadcast over tokens.

        Returns:
            Values in the dtype of `x`.
        """
        if uses_fused_kernel(x):
            return self._norm_fused(x, gain.to(x.dtype), shift.to(x.dtype))
        out: Tensor = _ModulatedNorm.apply(x, self.gamma.float() * gain.float(), shift.float(), self.eps)
        return out

    def _norm_fused(self, x: Tensor, gain: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            out: Tensor = _FusedNorm.apply(x, self.gamma, gain, shift, self.eps)
            return out
        return _apply_fused([part for part in (x, self.gamma, gain, shift) if part is not None], self.eps)


def _apply_modulation(sources: Sequence[Tensor]) -> Tensor:
    """Compute x · scale · gain (+ shift), rounded once."""
    x, scale, gain, *shift = sources
    return (torch.addcmul(shift[0], x * scale, gain) if shift else x * scale * gain).to(x.dtype)


class _ModulatedNorm(Function):
    """RMS norm times `gain` plus `shift`, both broadcast over tokens; None adds nothing.

    For the backward pass it saves x, which the residual stream saves anyway. Autograd by itself would save an fp32 copy
    of the normalized x as soon as the gain has a gradient, as it has when what makes it is adapted. From what it saves
    its output can be recomputed to the same bits, by `recompute`, for a layer that needs it in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, shift: Tensor | None, eps: float) -> Tensor:
        sources = (
            (x, _compute_inverse_rms(x, eps), gain) if shift is None else (x, _compute_inverse_rms(x, eps), gain, shift)
        )
        ctx.save_for_backward(*sources)
        ctx.recompute = _apply_modulation
        return _apply_modulation(sources)

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


def _apply_fused(sources: Sequence[Tensor], eps: float) -> Tensor:
    """Compute RMS norm by torch's kernel, in fp32 inside; then times gain plus shift where they are given."""
    x, gamma, *modulation = sources
    exact = x if x.dtype == gamma.dtype else x.float()
    normed = F.rms_norm(exact, gamma.shape, gamma.to(exact.dtype), eps).to(x.dtype)
    return torch.addcmul(modulation[1], normed, modulation[0]) if modulation else normed


class _FusedNorm(Function):
    """As `_ModulatedNorm` and as sparing, but by the fused kernel, which the backward pass runs again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, gain: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
        sources = (x, gamma) if gain is None or shift is None else (x, gamma, gain, shift)
        ctx.save_for_backward(*sources)
        ctx.recompute, ctx.eps = functools.partial(_apply_fused, eps=eps), eps
        return _apply_fused(sources, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, *modulation = ctx.saved_tensors
        wants = ctx.needs_input_grad
        leaves = [source.detach().requires_grad_(want) for source, want in zip((x, gamma), wants, strict=False)]
        with torch.enable_grad():
            normed = _apply_fused(leaves, ctx.eps)
        grads: list[Tensor | None] = [None, None]
        if modulation:
            gain, shift = modulation
            grads = [
                (grad * normed.detach()).sum_to_size(gain.shape) if wants[2] else None,
                grad.sum_to_size(shift.shape) if wants[3] else None,
            ]
            grad = grad * gain
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(normed, wanted, grad) if wanted else ())
        return (*(next(found) if leaf.requires_grad else None for leaf in leaves), *grads, None)


class DynamicTanh(nn.Module):
    """`gamma * tanh(alpha * x) + beta`: a norm without statistics (Zhu et al. 2025)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 4.0))
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.gamma, self.normalize(x))

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize without weight and bias.

        Args:
            x: Tensor.

        Returns:
            tanh(alpha * x).
        """
        scaled = self.alpha * x
        return cpu_kernels.compute_tanh(scaled) if cpu_kernels.is_supported(scaled) else torch.tanh(scaled)
