"""Samplers: each walks the noise levels `sigmas` (S+1,) from noise to data with a velocity model.

All share one signature. Keep `sigmas` on the CPU, so that no step waits for the device. `velocity(x_BCT, t)` takes t
as a scalar tensor and returns noise - data (B, C, T).
`callback(step, total, sigma, denoised_BCT)` is called after each step's first evaluation and may raise to cancel.
Shapes: B clips, C latent channels, T latent frames. Formulas: docs/model.md, section 5.

A new sampler is a function and one row of `SAMPLERS`, which says whether it draws noise, and its name in
`SAMPLER_NAMES` of inference/settings.py (light, so that `--help` does not load torch; a test compares the two).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sa3train.core.noise import randn

Velocity = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, int, float, Tensor], None]

# rk4 evaluates its last stage at t_next, and the model is not defined at exactly 0.
MIN_SIGMA = 1e-5


class Sampler(Protocol):
    """Signature of every sampler."""

    def __call__(
        self,
        velocity: Velocity,
        x_BCT: Tensor,
        sigmas: Tensor,
        *,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> Tensor: ...


def sample_euler(
    velocity: Velocity,
    x_BCT: Tensor,
    sigmas: Tensor,
    *,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample by Euler's method: x + (t_next - t) * v.

    Args:
        velocity: The model, called once per step.
        x_BCT: Start at noise level `sigmas[0]`.
        sigmas: Noise levels (S+1,) on the CPU.
        generator: Not used.
        callback: See the top of the file.

    Returns:
        Latents (B, C, T) at noise level `sigmas[-1]`.
    """
    total = len(sigmas) - 1
    for step, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
        v_BCT = velocity(x_BCT, t)
        _call_back(callback, step, total, t, x_BCT, v_BCT)
        x_BCT = x_BCT + (t_next - t) * v_BCT
    return x_BCT


def sample_dpmpp(
    velocity: Velocity,
    x_BCT: Tensor,
    sigmas: Tensor,
    *,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample by DPM-Solver++(2M) for x_t = (1-t)*data + t*noise (Lu et al. 2022).

    First order on the first and last step.

    Args:
        velocity: The model, called once per step.
        x_BCT: Start at noise level `sigmas[0]`.
        sigmas: Noise levels (S+1,) on the CPU.
        generator: Not used.
        callback: See the top of the file.

    Returns:
        Latents (B, C, T) at noise level `sigmas[-1]`.
    """
    total = len(sigmas) - 1
    lambdas = torch.log((1 - sigmas) / sigmas)
    previous_BCT: Tensor | None = None
    for step, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
        v_BCT = velocity(x_BCT, t)
        _call_back(callback, step, total, t, x_BCT, v_BCT)
        denoised_BCT = x_BCT - t * v_BCT
        h = lambdas[step + 1] - lambdas[step]
        estimate_BCT = denoised_BCT
        if previous_BCT is not None and step < total - 1:
            r = (lambdas[step] - lambdas[step - 1]) / h
            estimate_BCT = (1 + 1 / (2 * r)) * denoised_BCT - (1 / (2 * r)) * previous_BCT
        x_BCT = (t_next / t) * x_BCT - (1 - t_next) * torch.expm1(-h) * estimate_BCT
        previous_BCT = denoised_BCT
    return x_BCT


def sample_rk4(
    velocity: Velocity,
    x_BCT: Tensor,
    sigmas: Tensor,
    *,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample by the classical fourth-order Runge-Kutta method.

    Args:
        velocity: The model, called four times per step.
        x_BCT: Start at noise level `sigmas[0]`.
        sigmas: Noise levels (S+1,) on the CPU.
        generator: Not used.
        callback: See the top of the file.

    Returns:
        Latents (B, C, T) at noise level `sigmas[-1]`.
    """
    total = len(sigmas) - 1
    for step, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
        dt = t_next - t
        middle = t + dt / 2
        k1_BCT = velocity(x_BCT, t)
        _call_back(callback, step, total, t, x_BCT, k1_BCT)
        k2_BCT = velocity(x_BCT + dt / 2 * k1_BCT, middle)
        k3_BCT = velocity(x_BCT + dt / 2 * k2_BCT, middle)
        k4_BCT = velocity(x_BCT + dt * k3_BCT, t_next.clamp(min=MIN_SIGMA))
        x_BCT = x_BCT + dt / 6 * (k1_BCT + 2 * k2_BCT + 2 * k3_BCT + k4_BCT)
    return x_BCT


def sample_pingpong(
    velocity: Velocity,
    x_BCT: Tensor,
    sigmas: Tensor,
    *,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Denoise, then add fresh noise for the next level: the sampler of post-trained models (Song et al. 2023).

    Args:
        velocity: The model, called once per step.
        x_BCT: Start at noise level `sigmas[0]`.
        sigmas: Noise levels (S+1,) on the CPU.
        generator: CPU generator of one fp32 noise (B, C, T) per step, the last step included.
        callback: See the top of the file.

    Returns:
        Latents (B, C, T) at noise level `sigmas[-1]`.
    """
    total = len(sigmas) - 1
    for step, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
        v_BCT = velocity(x_BCT, t)
        _call_back(callback, step, total, t, x_BCT, v_BCT)
        denoised_BCT = x_BCT - t * v_BCT
        noise_BCT = randn(x_BCT.shape, generator, x_BCT.device).to(x_BCT.dtype)
        x_BCT = (1 - t_next) * denoised_BCT + t_next * noise_BCT
    return x_BCT


@dataclass(frozen=True)
class SamplerSpec:
    """One row of `SAMPLERS`.

    Attributes:
        sample: The function.
        is_stochastic: Whether it draws one noise (B, C, T) from `generator` in every step. On a GPU exactly that noise
            is prefetched, so a wrong value fails there.
    """

    sample: Sampler
    is_stochastic: bool


SAMPLERS: dict[str, SamplerSpec] = {
    "euler": SamplerSpec(sample_euler, is_stochastic=False),
    "dpmpp": SamplerSpec(sample_dpmpp, is_stochastic=False),
    "rk4": SamplerSpec(sample_rk4, is_stochastic=False),
    "pingpong": SamplerSpec(sample_pingpong, is_stochastic=True),
}
"""Samplers by the name that settings give."""


def _call_back(callback: Callback | None, step: int, total: int, t: Tensor, x_BCT: Tensor, v_BCT: Tensor) -> None:
    if callback is not None:
        callback(step, total, float(t), x_BCT - t * v_BCT)
