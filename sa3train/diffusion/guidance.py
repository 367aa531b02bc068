"""Classifier-free guidance with adaptive projection (APG, Sadat et al. 2024), as Stable Audio 3 computes it.

Formulas: docs/model.md, section 5. Shapes: B clips, C latent channels, T latent frames, L condition tokens, D width.
"""

from dataclasses import dataclass
from typing import Protocol, Required, TypedDict, Unpack

import torch
from torch import Tensor

from sa3train.core.device import get_widest_float, move_to_device

# Noise levels are float32: an end such as 0.6 must still include the level 0.6.
INTERVAL_SLACK = 1e-6


class VelocityInputs(TypedDict, total=False):
    """Keyword arguments of a denoiser; see `Condition`."""

    cross_attn_cond_BLD: Required[Tensor]
    global_cond_BD: Required[Tensor]
    local_add_cond_BCT: Tensor | None
    attention_mask_BT: Tensor | None


class VelocityModel(Protocol):
    """Signature of a denoiser: the DiT, or a stand-in for it."""

    def __call__(self, x_BCT: Tensor, t_B: Tensor, **inputs: Unpack[VelocityInputs]) -> Tensor: ...


@dataclass(frozen=True)
class Condition:
    """What the velocity is conditioned on.

    Attributes:
        cross_attn_cond_BLD: Prompt and duration tokens.
        global_cond_BD: Duration embedding.
        local_add_cond_BCT: Inpainting mask and masked latents.
        attention_mask_BT: True = real frame.
        negative_cross_attn_cond_BLD: Condition of the second evaluation; None is all zeros.
        negative_mask_BL: True = real token; the other tokens of the negative condition are zeroed.
    """

    cross_attn_cond_BLD: Tensor
    global_cond_BD: Tensor
    local_add_cond_BCT: Tensor | None = None
    attention_mask_BT: Tensor | None = None
    negative_cross_attn_cond_BLD: Tensor | None = None
    negative_mask_BL: Tensor | None = None


@dataclass(frozen=True)
class Guidance:
    """How strongly, and at which noise levels, the condition is followed.

    Attributes:
        cfg_scale: Guidance scale; 1 is off.
        cfg_interval: Noise levels, ends included, outside which guidance is off.
        apg_scale: 1 keeps only the part of the difference orthogonal to the denoised estimate, 0 is plain guidance.
        cfg_norm_threshold: Largest norm of the difference; 0 is no limit.
        scale_phi: Share of the result whose spread over channels is restored to that of the conditional velocity.
    """

    cfg_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    apg_scale: float = 1.0
    cfg_norm_threshold: float = 0.0
    scale_phi: float = 0.0

    def acts_at(self, sigma: float) -> bool:
        """Tell whether guidance changes anything at a noise level.

        Args:
            sigma: Noise level.

        Returns:
            Whether a second evaluation is needed.
        """
        low, high = self.cfg_interval
        return self.cfg_scale != 1.0 and low - INTERVAL_SLACK <= sigma <= high + INTERVAL_SLACK


def compute_guided_velocity(
    velocity_of: VelocityModel, x_BCT: Tensor, t_B: Tensor, condition: Condition, guidance: Guidance
) -> Tensor:
    """Compute the velocity under a condition, with guidance where it acts at `t_B[0]`.

    With guidance the model evaluates one batch of 2B: the conditions first, then the empty or negative ones.

    Args:
        velocity_of: The denoiser.
        x_BCT: Noisy latents.
        t_B: Noise levels, on the CPU: the first is read, which would otherwise block the host.
        condition: The condition.
        guidance: Its strength.

    Returns:
        Velocity (B, C, T).
    """
    is_guided = guidance.acts_at(float(t_B[0]))
    t_B = move_to_device(t_B, x_BCT.device)
    inputs = VelocityInputs(
        cross_attn_cond_BLD=condition.cross_attn_cond_BLD,
        global_cond_BD=condition.global_cond_BD,
        local_add_cond_BCT=condition.local_add_cond_BCT,
        attention_mask_BT=condition.attention_mask_BT,
    )
    if not is_guided:
        return velocity_of(x_BCT, t_B, **inputs)
    both = velocity_of(
        torch.cat((x_BCT, x_BCT)),
        torch.cat((t_B, t_B)),
        cross_attn_cond_BLD=torch.cat((condition.cross_attn_cond_BLD, _get_negative(condition))),
        global_cond_BD=torch.cat((condition.global_cond_BD, condition.global_cond_BD)),
        local_add_cond_BCT=_repeat_twice(condition.local_add_cond_BCT),
        attention_mask_BT=_repeat_twice(condition.attention_mask_BT),
    )
    v_cond_BCT, v_uncond_BCT = both.chunk(2)
    return combine_velocities(x_BCT, t_B, v_cond_BCT, v_uncond_BCT, condition.attention_mask_BT, guidance)


def combine_velocities(
    x_BCT: Tensor,
    t_B: Tensor,
    v_cond_BCT: Tensor,
    v_uncond_BCT: Tensor,
    attention_mask_BT: Tensor | None,
    guidance: Guidance,
) -> Tensor:
    """Combine conditional and unconditional velocities. Norms and projections run over (C, real T) of each clip.

    Args:
        x_BCT: Noisy latents.
        t_B: Noise levels.
        v_cond_BCT: Velocity under the condition.
        v_uncond_BCT: Velocity under the empty or negative condition.
        attention_mask_BT: True = real frame; None where all are.
        guidance: Strength and options.

    Returns:
        Guided velocity (B, C, T).
    """
    sigma_B11 = t_B.to(x_BCT.dtype)[:, None, None]
    denoised_BCT = x_BCT - sigma_B11 * v_cond_BCT
    difference_BCT = sigma_B11 * (v_uncond_BCT - v_cond_BCT)
    real_B1T = None if attention_mask_BT is None else attention_mask_BT[:, None, :].to(x_BCT.dtype)
    if guidance.cfg_norm_threshold > 0:
        difference_BCT = difference_BCT * _compute_norm_cap(difference_BCT, real_B1T, guidance.cfg_norm_threshold)
    if guidance.apg_scale != 0:
        parallel_BCT = _project_parallel(difference_BCT, denoised_BCT, real_B1T)
        difference_BCT = difference_BCT - guidance.apg_scale * parallel_BCT
    guided_BCT = denoised_BCT + (guidance.cfg_scale - 1) * difference_BCT
    v_BCT = (x_BCT - guided_BCT) / sigma_B11
    if guidance.scale_phi != 0:
        ratio_B1T = v_cond_BCT.std(dim=1, keepdim=True) / v_BCT.std(dim=1, keepdim=True)
        v_BCT = guidance.scale_phi * v_BCT * ratio_B1T + (1 - guidance.scale_phi) * v_BCT
    return v_BCT


def _get_negative(condition: Condition) -> Tensor:
    negative_BLD = condition.negative_cross_attn_cond_BLD
    if negative_BLD is None:
        return torch.zeros_like(condition.cross_attn_cond_BLD)
    if condition.negative_mask_BL is None:
        return negative_BLD
    return torch.where(condition.negative_mask_BL[:, :, None], negative_BLD, torch.zeros_like(negative_BLD))


def _repeat_twice(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.cat((tensor, tensor))


def _compute_norm_cap(difference_BCT: Tensor, real_B1T: Tensor | None, threshold: float) -> Tensor:
    masked_BCT = difference_BCT if real_B1T is None else difference_BCT * real_B1T
    norm_B11 = masked_BCT.flatten(1).norm(dim=1)[:, None, None]
    return (threshold / norm_B11).clamp(max=1.0)


def _project_parallel(difference_BCT: Tensor, denoised_BCT: Tensor, real_B1T: Tensor | None) -> Tensor:
    """Project the difference on the denoised estimate, in float64 over the real frames."""
    wide = get_widest_float(difference_BCT.device)
    d_BCT, along_BCT = difference_BCT.to(wide), denoised_BCT.to(wide)
    if real_B1T is not None:
        d_BCT, along_BCT = d_BCT * real_B1T, along_BCT * real_B1T
    unit_BCT = torch.nn.functional.normalize(along_BCT.flatten(1), dim=1).view_as(along_BCT)
    amount_B11 = (d_BCT * unit_BCT).sum(dim=(1, 2), keepdim=True)
    return (amount_B11 * unit_BCT).to(difference_BCT.dtype)
