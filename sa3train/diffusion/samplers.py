"""Samplers: each walks the noise levels `sigmas` (S+1,) from noise to data with a velocity model.

All share one signature. Keep `sigmas` on the CPU, so that no step waits for the device. `velocity(x_BCT, t)` takes t
as a scalar tensor and returns noise - data (B, C, T).
`callback(step, total, sigma, denoised_BCT)` is called after each step's first evaluation and may raise to cancel.
Shapes: B items, C latent channels, T latent frames.
"""

import itertools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sa3train.core.device import normal

Velocity = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, int, float, Tensor], None]

# rk4 evaluates its last stage at t_next, and the model is not defined at exactly 0.
LEAST_SIGMA = 1e-5


class Sampler(Protocol):
    """What every sampler is called with."""

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
    """Euler's method: x + (t_next - t) * v. Draws nothing."""
    total = len(sigmas) - 1
    for step, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
        v_BCT = velocity(x_BCT, t)
        _report(callback, step, total, t, x_BCT, v_BCT)
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
    """DPM-Solver++(2M) (Lu et al. 2022) for x_t = (1-t)*data + t*noise; first order on the first and last step."""
    total = len(sigmas) - 1
    lambdas = torch.log((1 - sigmas) / sigmas)
    previous_BCT: Tensor | None = None
    for step, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
        v_BCT = velocity(x_BCT, t)
        _report(callback, step, total, t, x_BCT, v_BCT)
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
    """The classical Runge-Kutta method of fourth order: four evaluations a step. Draws nothing."""
    total = len(sigmas) - 1
    for step, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
        dt = t_next - t
        middle = t + dt / 2
        k1_BCT = velocity(x_BCT, t)
        _report(callback, step, total, t, x_BCT, k1_BCT)
        k2_BCT = velocity(x_BCT + dt / 2 * k1_BCT, middle)
        k3_BCT = velocity(x_BCT + dt / 2 * k2_BCT, middle)
        k4_BCT = velocity(x_BCT + dt * k3_BCT, t_next.clamp(min=LEAST_SIGMA))
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
    """Denoise, then noise again to the next level: the sampler of the post-trained models.

    Draws one (B, C, T) of noise per step, the last one included, from `generator` (a CPU generator) in float32.
    """
    total = len(sigmas) - 1
    for step, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
        v_BCT = velocity(x_BCT, t)
        _report(callback, step, total, t, x_BCT, v_BCT)
        denoised_BCT = x_BCT - t * v_BCT
        noise_BCT = normal(x_BCT.shape, generator, x_BCT.device).to(x_BCT.dtype)
        x_BCT = (1 - t_next) * denoised_BCT + t_next * noise_BCT
    return x_BCT


SAMPLERS: dict[str, Sampler] = {
    "euler": sample_euler,
    "dpmpp": sample_dpmpp,
    "rk4": sample_rk4,
    "pingpong": sample_pingpong,
}

DRAWING = ("pingpong",)
"""Those that draw a (B, C, T) of noise in each step."""


def _report(callback: Callback | None, step: int, total: int, t: Tensor, x_BCT: Tensor, v_BCT: Tensor) -> None:
    if callback is not None:
        callback(step, total, float(t), x_BCT - t * v_BCT)
