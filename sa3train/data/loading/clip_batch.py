"""Batches as the loss needs them: one clip per row, whether or not the loader packed several into a row.

Shape legend: R rows of the loader's batch, T their frames, S clips, C latent channels, F frames of the longest clip.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sa3train.core.device import move_to_device
from sa3train.data.loading.loader import Batch


@dataclass(frozen=True)
class ClipBatch:
    """A micro-batch with one clip per row; everything is on the CPU except `data_SCF`.

    Attributes:
        data_SCF: Latents, zeros behind each clip.
        attention_mask_SF: True on real frames.
        seconds_S: Length given to the model, in seconds.
        at_end_S: Whether silence follows the real part, so that it may be extended.
        prompts: Prompt of each clip.
        keys: Key of each clip in its shard.
        segment_ids_RT: Clip of each frame of the packed rows that the model sees, -1 for padding; None if not packed.
        seeds: Loader's number of each crop, from which its random numbers are seeded.
    """

    data_SCF: Tensor
    attention_mask_SF: Tensor
    seconds_S: Tensor
    at_end_S: Tensor
    prompts: list[str]
    keys: list[str]
    segment_ids_RT: Tensor | None = None
    seeds: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)


def make_clip_batch(batch: Batch) -> ClipBatch:
    """Make a batch with one clip per row.

    Args:
        batch: Batch of the loader, packed or not.

    Returns:
        The same clips, one per row.
    """
    latents_RCT, segment_ids_RT = batch["latents_BCT"], batch.get("segment_ids_BT")
    keys = list(batch["keys"])
    at_end_S = batch.get("at_end_S", torch.ones(len(keys), dtype=torch.bool)).cpu()
    seconds_S, prompts, seeds = batch["seconds_total_S"].cpu(), list(batch["prompts"]), tuple(batch["seeds"])
    if segment_ids_RT is None:
        return ClipBatch(latents_RCT, batch["attention_mask_BT"].cpu(), seconds_S, at_end_S, prompts, keys, seeds=seeds)
    segment_ids_RT = segment_ids_RT.cpu()
    mask_SF = compute_clip_mask(segment_ids_RT, len(keys))
    data_SCF = unpack_rows(latents_RCT, segment_ids_RT, mask_SF)
    # A packed row has no room behind a clip, so none is extended into silence.
    return ClipBatch(data_SCF, mask_SF, seconds_S, torch.zeros_like(at_end_S), prompts, keys, segment_ids_RT, seeds)


def split_clips(batches: Iterable[Batch], limit: int | None = None) -> list[ClipBatch]:
    """Split batches into clips, without padding.

    Args:
        batches: Batches of the loader.
        limit: Maximum number of clips; None for all.

    Returns:
        The first clips by key, each as a batch of one.
    """
    found = []
    for batch in batches:
        clips = make_clip_batch(batch)
        for row in range(len(clips)):
            length, one = int(clips.attention_mask_SF[row].sum()), slice(row, row + 1)
            found.append(
                ClipBatch(
                    clips.data_SCF[one, :, :length].clone(),
                    clips.attention_mask_SF[one, :length].clone(),
                    clips.seconds_S[one].clone(),
                    clips.at_end_S[one].clone(),
                    clips.prompts[one],
                    clips.keys[one],
                )
            )
    return sorted(found, key=lambda clip: clip.keys)[:limit]


def compute_clip_mask(segment_ids_RT: Tensor, clips: int) -> Tensor:
    """Compute which frames are real once every clip has its own row.

    Args:
        segment_ids_RT: Clip of each frame of the packed rows, -1 for padding.
        clips: Number of clips.

    Returns:
        (S, F) bool, True on real frames.
    """
    counts_S = torch.bincount(segment_ids_RT[segment_ids_RT >= 0], minlength=clips)
    return torch.arange(int(counts_S.max()))[None, :] < counts_S[:, None]


def unpack_rows(packed_RCT: Tensor, segment_ids_RT: Tensor, mask_SF: Tensor) -> Tensor:
    """Unpack rows into one clip per row.

    Args:
        packed_RCT: Frames of packed rows.
        segment_ids_RT: Clip of each frame, -1 for padding; clips are numbered in order of row and position.
        mask_SF: What `compute_clip_mask` returns.

    Returns:
        (S, C, F), zeros behind each clip.
    """
    return _move_frames(packed_RCT, segment_ids_RT >= 0, mask_SF)


def pack_rows(clips_SCF: Tensor, segment_ids_RT: Tensor, mask_SF: Tensor) -> Tensor:
    """Pack clips into rows, the inverse of `unpack_rows`.

    Args:
        clips_SCF: One clip per row.
        segment_ids_RT: Clip of each frame of the packed rows, -1 for padding.
        mask_SF: What `compute_clip_mask` returns.

    Returns:
        (R, C, T), zeros at padding.
    """
    return _move_frames(clips_SCF, mask_SF, segment_ids_RT >= 0)


def _move_frames(values_RCT: Tensor, from_RT: Tensor, to_SF: Tensor) -> Tensor:
    """The frames marked in `from_RT`, in order, at those marked in `to_SF`: (S, C, F), zeros elsewhere.

    Indices are computed on the CPU: a mask as index would make the host wait for the device.
    """
    device = values_RCT.device
    from_N, to_N = (move_to_device(mask.flatten().nonzero().squeeze(1), device) for mask in (from_RT, to_SF))
    frames_NC = values_RCT.transpose(1, 2).flatten(0, 1).index_select(0, from_N)
    out_NC = values_RCT.new_zeros(to_SF.numel(), values_RCT.shape[1]).index_copy(0, to_N, frames_NC)
    return out_NC.unflatten(0, tuple(to_SF.shape)).transpose(1, 2)
