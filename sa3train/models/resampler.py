"""The resampling transformers of the SAME autoencoder, chunked and window kinds (docs/model.md, section 2).

Shape legend: L tokens of all clips laid end to end, G groups, N new tokens per group, B chunks, D width.
Module names are those of the released files.

Clips are laid end to end in one flat row of tokens with their group counts beside it, so that a batch of equal clips
and a list of unequal ones take the same path and no padding is computed.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3train.core.noise import randn
from sa3train.models.attention import Window
from sa3train.models.blocks import FeedForward, Rotary, SelfAttention
from sa3train.models.config import StackConfig
from sa3train.models.norms import DynamicTanh

TOKENS_IN_CACHE = 1088  # 10 MB of the widest activation in bf16; products of fewer rows run slower


def draw_noise(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw N(0, 1) in fp32 on the generator's device, in contiguous order.

    Args:
        shape: Shape.
        like: Tensor whose device and dtype the result has.
        generator: Source; None is torch's global one of `like`'s device.

    Returns:
        Noise.
    """
    if generator is not None and generator.device.type == "cpu":
        return randn(shape, generator, like.device).to(like.dtype)
    return torch.randn(tuple(shape), generator=generator, device=like.device).to(like.dtype)


class WeightNormConv(nn.Module):
    """A weight-normed convolution on (B, L, channels), stored as `weight_g` and `weight_v` (Salimans & Kingma 2016)."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.weight_v = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(outputs, inputs, kernel), a=math.sqrt(5)))
        self.weight_g = nn.Parameter(torch.full((outputs, 1, 1), 1 / math.sqrt(3)))  # what that norm is on average

    def forward(self, x_BLD: Tensor) -> Tensor:
        v = self.weight_v.float()
        weight = (v * (self.weight_g.float() / v.norm(dim=(1, 2), keepdim=True))).to(x_BLD.dtype)
        if weight.shape[-1] == 1:
            return F.linear(x_BLD, weight.squeeze(-1), self.bias)
        return F.conv1d(x_BLD.transpose(1, 2), weight, self.bias, padding="same").transpose(1, 2)


class ResamplerLayer(nn.Module):
    """Differential attention and feed-forward, each behind a dynamic tanh. Given `kept`, only these are returned."""

    def __init__(self, config: StackConfig, activation: Literal["silu", "sine"]) -> None:
        super().__init__()
        self.pre_norm = DynamicTanh(config.width)
        self.self_attn = SelfAttention(config.width, DynamicTanh, differential=True)
        self.ff_norm = DynamicTanh(config.width)
        self.ff = FeedForward(config.width, config.ff_mult, activation)
        self.rope = Rotary()

    def forward(
        self, x_BLD: Tensor, rotary: tuple[Tensor, Tensor], pattern: Window | None = None, kept: slice | None = None
    ) -> Tensor:
        attended_BLD = self.self_attn(self.pre_norm(x_BLD), rotary, pattern, kept)
        x_BLD = (x_BLD if kept is None else x_BLD[:, kept]) + attended_BLD
        return x_BLD + self.ff(self.ff_norm(x_BLD))


class Resampler(nn.Module):
    """Groups of raw tokens and new tokens through a stack of layers.

    Encoder: 16 + 1 new, the new one is kept. Decoder: 1 + 16 new, the new ones are kept. New tokens are one learned
        vector
    plus noise.

    Attributes:
        config: Sizes.
        direction: "encoder" or "decoder".
        raw: Raw tokens of a group.
        new: New tokens of a group.
    """

    def __init__(self, config: StackConfig, patch_width: int, direction: Literal["encoder", "decoder"]) -> None:
        super().__init__()
        self.config = config
        self.direction = direction
        encodes = direction == "encoder"
        self.raw, self.new = (config.stride, 1) if encodes else (1, config.stride)
        kernel = 3 if config.conv_mapping else 1
        inputs, outputs = (patch_width, config.width) if encodes else (config.width, patch_width)
        self.mapping = WeightNormConv(inputs, outputs, kernel)
        self.new_tokens = nn.Parameter(nn.init.normal_(torch.empty(1, 1, config.width)))
        sine_from = config.depth - config.sinusoidal_blocks
        self.transformers = nn.ModuleList(
            ResamplerLayer(config, "sine" if not encodes and index > sine_from else "silu")
            for index in range(config.depth)
        )

    def draw(self, groups: int, like: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """Draw the noise of new tokens.

        Args:
            groups: Number of groups.
            like: Tensor whose device and dtype the noise has.
            generator: Source.

        Returns:
            (G, N, D); None where the model has no noise.
        """
        if not self.config.mask_noise:
            return None
        return self.config.mask_noise * draw_noise(self.get_noise_shape(groups), like, generator)

    def get_noise_shape(self, groups: int) -> tuple[int, int, int]:
        """Get the shape of what `draw` returns.

        Args:
            groups: Number of groups.

        Returns:
            (G, N, D).
        """
        return groups, self.new, self.config.width

    def forward(self, x_LD: Tensor, groups: tuple[int, ...], noise_GND: Tensor | None) -> Tensor:
        """Resample clips of `groups` groups each, laid end to end. `noise_GND` is from `draw`, for whole chunks.

        Encoder: (16 L, patch width) to (L, D); clips must fill their chunks. Decoder: (L, D) to (16 L, patch width),
            where
        clips that do not fill their last chunk come out as if they did.
        """
        if self.direction == "encoder":
            return self._layers(self._map(x_LD, [count * self.raw for count in groups]), groups, noise_GND)
        x_LD, groups = self._fill_chunks(x_LD, groups)
        tokens = self._layers(x_LD, groups, noise_GND)
        return self._map(tokens, [count * self.new for count in groups])

    @property
    def groups_per_chunk(self) -> int:
        """Groups of a chunk; every clip has a multiple of it."""
        return 1 if self.config.chunk_size is None else self.config.chunk_size // self.config.stride

    @property
    def reach(self) -> int:
        """Groups to each side that a group's output may depend on."""
        # Chunks of the second half lie across two of the first; windows add up layer by layer.
        layers = 2 * self.groups_per_chunk if self.config.window is None else self.config.depth * self.config.window
        return layers + (1 if self.config.conv_mapping else 0)

    def _fill_chunks(self, x_LD: Tensor, groups: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """Append zero groups to each clip that does not fill its last chunk."""
        missing = [-count % self.groups_per_chunk for count in groups]
        if not any(missing):
            return x_LD, groups
        parts = zip(x_LD.split(groups), missing, strict=True)
        padded = torch.cat([F.pad(part, (0, 0, 0, extra)) for part, extra in parts])
        return padded, tuple(count + extra for count, extra in zip(groups, missing, strict=True))

    def _map(self, x_LD: Tensor, lengths: list[int]) -> Tensor:
        """Apply the mapping within each clip: a kernel of 3 must not reach into a neighbor."""
        if self.mapping.weight_v.shape[-1] == 1:
            return self.mapping(x_LD)
        if all(each == lengths[0] for each in lengths):
            return self.mapping(x_LD.unflatten(0, (len(lengths), -1))).flatten(0, 1)
        return torch.cat([self.mapping(part[None])[0] for part in x_LD.split(lengths)])

    def _layers(self, x_LD: Tensor, groups: tuple[int, ...], noise_GND: Tensor | None) -> Tensor:
        width, size = x_LD.shape[-1], self.raw + self.new
        new_GND = self.new_tokens.expand(sum(groups), self.new, width)
        if noise_GND is not None:
            new_GND = new_GND + noise_GND
        tokens_LD = torch.cat((x_LD.unflatten(0, (-1, self.raw)), new_GND), dim=1).flatten(0, 1)
        lengths = tuple(count * size for count in groups)
        run = self._in_window if self.config.window is not None else self._in_chunks
        if self.direction == "encoder" and (self.config.window is not None or self.groups_per_chunk % 2 == 0):
            # One token of 17 is kept: the last layer computes no other.
            return run(tokens_LD, lengths, slice(self.raw, None, size))
        return run(tokens_LD, lengths).unflatten(0, (-1, size))[:, self.raw :].flatten(0, 1)

    def _in_window(self, tokens_LD: Tensor, lengths: tuple[int, ...], kept: slice | None = None) -> Tensor:
        assert self.config.window is not None
        pattern = Window(lengths, self.config.window * (self.raw + self.new))
        positions = torch.cat([torch.arange(length, device=tokens_LD.device) for length in lengths])
        return self._run(self.transformers, tokens_LD[None], positions, pattern, kept)[0]

    def _in_chunks(self, tokens_LD: Tensor, lengths: tuple[int, ...], kept: slice | None = None) -> Tensor:
        """Run the first half of the layers in chunks, the second half in chunks that are shifted by half a chunk.

        `kept` is of the tokens of a chunk, and the same wherever a chunk begins.
        """
        size = self.groups_per_chunk * (self.raw + self.new)
        half, middle = size // 2, len(self.transformers) // 2
        positions = torch.arange(size, device=tokens_LD.device)
        tokens_LD = self._run_chunks(self.transformers[:middle], tokens_LD.unflatten(0, (-1, size)), positions)
        parts = tokens_LD.split(lengths)
        shifted_LD = torch.cat([piece for part in parts for piece in (part[:half], part, part[-half:])])
        shifted_LD = self._run_chunks(self.transformers[middle:], shifted_LD.unflatten(0, (-1, size)), positions, kept)
        share = 1 if kept is None else kept.step
        parts = shifted_LD.split([(length + 2 * half) // share for length in lengths])
        return torch.cat([part[half // share : part.shape[0] - half // share] for part in parts])

    def _run_chunks(
        self, layers: nn.ModuleList, x_BLD: Tensor, positions_L: Tensor, kept: slice | None = None
    ) -> Tensor:
        """Run layers on chunks, on a CPU so many at a time that their activations stay in the cache.

        Returns them end to end. An exported graph has no loop over sizes.
        """
        in_parts = x_BLD.device.type == "cpu" and not torch.compiler.is_exporting()
        parts = x_BLD.split(max(1, TOKENS_IN_CACHE // x_BLD.shape[1])) if in_parts else (x_BLD,)
        return torch.cat([self._run(layers, part, positions_L, kept=kept).flatten(0, 1) for part in parts])

    def _run(
        self,
        layers: nn.ModuleList,
        x_BLD: Tensor,
        positions_L: Tensor,
        pattern: Window | None = None,
        kept: slice | None = None,
    ) -> Tensor:
        """Run layers; the last returns the kept tokens alone."""
        rotary: tuple[Tensor, Tensor] | None = None
        last = len(layers) - 1
        for index, layer in enumerate(layers):
            rotary = rotary or layer.rope(positions_L)  # type: ignore[operator]
            x_BLD = layer(x_BLD, rotary, pattern, kept if index == last else None)
        return x_BLD


class AutoencoderStack(nn.Module):
    """Encoder (resampler, linear to latents) or decoder (linear from latents, resampler)."""

    def __init__(self, config: StackConfig, patch_width: int, direction: Literal["encoder", "decoder"]) -> None:
        super().__init__()
        self.resampler_index, self.linear_index = (0, 2) if direction == "encoder" else (3, 1)
        modules: list[nn.Module] = [nn.Identity() for _ in range(3 if direction == "encoder" else 4)]
        ends = (config.width, config.latent_width)
        modules[self.resampler_index] = Resampler(config, patch_width, direction)
        modules[self.linear_index] = nn.Linear(*(ends if direction == "encoder" else ends[::-1]))
        self.layers = nn.ModuleList(modules)

    @property
    def resampler(self) -> Resampler:
        """The transformer."""
        resampler = self.layers[self.resampler_index]
        assert isinstance(resampler, Resampler)
        return resampler

    def forward(self, x_LD: Tensor, groups: tuple[int, ...], noise_GND: Tensor | None) -> Tensor:
        linear = self.layers[self.linear_index]
        if self.resampler_index < self.linear_index:
            return linear(self.resampler(x_LD, groups, noise_GND))
        return self.resampler(linear(x_LD), groups, noise_GND)
