"""The roofline: the least time that a computation can take, from counted work and measured rates.

It is the larger of operations / matmul rate and bytes / copy rate (Williams et al. 2009, "Roofline"), where each weight
is read once and only matrix products are counted. No implementation can be faster at these rates.
"""

import functools
from dataclasses import dataclass

import torch

from sa3train.bench.measure import time_interleaved
from sa3train.models.config import AutoencoderConfig, DiTConfig, StackConfig

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

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.weights + other.weights)

    def __mul__(self, times: float) -> "Cost":
        """Repeat the work `times` times; the weights are read each time."""
        return Cost(self.flops * times, self.weights * times)

    def compute_seconds(self, rates: "Rates", itemsize: int) -> float:
        """Compute the roofline.

        Args:
            rates: Rates of the machine.
            itemsize: Bytes of a weight.

        Returns:
            Seconds.
        """
        return max(self.flops / rates.flops, self.weights * itemsize / rates.bytes)


@dataclass(frozen=True)
class Rates:
    """Measured rates of a machine.

    Attributes:
        flops: Matmul operations per second in one dtype.
        bytes: Bytes per second read and written by a copy.
    """

    flops: float
    bytes: float


def measure_rates(dtype: torch.dtype, device: str = "cpu", repeats: int = 5) -> Rates:
    """Measure the rates of several matmul shapes and of a 256 MiB copy, and take the best.

    Args:
        dtype: Of the matrices.
        device: Device to measure.
        repeats: Measured rounds of each; the fastest counts.

    Returns:
        The rates.
    """
    shapes = _CUDA_SHAPES if device.startswith("cuda") else _SHAPES
    best = 0.0
    for rows, inputs, outputs in shapes:
        x = torch.randn(rows, inputs, device=device).to(dtype)
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        with torch.inference_mode():
            task = functools.partial(torch.nn.functional.linear, x, weight)
            timings = time_interleaved({"matmul": task}, repeats, device)
        best = max(best, 2 * rows * inputs * outputs / timings.best("matmul"))
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    timings = time_interleaved({"copy": lambda: target.copy_(source)}, repeats, device)
    return Rates(best, 2 * source.nbytes / timings.best("copy"))


def _linear(rows: float, inputs: int, outputs: int) -> Cost:
    return Cost(2.0 * rows * inputs * outputs, float(inputs * outputs))


def _attention(queries: float, keys: float, width: int, branches: int = 1) -> Cost:
    """Count QKᵀ and the weighted sum of values; all heads together have `width` channels."""
    return Cost(4.0 * queries * keys * width * branches)


def count_dit_step(config: DiTConfig, frames: int, context: int, batch: int = 1) -> Cost:
    """Count one velocity with its conditions prepared: what no sampling step can avoid.

    Args:
        config: Configuration of the DiT.
        frames: Latent frames.
        context: Context tokens of cross-attention.
        batch: Items.

    Returns:
        The cost.
    """
    width, latent = config.width, config.latent_width
    tokens, rows = batch * (frames + config.memory_tokens), batch * frames
    branches = 2 if config.differential else 1
    inner = int(width * config.ff_mult)
    block = (
        _linear(tokens, width, (2 * branches + 1) * width)
        + _attention(tokens, frames + config.memory_tokens, width, branches)
        + _linear(tokens, width, width)
        + _linear(tokens, width, branches * width)
        + _attention(tokens, context, width, branches)
        + _linear(tokens, width, width)
        + _linear(tokens, width, 2 * inner)
        + _linear(tokens, inner, width)
    )
    time = _linear(batch, config.features, width) + _linear(batch, width, width)
    modulation = _linear(batch, width, width) + _linear(batch, width, 6 * width)
    ends = _linear(rows, latent, width) + _linear(rows, width, latent) + _linear(rows, latent, latent) * 2
    return block * config.depth + time + modulation + ends


def count_dit_conditions(config: DiTConfig, frames: int, context: int, batch: int = 1, local: bool = True) -> Cost:
    """Count what a generation computes once: embedded context, keys and values of each block, the local condition.

    Args:
        config: Configuration of the DiT.
        frames: Latent frames.
        context: Context tokens of cross-attention.
        batch: Items.
        local: Whether there is a local condition.

    Returns:
        The cost.
    """
    width, rows = config.width, batch * context
    once = _linear(rows, config.context_width, width) + _linear(rows, width, width)
    once += _linear(batch, config.global_width, width) + _linear(batch, width, width)
    block = _linear(rows, width, (3 if config.differential else 2) * width)
    if local:
        block += _linear(batch * frames, config.local_width, width) + _linear(batch * frames, width, width)
    return once + block * config.depth


def count_same_encode(config: AutoencoderConfig, frames: int, batch: int = 1) -> Cost:
    """Count encoding of audio, not in chunks.

    Args:
        config: Configuration of the autoencoder.
        frames: Latent frames.
        batch: Items.

    Returns:
        The cost.
    """
    stack, patch = config.encoder, config.audio_channels * config.patch_size
    groups = _round_up_groups(stack, frames) * batch
    mapping = _linear(groups * stack.stride, patch * (3 if stack.conv_mapping else 1), stack.width)
    return (
        mapping
        + _count_layers(stack, groups, batch, ends_in_one=True)
        + _linear(groups, stack.width, stack.latent_width)
    )


def count_same_decode(config: AutoencoderConfig, frames: int, batch: int = 1) -> Cost:
    """Count decoding of latents, not in chunks.

    Args:
        config: Configuration of the autoencoder.
        frames: Latent frames.
        batch: Items.

    Returns:
        The cost.
    """
    stack, patch = config.decoder, config.audio_channels * config.patch_size
    groups = _round_up_groups(stack, frames) * batch
    mapping = _linear(groups * stack.stride, stack.width * (3 if stack.conv_mapping else 1), patch)
    return _linear(frames * batch, stack.latent_width, stack.width) + _count_layers(stack, groups, batch) + mapping


def _round_up_groups(stack: StackConfig, frames: int) -> int:
    unit = 1 if stack.chunk_size is None else stack.chunk_size // stack.stride
    return -(-frames // unit) * unit


def _count_layers(stack: StackConfig, groups: int, batch: int, ends_in_one: bool = False) -> Cost:
    """Count a resampler's transformer over groups of stride + 1 tokens.

    The second half of a chunked one has a chunk more. With `ends_in_one` the last layer computes one token of each
    group; in a window its attention is that of all.
    """
    size, width, inner = stack.stride + 1, stack.width, int(stack.width * stack.ff_mult)
    tokens = float(groups * size)
    if stack.window is None:
        keys = (stack.chunk_size or stack.stride) // stack.stride * size
        shifted = tokens + batch * keys
    else:
        keys, shifted = 2 * stack.window * size + 1, tokens
    cost = Cost()
    for index in range(stack.depth):
        rows = shifted if index >= stack.depth // 2 else tokens
        made = rows / size if ends_in_one and index == stack.depth - 1 else rows
        queries = made if stack.window is None else rows
        cost += _linear(rows, width, 5 * width) + _attention(queries, keys, width, 2) + _linear(made, width, width)
        cost += _linear(made, width, 2 * inner) + _linear(made, inner, width)
    return cost


def count_dit_training(config: DiTConfig, frames: int, context: int, batch: int = 1) -> Cost:
    """Count forward and backward to the input of a frozen DiT, with its conditions.

    Each product of the forward pass comes once more for its input's gradient, the two of attention twice more.

    Args:
        config: Configuration of the DiT.
        frames: Latent frames.
        context: Context tokens of cross-attention.
        batch: Items.

    Returns:
        The cost.
    """
    step = count_dit_step(config, frames, context, batch)
    tokens, branches = batch * (frames + config.memory_tokens), 2 if config.differential else 1
    scores = _attention(tokens, frames + config.memory_tokens + context, config.width, branches) * config.depth
    return step * 2 + scores + count_dit_conditions(config, frames, context, batch)
