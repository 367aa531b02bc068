"""The diffusion transformer of Stable Audio 3, plain and differential.

Shape legend: B batch rows (of t and the conditions: clips, which are rows unless packed), T latent frames, C latent
channels, S clips, L tokens, M context tokens, D width, K modulation (6 D). Module names are those of the released
files under `model.model.`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sa3train.models import norms
from sa3train.models.attention import Pattern
from sa3train.models.blocks import CrossAttention, FeedForward, Rotary, SelfAttention, fourier_features, whole_head
from sa3train.models.config import DiTConfig
from sa3train.models.norms import RMSNorm
from sa3train.models.packing import Layout, dense_layout, packed_layout

HEAD_NORM = functools.partial(RMSNorm, eps=1e-6)


def _mlp(inputs: int, outputs: int, bias: bool, last: int | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, outputs, bias=bias), nn.SiLU(), nn.Linear(outputs, last or outputs, bias=bias)
    )


@dataclass(frozen=True, eq=False)
class Conditions:
    """What every block starts from: the embedded context, and the local condition of each picked frame."""

    context_BMD: Tensor
    local: Tensor | None


@dataclass(frozen=True, eq=False)
class BlockConditions:
    """What one block makes of the conditions: cross-attention keys and values, and the local term of each token."""

    context: tuple[Tensor, ...]
    local_BLD: Tensor | None


class Modulation(NamedTuple):
    """adaLN of one block, or of all (with a dimension in front): gains, shifts and gates of its two branches.

    `norm(x) * gain + shift` goes into a branch, and gate times what comes out is added. Each (S, 2, D).
    """

    gains: Tensor
    shifts: Tensor
    gates: Tensor


@dataclass(frozen=True, eq=False)
class Prepared:
    """All of a forward pass that depends on neither x nor t. `blocks` holds the conditions, worked out or not."""

    layout: Layout
    context_length: int
    global_SD: Tensor
    blocks: Sequence[Conditions | BlockConditions]


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

    def prepare(self, conditions: Conditions, layout: Layout) -> BlockConditions:
        """This block's share of the conditions."""
        local = conditions.local
        embedded = None if local is None else layout.beside_memory(self.to_local_embed(local))
        return BlockConditions(self.cross_attn.context(conditions.context_BMD), embedded)

    def forward(
        self,
        x_BLD: Tensor,
        modulation: Modulation,
        conditions: Conditions | BlockConditions,
        rotary: tuple[Tensor, Tensor],
        layout: Layout,
        cross_pattern: Pattern,
    ) -> Tensor:
        if isinstance(conditions, Conditions):
            conditions = self.prepare(conditions, layout)
        gains, shifts, gates = (layout.spread(each).unbind(dim=-2) for each in modulation)
        attended = self.self_attn(self.pre_norm.modulated(x_BLD, gains[0], shifts[0]), rotary, layout.self_pattern)
        x_BLD = torch.addcmul(x_BLD, gates[0], attended)
        x_BLD = x_BLD + self.cross_attn(self.cross_attend_norm(x_BLD), conditions.context, cross_pattern)
        if conditions.local_BLD is not None:
            x_BLD = x_BLD + conditions.local_BLD
        return torch.addcmul(x_BLD, gates[1], self.ff(self.ff_norm.modulated(x_BLD, gains[1], shifts[1])))


class Transformer(nn.Module):
    """Memory tokens, blocks and projections. `checkpointing` trades memory for a second forward pass of each block."""

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

    def forward(self, frames: Tensor, global_SD: Tensor, prepared: Prepared) -> Tensor:
        layout = prepared.layout
        x_BLD = layout.tokens(self.project_in(frames), self.memory_tokens)
        modulations = self._modulations(global_SD)
        rotary = self.rotary_pos_emb(layout.positions(x_BLD.device))
        if norms.few_passes(x_BLD):
            rotary = whole_head(rotary)
        pattern = layout.cross_pattern(prepared.context_length)
        for block, modulation, conditions in zip(self.layers, modulations, prepared.blocks, strict=True):
            arguments = (x_BLD, modulation, conditions, rotary, layout, pattern)
            if self.checkpointing and torch.is_grad_enabled():
                x_BLD = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_BLD = block(*arguments)
        return self.project_out(layout.frames(x_BLD))

    def _modulations(self, global_SD: Tensor) -> list[Modulation]:
        """adaLN of every block, worked out for all at once: scale, shift and gate twice, in the order of the files."""
        own_NK = torch.stack([block.get_parameter("to_scale_shift_gate") for block in self.layers])
        sums_NS6D = (own_NK[:, None] + self.global_cond_embedder(global_SD)).unflatten(-1, (6, -1))
        exact = sums_NS6D if norms.few_passes(sums_NS6D) else sums_NS6D.float()
        parts = (1 + exact[..., 0::3, :], exact[..., 1::3, :], torch.sigmoid(1 - sums_NS6D[..., 2::3, :]))
        return [Modulation(*each) for each in zip(*(part.unbind() for part in parts), strict=True)]


class DiT(nn.Module):
    """Predicts velocity (noise - data) from noisy latents, the noise level and the conditions."""

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
        """The dtype of the weights; t and the Fourier features stay fp32 whatever it is."""
        return self.transformer.memory_tokens.dtype

    def forward(
        self,
        x_BCT: Tensor,
        t_B: Tensor,
        *,
        cross_attn_cond_BLD: Tensor,
        global_cond_BD: Tensor,
        local_add_cond_BCT: Tensor | None = None,
        padding_mask_BT: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, C, T) in the dtype of `x`.

        Unpacked, every row is a clip: S = B, and `padding_mask_BT` (True = real, real frames first) hides padding
        from real frames; the output at padded frames means nothing.

        Packed, rows hold several clips: `segment_ids[b, t]` is the index of the frame's clip in `t_B` and the
        conditions (-1 = padding); each clip's frames follow one another in one row. Every clip has its own t,
        conditions, memory tokens and rotary positions, no clip sees another, and padding is not computed at all:
        the output equals that of the clips run one by one, and is zero at padding. Keep `segment_ids` on the CPU,
        so that no step has to wait for the device.

        Raises `ValueError` when masks or ids do not fit.
        """
        prepared = self._prepare(
            x_BCT.shape,
            cross_attn_cond_BLD,
            global_cond_BD,
            local_add_cond_BCT,
            padding_mask_BT,
            segment_ids,
        )
        return self.velocity(x_BCT, t_B, prepared)

    def prepare(
        self,
        shape_BCT: torch.Size | tuple[int, ...],
        *,
        cross_attn_cond_BLD: Tensor,
        global_cond_BD: Tensor,
        local_add_cond_BCT: Tensor | None = None,
        padding_mask_BT: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Prepared:
        """Everything that does not change from step to step, for `velocity`; `shape_BCT` is the shape of the latents.

        Costs 2 M D + L D values of memory per block. Valid until a weight changes.
        """
        prepared = self._prepare(
            shape_BCT, cross_attn_cond_BLD, global_cond_BD, local_add_cond_BCT, padding_mask_BT, segment_ids
        )
        blocks = [
            block.prepare(conditions, prepared.layout)  # type: ignore[operator]
            for block, conditions in zip(self.transformer.layers, prepared.blocks, strict=True)
        ]
        return Prepared(prepared.layout, prepared.context_length, prepared.global_SD, blocks)

    def velocity(self, x_BCT: Tensor, t_B: Tensor, prepared: Prepared) -> Tensor:
        """`forward` with its conditions prepared."""
        x = x_BCT.to(self.dtype)
        x = self.preprocess_conv(x) + x
        features = fourier_features(t_B, self.config.features).to(self.dtype)
        global_SD = prepared.global_SD + self.to_timestep_embed(features)
        picked = prepared.layout.pick(x.transpose(1, 2))
        picked = self.transformer(picked, global_SD, prepared)
        out_BCT = prepared.layout.restore(picked).transpose(1, 2)
        return (self.postprocess_conv(out_BCT) + out_BCT).to(x_BCT.dtype)

    def _prepare(
        self,
        shape_BCT: torch.Size | tuple[int, ...],
        cross_attn_cond_BLD: Tensor,
        global_cond_BD: Tensor,
        local_add_cond_BCT: Tensor | None,
        padding_mask_BT: Tensor | None,
        segment_ids: Tensor | None,
    ) -> Prepared:
        batch, _, length = shape_BCT
        clips, context_length, _ = cross_attn_cond_BLD.shape
        memory = self.config.memory_tokens
        layout: Layout
        if segment_ids is None:
            if clips != batch:
                raise ValueError(f"{clips} conditions for {batch} rows; several clips in a row need segment_ids")
            layout = dense_layout(batch, length, memory, padding_mask_BT)
        elif padding_mask_BT is not None:
            raise ValueError("give segment_ids or a padding mask, not both: -1 in segment_ids is padding")
        else:
            layout = packed_layout(segment_ids, clips, memory, cross_attn_cond_BLD.device)
        context = layout.context(self.to_cond_embed(cross_attn_cond_BLD.to(self.dtype)))
        local = None
        if local_add_cond_BCT is not None:
            local = layout.pick(local_add_cond_BCT.to(self.dtype).transpose(1, 2)).contiguous()
        global_SD = self.to_global_embed(global_cond_BD.to(self.dtype))
        return Prepared(layout, context_length, global_SD, [Conditions(context, local)] * self.config.depth)
