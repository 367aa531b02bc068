"""Loss of held-out clips at every noise level, with noise of their own, so that any two adapters can be compared.

Noise comes from each clip's key and nothing draws from a shared random state: the numbers of two runs, of two steps,
and of base and adapter differ by the weights alone. Training validates by the same function.

Shape legend: S clips, N noise levels, B = S · N pairs of them, C latent channels, F frames of the longest clip.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from sa3train.core.device import move_to_device
from sa3train.core.seeds import derive_seed
from sa3train.data.loading.clip_batch import ClipBatch
from sa3train.diffusion import objective

BINS = 10
LEVELS = tuple((index + 0.5) / BINS for index in range(BINS))
"""The centers of the ten bins of noise level."""

PredictVelocity = Callable[[ClipBatch, Tensor, Tensor], Tensor]
"""Predicts the velocity (B, C, F) of clips from their noise (B, C, F) and noise levels (B,), on the model's device."""


@torch.no_grad()
def measure_losses(
    predict: PredictVelocity,
    clips: Sequence[ClipBatch],
    device: torch.device,
    *,
    seed: int = 0,
    levels: Sequence[float] = LEVELS,
) -> Tensor:
    """Measure the loss of a few clips at every noise level, in one forward pass.

    Args:
        predict: The model.
        clips: Batches of one clip.
        device: Where the model computes.
        seed: Seed of the fixed noise.
        levels: Noise levels.

    Returns:
        Mean squared error of the velocity over each clip's frames (docs/model.md, section 6), (S, N) on the device.
    """
    longest, times = max(clip.data_SCF.shape[2] for clip in clips), len(levels)
    data, masks, noise = [], [], []
    for clip in clips:
        padding = (0, longest - clip.data_SCF.shape[2])
        data.append(pad(clip.data_SCF, padding))
        masks.append(pad(clip.attention_mask_SF, padding))
        rng = torch.Generator().manual_seed(derive_seed(seed, "fixed", clip.keys[0]))
        noise.append(torch.randn(longest, clip.data_SCF.shape[1], generator=rng).T[None])
    t_B = torch.tensor(levels).repeat(len(clips))
    batch = ClipBatch(
        move_to_device(torch.cat(data), device).repeat_interleave(times, dim=0),
        torch.cat(masks).repeat_interleave(times, dim=0),
        torch.cat([clip.seconds_S for clip in clips]).repeat_interleave(times),
        torch.zeros(len(t_B), dtype=torch.bool),
        [clip.prompts[0] for clip in clips for _ in levels],
        [clip.keys[0] for clip in clips for _ in levels],
    )
    noise_BCF = move_to_device(torch.cat(noise), device).repeat_interleave(times, dim=0)
    target_BCF = objective.compute_velocity_target(batch.data_SCF, noise_BCF)
    error_BCF = objective.compute_squared_error(predict(batch, noise_BCF, move_to_device(t_B, device)), target_BCF)
    mask_BF = move_to_device(batch.attention_mask_SF, device)
    return objective.compute_masked_means(error_BCF, mask_BF).view(len(clips), times)
