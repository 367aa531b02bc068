"""One training step as functions: what is drawn at random, and the loss that follows from it.

The mathematics is `sa3train.diffusion`'s. Here every random number of a clip comes from a seed of its own (run, step,
clip), so a step is the same whatever the number of ranks, workers or restarts, and nothing else consumes it.

Shape legend: B clips, C latent channels, T latent frames.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sa3train.core.device import move_to_device
from sa3train.core.seeds import derive_seed
from sa3train.diffusion import masks, objective, schedule
from sa3train.training.settings import LossSettings

DRAWS_VERSION = 1
"""Version of the random draws of a step. Raise it with any change to what `draw_step` returns for given seeds: it is
part of a run's identity, so that a run started with other draws is not resumed with these."""


@dataclass(frozen=True)
class StepDraw:
    """Everything random in a step.

    Attributes:
        noise_BCT: Gaussian noise.
        t_B: Noise level of each clip, in (0, 1).
        attention_mask_BT: True on real frames, after the extension into silence.
        inpaint_mask_B1T: True on context frames, which inpainting preserves.
        dropped_B: Clips trained without their prompt.
    """

    noise_BCT: Tensor
    t_B: Tensor
    attention_mask_BT: Tensor
    inpaint_mask_B1T: Tensor
    dropped_B: Tensor

    def to(self, device: torch.device | str) -> "StepDraw":
        """Move the draw to a device.

        Args:
            device: Where to.

        Returns:
            The same draw there.
        """
        return StepDraw(*(move_to_device(getattr(self, name), device) for name in self.__dataclass_fields__))


def make_plain_draw(noise_BCT: Tensor, t_B: Tensor, attention_mask_BT: Tensor) -> StepDraw:
    """Make a draw of given noise and noise levels, without inpainting and with every prompt.

    Args:
        noise_BCT: The noise.
        t_B: The noise levels.
        attention_mask_BT: True on real frames.

    Returns:
        The draw.
    """
    batch, _, frames = noise_BCT.shape
    nothing_kept_B1T, nothing_dropped_B = torch.zeros(batch, 1, frames), torch.zeros(batch, dtype=torch.bool)
    return StepDraw(noise_BCT, t_B, attention_mask_BT, nothing_kept_B1T, nothing_dropped_B)


@dataclass(frozen=True)
class Losses:
    """Losses of a micro-batch.

    Attributes:
        loss: Over generated frames.
        context_loss: Over context frames.
        total: Their weighted sum, to be minimized.
        item_loss_B: Loss of each clip over generated frames, detached.
    """

    loss: Tensor
    context_loss: Tensor
    total: Tensor
    item_loss_B: Tensor


def derive_clip_seeds(seed: int, micro_step: int, crop_seeds: Sequence[int]) -> list[int]:
    """Derive one seed per clip of a micro-batch.

    The position in the batch plays no part, so that splitting a batch over ranks changes nothing, even when it holds
    the same clip twice.

    Args:
        seed: Seed of the run.
        micro_step: Number of the micro-batch.
        crop_seeds: Loader's number of each crop.

    Returns:
        The seeds.
    """
    return [derive_seed(seed, micro_step, crop_seed) for crop_seed in crop_seeds]


def draw_step(
    settings: LossSettings,
    seeds: Sequence[int],
    numbers: Sequence[int],
    shape_BCT: torch.Size | tuple[int, int, int],
    attention_mask_BT: Tensor,
    effective_frames_B: Tensor,
    frames_per_second: float,
    at_end_B: Tensor | None = None,
) -> StepDraw:
    """Draw everything random of a training step on the CPU, clip by clip.

    Args:
        settings: Distributions to draw from.
        seeds: Seed of each clip.
        numbers: Number of each clip in the run, for timesteps that are spread over clips.
        shape_BCT: Shape of the latents.
        attention_mask_BT: True on real frames.
        effective_frames_B: Latent frames of each clip's seconds, for the shift of t.
        frames_per_second: Latent frames per second.
        at_end_B: Clips whose real part reaches the end of their file, so that silence follows it; only these are
            extended into silence. None: all.

    Returns:
        The draw, on the CPU.
    """
    _, channels, frames = shape_BCT
    noise, t, real, inpaint, dropped = [], [], [], [], []
    for row, (seed, number) in enumerate(zip(seeds, numbers, strict=True)):
        rng = torch.Generator().manual_seed(seed)
        t.append(_draw_timestep(settings, effective_frames_B[row : row + 1], number, rng))
        dropped.append(torch.rand(1, generator=rng) < settings.cfg_dropout)
        mask_1T = attention_mask_BT[row : row + 1]
        if settings.silence_seconds > 0 and (at_end_B is None or bool(at_end_B[row])):
            mask_1T = masks.extend_into_silence(
                mask_1T, rng, mean_seconds=settings.silence_seconds, frames_per_second=frames_per_second
            )
        real.append(mask_1T)
        inpaint.append(masks.draw_inpainting_masks(mask_1T, random.Random(seed), settings.inpainting))
        # Frames first and drawn last: a longer T, as another rank may have, changes nothing before it.
        noise.append(torch.randn(frames, channels, generator=rng).T)
    return StepDraw(torch.stack(noise), torch.cat(t), torch.cat(real), torch.cat(inpaint), torch.cat(dropped))


def _draw_timestep(settings: LossSettings, length_1: Tensor, number: int, rng: torch.Generator) -> Tensor:
    if settings.timesteps == "low_discrepancy":
        t_1 = objective.place_timesteps([number])
    elif settings.timesteps == "levels":
        t_1 = objective.sample_levels(list_sampled_noise_levels(settings), 1, rng)
    else:
        t_1 = objective.TIMESTEP_SAMPLERS[settings.timesteps](1, rng)
    return schedule.SHIFTS[settings.shift](t_1, length_1)


def list_sampled_noise_levels(settings: LossSettings) -> Tensor:
    """List the noise levels at which a sampler calls the model.

    Args:
        settings: Settings with `sampler_steps`.

    Returns:
        (steps,), falling.
    """
    assert settings.sampler_steps is not None, "the settings require it with timesteps=levels"
    return schedule.build_schedule(settings.sampler_steps)[:-1]


def make_noisy_inputs(data_BCT: Tensor, draw: StepDraw) -> tuple[Tensor, Tensor]:
    """Make the model's inputs.

    Args:
        data_BCT: Clean latents.
        draw: Noise, noise levels and inpainting masks.

    Returns:
        The noisy latents (B, C, T), and the local condition (B, C+1, T): inpainting mask, masked latents.
    """
    x_BCT = objective.add_noise(data_BCT, draw.noise_BCT, draw.t_B)
    mask_B1T = draw.inpaint_mask_B1T.to(data_BCT.dtype)
    return x_BCT, torch.cat((mask_B1T, data_BCT * mask_B1T), dim=1)


def compute_step_losses(settings: LossSettings, velocity_BCT: Tensor, data_BCT: Tensor, draw: StepDraw) -> Losses:
    """Compute the training loss of predicted velocities against noise − data (docs/model.md, section 6).

    Args:
        settings: Loss function and weights.
        velocity_BCT: The model's prediction.
        data_BCT: Clean latents.
        draw: What the inputs were made from.

    Returns:
        The losses.
    """
    target_BCT = objective.compute_velocity_target(data_BCT, draw.noise_BCT)
    if settings.function == "huber":
        error_BCT = objective.compute_huber_error(velocity_BCT, target_BCT, settings.huber_delta)
    else:
        error_BCT = objective.compute_squared_error(velocity_BCT, target_BCT)
    weight_B = compute_loss_weights(settings, draw.t_B)
    loss, context = objective.compute_losses(error_BCT, draw.inpaint_mask_B1T, draw.attention_mask_BT, weight_B)
    generated_BT, _ = objective.split_generated_and_kept(draw.inpaint_mask_B1T, draw.attention_mask_BT)
    items_B = objective.compute_masked_means(error_BCT.detach(), generated_BT)
    return Losses(loss, context, loss + settings.context_weight * context, items_B)


def compute_loss_weights(settings: LossSettings, t_B: Tensor) -> Tensor | None:
    """Compute the weight of each clip's loss by its noise level.

    Args:
        settings: Settings with `weighting`.
        t_B: Noise levels.

    Returns:
        (B,), or None where all weights are 1.
    """
    if settings.weighting == "none":
        return None
    if isinstance(settings.weighting, str):
        return objective.WEIGHTINGS[settings.weighting](t_B)
    return objective.interpolate_weights(t_B, settings.weighting)
