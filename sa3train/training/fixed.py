"""The same question asked again and again: loss on fixed clips, fixed noise and fixed noise levels.

Nothing here draws from a shared random state: noise comes from each clip's key, so the numbers of two runs, of two
steps
and of base and adapter can be compared.

Shape legend: I items, N noise levels, C latent channels, F frames.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sa3train.data.datamodule import LatentDataModule
from sa3train.data.loader import ClipDataset, FixedLoader, Request
from sa3train.diffusion import objective
from sa3train.training.clips import Clips, clips_of
from sa3train.training.meter import BINS
from sa3train.training.module import LoraModule
from sa3train.training.objective import Draw, seed_of
from sa3train.training.parallel import place, summed
from sa3train.transfer import to_device

LEVELS = tuple((index + 0.5) / BINS for index in range(BINS))
"""The centres of the ten bins of noise level."""


@dataclass(frozen=True)
class FixedItem:
    """One clip to be judged: its crop (1, C, F without padding), seconds, prompt and key."""

    clip: Clips

    @property
    def key(self) -> str:
        """The clip's key in its shard."""
        return self.clip.keys[0]


@dataclass(frozen=True)
class LossTable:
    """Mean squared velocity error of each item at each level: loss_IN, with the items' keys and prompts."""

    loss_IN: Tensor
    keys: tuple[str, ...]
    prompts: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Over all items and levels."""
        return float(self.loss_IN.mean())

    @property
    def by_level(self) -> list[float]:
        """Mean over items at each level."""
        return [float(value) for value in self.loss_IN.mean(dim=0)]

    @property
    def by_item(self) -> list[float]:
        """Mean over levels of each item."""
        return [float(value) for value in self.loss_IN.mean(dim=1)]


def heldout_items(data: LatentDataModule, most: int) -> list[FixedItem]:
    """The first `most` held-out clips by key; empty when nothing is held out."""
    return _items((batch for loader in data.val_dataloader() for batch in loader), most)


def training_items(data: LatentDataModule, most: int) -> list[FixedItem]:
    """`most` training clips spread over the set, each with a fixed crop and prompt."""
    data.setup()
    requests = []
    for number, (source, clips) in enumerate(zip(data.sources, data.train_clips, strict=True)):
        if source.role == "train":
            frames = clips.lengths(data.crop.frames)
            requests += [Request(number, clip, int(frames[clip]), clip) for clip in range(len(clips))]
    stride = max(1, len(requests) // max(1, most))
    dataset = ClipDataset(data.train_clips, data.crop, data.builder, fixed_prompts=True)
    return _items(FixedLoader(dataset, [[[request]] for request in requests[::stride][:most]]), most)


def _items(batches: Iterable[dict[str, object]], most: int) -> list[FixedItem]:
    found = []
    for batch in batches:
        clips = clips_of(batch)
        for row in range(len(clips)):
            length = int(clips.padding_mask_SF[row].sum())
            found.append(
                FixedItem(
                    Clips(
                        clips.data_SCF[row : row + 1, :, :length].clone(),
                        clips.padding_mask_SF[row : row + 1, :length].clone(),
                        clips.seconds_S[row : row + 1].clone(),
                        clips.at_end_S[row : row + 1].clone(),
                        [clips.prompts[row]],
                        [clips.keys[row]],
                    )
                )
            )
    return sorted(found, key=lambda item: item.key)[:most]


def loss_table(
    module: LoraModule, items: Sequence[FixedItem], *, seed: int, rows: int, levels: Sequence[float] = LEVELS
) -> LossTable:
    """Loss of every item at every level, with the adapter as it now is; `rows` (item, level) pairs at a time.

    Ranks share the work and all get the whole table. The module's randomness and gradients are left alone.
    """
    rank, world = place()
    device = module.device
    table_IN = torch.zeros(len(items), len(levels), dtype=torch.float64, device=device)
    per_pass = max(1, rows // len(levels))
    mine = list(range(rank, len(items), world))
    was_training = module.training
    module.eval()
    with torch.no_grad(), module.trainer_precision():
        for start in range(0, -(-len(items) // world), per_pass):
            numbers = mine[start : start + per_pass]
            # A rank with nothing left computes along: with a sharded base every forward pass needs all ranks.
            losses_IN = _losses(module, [items[n] for n in numbers or [0]], seed, levels).double()
            if numbers:
                table_IN.index_copy_(0, to_device(torch.tensor(numbers), device), losses_IN)
    module.train(was_training)
    return LossTable(
        summed(table_IN).cpu(), tuple(item.key for item in items), tuple(item.clip.prompts[0] for item in items)
    )


def _losses(module: LoraModule, items: Sequence[FixedItem], seed: int, levels: Sequence[float]) -> Tensor:
    """Losses (len(items), len(levels)) of a few items, padded to the longest among them."""
    longest = max(item.clip.data_SCF.shape[2] for item in items)
    data, masks, noise = [], [], []
    for item in items:
        data_1CF = item.clip.data_SCF
        room = longest - data_1CF.shape[2]
        data.append(torch.nn.functional.pad(data_1CF, (0, room)))
        masks.append(torch.nn.functional.pad(item.clip.padding_mask_SF, (0, room)))
        generator = torch.Generator().manual_seed(seed_of(seed, "fixed", item.key))
        noise.append(torch.randn(longest, data_1CF.shape[1], generator=generator).T[None])
    times = len(levels)
    t_S = torch.tensor(levels).repeat(len(items))
    clips = Clips(
        to_device(torch.cat(data), module.device).repeat_interleave(times, dim=0),
        torch.cat(masks).repeat_interleave(times, dim=0),
        torch.cat([item.clip.seconds_S for item in items]).repeat_interleave(times),
        torch.zeros(len(t_S), dtype=torch.bool),
        [item.clip.prompts[0] for item in items for _ in levels],
        [item.key for item in items for _ in levels],
    )
    draw = Draw(
        torch.cat(noise).repeat_interleave(times, dim=0),
        t_S,
        clips.padding_mask_SF,
        torch.zeros(len(t_S), 1, longest),
        torch.zeros(len(t_S), dtype=torch.bool),
    ).to(module.device)
    error_SCF = objective.squared_error(module(clips, draw), objective.velocity_target(clips.data_SCF, draw.noise_BCT))
    return objective.masked_item_means(error_SCF, draw.padding_mask_BT).view(len(items), times)
