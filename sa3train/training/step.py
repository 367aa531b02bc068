"""One training step as a function: what is drawn at random, and the loss that follows from it.

The mathematics is `sa3train.diffusion`'s. Here every random number of an item comes from a seed of its own (run,
step, clip), so a step is the same whatever the number of ranks, workers or restarts, and nothing else consumes it.

Shape legend: B items (clips), C latent channels, T latent frames.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sa3train.core.device import to_device
from sa3train.diffusion import masks, objective, schedule
from sa3train.training.settings import Objective


@dataclass(frozen=True)
class Draw:
    """Everything random in a step. padding_mask_BT is the real length after silence extension; dropped_B: no prompt."""

    noise_BCT: Tensor
    t_B: Tensor
    padding_mask_BT: Tensor
    inpaint_mask_B1T: Tensor
    dropped_B: Tensor

    def to(self, device: torch.device | str) -> "Draw":
        """The same draw on `device`."""
        return Draw(*(to_device(getattr(self, name), device) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Losses:
    """Loss over generated frames, over kept frames, their weighted sum, and (detached) each item's own loss."""

    loss: Tensor
    context_loss: Tensor
    total: Tensor
    item_loss_B: Tensor


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any parts (text, numbers), the same on every machine."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def item_seeds(seed: int, micro_step: int, showings: Sequence[int]) -> list[int]:
    """One seed per item of a micro-batch, from the loader's number of its showing: never from its place in the batch,
    so that splitting a batch over ranks changes nothing, also where one clip is in it twice.
    """
    return [seed_of(seed, micro_step, showing) for showing in showings]


def draw_step(
    settings: Objective,
    seeds: Sequence[int],
    shape_BCT: torch.Size | tuple[int, int, int],
    padding_mask_BT: Tensor,
    effective_frames_B: Tensor,
    frames_per_second: float,
    at_end_B: Tensor | None = None,
) -> Draw:
    """Draw one training step on the CPU, item by item.

    `effective_frames_B`: latent frames of each item's seconds. `at_end_B`: items whose real part reaches the end of
    their clip, so that silence follows it; only these are extended into silence (None: all).
    """
    _, channels, frames = shape_BCT
    noise, t, padding, inpaint, dropped = [], [], [], [], []
    for row, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        t.append(_timestep(settings, effective_frames_B[row : row + 1], generator))
        dropped.append(torch.rand(1, generator=generator) < settings.cfg_dropout)
        mask_1T = padding_mask_BT[row : row + 1]
        if settings.silence_seconds > 0 and (at_end_B is None or bool(at_end_B[row])):
            mask_1T = masks.extend_into_silence(
                mask_1T, generator, mean_seconds=settings.silence_seconds, frames_per_second=frames_per_second
            )
        padding.append(mask_1T)
        inpaint.append(masks.mixed_inpainting_masks(mask_1T, random.Random(seed), settings.inpainting))
        # Frames first and drawn last: a longer T, as another rank may have, changes nothing before it.
        noise.append(torch.randn(frames, channels, generator=generator).T)
    return Draw(torch.stack(noise), torch.cat(t), torch.cat(padding), torch.cat(inpaint), torch.cat(dropped))


def _timestep(settings: Objective, length_1: Tensor, generator: torch.Generator) -> Tensor:
    if settings.timesteps == "levels":
        t_1 = objective.level_t(visited_levels(settings), 1, generator)
    else:
        t_1 = objective.TIMESTEP_SAMPLERS[settings.timesteps](1, generator)
    return schedule.SHIFTS[settings.shift](t_1, length_1)


def visited_levels(settings: Objective) -> Tensor:
    """The noise levels at which a sampler of `settings.sampler_steps` steps calls the model: (steps,)."""
    assert settings.sampler_steps is not None, "only for timesteps=levels, which the settings check"
    return schedule.sampling_schedule(settings.sampler_steps)[:-1]


def noised_inputs(data_BCT: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """The noisy latents and the local condition (mask, masked latents): (B, C, T) and (B, C+1, T)."""
    x_BCT = objective.noised(data_BCT, draw.noise_BCT, draw.t_B)
    mask_B1T = draw.inpaint_mask_B1T.to(data_BCT.dtype)
    return x_BCT, torch.cat((mask_B1T, data_BCT * mask_B1T), dim=1)


def step_losses(settings: Objective, velocity_BCT: Tensor, data_BCT: Tensor, draw: Draw) -> Losses:
    """The training loss of predicted velocities against noise − data."""
    target_BCT = objective.velocity_target(data_BCT, draw.noise_BCT)
    if settings.loss == "huber":
        error_BCT = objective.huber_error(velocity_BCT, target_BCT, settings.huber_delta)
    else:
        error_BCT = objective.squared_error(velocity_BCT, target_BCT)
    weight_B = weights(settings, draw.t_B)
    loss, context = objective.losses(error_BCT, draw.inpaint_mask_B1T, draw.padding_mask_BT, weight_B)
    generated_BT, _ = objective.generated_and_kept(draw.inpaint_mask_B1T, draw.padding_mask_BT)
    items_B = objective.masked_item_means(error_BCT.detach(), generated_BT)
    return Losses(loss, context, loss + settings.context_weight * context, items_B)


def weights(settings: Objective, t_B: Tensor) -> Tensor | None:
    """The weight of each item's loss by its noise level: (B,), or None where all are 1."""
    if settings.weighting == "none":
        return None
    if isinstance(settings.weighting, str):
        return objective.WEIGHTINGS[settings.weighting](t_B)
    return objective.level_weighting(t_B, settings.weighting)
