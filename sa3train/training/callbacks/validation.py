"""Held to account: loss on clips the adapter has never seen, against the base model's own, level by level.

`heldout.json` in the run folder holds everything measured; the report draws it.

The same question asked again and again: loss on fixed clips, fixed noise and fixed noise levels.

Nothing here draws from a shared random state: noise comes from each clip's key, so the numbers of two runs, of two
steps
and of base and adapter can be compared.

Shape legend: I items, N noise levels, C latent channels, F frames.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor

from sa3train.core.device import to_device
from sa3train.core.errors import ConfigError
from sa3train.core.files import write_json
from sa3train.core.log import get_logger
from sa3train.data.loading.datamodule import LatentDataModule
from sa3train.data.loading.loader import ClipDataset, FixedLoader, Request
from sa3train.diffusion import objective
from sa3train.reports.run_files import HELDOUT
from sa3train.training.batch import Clips, clips_of
from sa3train.training.callbacks.checkpoint import BEST_ADAPTER, Saver
from sa3train.training.callbacks.metrics import BINS, level_names
from sa3train.training.distributed import place, summed
from sa3train.training.ema import swapped_in
from sa3train.training.loggers import Tracker
from sa3train.training.module import LoraModule
from sa3train.training.step import Draw, seed_of

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


_logger = get_logger(__name__)


class Judge(lightning.Callback):
    """Every `every` steps, and before the first and after the last: loss on fixed held-out and training clips.

    The base model's loss on the same clips, noise and levels is the zero line. With `select_best` the adapter of the
    lowest held-out loss becomes the run's; with `patience` training stops after so many judgements without a new best.
    Without held-out clips only the training clips are judged, and selection and stopping are refused.
    """

    def __init__(
        self,
        run_dir: Path,
        tracker: Tracker,
        saver: Saver,
        heldout: Sequence[FixedItem],
        training: Sequence[FixedItem],
        *,
        every: int,
        rows: int,
        seed: int = 0,
        select_best: bool = False,
        patience: int | None = None,
    ) -> None:
        if not heldout and (select_best or patience):
            raise ConfigError(
                "callbacks.judge.select_best and patience need held-out clips, and this data has none: "
                "encode with split=0.1, or turn them off."
            )
        self.run_dir, self.tracker, self.saver = run_dir, tracker, saver
        self.items = {"heldout": list(heldout), "train": list(training)}
        self.every, self.rows, self.seed = every, rows, seed
        self.select_best, self.patience = select_best, patience
        self.base: dict[str, LossTable] = {}
        self.last: dict[str, LossTable] = {}
        self.history: list[dict[str, Any]] = []
        self.best_loss, self.best_step = float("inf"), -1
        self._without_best = 0

    @property
    def state_key(self) -> str:
        """The name of its state in a checkpoint."""
        return "judge"

    def state_dict(self) -> dict[str, Any]:
        """Everything measured so far."""
        return {
            "history": self.history,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "without_best": self._without_best,
            "base": {name: table.loss_IN for name, table in self.base.items()},
            "last": {name: table.loss_IN for name, table in self.last.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was measured before the interruption."""
        self.history = list(state_dict["history"])
        self.best_loss, self.best_step = state_dict["best_loss"], state_dict["best_step"]
        self._without_best = state_dict["without_best"]
        for name, tables in (("base", self.base), ("last", self.last)):
            for part, loss_IN in state_dict[name].items():
                items = self.items[part]
                if len(items) == len(loss_IN):
                    tables[part] = _table(loss_IN, items)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure the zero line once."""
        assert isinstance(pl_module, LoraModule)
        missing = [part for part, items in self.items.items() if items and part not in self.base]
        if missing:
            with pl_module.injected.disabled():
                self.base |= {part: self._measure(pl_module, part) for part in missing}
        if not self.history:
            self._judge(trainer, pl_module)
        if self.patience and self._without_best >= self.patience:
            trainer.should_stop = True  # it had stopped early before it was interrupted

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Judge when it is time."""
        assert isinstance(pl_module, LoraModule)
        if trainer.fit_loop._should_accumulate():
            return
        step = trainer.global_step
        if step % self.every == 0 or step == trainer.max_steps:
            self._judge(trainer, pl_module)
            if self.patience and self._without_best >= self.patience:
                _logger.warning(
                    "stopped early after step %d: no better held-out loss than %.4f (step %d) in %d judgements",
                    step, self.best_loss, self.best_step, self.patience,
                )  # fmt: skip
                trainer.should_stop = True

    def summary(self) -> dict[str, Any]:
        """What `heldout.json` holds."""
        items = {
            part: [
                {
                    "key": key,
                    "prompt": prompt,
                    "base": self.base[part].by_item[row],
                    "adapter": table.by_item[row],
                }
                for row, (key, prompt) in enumerate(zip(table.keys, table.prompts, strict=True))
            ]
            for part, table in self.last.items()
        }
        return {
            "levels": list(LEVELS),
            "base": {part: {"loss": table.mean, "by_level": table.by_level} for part, table in self.base.items()},
            "history": self.history,
            "best_step": self.best_step,
            "best_loss": self.best_loss if self.best_step >= 0 else None,
            "items": items,
        }

    def _judge(self, trainer: lightning.Trainer, module: LoraModule) -> None:
        step = trainer.global_step
        with swapped_in(module.trained, module.judged()):
            self.last = {part: self._measure(module, part) for part, items in self.items.items() if items}
        row: dict[str, Any] = {"step": step}
        metrics: dict[str, float] = {}
        for part, table in self.last.items():
            row[part] = {"loss": table.mean, "by_level": table.by_level}
            prefix = "heldout" if part == "heldout" else "fixed_train"
            metrics |= {f"{prefix}/loss": table.mean, f"{prefix}/over_base": table.mean - self.base[part].mean}
            metrics |= dict(zip(level_names(prefix), table.by_level, strict=True))
        if len(self.last) == 2:
            metrics["heldout/gap"] = self.last["heldout"].mean - self.last["train"].mean
        self.history.append(row)
        self.tracker.metrics(metrics, step)
        self._keep_best(trainer, module, step)
        if trainer.is_global_zero:
            write_json(self.run_dir / HELDOUT, self.summary())

    def _keep_best(self, trainer: lightning.Trainer, module: LoraModule, step: int) -> None:
        if "heldout" not in self.last:
            return
        loss = self.last["heldout"].mean
        if loss < self.best_loss:
            self.best_loss, self.best_step, self._without_best = loss, step, 0
            if self.select_best and trainer.is_global_zero:
                self.saver.write_adapter(BEST_ADAPTER, module, step)
        else:
            self._without_best += 1

    def _measure(self, module: LoraModule, part: str) -> LossTable:
        return loss_table(module, self.items[part], seed=self.seed, rows=self.rows)


def _table(loss_IN: Any, items: Sequence[FixedItem]) -> LossTable:
    return LossTable(loss_IN, tuple(item.key for item in items), tuple(item.clip.prompts[0] for item in items))


def verdict(summary: dict[str, Any]) -> list[str]:
    """What the fixed evaluation says, in lines for a person: loss before and after on the same noise and levels."""
    lines = []
    history = summary["history"]
    titles = {"train": "training clips", "heldout": "held-out clips"}
    for part, base in summary["base"].items():
        if not history or part not in history[-1]:
            continue
        after = history[-1][part]["loss"]
        change = 100 * (after - base["loss"]) / base["loss"]
        lines.append(
            f"loss on fixed noise and timesteps, {titles[part]}: base {base['loss']:.4f} -> adapter {after:.4f} "
            f"({change:+.1f} %) at step {history[-1]['step']}"
        )
    if summary["best_step"] >= 0 and history and summary["best_step"] != history[-1]["step"]:
        lines.append(f"best held-out loss {summary['best_loss']:.4f} was at step {summary['best_step']}")
    return lines
