"""The training objective of rectified flow as Stable Audio 3 is trained (reference section 6), and its options.

x_t = (1-t)*data + t*noise; the model predicts the velocity noise - data.
Shapes: B items, C latent channels, T latent frames.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TimestepSampler = Callable[[int, torch.Generator | None], Tensor]
Weighting = Callable[[Tensor], Tensor]

TRUNCATION = 0.075
LEAST_T = 1e-4
COUPLING_ROUNDS = 20


def trunc_logit_normal_t(batch: int, generator: torch.Generator | None = None) -> Tensor:
    """t = 1 - v, v a logit-normal cut below 0.075 and stretched to [0, 1]: the released models' default. (B,)"""
    normal = torch.distributions.Normal(0.0, 1.0)
    floor = normal.cdf(torch.logit(torch.tensor(TRUNCATION)))
    quantile_B = floor + (1 - floor) * normal.cdf(torch.randn(batch, generator=generator))
    return 1 - (torch.sigmoid(normal.icdf(quantile_B)) - TRUNCATION) / (1 - TRUNCATION)


def log_snr_t(batch: int, generator: torch.Generator | None = None) -> Tensor:
    """log-SNR ~ N(-1.2, 2): (B,) in [1e-4, 1 - 1e-4]."""
    return torch.sigmoid(-(2 * torch.randn(batch, generator=generator) - 1.2)).clamp(LEAST_T, 1 - LEAST_T)


def log_snr_uniform_t(batch: int, generator: torch.Generator | None = None) -> Tensor:
    """log-SNR uniform from -6 to 5: (B,) in [1e-4, 1 - 1e-4]."""
    return torch.sigmoid(-(11 * torch.rand(batch, generator=generator) - 6)).clamp(LEAST_T, 1 - LEAST_T)


def uniform_t(batch: int, generator: torch.Generator | None = None) -> Tensor:
    """t uniform in [0, 1): (B,)."""
    return torch.rand(batch, generator=generator)


TIMESTEP_SAMPLERS: dict[str, TimestepSampler] = {
    "trunc_logit_normal": trunc_logit_normal_t,
    "log_snr": log_snr_t,
    "log_snr_uniform": log_snr_uniform_t,
    "uniform": uniform_t,
}


def level_t(levels: Tensor, batch: int, generator: torch.Generator | None = None) -> Tensor:
    """t drawn from the given noise levels alone, such as a few-step sampler's (post-trained models): (B,)."""
    return levels[torch.randint(len(levels), (batch,), generator=generator)]


def effective_frames(seconds: float, sample_rate: int, downsampling_ratio: int) -> int:
    """Latent frames that `seconds` of audio fill: ceil(int(seconds * sample_rate) / downsampling_ratio)."""
    return -(-int(seconds * sample_rate) // downsampling_ratio)


def noised(data_BCT: Tensor, noise_BCT: Tensor, t_B: Tensor) -> Tensor:
    """x_t = (1-t)*data + t*noise: (B, C, T)."""
    t_B11 = t_B[:, None, None].to(data_BCT.dtype)
    return (1 - t_B11) * data_BCT + t_B11 * noise_BCT


def velocity_target(data_BCT: Tensor, noise_BCT: Tensor) -> Tensor:
    """What the model must predict: noise - data (B, C, T)."""
    return noise_BCT - data_BCT


def coupling_columns(data_BCT: Tensor, noise_BCT: Tensor) -> Tensor:
    """Which noise each item takes so that paths cross less: (B,) int64, `noise_BCT[columns]` replaces the noise.

    Twenty Sinkhorn rounds on the squared L2 cost divided by its mean, then items choose in order of the batch.
    """
    batch = len(data_BCT)
    cost_BB = torch.cdist(data_BCT.flatten(1).double(), noise_BCT.flatten(1).double()).square()
    log_plan_BB = -cost_BB / cost_BB.mean()
    for _ in range(COUPLING_ROUNDS):
        log_plan_BB = log_plan_BB - log_plan_BB.logsumexp(dim=1, keepdim=True)
        log_plan_BB = log_plan_BB - log_plan_BB.logsumexp(dim=0, keepdim=True)
    columns = torch.empty(batch, dtype=torch.int64, device=data_BCT.device)
    for row in range(batch):
        columns[row] = log_plan_BB[row].argmax()
        log_plan_BB.index_fill_(1, columns[row : row + 1], -math.inf)  # by tensor: the host never waits for the number
    return columns


def squared_error(velocity_BCT: Tensor, target_BCT: Tensor) -> Tensor:
    """(velocity - target)², float32 (B, C, T)."""
    return (velocity_BCT.float() - target_BCT.float()).square()


def huber_error(velocity_BCT: Tensor, target_BCT: Tensor, delta: float = 1.0) -> Tensor:
    """The square up to `delta`, then the line that continues it (twice Huber's loss), float32 (B, C, T)."""
    return 2 * torch.nn.functional.huber_loss(velocity_BCT.float(), target_BCT.float(), reduction="none", delta=delta)


def masked_item_means(error_BCT: Tensor, mask_BT: Tensor) -> Tensor:
    """Each item's mean error over (C, masked T): (B,); 0 for an item whose mask is empty."""
    mask_BT = mask_BT.to(torch.bool)
    count_B = mask_BT.sum(dim=1) * error_BCT.shape[1]
    total_B = error_BCT.masked_fill(~mask_BT[:, None, :], 0.0).sum(dim=(1, 2))
    return total_B / count_B.clamp(min=1)


def masked_loss(error_BCT: Tensor, mask_BT: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """The mean over items of their weighted masked means: a scalar. An item with an empty mask counts as 0."""
    means_B = masked_item_means(error_BCT, mask_BT)
    return (means_B if weight_B is None else weight_B.to(means_B) * means_B).mean()


def generated_and_kept(inpaint_mask_B1T: Tensor, padding_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Real positions to generate, and real positions kept as context: two (B, T) bool masks."""
    kept_BT = inpaint_mask_B1T[:, 0] > 0.5
    real_BT = padding_mask_BT.to(torch.bool)
    return real_BT & ~kept_BT, real_BT & kept_BT


def losses(
    error_BCT: Tensor, inpaint_mask_B1T: Tensor, padding_mask_BT: Tensor, weight_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss over generated positions and the context loss over kept ones: two scalars.

    The released models train on `loss + 1.0 * context_loss`.
    """
    generated_BT, kept_BT = generated_and_kept(inpaint_mask_B1T, padding_mask_BT)
    return masked_loss(error_BCT, generated_BT, weight_B), masked_loss(error_BCT, kept_BT, weight_B)


def no_weighting(t_B: Tensor) -> Tensor:
    """1 at every noise level."""
    return torch.ones_like(t_B)


def min_snr_weighting(t_B: Tensor, gamma: float = 5.0) -> Tensor:
    """Min-SNR (Hang et al. 2023): min(SNR, gamma) on the data estimate, SNR = ((1-t)/t)².

    The data estimate's error is t times the velocity's, so the velocity loss is weighted by
    t² * min(SNR, gamma) = min((1-t)², gamma * t²).
    """
    return torch.minimum((1 - t_B).square(), gamma * t_B.square())


def cosmap_weighting(t_B: Tensor) -> Tensor:
    """2 / (pi * (1 - 2t + 2t²)), the density of the cosine schedule over t (Esser et al. 2024): most in the middle."""
    return 2 / (math.pi * (1 - 2 * t_B + 2 * t_B.square()))


def level_weighting(t_B: Tensor, weights: Sequence[float]) -> Tensor:
    """Weights given for evenly spaced noise levels from t = 0 to t = 1, joined by straight lines: (B,)."""
    if len(weights) < 2:
        raise ValueError("weighting by noise level needs at least two weights, for t = 0 and t = 1")
    table = torch.tensor(list(weights), dtype=t_B.dtype, device=t_B.device)
    place_B = t_B.clamp(0, 1) * (len(weights) - 1)
    low_B = place_B.floor().long().clamp(max=len(weights) - 2)
    return torch.lerp(table[low_B], table[low_B + 1], place_B - low_B)


WEIGHTINGS: dict[str, Weighting] = {
    "none": no_weighting,
    "min_snr": min_snr_weighting,
    "cosmap": cosmap_weighting,
}
