"""The training objective of rectified flow (docs/model.md, section 6): noise levels, coupling, losses and weights.

x_t = (1-t)*data + t*noise; the model predicts the velocity noise - data.
Shapes: B clips, C latent channels, T latent frames.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sa3train.core.device import get_widest_float

TimestepSampler = Callable[[int, torch.Generator | None], Tensor]
Weighting = Callable[[Tensor], Tensor]

TRUNCATION = 0.075
MIN_T = 1e-4
COUPLING_ROUNDS = 20
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def sample_trunc_logit_normal(batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Sample t = 1 - v, v a logit-normal truncated below 0.075 and stretched to [0, 1], as the released models do.

    Args:
        batch: Number of clips.
        generator: CPU generator.

    Returns:
        (B,) in [0, 1].
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    floor = normal.cdf(torch.logit(torch.tensor(TRUNCATION)))
    quantile_B = floor + (1 - floor) * normal.cdf(torch.randn(batch, generator=generator))
    return 1 - (torch.sigmoid(normal.icdf(quantile_B)) - TRUNCATION) / (1 - TRUNCATION)


def sample_log_snr(batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Sample timesteps with log-SNR ~ N(-1.2, 2).

    Args:
        batch: Number of clips.
        generator: CPU generator.

    Returns:
        (B,) in [1e-4, 1 - 1e-4].
    """
    return torch.sigmoid(-(2 * torch.randn(batch, generator=generator) - 1.2)).clamp(MIN_T, 1 - MIN_T)


def sample_log_snr_uniform(batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Sample timesteps with log-SNR uniform from -6 to 5.

    Args:
        batch: Number of clips.
        generator: CPU generator.

    Returns:
        (B,) in [1e-4, 1 - 1e-4].
    """
    return torch.sigmoid(-(11 * torch.rand(batch, generator=generator) - 6)).clamp(MIN_T, 1 - MIN_T)


def sample_uniform(batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Sample timesteps uniformly.

    Args:
        batch: Number of clips.
        generator: CPU generator.

    Returns:
        (B,) in [0, 1).
    """
    return torch.rand(batch, generator=generator)


def place_timesteps(numbers: Sequence[int]) -> Tensor:
    """Place timesteps evenly: the fractional parts of n times the golden ratio.

    Any stretch of numbers covers [0, 1) about evenly (Weyl 1916, "Über die Gleichverteilung von Zahlen mod. Eins"), so
    that successive losses vary less than with independent draws (Kingma et al. 2021, "Variational Diffusion Models").

    Args:
        numbers: Number of each clip in the run.

    Returns:
        (B,) in [0, 1].
    """
    return torch.tensor([number * GOLDEN_RATIO % 1 for number in numbers], dtype=torch.float32)


TIMESTEP_SAMPLERS: dict[str, TimestepSampler] = {
    "trunc_logit_normal": sample_trunc_logit_normal,
    "log_snr": sample_log_snr,
    "log_snr_uniform": sample_log_snr_uniform,
    "uniform": sample_uniform,
}


def sample_levels(levels: Tensor, batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Sample from given noise levels alone, such as those of a few-step sampler (for post-trained models).

    Args:
        levels: Noise levels.
        batch: Number of clips.
        generator: CPU generator.

    Returns:
        (B,).
    """
    return levels[torch.randint(len(levels), (batch,), generator=generator)]


def count_effective_frames(seconds: float, sample_rate: int, downsampling_ratio: int) -> int:
    """Count the latent frames that a duration fills: ceil(int(seconds * sample_rate) / downsampling_ratio).

    Args:
        seconds: Duration.
        sample_rate: Sample rate in Hz.
        downsampling_ratio: Samples per latent frame.

    Returns:
        Frames.
    """
    return -(-int(seconds * sample_rate) // downsampling_ratio)


def add_noise(data_BCT: Tensor, noise_BCT: Tensor, t_B: Tensor) -> Tensor:
    """Add noise: x_t = (1-t)*data + t*noise.

    Args:
        data_BCT: Latents.
        noise_BCT: Noise.
        t_B: Noise levels.

    Returns:
        Noisy latents (B, C, T).
    """
    t_B11 = t_B[:, None, None].to(data_BCT.dtype)
    return (1 - t_B11) * data_BCT + t_B11 * noise_BCT


def compute_velocity_target(data_BCT: Tensor, noise_BCT: Tensor) -> Tensor:
    """Compute what the model must predict: noise - data.

    Args:
        data_BCT: Latents.
        noise_BCT: Noise.

    Returns:
        Velocity (B, C, T).
    """
    return noise_BCT - data_BCT


def match_noise(data_BCT: Tensor, noise_BCT: Tensor) -> Tensor:
    """Match each clip with the noise near it, so that paths cross less (Pooladian et al. 2023; Tong et al. 2024).

    Twenty Sinkhorn rounds on the squared L2 cost divided by its mean, then clips choose in the order of the batch.

    Args:
        data_BCT: Latents.
        noise_BCT: Noise.

    Returns:
        Permutation (B,) int64: use `noise_BCT[columns]` as the noise.
    """
    batch = len(data_BCT)
    wide = get_widest_float(data_BCT.device)
    cost_BB = torch.cdist(data_BCT.flatten(1).to(wide), noise_BCT.flatten(1).to(wide)).square()
    log_plan_BB = -cost_BB / cost_BB.mean()
    for _ in range(COUPLING_ROUNDS):
        log_plan_BB = log_plan_BB - log_plan_BB.logsumexp(dim=1, keepdim=True)
        log_plan_BB = log_plan_BB - log_plan_BB.logsumexp(dim=0, keepdim=True)
    columns = torch.empty(batch, dtype=torch.int64, device=data_BCT.device)
    for row in range(batch):
        columns[row] = log_plan_BB[row].argmax()
        log_plan_BB.index_fill_(1, columns[row : row + 1], -math.inf)  # by tensor: the host never waits for the number
    return columns


def compute_squared_error(velocity_BCT: Tensor, target_BCT: Tensor) -> Tensor:
    """Compute (velocity - target)².

    Args:
        velocity_BCT: Prediction.
        target_BCT: Target.

    Returns:
        Float32 (B, C, T).
    """
    return (velocity_BCT.float() - target_BCT.float()).square()


def compute_huber_error(velocity_BCT: Tensor, target_BCT: Tensor, delta: float = 1.0) -> Tensor:
    """Compute twice Huber's loss: the square up to `delta`, then the line that continues it.

    Args:
        velocity_BCT: Prediction.
        target_BCT: Target.
        delta: Where the line begins.

    Returns:
        Float32 (B, C, T).
    """
    return 2 * torch.nn.functional.huber_loss(velocity_BCT.float(), target_BCT.float(), reduction="none", delta=delta)


def compute_masked_means(error_BCT: Tensor, mask_BT: Tensor) -> Tensor:
    """Compute each clip's mean error over (C, masked T).

    Args:
        error_BCT: Error.
        mask_BT: Frames that count.

    Returns:
        (B,); 0 for a clip whose mask is empty.
    """
    mask_BT = mask_BT.to(torch.bool)
    count_B = mask_BT.sum(dim=1) * error_BCT.shape[1]
    total_B = error_BCT.masked_fill(~mask_BT[:, None, :], 0.0).sum(dim=(1, 2))
    return total_B / count_B.clamp(min=1)


def compute_masked_loss(error_BCT: Tensor, mask_BT: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """Compute the mean over clips of their weighted masked means. A clip whose mask is empty counts as 0.

    Args:
        error_BCT: Error.
        mask_BT: Frames that count.
        weight_B: Weight of each clip; None is 1.

    Returns:
        Scalar.
    """
    means_B = compute_masked_means(error_BCT, mask_BT)
    return (means_B if weight_B is None else weight_B.to(means_B) * means_B).mean()


def split_generated_and_kept(inpaint_mask_B1T: Tensor, attention_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Split the real frames into those to generate and those kept as context.

    Args:
        inpaint_mask_B1T: 1 = keep, 0 = generate.
        attention_mask_BT: True = real.

    Returns:
        Two (B, T) bool masks: generated, kept.
    """
    kept_BT = inpaint_mask_B1T[:, 0] > 0.5
    real_BT = attention_mask_BT.to(torch.bool)
    return real_BT & ~kept_BT, real_BT & kept_BT


def compute_losses(
    error_BCT: Tensor, inpaint_mask_B1T: Tensor, attention_mask_BT: Tensor, weight_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the loss over generated frames and the context loss over kept ones.

    The released models train on `loss + 1.0 * context_loss`.

    Args:
        error_BCT: Error.
        inpaint_mask_B1T: 1 = keep, 0 = generate.
        attention_mask_BT: True = real.
        weight_B: Weight of each clip; None is 1.

    Returns:
        Two scalars: loss, context loss.
    """
    generated_BT, kept_BT = split_generated_and_kept(inpaint_mask_B1T, attention_mask_BT)
    return compute_masked_loss(error_BCT, generated_BT, weight_B), compute_masked_loss(error_BCT, kept_BT, weight_B)


def compute_unit_weights(t_B: Tensor) -> Tensor:
    """Compute weights of 1 at every noise level.

    Args:
        t_B: Noise levels.

    Returns:
        (B,).
    """
    return torch.ones_like(t_B)


def compute_min_snr_weights(t_B: Tensor, gamma: float = 5.0) -> Tensor:
    """Compute Min-SNR weights (Hang et al. 2023): min(SNR, gamma) on the data estimate, SNR = ((1-t)/t)².

    The error of the data estimate is t times that of the velocity, so the weight of the velocity's squared error is
    t² * min(SNR, gamma) = min((1-t)², gamma * t²).

    Args:
        t_B: Noise levels.
        gamma: Largest weight.

    Returns:
        (B,).
    """
    return torch.minimum((1 - t_B).square(), gamma * t_B.square())


def compute_cosmap_weights(t_B: Tensor) -> Tensor:
    """Compute 2 / (pi * (1 - 2t + 2t²)), the density of the cosine schedule over t (Esser et al. 2024).

    It is largest in the middle.

    Args:
        t_B: Noise levels.

    Returns:
        (B,).
    """
    return 2 / (math.pi * (1 - 2 * t_B + 2 * t_B.square()))


def interpolate_weights(t_B: Tensor, weights: Sequence[float]) -> Tensor:
    """Interpolate weights between evenly spaced noise levels.

    Args:
        t_B: Noise levels.
        weights: Weights from t = 0 to t = 1, at least two; otherwise `ValueError`.

    Returns:
        (B,).
    """
    if len(weights) < 2:
        raise ValueError("weighting by noise level needs at least two weights, for t = 0 and t = 1")
    table = torch.tensor(list(weights), dtype=t_B.dtype, device=t_B.device)
    position_B = t_B.clamp(0, 1) * (len(weights) - 1)
    low_B = position_B.floor().long().clamp(max=len(weights) - 2)
    return torch.lerp(table[low_B], table[low_B + 1], position_B - low_B)


WEIGHTINGS: dict[str, Weighting] = {
    "none": compute_unit_weights,
    "min_snr": compute_min_snr_weights,
    "cosmap": compute_cosmap_weights,
}
