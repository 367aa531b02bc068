"""How the frames of a batch become the transformer's tokens: a rectangle of rows, or one packed row of clips.

Shape legend: B batch rows, T frames, S clips, M memory tokens, F real frames, L tokens (per row, or of the packed
row), C channels, D width. In the dense layout every row is one clip (S = B). In the packed layout one row of L tokens
has, clip after clip, the clip's own memory tokens and then its frames. Blocks see (B, L, D) or (1, L, D) and need not
know which.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sa3train.core.device import move_to_device
from sa3train.models.attention import Packed, Padded, Pattern


class Layout(Protocol):
    """What the transformer asks of a layout."""

    @property
    def self_pattern(self) -> Pattern:
        """Who sees whom in self-attention."""

    def cross_pattern(self, context_length: int) -> Pattern:
        """Get who sees whom in cross-attention.

        Args:
            context_length: Context tokens of a clip.

        Returns:
            The pattern.
        """

    def positions(self, device: torch.device) -> Tensor:
        """Get the rotary position of every token, memory tokens included.

        Args:
            device: Where the model computes.

        Returns:
            (L,).
        """

    def gather_frames(self, frames_BTC: Tensor) -> Tensor:
        """Gather the frames that are computed.

        Args:
            frames_BTC: All frames.

        Returns:
            (B, T, C) or (1, F, C).
        """

    def add_memory(self, picked: Tensor, memory_MD: Tensor) -> Tensor:
        """Add each clip's memory tokens in front of its frames.

        Args:
            picked: Gathered frames.
            memory_MD: Memory tokens.

        Returns:
            Tokens (B, L, D) or (1, L, D).
        """

    def pad_memory(self, picked: Tensor) -> Tensor:
        """Pad gathered values with zeros at memory tokens.

        Args:
            picked: Values of the gathered frames.

        Returns:
            Values of all tokens.
        """

    def expand_clips(self, clip_SD: Tensor) -> Tensor:
        """Expand one value per clip for broadcasting over its tokens.

        Args:
            clip_SD: Values.

        Returns:
            (B, 1, D) or (1, L, D).
        """

    def arrange_context(self, context_SMD: Tensor) -> Tensor:
        """Arrange one context per clip as `cross_pattern` describes it.

        Args:
            context_SMD: Contexts.

        Returns:
            (B, M, D) or (1, S * M, D).
        """

    def drop_memory(self, tokens: Tensor) -> Tensor:
        """Drop the memory tokens.

        Args:
            tokens: All tokens.

        Returns:
            Tokens of the gathered frames.
        """

    def scatter_frames(self, picked: Tensor) -> Tensor:
        """Scatter gathered frames back to rows.

        Args:
            picked: Gathered frames.

        Returns:
            (B, T, C), zero where a frame was not gathered.
        """


@dataclass(frozen=True, eq=False)
class _DenseLayout:
    """Rows of equal length, with or without padding at their ends.

    Attributes:
        batch: Rows, B.
        length: Frames of a row, T.
        memory: Memory tokens, M.
        self_pattern: Who sees whom in self-attention.
    """

    batch: int
    length: int
    memory: int
    self_pattern: Pattern

    def cross_pattern(self, context_length: int) -> Pattern:
        return None

    def positions(self, device: torch.device) -> Tensor:
        return torch.arange(self.memory + self.length, device=device)

    def gather_frames(self, frames_BTC: Tensor) -> Tensor:
        return frames_BTC

    def add_memory(self, picked: Tensor, memory_MD: Tensor) -> Tensor:
        return torch.cat((memory_MD.expand(self.batch, -1, -1), picked), dim=1)

    def pad_memory(self, picked: Tensor) -> Tensor:
        return F.pad(picked, (0, 0, self.memory, 0))

    def expand_clips(self, clip_SD: Tensor) -> Tensor:
        return clip_SD[:, None]

    def arrange_context(self, context_SMD: Tensor) -> Tensor:
        return context_SMD

    def drop_memory(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.memory :]

    def scatter_frames(self, picked: Tensor) -> Tensor:
        return picked


def make_dense_layout(batch: int, length: int, memory: int, attention_mask_BT: Tensor | None = None) -> Layout:
    """Make the layout of rows of equal length.

    Args:
        batch: Rows.
        length: Frames of a row.
        memory: Memory tokens.
        attention_mask_BT: True = real; real frames come first in each row. A wrong shape is a `ValueError`, and on the
            CPU so is padding before real frames (elsewhere the check would block the host in every step).

    Returns:
        The layout; without padding its pattern is None.
    """
    if attention_mask_BT is None:
        return _DenseLayout(batch, length, memory, None)
    if attention_mask_BT.shape != (batch, length):
        raise ValueError(
            f"attention mask {tuple(attention_mask_BT.shape)} does not fit {batch} rows of {length} frames"
        )
    mask_BT = attention_mask_BT.bool()
    if mask_BT.device.type == "cpu":
        if bool((mask_BT[:, 1:] & ~mask_BT[:, :-1]).any()):
            raise ValueError("the attention mask has padding before real frames. Padding must be at the end of a row.")
        if bool(mask_BT.all()):
            return _DenseLayout(batch, length, memory, None)
    return _DenseLayout(batch, length, memory, Padded(F.pad(mask_BT, (memory, 0), value=True)))


@dataclass(frozen=True, eq=False)
class _PackedLayout:
    """Clips laid end to end in one row of tokens; padding frames are left out.

    Attributes:
        batch: Rows of the batch, B.
        length: Frames of a row, T.
        memory: Memory tokens, M.
        clip_lengths: Frames of each clip.
        frame_F: Index of each real frame in the flattened (B * T), clip after clip.
        token_F: Token of each real frame.
        source_L: For each token which memory token (below M) or, from M on, which real frame it is.
        clip_L: Clip of each token.
        position_L: Rotary position of each token within its clip.
    """

    batch: int
    length: int
    memory: int
    clip_lengths: tuple[int, ...]
    frame_F: Tensor  # index of each picked frame in the flattened (B * T), clip after clip
    token_F: Tensor  # the token of each picked frame
    source_L: Tensor  # for each token: which memory token (< M) or, from M on, which picked frame it is
    clip_L: Tensor  # the clip of each token
    position_L: Tensor  # rotary position within the clip

    @property
    def self_pattern(self) -> Pattern:
        lengths = tuple(self.memory + length for length in self.clip_lengths)
        return Packed(lengths, lengths)

    def cross_pattern(self, context_length: int) -> Pattern:
        queries = tuple(self.memory + length for length in self.clip_lengths)
        return Packed(queries, (context_length,) * len(queries))

    def positions(self, device: torch.device) -> Tensor:
        return self.position_L

    def gather_frames(self, frames_BTC: Tensor) -> Tensor:
        return frames_BTC.flatten(0, 1).index_select(0, self.frame_F)[None]

    def add_memory(self, picked: Tensor, memory_MD: Tensor) -> Tensor:
        return torch.cat((memory_MD, picked[0])).index_select(0, self.source_L)[None]

    def pad_memory(self, picked: Tensor) -> Tensor:
        rows = picked.new_zeros(self.source_L.shape[0], picked.shape[-1])
        return rows.index_copy(0, self.token_F, picked[0])[None]

    def expand_clips(self, clip_SD: Tensor) -> Tensor:
        return clip_SD.index_select(0, self.clip_L)[None]

    def arrange_context(self, context_SMD: Tensor) -> Tensor:
        return context_SMD.flatten(0, 1)[None]

    def drop_memory(self, tokens: Tensor) -> Tensor:
        return tokens[0].index_select(0, self.token_F)[None]

    def scatter_frames(self, picked: Tensor) -> Tensor:
        rows = picked.new_zeros(self.batch * self.length, picked.shape[-1])
        return rows.index_copy(0, self.frame_F, picked[0]).unflatten(0, (self.batch, self.length))


def make_packed_layout(segment_ids_BT: Tensor, clips: int, memory: int, device: torch.device) -> Layout:
    """Make the layout of clips packed into rows.

    Args:
        segment_ids_BT: Index of each frame's clip, -1 = padding. Keep it on the CPU: the layout is made there, and only
            index tensors go to `device`. An index out of range, a clip without frames, or one whose frames are not in
            one stretch of one row is a `ValueError`.
        clips: Number of clips.
        memory: Memory tokens.
        device: Where the model computes.

    Returns:
        The layout.
    """
    ids_F = segment_ids_BT.cpu().long()
    rows, length = ids_F.shape
    ids_F = ids_F.flatten()
    if ids_F.numel() and (int(ids_F.max()) >= clips or int(ids_F.min()) < -1):
        raise ValueError(f"segment ids must lie in -1..{clips - 1}, one per clip")
    real_F = (ids_F >= 0).nonzero().squeeze(1)
    order = torch.sort(ids_F[real_F], stable=True)
    frame_F, owner_F = real_F[order.indices], order.values
    counts_S = torch.bincount(owner_F, minlength=clips)
    first_S = counts_S.cumsum(0) - counts_S
    if bool((counts_S == 0).any()):
        empty = (counts_S == 0).nonzero().squeeze(1).tolist()
        raise ValueError(f"clips {empty} have conditions but no frame in segment_ids")
    offset_F = torch.arange(frame_F.numel()) - first_S[owner_F]
    start_F = frame_F[first_S][owner_F]
    if bool((frame_F - start_F != offset_F).any()) or bool((frame_F // length != start_F // length).any()):
        raise ValueError("a clip's frames must follow one another within one row")
    tokens_S = counts_S + memory
    clip_L = torch.repeat_interleave(torch.arange(clips), tokens_S)
    position_L = torch.arange(clip_L.numel()) - (tokens_S.cumsum(0) - tokens_S)[clip_L]
    source_L = torch.where(position_L < memory, position_L, position_L + first_S[clip_L])
    token_F = (position_L >= memory).nonzero().squeeze(1)
    indexes = (frame_F, token_F, source_L, clip_L, position_L)
    return _PackedLayout(rows, length, memory, tuple(counts_S.tolist()), *(move_to_device(x, device) for x in indexes))
