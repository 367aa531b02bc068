"""The five graphs of an exported model, as modules that `torch.onnx.export` traces with dynamic sizes.

Shape legend: B clips, R rows of a step (B, or 2B under guidance), L prompt tokens, M context tokens, C latent channels,
T latent frames, P patches, G groups, K new tokens of a group, D width.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sa3train.models.autoencoder import BOTTLENECK_NOISE, patchify, unpatchify
from sa3train.models.checkpoint import StableAudio3
from sa3train.models.dit_graph import EXAMPLE_FRAMES, PAIRS, PREPARED, ROWS, PrepareGraph, StepGraph
from sa3train.models.t5gemma import T5GemmaEncoder


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph to export.

    Attributes:
        module: Computes it.
        inputs: An example of each input by name, in order.
        outputs: Names of the outputs.
        dynamic: Dynamic dimensions of each input by index.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, Any]]

    @property
    def dynamic_shapes(self) -> tuple[Any, ...]:
        """Dynamic dimensions by argument of the module."""
        shapes = tuple(self.dynamic[name] for name in self.inputs)
        takes_any = inspect.signature(self.module.forward).parameters.keys() == {"inputs"}
        return (shapes,) if takes_any else shapes


class _Conditions(nn.Module):
    """Prompt tokens and seconds to the conditions of the DiT, by the text encoder in fp32."""

    def __init__(self, model: StableAudio3) -> None:
        super().__init__()
        self.conditioner = model.conditioner
        encoder = model.conditioner.text_encoder.model(torch.device("cpu"))
        self.encoder = T5GemmaEncoder(encoder.config, {name: each.float() for name, each in encoder.weights.items()})

    def forward(self, input_ids: Tensor, token_mask: Tensor, seconds: Tensor) -> tuple[Tensor, Tensor]:
        prompt, number = self.conditioner.conditioners["prompt"], self.conditioner.conditioners["seconds_total"]
        padding_D, length = prompt.get_parameter("padding_embedding"), self.conditioner.max_length
        hidden_BLD = torch.where(token_mask[..., None], self.encoder(input_ids, token_mask), padding_D)
        rest_BLD = padding_D.expand(hidden_BLD.shape[0], length, -1)
        seconds_B1D = number(seconds)
        prompt_BLD = torch.cat((hidden_BLD, rest_BLD), dim=1)[:, :length]
        return torch.cat((prompt_BLD, seconds_B1D), dim=1), seconds_B1D[:, 0]


class _Decode(nn.Module):
    """Latents of one clip, or of one chunk of it, to audio. The noise inputs are N(0, 1)."""

    def __init__(self, model: StableAudio3) -> None:
        super().__init__()
        self.autoencoder = model.autoencoder

    def forward(self, latents: Tensor, latent_noise: Tensor, token_noise: Tensor) -> Tensor:
        autoencoder = self.autoencoder
        std = autoencoder.bottleneck.running_std
        scaled_1CT = latents * std + latent_noise * (std * BOTTLENECK_NOISE)
        noise_GKD = token_noise * autoencoder.decoder.resampler.config.mask_noise
        patches_PK = autoencoder.decoder(scaled_1CT[0].T, (latents.shape[2],), noise_GKD)
        return unpatchify(patches_PK[None], autoencoder.config.audio_channels)


class _Encode(nn.Module):
    """Audio of one clip, or of one chunk of it, to latents."""

    def __init__(self, model: StableAudio3) -> None:
        super().__init__()
        self.autoencoder = model.autoencoder

    def forward(self, audio: Tensor, token_noise: Tensor) -> Tensor:
        autoencoder = self.autoencoder
        patches_PK = patchify(audio, autoencoder.config.patch_size)[0]
        noise_GKD = token_noise * autoencoder.encoder.resampler.config.mask_noise
        z_TC = autoencoder.encoder(patches_PK, (token_noise.shape[0],), noise_GKD)
        return autoencoder.bottleneck.encode(z_TC.T[None])


def build_graphs(
    model: StableAudio3,
    rows: int = 2,
    frames: int = EXAMPLE_FRAMES,
    chunk_frames: int = EXAMPLE_FRAMES,
    prompt_tokens: int = 5,
) -> dict[str, Graph]:
    """Build the graphs of a model whose weights are those to export.

    Args:
        model: The whole model in fp32 on the CPU, its autoencoder of the chunked kind.
        rows: Rows of a step in the examples, which are the sizes of formats without dynamic ones.
        frames: Frames of a step in the examples.
        chunk_frames: Frames of the autoencoder in the examples.
        prompt_tokens: Tokens of a prompt in the examples.

    Returns:
        "conditions", "prepare", "step", "decoder" and "encoder".
    """
    dit, tokens = model.dit.config, model.conditioner.max_length
    length = torch.export.Dim("tokens", min=1, max=tokens)
    of_rows, of_frames = {0: ROWS}, 2 * PAIRS
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    ids_RL = torch.ones(rows, prompt_tokens, dtype=torch.int64)
    prompt = {"input_ids": ids_RL, "token_mask": ids_RL.bool(), "seconds": torch.ones(rows)}
    of_prompt = {"input_ids": of_rows | {1: length}, "token_mask": of_rows | {1: length}, "seconds": of_rows}
    prepare, step, context = PrepareGraph(model.dit), StepGraph(model.dit), tokens + 1
    of_given = {"cross_attn_cond": of_rows, "global_cond": of_rows, "local_add_cond": of_rows | {2: of_frames}}
    size = 1, dit.latent_width, chunk_frames
    latents = {"latents": draw(*size), "latent_noise": draw(*size)}
    ratio, stacks = model.downsampling_ratio, (model.autoencoder.decoder, model.autoencoder.encoder)
    shapes = [stack.resampler.get_noise_shape(chunk_frames) for stack in stacks]
    token_noise = {"token_noise": {0: of_frames}}
    audio = {"audio": draw(1, model.config.audio_channels, chunk_frames * ratio)}
    of_latents = {"latents": {2: of_frames}, "latent_noise": {2: of_frames}}
    return {
        "conditions": Graph(_Conditions(model), prompt, ("cross_attn_cond", "global_cond"), of_prompt),
        "prepare": Graph(prepare, prepare.make_example(context, rows, frames), PREPARED, of_given),
        "step": Graph(step, step.make_example(context, rows, frames), ("velocity",), step.list_dynamic_sizes()),
        "decoder": Graph(
            _Decode(model), latents | {"token_noise": draw(*shapes[0])}, ("audio",), of_latents | token_noise
        ),
        "encoder": Graph(
            _Encode(model), audio | {"token_noise": draw(*shapes[1])}, ("latents",),
            {"audio": {2: 2 * ratio * PAIRS}} | token_noise,
        ),
    }  # fmt: skip
