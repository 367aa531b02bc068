"""The denoiser as two functions of tensors alone, for what traces graphs with dynamic sizes.

Shape legend: B rows, C latent channels, T latent frames, M context tokens, L tokens (memory, then frames), N blocks.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3train.models.attention import Padded
from sa3train.models.dit import BlockConditions, DiT, PreparedConditions
from sa3train.models.packing import make_dense_layout

MAX_ROWS = 64
MIN_FRAMES, MAX_FRAMES = 4, 8192
ROWS = torch.export.Dim("rows", max=MAX_ROWS)
PAIRS = torch.export.Dim("pairs", min=MIN_FRAMES // 2, max=MAX_FRAMES // 2)
"""Pairs of frames: a generation has an even number."""
EXAMPLE_FRAMES = 8
PREPARED = ("embedded", "keys", "values", "local")
"""Outputs of `PrepareGraph`."""


def join_conditions(prepared: PreparedConditions) -> tuple[Tensor, ...]:
    """Join the prepared conditions of all blocks.

    Args:
        prepared: From `DiT.prepare`, with a local condition.

    Returns:
        `PREPARED`: the embedded global condition (B, D), keys (N or 2N, B, ...), values (N, B, ...), local terms
        (N, B, L, D).
    """
    blocks = [block for block in prepared.blocks if isinstance(block, BlockConditions)]
    keys = torch.stack([key for block in blocks for key in block.context[:-1]])
    values = torch.stack([block.context[-1] for block in blocks])
    local = torch.stack([block.local_BLD for block in blocks if block.local_BLD is not None])
    return prepared.global_SD, keys, values, local


class PrepareGraph(nn.Module):
    """All of a step that depends on neither x nor t.

    Args:
        dit: The denoiser.
    """

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, cross_attn_cond: Tensor, global_cond: Tensor, local_add_cond: Tensor) -> tuple[Tensor, ...]:
        conditions = {"cross_attn_cond_BLD": cross_attn_cond, "global_cond_BD": global_cond}
        return join_conditions(self.dit.prepare(local_add_cond.shape, **conditions, local_add_cond_BCT=local_add_cond))

    def make_example(self, context_length: int, rows: int = 2, frames: int = EXAMPLE_FRAMES) -> dict[str, Tensor]:
        """Make inputs to trace with.

        Args:
            context_length: Context tokens, which are fixed.
            rows: Rows.
            frames: Latent frames.

        Returns:
            Tensors by name, in order.
        """
        config, rng = self.dit.config, torch.Generator().manual_seed(0)
        return {
            "cross_attn_cond": torch.randn(rows, context_length, config.context_width, generator=rng),
            "global_cond": torch.randn(rows, config.global_width, generator=rng),
            "local_add_cond": torch.randn(rows, config.local_width, frames, generator=rng),
        }


class EmbeddedStepGraph(nn.Module):
    """One evaluation of the denoiser, given the sum of the embedded noise level and global condition.

    Args:
        dit: The denoiser.
    """

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(
        self, x: Tensor, frame_mask: Tensor, embedded: Tensor, keys: Tensor, values: Tensor, local: Tensor
    ) -> Tensor:
        memory = self.dit.config.memory_tokens
        # Its checks of a mask read values, which a traced graph cannot; padding of int64, since ONNX pads no booleans.
        layout: Any = make_dense_layout(x.shape[0], x.shape[2], memory)
        mask_BL = F.pad(frame_mask.to(torch.int64), (memory, 0), value=1).bool()
        layout = dataclasses.replace(layout, self_pattern=Padded(mask_BL))
        parts = zip(keys.split(len(keys) // len(values)), values, local, strict=True)
        blocks = [BlockConditions((*key, value), each) for key, value, each in parts]
        prepared = PreparedConditions(layout, values.shape[2], embedded, blocks)
        return DiT.predict_embedded(self.dit, x, embedded, prepared)

    def make_example(self, context_length: int, rows: int = 2, frames: int = EXAMPLE_FRAMES) -> dict[str, Tensor]:
        """Make inputs to trace with.

        Args:
            context_length: Context tokens, which are fixed.
            rows: Rows.
            frames: Latent frames.

        Returns:
            Tensors by name, in order.
        """
        rng, prepare = torch.Generator().manual_seed(1), PrepareGraph(self.dit)
        with torch.no_grad():
            prepared = prepare(*prepare.make_example(context_length, rows, frames).values())
        return {
            "x": torch.randn(rows, self.dit.config.latent_width, frames, generator=rng),
            "frame_mask": torch.arange(frames)[None].expand(rows, -1) < frames - 2,
            **dict(zip(PREPARED, prepared, strict=True)),
        }

    def list_dynamic_sizes(self) -> dict[str, dict[int, Any]]:
        """List the sizes that vary.

        Returns:
            Dimensions by index, for each input in order.
        """
        frames = 2 * PAIRS
        return {
            "x": {0: ROWS, 2: frames},
            "frame_mask": {0: ROWS, 1: frames},
            "embedded": {0: ROWS},
            "keys": {1: ROWS},
            "values": {1: ROWS},
            "local": {1: ROWS, 2: frames + self.dit.config.memory_tokens},
        }


class StepGraph(EmbeddedStepGraph):
    """One evaluation of the denoiser, with the noise level as its last input."""

    def forward(  # type: ignore[override]
        self, x: Tensor, frame_mask: Tensor, embedded: Tensor, keys: Tensor, values: Tensor, local: Tensor, t: Tensor
    ) -> Tensor:
        return super().forward(x, frame_mask, embedded + self.dit.embed_noise_level(t), keys, values, local)

    def make_example(self, context_length: int, rows: int = 2, frames: int = EXAMPLE_FRAMES) -> dict[str, Tensor]:
        """Make inputs to trace with.

        Args:
            context_length: Context tokens, which are fixed.
            rows: Rows.
            frames: Latent frames.

        Returns:
            Tensors by name, in order.
        """
        return super().make_example(context_length, rows, frames) | {"t": torch.linspace(0.3, 0.8, rows)}

    def list_dynamic_sizes(self) -> dict[str, dict[int, Any]]:
        """List the sizes that vary.

        Returns:
            Dimensions by index, for each input in order.
        """
        return super().list_dynamic_sizes() | {"t": {0: ROWS}}
