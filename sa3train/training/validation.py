"""Held to account: loss on clips the adapter has never seen, against the base model's own, level by level.

`heldout.json` in the run folder holds everything measured; the report draws it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning

from sa3train.errors import ConfigError
from sa3train.files import write_json
from sa3train.log import get_logger
from sa3train.training.averaging import swapped_in
from sa3train.training.checkpoints import BEST_ADAPTER, Saver
from sa3train.training.fixed import LEVELS, FixedItem, LossTable, loss_table
from sa3train.training.meter import level_names
from sa3train.training.module import LoraModule
from sa3train.training.report_files import HELDOUT
from sa3train.training.tracking import Tracker

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
