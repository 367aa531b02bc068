"""The floor a figure is held against: work counted from the architecture, rates measured here.

The floor of a computation is the larger of operations / matmul rate and bytes / copy rate, where every weight is read
once and nothing but matrix products is counted. No implementation can be faster at these rates.

Shape legend: B batch, L tokens, M context tokens or keys, T latent frames, D width.
"""

from dataclasses import dataclass

import torch

from sa3train.bench.measure import interleaved
from sa3train.models.config import AutoencoderConfig, DiTConfig, StackConfig

_SHAPES = ((452, 1024, 8192), (1024, 1024, 4096), (2048, 2048, 2048))
_CUDA_SHAPES = ((8192, 8192, 8192), (4096, 8192, 8192))


@dataclass(frozen=True)
class Cost:
    """Floating-point operations (a multiply-add is two) of the matrix products, and weights read."""

    flops: float = 0.0
    weights: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.weights + other.weights)

    def __mul__(self, times: float) -> "Cost":
        """So many times the work, weights read every time."""
        return Cost(self.flops * times, self.weights * times)

    def seconds(self, rates: "Rates", itemsize: int) -> float:
        """The floor with weights of `itemsize` bytes."""
        return max(self.flops / rates.flops, self.weights * itemsize / rates.bytes)


@dataclass(frozen=True)
class Rates:
    """Matmul operations per second in one dtype, and bytes per second read and written by a copy."""

    flops: float
    bytes: float


def measured_rates(dtype: torch.dtype, device: str = "cpu", repeats: int = 5) -> Rates:
    """The best of several matmul shapes and of a 256 MiB copy, each the fastest of `repeats`."""
    shapes = _CUDA_SHAPES if device.startswith("cuda") else _SHAPES
    best = 0.0
    for rows, inputs, outputs in shapes:
        x = torch.randn(rows, inputs, device=device).to(dtype)
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        with torch.inference_mode():
            timings = interleaved({"matmul": lambda x=x, w=weight: torch.nn.functional.linear(x, w)}, repeats, device)  # type: ignore[misc]
        best = max(best, 2 * rows * inputs * outputs / timings.best("matmul"))
    return Rates(best, copy_rate(device, repeats))


def copy_rate(device: str = "cpu", repeats: int = 5) -> float:
    """Bytes per second of a copy, reads and writes counted."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    timings = interleaved({"copy": lambda: target.copy_(source)}, repeats, device)
    return 2 * source.nbytes / timings.best("copy")


def linear(rows: float, inputs: int, outputs: int) -> Cost:
    """One linear layer on `rows` rows."""
    return Cost(2.0 * rows * inputs * outputs, float(inputs * outputs))


def attention(queries: float, keys: float, width: int, branches: int = 1) -> Cost:
    """QKᵀ and the weighted sum of values, all heads together making up `width`."""
    return Cost(4.0 * queries * keys * width * branches)


def dit_step(config: DiTConfig, frames: int, context: int, batch: int = 1) -> Cost:
    """One velocity with its conditions prepared: what no step can avoid."""
    width, latent = config.width, config.latent_width
    tokens, rows = batch * (frames + config.memory_tokens), batch * frames
    branches = 2 if config.differential else 1
    inner = int(width * config.ff_mult)
    block = (
        linear(tokens, width, (2 * branches + 1) * width)
        + attention(tokens, frames + config.memory_tokens, width, branches)
        + linear(tokens, width, width)
        + linear(tokens, width, branches * width)
        + attention(tokens, context, width, branches)
        + linear(tokens, width, width)
        + linear(tokens, width, 2 * inner)
        + linear(tokens, inner, width)
    )
    time = linear(batch, config.features, width) + linear(batch, width, width)
    modulation = linear(batch, width, width) + linear(batch, width, 6 * width)
    ends = linear(rows, latent, width) + linear(rows, width, latent) + linear(rows, latent, latent) * 2
    return block * config.depth + time + modulation + ends


def dit_conditions(config: DiTConfig, frames: int, context: int, batch: int = 1, local: bool = True) -> Cost:
    """What a generation computes once: embedded context, keys and values of every block, the local condition."""
    width, rows = config.width, batch * context
    once = linear(rows, config.context_width, width) + linear(rows, width, width)
    once += linear(batch, config.global_width, width) + linear(batch, width, width)
    block = linear(rows, width, (3 if config.differential else 2) * width)
    if local:
        block += linear(batch * frames, config.local_width, width) + linear(batch * frames, width, width)
    return once + block * config.depth


def same_encode(config: AutoencoderConfig, frames: int, batch: int = 1) -> Cost:
    """Audio of `frames` latent frames to latents, run whole."""
    stack, patch = config.encoder, config.audio_channels * config.patch_size
    groups = _whole_groups(stack, frames) * batch
    mapping = linear(groups * stack.stride, patch * (3 if stack.conv_mapping else 1), stack.width)
    return mapping + _layers(stack, groups, batch, ends_in_one=True) + linear(groups, stack.width, stack.latent_width)


def same_decode(config: AutoencoderConfig, frames: int, batch: int = 1) -> Cost:
    """Latents of `frames` frames to audio, run whole."""
    stack, patch = config.decoder, config.audio_channels * config.patch_size
    groups = _whole_groups(stack, frames) * batch
    mapping = linear(groups * stack.stride, stack.width * (3 if stack.conv_mapping else 1), patch)
    return linear(frames * batch, stack.latent_width, stack.width) + _layers(stack, groups, batch) + mapping


def _whole_groups(stack: StackConfig, frames: int) -> int:
    unit = 1 if stack.chunk_size is None else stack.chunk_size // stack.stride
    return -(-frames // unit) * unit


def _layers(stack: StackConfig, groups: int, batch: int, ends_in_one: bool = False) -> Cost:
    """A resampler's transformer over groups of stride + 1 tokens; the chunked kind's second half has a chunk more.

    `ends_in_one`: the last layer makes one token of each group; in a window its attention is that of all.
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
        cost += linear(rows, width, 5 * width) + attention(queries, keys, width, 2) + linear(made, width, width)
        cost += linear(made, width, 2 * inner) + linear(made, inner, width)
    return cost


def dit_training_floor(config: DiTConfig, frames: int, context: int, batch: int = 1) -> Cost:
    """Forward and backward to the input of a frozen DiT, conditions once.

    Every product of the forward comes once more for its input's gradient, the two of attention twice more.
    """
    step = dit_step(config, frames, context, batch)
    tokens, branches = batch * (frames + config.memory_tokens), 2 if config.differential else 1
    scores = attention(tokens, frames + config.memory_tokens + context, config.width, branches) * config.depth
    return step * 2 + scores + dit_conditions(config, frames, context, batch)
