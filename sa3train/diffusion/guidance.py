"""Classifier-free guidance with adaptive projection (APG, Sadat et al. 2024), as Stable Audio 3 computes it.

Shapes: B items, C latent channels, T latent frames, L condition tokens, D condition width.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sa3train.core.device import to_device, widest

# Noise levels are float32: an end such as 0.6 must still include the level 0.6.
INTERVAL_SLACK = 1e-6


class VelocityModel(Protocol):
    """What a denoiser is called with: the DiT, or anything that stands in for it."""

    def __call__(
        self,
        x_BCT: Tensor,
        t_B: Tensor,
        *,
        cross_attn_cond_BLD: Tensor,
        global_cond_BD: Tensor,
        local_add_cond_BCT: Tensor | None = None,
        padding_mask_BT: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Condition:
    """What the velocity is conditioned on. `padding_mask_BT`: True = real frame.

    `negative_cross_attn_cond_BLD` takes the place of the empty condition; `negative_mask_BL` (True = real token)
    says which of its tokens are padding and set to zero.
    """

    cross_attn_cond_BLD: Tensor
    global_cond_BD: Tensor
    local_add_cond_BCT: Tensor | None = None
    padding_mask_BT: Tensor | None = None
    negative_cross_attn_cond_BLD: Tensor | None = None
    negative_mask_BL: Tensor | None = None


@dataclass(frozen=True)
class Guidance:
    """How strongly, and at which noise levels, the condition is pressed.

    `cfg_scale` 1 is off. `cfg_interval`: noise levels, ends inclusive, outside which guidance is off.
    `apg_scale` 1 keeps only what is orthogonal to the denoised estimate, 0 is plain guidance.
    `cfg_norm_threshold` > 0 caps the norm of the difference; `scale_phi` in [0, 1] restores the velocity's spread.
    """

    cfg_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    apg_scale: float = 1.0
    cfg_norm_threshold: float = 0.0
    scale_phi: float = 0.0

    def acts_at(self, sigma: float) -> bool:
        """Whether guidance changes anything at noise level `sigma`."""
        low, high = self.cfg_interval
        return self.cfg_scale != 1.0 and low - INTERVAL_SLACK <= sigma <= high + INTERVAL_SLACK


def guided_velocity(
    velocity_of: VelocityModel, x_BCT: Tensor, t_B: Tensor, condition: Condition, guidance: Guidance
) -> Tensor:
    """The velocity (B, C, T) of `velocity_of` at `t_B` under `condition`, guided when `guidance` acts at t_B[0].

    Guided calls evaluate one batch of 2B: conditions first, then the empty or negative prompt. Keep `t_B` on the CPU:
    its first number is looked at, and on another device the host would wait for it.
    """
    guided = guidance.acts_at(float(t_B[0]))
    t_B = to_device(t_B, x_BCT.device)
    if not guided:
        return velocity_of(
            x_BCT,
            t_B,
            cross_attn_cond_BLD=condition.cross_attn_cond_BLD,
            global_cond_BD=condition.global_cond_BD,
            local_add_cond_BCT=condition.local_add_cond_BCT,
            padding_mask_BT=condition.padding_mask_BT,
        )
    both = velocity_of(
        torch.cat((x_BCT, x_BCT)),
        torch.cat((t_B, t_B)),
        cross_attn_cond_BLD=torch.cat((condition.cross_attn_cond_BLD, _negative_of(condition))),
        global_cond_BD=torch.cat((condition.global_cond_BD, condition.global_cond_BD)),
        local_add_cond_BCT=_twice(condition.local_add_cond_BCT),
        padding_mask_BT=_twice(condition.padding_mask_BT),
    )
    v_cond_BCT, v_uncond_BCT = both.chunk(2)
    return combine(x_BCT, t_B, v_cond_BCT, v_uncond_BCT, condition.padding_mask_BT, guidance)


def combine(
    x_BCT: Tensor,
    t_B: Tensor,
    v_cond_BCT: Tensor,
    v_uncond_BCT: Tensor,
    padding_mask_BT: Tensor | None,
    guidance: Guidance,
) -> Tensor:
    """Combine both velocities into the guided one; norms and projections run over (C, real T) of each item."""
    sigma_B11 = t_B.to(x_BCT.dtype)[:, None, None]
    denoised_BCT = x_BCT - sigma_B11 * v_cond_BCT
    difference_BCT = sigma_B11 * (v_uncond_BCT - v_cond_BCT)
    real_B1T = None if padding_mask_BT is None else padding_mask_BT[:, None, :].to(x_BCT.dtype)
    if guidance.cfg_norm_threshold > 0:
        difference_BCT = difference_BCT * _cap(difference_BCT, real_B1T, guidance.cfg_norm_threshold)
    if guidance.apg_scale != 0:
        parallel_BCT = _parallel(difference_BCT, denoised_BCT, real_B1T)
        difference_BCT = difference_BCT - guidance.apg_scale * parallel_BCT
    guided_BCT = denoised_BCT + (guidance.cfg_scale - 1) * difference_BCT
    v_BCT = (x_BCT - guided_BCT) / sigma_B11
    if guidance.scale_phi != 0:
        ratio_B1T = v_cond_BCT.std(dim=1, keepdim=True) / v_BCT.std(dim=1, keepdim=True)
        v_BCT = guidance.scale_phi * v_BCT * ratio_B1T + (1 - guidance.scale_phi) * v_BCT
    return v_BCT


def _negative_of(condition: Condition) -> Tensor:
    negative_BLD = condition.negative_cross_attn_cond_BLD
    if negative_BLD is None:
        return torch.zeros_like(condition.cross_attn_cond_BLD)
    if condition.negative_mask_BL is None:
        return negative_BLD
    return torch.where(condition.negative_mask_BL[:, :, None], negative_BLD, torch.zeros_like(negative_BLD))


def _twice(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.cat((tensor, tensor))


def _cap(difference_BCT: Tensor, real_B1T: Tensor | None, threshold: float) -> Tensor:
    masked_BCT = difference_BCT if real_B1T is None else difference_BCT * real_B1T
    norm_B11 = masked_BCT.flatten(1).norm(dim=1)[:, None, None]
    return (threshold / norm_B11).clamp(max=1.0)


def _parallel(difference_BCT: Tensor, denoised_BCT: Tensor, real_B1T: Tensor | None) -> Tensor:
    """The part of the difference along the denoised estimate, measured in float64 over the real frames."""
    wide = widest(difference_BCT.device)
    d_BCT, along_BCT = difference_BCT.to(wide), denoised_BCT.to(wide)
    if real_B1T is not None:
        d_BCT, along_BCT = d_BCT * real_B1T, along_BCT * real_B1T
    unit_BCT = torch.nn.functional.normalize(along_BCT.flatten(1), dim=1).view_as(along_BCT)
    amount_B11 = (d_BCT * unit_BCT).sum(dim=(1, 2), keepdim=True)
    return (amount_B11 * unit_BCT).to(difference_BCT.dtype)
