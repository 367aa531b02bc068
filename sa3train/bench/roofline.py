"""The roofline: the least time that a computation can take, from counted work and measured rates.

It is the larger of operations / matmul rate and bytes / copy rate (Williams et al. 2009, "Roofline"). Operations are
those of the matrix products, as torch counts them on models without memory; each weight is read once in a pass. The
same passes cannot be faster at these rates.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sa3train.bench.figures import Options
from sa3train.bench.measure import time_interleaved
from sa3train.core.dtypes import get_dtype
from sa3train.models.attention import force_backend
from sa3train.models.autoencoder import Autoencoder
from sa3train.models.config import AutoencoderConfig, DiTConfig
from sa3train.models.dit import DiT

_SHAPES = ((452, 1024, 8192), (1024, 1024, 4096), (2048, 2048, 2048))
_CUDA_SHAPES = ((8192, 8192, 8192), (4096, 8192, 8192))


@dataclass(frozen=True)
class Cost:
    """Work of a computation.

    Attributes:
        flops: Floating-point operations of the matrix products; a multiply-add is two.
        weights: Number of weights read.
    """

    flops: float = 0.0
    weights: float = 0.0

    def compute_seconds(self, rates: "Rates") -> float:
        """Compute the roofline.

        Args:
            rates: Rates of the machine.

        Returns:
            Seconds.
        """
        return max(self.flops / rates.flops, self.weights / rates.weights)


@dataclass(frozen=True)
class Rates:
    """Measured rates of a machine in one dtype.

    Attributes:
        flops: Matmul operations per second.
        weights: Weights per second that a copy reads and writes.
    """

    flops: float
    weights: float


def measure_rates(options: Options) -> Rates:
    """Measure the rates of several matmul shapes and of a 256 MiB copy, and take the best.

    Args:
        options: `dtype`, `device`, and `repeats` of each, of which the fastest counts.

    Returns:
        The rates.
    """
    shapes, dtype = _CUDA_SHAPES if options.is_cuda else _SHAPES, get_dtype(options.dtype)
    best = 0.0
    for rows, inputs, outputs in shapes:
        x = torch.randn(rows, inputs, device=options.device).to(dtype)
        weight = torch.randn(outputs, inputs, device=options.device).to(dtype)
        with torch.inference_mode():
            task = functools.partial(torch.nn.functional.linear, x, weight)
            timings = time_interleaved({"matmul": task}, options.repeats, options.device)
        best = max(best, 2 * rows * inputs * outputs / timings.best("matmul"))
    source = torch.ones(2**26, device=options.device)
    target = torch.empty_like(source)
    timings = time_interleaved({"copy": lambda: target.copy_(source)}, options.repeats, options.device)
    return Rates(best, 2 * source.nbytes / timings.best("copy") / dtype.itemsize)


def count_dit_sampling(config: DiTConfig, frames: int, context: int, steps: int) -> Cost:
    """Count the denoising of one item: its conditions once, then the steps.

    Args:
        config: Configuration of the DiT.
        frames: Latent frames.
        context: Context tokens of cross-attention.
        steps: Sampling steps.

    Returns:
        The cost.
    """
    dit, x_BCT, t_B, conditions = _make_dit(config, frames, context)
    prepared = dit.prepare(x_BCT.shape, **conditions)
    once = _count_flops(lambda: dit.prepare(x_BCT.shape, **conditions))
    step = _count_flops(lambda: dit.predict_velocity(x_BCT, t_B, prepared))
    return Cost(once + steps * step, steps * _count_weights(dit))


def count_dit_training(config: DiTConfig, frames: int, context: int) -> Cost:
    """Count forward and backward to the input of a frozen DiT, for one item, with its conditions.

    Args:
        config: Configuration of the DiT.
        frames: Latent frames.
        context: Context tokens of cross-attention.

    Returns:
        The cost.
    """
    dit, x_BCT, t_B, conditions = _make_dit(config, frames, context)
    flops = _count_flops(lambda: dit(x_BCT.requires_grad_(), t_B, **conditions).sum().backward())
    return Cost(flops, 2 * _count_weights(dit))


def count_same(config: AutoencoderConfig, frames: int, decodes: bool) -> Cost:
    """Count encoding of audio, or decoding of latents, not in chunks.

    Args:
        config: Configuration of the autoencoder.
        frames: Latent frames.
        decodes: Whether to count the decoder.

    Returns:
        The cost.
    """
    with torch.device("meta"):
        autoencoder = Autoencoder(config)
        latents_BCT = torch.zeros(1, autoencoder.latent_channels, frames)
        audio_BCN = torch.zeros(1, config.audio_channels, frames * autoencoder.downsampling_ratio)
    if decodes:
        flops = _count_flops(lambda: autoencoder.decode(latents_BCT, noise=False, chunked=False))
    else:
        flops = _count_flops(lambda: autoencoder.encode(audio_BCN, noise=False, chunked=False))
    return Cost(flops, _count_weights(autoencoder.decoder if decodes else autoencoder.encoder))


def _make_dit(config: DiTConfig, frames: int, context: int) -> tuple[DiT, Tensor, Tensor, dict[str, Tensor]]:
    """A DiT without memory, and inputs of one item."""
    with torch.device("meta"):
        conditions = {
            "cross_attn_cond_BLD": torch.zeros(1, context, config.context_width),
            "global_cond_BD": torch.zeros(1, config.global_width),
            "local_add_cond_BCT": torch.zeros(1, config.local_width, frames),
        }
        dit = DiT(config).requires_grad_(False)
        return dit, torch.zeros(1, config.latent_width, frames), torch.zeros(1), conditions


def _count_flops(task: Callable[[], object]) -> float:
    counter = FlopCounterMode(display=False)
    with counter, force_backend("sdpa"):
        task()
    return float(counter.get_total_flops())


def _count_weights(module: nn.Module) -> float:
    return float(sum(parameter.numel() for parameter in module.parameters()))
