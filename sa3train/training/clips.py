"""Batches as the loss wants them: one clip a row, whether the loader packed several into a row or not.

Shape legend: R rows of the loader's batch, T their frames, S clips, C latent channels, F frames of the longest clip.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clips:
    """A micro-batch, one clip a row; `segment_ids_RT` when the model is to see it packed.

    padding_mask_SF: True on real frames. at_end_S: silence follows the real part. seeds: a number for each showing of a
    clip, where its random numbers start. All on the CPU except data_SCF.
    """

    data_SCF: Tensor
    padding_mask_SF: Tensor
    seconds_S: Tensor
    at_end_S: Tensor
    prompts: list[str]
    keys: list[str]
    segment_ids_RT: Tensor | None = None
    seeds: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)


def clips_of(batch: Mapping[str, Any]) -> Clips:
    """The clips of a batch of `LatentDataModule`, packed or not."""
    latents_RCT, segment_ids_RT = batch["latents_BCT"], batch.get("segment_ids_BT")
    keys = list(batch["keys"])
    at_end_S = batch.get("at_end_B", torch.ones(len(keys), dtype=torch.bool)).cpu()
    seconds_S, prompts, seeds = batch["seconds_total_B"].cpu(), list(batch["prompts"]), tuple(batch["seeds"])
    if segment_ids_RT is None:
        return Clips(latents_RCT, batch["padding_mask_BT"].cpu(), seconds_S, at_end_S, prompts, keys, seeds=seeds)
    segment_ids_RT = segment_ids_RT.cpu()
    mask_SF = clip_mask(segment_ids_RT, len(keys))
    data_SCF = to_clips(latents_RCT, segment_ids_RT, mask_SF)
    # A packed row has no room behind a clip, so none is extended into silence.
    return Clips(data_SCF, mask_SF, seconds_S, torch.zeros_like(at_end_S), prompts, keys, segment_ids_RT, seeds)


def clip_mask(segment_ids_RT: Tensor, clips: int) -> Tensor:
    """Real frames of each clip when every clip has a row of its own: (S, F) bool."""
    counts_S = torch.bincount(segment_ids_RT[segment_ids_RT >= 0], minlength=clips)
    return torch.arange(int(counts_S.max()))[None, :] < counts_S[:, None]


def to_clips(packed_RCT: Tensor, segment_ids_RT: Tensor, mask_SF: Tensor) -> Tensor:
    """Frames of packed rows laid out one clip a row: (S, C, F), zeros behind each clip."""
    frames_NC = packed_RCT.transpose(1, 2)[segment_ids_RT >= 0]  # clips are numbered in order of row and place
    out_SFC = packed_RCT.new_zeros(*mask_SF.shape, packed_RCT.shape[1])
    out_SFC[mask_SF] = frames_NC
    return out_SFC.transpose(1, 2)


def to_rows(clips_SCF: Tensor, segment_ids_RT: Tensor, mask_SF: Tensor) -> Tensor:
    """The inverse of `to_clips`: (R, C, T), zeros at padding."""
    out_RTC = clips_SCF.new_zeros(*segment_ids_RT.shape, clips_SCF.shape[1])
    out_RTC[segment_ids_RT >= 0] = clips_SCF.transpose(1, 2)[mask_SF]
    return out_RTC.transpose(1, 2)
