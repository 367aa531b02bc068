"""Batches as the loss wants them: one clip a row, whether the loader packed several into a row or not.

Shape legend: R rows of the loader's batch, T their frames, S clips, C latent channels, F frames of the longest clip.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sa3train.core.device import to_device


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
    return _moved(packed_RCT, segment_ids_RT >= 0, mask_SF)  # clips are numbered in order of row and place


def to_rows(clips_SCF: Tensor, segment_ids_RT: Tensor, mask_SF: Tensor) -> Tensor:
    """The inverse of `to_clips`: (R, C, T), zeros at padding."""
    return _moved(clips_SCF, mask_SF, segment_ids_RT >= 0)


def _moved(values_RCT: Tensor, from_RT: Tensor, to_SF: Tensor) -> Tensor:
    """The frames marked in `from_RT`, in order, at those marked in `to_SF`: (S, C, F), zeros elsewhere.

    By numbers worked out on the CPU: a mask as index would make the host wait for the device.
    """
    device = values_RCT.device
    from_N, to_N = (to_device(mask.flatten().nonzero().squeeze(1), device) for mask in (from_RT, to_SF))
    frames_NC = values_RCT.transpose(1, 2).flatten(0, 1).index_select(0, from_N)
    out_NC = values_RCT.new_zeros(to_SF.numel(), values_RCT.shape[1]).index_copy(0, to_N, frames_NC)
    return out_NC.unflatten(0, tuple(to_SF.shape)).transpose(1, 2)
