"""How the frames of a batch become the transformer's tokens: a rectangle of rows, or one packed row of clips.

Shape legend: B batch rows, T frames, S clips, M memory tokens, F real frames, L tokens (per row, or of the packed
row), C channels, D width. In the dense layout every row is one clip (S = B); in the packed layout one row of L
tokens holds, clip after clip, the clip's own memory tokens and then its frames. Blocks see (B, L, D) or (1, L, D)
and need not know which.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sa3train.core.device import to_device
from sa3train.models.attention import Packed, Padded, Pattern


class Layout(Protocol):
    """What the transformer asks of a layout."""

    @property
    def self_pattern(self) -> Pattern: ...

    def cross_pattern(self, context_length: int) -> Pattern: ...

    def positions(self, device: torch.device) -> Tensor:
        """Rotary position of every token, memory tokens included; (L,)."""

    def pick(self, frames_BTC: Tensor) -> Tensor:
        """The frames that are computed: (B, T, C) or (1, F, C)."""

    def tokens(self, picked: Tensor, memory_MD: Tensor) -> Tensor:
        """Tokens with each clip's memory in front."""

    def beside_memory(self, picked: Tensor) -> Tensor:
        """The picked values at their tokens, zeros at memory tokens."""

    def spread(self, clip_SD: Tensor) -> Tensor:
        """One value per clip, ready to broadcast over its tokens."""

    def context(self, context_SMD: Tensor) -> Tensor:
        """One context per clip, as `cross_pattern` wants it."""

    def frames(self, tokens: Tensor) -> Tensor:
        """The tokens of picked frames, memory left out."""

    def restore(self, picked: Tensor) -> Tensor:
        """Back to (B, T, C); zeros at frames that were not picked."""


@dataclass(frozen=True, eq=False)
class Dense:
    """Rows of equal length, with or without padding at their ends."""

    batch: int
    length: int
    memory: int
    self_pattern: Pattern

    def cross_pattern(self, context_length: int) -> Pattern:
        return None

    def positions(self, device: torch.device) -> Tensor:
        return torch.arange(self.memory + self.length, device=device)

    def pick(self, frames_BTC: Tensor) -> Tensor:
        return frames_BTC

    def tokens(self, picked: Tensor, memory_MD: Tensor) -> Tensor:
        return torch.cat((memory_MD.expand(self.batch, -1, -1), picked), dim=1)

    def beside_memory(self, picked: Tensor) -> Tensor:
        return F.pad(picked, (0, 0, self.memory, 0))

    def spread(self, clip_SD: Tensor) -> Tensor:
        return clip_SD[:, None]

    def context(self, context_SMD: Tensor) -> Tensor:
        return context_SMD

    def frames(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.memory :]

    def restore(self, picked: Tensor) -> Tensor:
        return picked


def dense_layout(batch: int, length: int, memory: int, padding_mask_BT: Tensor | None = None) -> Dense:
    """Rows of `length` frames. `padding_mask_BT`: True = real; real frames come first in each row.

    Raises `ValueError` for a mask of another shape, and, on the CPU, for one with padding before real frames
    (looking at a mask on another device would make the host wait for it in every step).
    """
    if padding_mask_BT is None:
        return Dense(batch, length, memory, None)
    if padding_mask_BT.shape != (batch, length):
        raise ValueError(f"padding mask {tuple(padding_mask_BT.shape)} does not fit {batch} rows of {length} frames")
    mask_BT = padding_mask_BT.bool()
    if mask_BT.device.type == "cpu":
        if bool((mask_BT[:, 1:] & ~mask_BT[:, :-1]).any()):
            raise ValueError("the padding mask has padding before real frames; padding belongs at the end of a row")
        if bool(mask_BT.all()):
            return Dense(batch, length, memory, None)
    return Dense(batch, length, memory, Padded(F.pad(mask_BT, (memory, 0), value=True)))


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Clips laid end to end in one row of tokens; padding frames are left out altogether."""

    batch: int
    length: int
    memory: int
    clip_lengths: tuple[int, ...]
    frame_F: Tensor  # index of each picked frame in the flattened (B * T), clip after clip
    place_F: Tensor  # the token of each picked frame
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

    def pick(self, frames_BTC: Tensor) -> Tensor:
        return frames_BTC.flatten(0, 1).index_select(0, self.frame_F)[None]

    def tokens(self, picked: Tensor, memory_MD: Tensor) -> Tensor:
        return torch.cat((memory_MD, picked[0])).index_select(0, self.source_L)[None]

    def beside_memory(self, picked: Tensor) -> Tensor:
        rows = picked.new_zeros(self.source_L.shape[0], picked.shape[-1])
        return rows.index_copy(0, self.place_F, picked[0])[None]

    def spread(self, clip_SD: Tensor) -> Tensor:
        return clip_SD.index_select(0, self.clip_L)[None]

    def context(self, context_SMD: Tensor) -> Tensor:
        return context_SMD.flatten(0, 1)[None]

    def frames(self, tokens: Tensor) -> Tensor:
        return tokens[0].index_select(0, self.place_F)[None]

    def restore(self, picked: Tensor) -> Tensor:
        rows = picked.new_zeros(self.batch * self.length, picked.shape[-1])
        return rows.index_copy(0, self.frame_F, picked[0]).unflatten(0, (self.batch, self.length))


def packed_layout(segment_ids_BT: Tensor, clips: int, memory: int, device: torch.device) -> PackedRows:
    """Clips packed into rows: `segment_ids_BT[b, t]` = index of the frame's clip among all `clips`, -1 = padding.

    Keep `segment_ids` on the CPU: the layout is worked out there, and only index tensors travel to `device`.
    Raises `ValueError` when an id is out of range, has no frame, or its frames are not in one stretch of one row.
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
    place_F = (position_L >= memory).nonzero().squeeze(1)
    indexes = (frame_F, place_F, source_L, clip_L, position_L)
    return PackedRows(rows, length, memory, tuple(counts_S.tolist()), *(to_device(x, device) for x in indexes))
