"""The diffusion transformer of Stable Audio 3, plain and differential (docs/model.md, section 4).

Shape legend: B batch rows (of t and the conditions: clips, which are rows unless packed), T latent frames, C latent
channels, S clips, L tokens, M context tokens, D width, K modulation (6 D). Module names are those of the released
files under `model.model.`.
"""

import dataclasses
import functools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sa3train.core.errors import ConfigError
from sa3train.core.files import get_cache_dir
from sa3train.diffusion.guidance import VelocityInputs
from sa3train.models import norms
from sa3train.models.attention import Pattern
from sa3train.models.blocks import (
    CrossAttention,
    FeedForward,
    Rotary,
    SelfAttention,
    compute_fourier_features,
    expand_to_head,
)
from sa3train.models.config import DiTConfig
from sa3train.models.norms import RMSNorm
from sa3train.models.packing import Layout, make_dense_layout, make_packed_layout

HEAD_NORM = functools.partial(RMSNorm, eps=1e-6)


def _mlp(inputs: int, outputs: int, bias: bool, last: int | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, outputs, bias=bias), nn.SiLU(), nn.Linear(outputs, last or outputs, bias=bias)
    )


@dataclass(frozen=True, eq=False)
class RawConditions:
    """Conditions that every block starts from.

    Attributes:
        context_BMD: Embedded context.
        local: Local condition of each gathered frame.
    """

    context_BMD: Tensor
    local: Tensor | None


@dataclass(frozen=True, eq=False)
class BlockConditions:
    """What one block makes of the conditions.

    Attributes:
        context: Keys and values of cross-attention.
        local_BLD: Local term of each token.
    """

    context: tuple[Tensor, ...]
    local_BLD: Tensor | None


class Modulation(NamedTuple):
    """adaLN of one block, or of all with a dimension in front.

    `norm(x) * gain + shift` enters a branch, and what comes out is multiplied by gate and added.

    Attributes:
        gains: (S, 2, D), for the two branches.
        shifts: (S, 2, D).
        gates: (S, 2, D).
    """

    gains: Tensor
    shifts: Tensor
    gates: Tensor


@dataclass(frozen=True, eq=False)
class PreparedConditions:
    """All of a forward pass that depends on neither x nor t.

    Attributes:
        layout: How frames become tokens.
        context_length: Context tokens of a clip.
        global_SD: Embedded global condition.
        blocks: Conditions of each block, raw or its own.
    """

    layout: Layout
    context_length: int
    global_SD: Tensor
    blocks: Sequence[RawConditions | BlockConditions]


class Block(nn.Module):
    """Self-attention, cross-attention, local condition, feed-forward; adaLN on the first and last."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.pre_norm = RMSNorm(width)
        self.self_attn = SelfAttention(width, HEAD_NORM, config.differential)
        self.cross_attend_norm = RMSNorm(width)
        self.cross_attn = CrossAttention(width, HEAD_NORM, config.differential)
        self.ff_norm = RMSNorm(width)
        self.ff = FeedForward(width, config.ff_mult)
        self.to_local_embed = _mlp(config.local_width, width, bias=True)
        self.to_scale_shift_gate = nn.Parameter(torch.zeros(6 * width))

    def prepare(self, conditions: RawConditions, layout: Layout) -> BlockConditions:
        """Compute this block's part of the conditions.

        Args:
            conditions: Conditions that all blocks share.
            layout: How frames become tokens.

        Returns:
            Keys, values and the local term.
        """
        local = conditions.local
        embedded = None if local is None else layout.pad_memory(self.to_local_embed(local))
        return BlockConditions(self.cross_attn.project_context(conditions.context_BMD), embedded)

    def forward(
        self,
        x_BLD: Tensor,
        modulation: Modulation,
        conditions: RawConditions | BlockConditions,
        rotary: tuple[Tensor, Tensor],
        layout: Layout,
        cross_pattern: Pattern,
    ) -> Tensor:
        if isinstance(conditions, RawConditions):
            conditions = self.prepare(conditions, layout)
        gains, shifts, gates = (layout.expand_clips(each).unbind(dim=-2) for each in modulation)
        attended = self.self_attn(self.pre_norm.modulate(x_BLD, gains[0], shifts[0]), rotary, layout.self_pattern)
        x_BLD = torch.addcmul(x_BLD, gates[0], attended)
        x_BLD = x_BLD + self.cross_attn(self.cross_attend_norm(x_BLD), conditions.context, cross_pattern)
        if conditions.local_BLD is not None:
            x_BLD = x_BLD + conditions.local_BLD
        return torch.addcmul(x_BLD, gates[1], self.ff(self.ff_norm.modulate(x_BLD, gains[1], shifts[1])))


class Transformer(nn.Module):
    """Memory tokens, blocks and projections.

    Attributes:
        checkpointing: Whether training recomputes each block in the backward pass to save memory.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.checkpointing = False
        self.project_in = nn.Linear(config.latent_width, width, bias=False)
        self.project_out = nn.Linear(width, config.latent_width, bias=False)
        self.memory_tokens = nn.Parameter(nn.init.normal_(torch.empty(config.memory_tokens, width)))
        self.rotary_pos_emb = Rotary()
        self.global_cond_embedder = _mlp(width, width, bias=True, last=6 * width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))

    def forward(self, frames: Tensor, global_SD: Tensor, prepared: PreparedConditions) -> Tensor:
        layout = prepared.layout
        x_BLD = layout.add_memory(self.project_in(frames), self.memory_tokens)
        modulations = self._modulations(global_SD)
        rotary = self.rotary_pos_emb(layout.positions(x_BLD.device))
        if norms.uses_fused_kernel(x_BLD):
            rotary = expand_to_head(rotary)
        pattern = layout.cross_pattern(prepared.context_length)
        for block, modulation, conditions in zip(self.layers, modulations, prepared.blocks, strict=True):
            arguments = (x_BLD, modulation, conditions, rotary, layout, pattern)
            if self.checkpointing and torch.is_grad_enabled():
                x_BLD = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_BLD = block(*arguments)
        return self.project_out(layout.drop_memory(x_BLD))

    def _modulations(self, global_SD: Tensor) -> list[Modulation]:
        """Compute adaLN of every block at once: scale, shift and gate twice, in the order of the files."""
        own_NK = torch.stack([block.get_parameter("to_scale_shift_gate") for block in self.layers])
        sums_NS6D = (own_NK[:, None] + self.global_cond_embedder(global_SD)).unflatten(-1, (6, -1))
        exact = sums_NS6D if norms.uses_fused_kernel(sums_NS6D) else sums_NS6D.float()
        parts = (1 + exact[..., 0::3, :], exact[..., 1::3, :], torch.sigmoid(1 - sums_NS6D[..., 2::3, :]))
        return [Modulation(*each) for each in zip(*(part.unbind() for part in parts), strict=True)]


class DiTInputs(VelocityInputs, total=False):
    """Conditions of a forward pass, by keyword.

    Attributes:
        cross_attn_cond_BLD: Prompt and duration tokens of each clip.
        global_cond_BD: Duration embedding of each clip.
        local_add_cond_BCT: Inpainting mask and masked latents of each row.
        attention_mask_BT: True = real; real frames come first. The output at padded frames means nothing.
        segment_ids: Index (B, T) of each frame's clip, -1 = padding. Keep it on the CPU, so that no step blocks the
            host.
    """

    segment_ids: Tensor | None


class DiT(nn.Module):
    """Predicts velocity (noise - data) from noisy latents, the noise level and the conditions.

    Attributes:
        config: Its architecture.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, latent = config.width, config.latent_width
        self.to_timestep_embed = _mlp(config.features, width, bias=True)
        self.to_cond_embed = _mlp(config.context_width, width, bias=False)
        self.to_global_embed = _mlp(config.global_width, width, bias=False)
        self.transformer = Transformer(config)
        self.preprocess_conv = nn.Conv1d(latent, latent, 1, bias=False)
        self.postprocess_conv = nn.Conv1d(latent, latent, 1, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights. t and the Fourier features stay fp32."""
        return self.transformer.memory_tokens.dtype

    def forward(self, x_BCT: Tensor, t_B: Tensor, **inputs: Unpack[DiTInputs]) -> Tensor:
        """Predict velocity.

        Unpacked, every row is a clip (S = B), and `attention_mask_BT` hides padding from real frames.

        Packed, rows hold several clips; the frames of each follow one another in one row. Every clip has its own t,
        conditions, memory tokens and rotary positions, no clip sees another, and padding is not computed: the output
        equals that of the clips run one by one and is zero at padding.

        Args:
            x_BCT: Noisy latents.
            t_B: Noise level of each clip.
            **inputs: Conditions, see `DiTInputs`. Masks or indexes that do not fit are a `ValueError`.

        Returns:
            Velocity (B, C, T) in the dtype of `x_BCT`.
        """
        return self.predict_velocity(x_BCT, t_B, self._prepare_shared(x_BCT.shape, **inputs))

    def prepare(self, shape_BCT: torch.Size | tuple[int, ...], **inputs: Unpack[DiTInputs]) -> PreparedConditions:
        """Compute everything that stays the same from step to step. Valid until a weight changes.

        Costs 2 M D + L D values of memory per block.

        Args:
            shape_BCT: Shape of the latents.
            **inputs: As in `forward`.

        Returns:
            Input of `predict_velocity`.
        """
        prepared = self._prepare_shared(shape_BCT, **inputs)
        blocks = [
            block.prepare(conditions, prepared.layout)  # type: ignore[operator]
            for block, conditions in zip(self.transformer.layers, prepared.blocks, strict=True)
        ]
        return dataclasses.replace(prepared, blocks=blocks)

    def predict_velocity(self, x_BCT: Tensor, t_B: Tensor, prepared: PreparedConditions) -> Tensor:
        """Predict velocity from prepared conditions.

        Args:
            x_BCT: Noisy latents.
            t_B: Noise level of each clip.
            prepared: From `prepare`.

        Returns:
            Velocity (B, C, T) in the dtype of `x_BCT`.
        """
        return self.predict_embedded(x_BCT, prepared.global_SD + self.embed_noise_level(t_B), prepared)

    def embed_noise_level(self, t_B: Tensor) -> Tensor:
        """Embed noise levels.

        Args:
            t_B: Noise level of each clip.

        Returns:
            The embeddings (S, D), which add to the embedded global condition.
        """
        embedded: Tensor = self.to_timestep_embed(compute_fourier_features(t_B, self.config.features).to(self.dtype))
        return embedded

    def predict_embedded(self, x_BCT: Tensor, global_SD: Tensor, prepared: PreparedConditions) -> Tensor:
        """Predict velocity at an embedded noise level.

        Args:
            x_BCT: Noisy latents.
            global_SD: Embedded noise level and global condition of each clip.
            prepared: From `prepare`.

        Returns:
            Velocity (B, C, T) in the dtype of `x_BCT`.
        """
        x = x_BCT.to(self.dtype)
        x = self.preprocess_conv(x) + x
        picked = prepared.layout.gather_frames(x.transpose(1, 2))
        picked = self.transformer(picked, global_SD, prepared)
        out_BCT = prepared.layout.scatter_frames(picked).transpose(1, 2)
        return (self.postprocess_conv(out_BCT) + out_BCT).to(x_BCT.dtype)

    def _prepare_shared(
        self,
        shape_BCT: torch.Size | tuple[int, ...],
        *,
        cross_attn_cond_BLD: Tensor,
        global_cond_BD: Tensor,
        local_add_cond_BCT: Tensor | None = None,
        attention_mask_BT: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> PreparedConditions:
        batch, _, length = shape_BCT
        clips, context_length, _ = cross_attn_cond_BLD.shape
        memory = self.config.memory_tokens
        layout: Layout
        if segment_ids is None:
            if clips != batch:
                raise ValueError(f"{clips} conditions for {batch} rows; several clips in a row need segment_ids")
            layout = make_dense_layout(batch, length, memory, attention_mask_BT)
        elif attention_mask_BT is not None:
            raise ValueError("pass attention_mask_BT or segment_ids, not both: -1 in segment_ids is padding")
        else:
            layout = make_packed_layout(segment_ids, clips, memory, cross_attn_cond_BLD.device)
        context = layout.arrange_context(self.to_cond_embed(cross_attn_cond_BLD.to(self.dtype)))
        local = None
        if local_add_cond_BCT is not None:
            local = layout.gather_frames(local_add_cond_BCT.to(self.dtype).transpose(1, 2)).contiguous()
        global_SD = self.to_global_embed(global_cond_BD.to(self.dtype))
        return PreparedConditions(
            layout, context_length, global_SD, [RawConditions(context, local)] * self.config.depth
        )


def compile_blocks(dit: DiT, backend: str = "inductor") -> None:
    """Compile each block of a DiT for any length of audio. Compilation happens in the first forward pass.

    Later processes reuse what the compiler leaves in the cache folder, or in `TORCHINDUCTOR_CACHE_DIR`.

    Args:
        dit: Model, changed in place.
        backend: Backend of `torch.compile`.

    Raises:
        ConfigError: The model is on the CPU and no C++ compiler is installed, or it is on one of Apple's GPUs.
    """
    device = next(dit.parameters()).device
    if device.type == "mps":
        raise ConfigError("compile has no tested support on mps, where torch's compiler is a prototype. Leave it out.")
    on_cpu = device.type == "cpu"
    if backend == "inductor" and on_cpu and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ConfigError("compile=True needs a C++ compiler. Install g++, name one in CXX, or leave compile out.")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(get_cache_dir() / "compiled"))
    for block in dit.transformer.layers:
        block.compile(backend=backend, dynamic=True)
