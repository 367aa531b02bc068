"""The five graphs of an exported model, as modules that `torch.onnx.export` traces with dynamic sizes.

Shape legend: B clips, R rows of a step (B, or 2B under guidance), L prompt tokens, M context tokens, C latent channels,
T latent frames, P patches, G groups, K new tokens of a group, D width.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3train.models.attention import Padded
from sa3train.models.autoencoder import BOTTLENECK_NOISE, patchify, unpatchify
from sa3train.models.checkpoint import StableAudio3
from sa3train.models.dit import BlockConditions, PreparedConditions
from sa3train.models.packing import make_dense_layout
from sa3train.models.t5gemma import T5GemmaEncoder

MAX_ROWS = 64
MIN_FRAMES, MAX_FRAMES = 4, 8192
EXAMPLE_FRAMES = 8


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


class _Prepare(nn.Module):
    """All of a step that depends on neither x nor t."""

    def __init__(self, model: StableAudio3) -> None:
        super().__init__()
        self.dit = model.dit

    def forward(self, cross_attn_cond: Tensor, global_cond: Tensor, local_add_cond: Tensor) -> tuple[Tensor, ...]:
        conditions = {"cross_attn_cond_BLD": cross_attn_cond, "global_cond_BD": global_cond}
        prepared = self.dit.prepare(local_add_cond.shape, **conditions, local_add_cond_BCT=local_add_cond)
        blocks = [block for block in prepared.blocks if isinstance(block, BlockConditions)]
        keys = torch.stack([torch.stack(block.context[:-1]) for block in blocks])
        values = torch.stack([block.context[-1] for block in blocks])
        local = torch.stack([block.local_BLD for block in blocks if block.local_BLD is not None])
        return prepared.global_SD, keys, values, local


class _Step(nn.Module):
    """One evaluation of the denoiser."""

    def __init__(self, model: StableAudio3) -> None:
        super().__init__()
        self.dit = model.dit

    def forward(
        self, x: Tensor, t: Tensor, frame_mask: Tensor, embedded: Tensor, keys: Tensor, values: Tensor, local: Tensor
    ) -> Tensor:
        memory = self.dit.config.memory_tokens
        # Its checks of a mask read values, which a traced graph cannot; padding of int64, since ONNX pads no booleans.
        layout: Any = make_dense_layout(x.shape[0], x.shape[2], memory)
        mask_BL = F.pad(frame_mask.to(torch.int64), (memory, 0), value=1).bool()
        layout = dataclasses.replace(layout, self_pattern=Padded(mask_BL))
        parts = zip(keys, values, local, strict=True)
        blocks = [BlockConditions((*key.unbind(), value), each) for key, value, each in parts]
        return self.dit.predict_velocity(x, t, PreparedConditions(layout, values.shape[2], embedded, blocks))


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


def build_graphs(model: StableAudio3) -> dict[str, Graph]:
    """Build the graphs of a model whose weights are those to export.

    Args:
        model: The whole model in fp32 on the CPU, its autoencoder of the chunked kind.

    Returns:
        "conditions", "prepare", "step", "decoder" and "encoder".
    """
    dit, tokens = model.dit.config, model.conditioner.max_length
    rows = torch.export.Dim("rows", max=MAX_ROWS)
    length = torch.export.Dim("tokens", min=1, max=tokens)
    pairs = torch.export.Dim("pairs", min=MIN_FRAMES // 2, max=MAX_FRAMES // 2)
    frames, count = 2 * pairs, EXAMPLE_FRAMES
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    prompt = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "token_mask": torch.ones(2, 5, dtype=torch.bool)}
    of_prompt = {"input_ids": {0: rows, 1: length}, "token_mask": {0: rows, 1: length}, "seconds": {0: rows}}
    given = {
        "cross_attn_cond": draw(2, tokens + 1, dit.context_width),
        "global_cond": draw(2, dit.global_width),
        "local_add_cond": draw(2, dit.local_width, count),
    }
    of_given = {"cross_attn_cond": {0: rows}, "global_cond": {0: rows}, "local_add_cond": {0: rows, 2: frames}}
    names = ("embedded", "keys", "values", "local")
    with torch.no_grad():
        prepared = dict(zip(names, _Prepare(model)(*given.values()), strict=True))
    of_prepared = {
        "embedded": {0: rows},
        "keys": {2: rows},
        "values": {1: rows},
        "local": {1: rows, 2: frames + dit.memory_tokens},
    }
    noisy = {"x": draw(2, dit.latent_width, count), "t": torch.rand(2, generator=rng)}
    noisy["frame_mask"] = torch.arange(count)[None].expand(2, -1) < count - 2
    of_noisy = {"x": {0: rows, 2: frames}, "t": {0: rows}, "frame_mask": {0: rows, 1: frames}}
    latents = {"latents": draw(1, dit.latent_width, count), "latent_noise": draw(1, dit.latent_width, count)}
    ratio, stacks = model.downsampling_ratio, (model.autoencoder.decoder, model.autoencoder.encoder)
    shapes = [stack.resampler.get_noise_shape(count) for stack in stacks]
    token_noise = {"token_noise": {0: frames}}
    audio = {"audio": draw(1, model.config.audio_channels, count * ratio)}
    of_latents = {"latents": {2: frames}, "latent_noise": {2: frames}}
    return {
        "conditions": Graph(
            _Conditions(model), {**prompt, "seconds": torch.ones(2)}, ("cross_attn_cond", "global_cond"), of_prompt
        ),
        "prepare": Graph(_Prepare(model), given, names, of_given),
        "step": Graph(_Step(model), noisy | prepared, ("velocity",), of_noisy | of_prepared),
        "decoder": Graph(
            _Decode(model), latents | {"token_noise": draw(*shapes[0])}, ("audio",), of_latents | token_noise
        ),
        "encoder": Graph(
            _Encode(model), audio | {"token_noise": draw(*shapes[1])}, ("latents",),
            {"audio": {2: 2 * ratio * pairs}} | token_noise,
        ),
    }  # fmt: skip
