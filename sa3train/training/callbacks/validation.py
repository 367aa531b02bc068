"""Validation: loss on fixed clips with fixed noise and noise levels, for the base model and for the adapter.

Noise comes from each clip's key and nothing draws from a shared random state, so the numbers of two runs, of two steps,
and of base and adapter can be compared. `validation.json` in the run folder holds all of them.

Shape legend: I clips, N noise levels, C latent channels, F frames.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as lightning
import torch
from torch import Tensor
from typing_extensions import override

from sa3train.core.device import get_widest_float, move_to_device
from sa3train.core.errors import ConfigError
from sa3train.core.files import write_json
from sa3train.core.log import get_logger, report_stage
from sa3train.data.loading.clip_batch import ClipBatch, split_clips
from sa3train.data.loading.datamodule import LatentDataModule
from sa3train.data.loading.loader import LatentDataset, ValidationLoader
from sa3train.data.loading.sampler import SampleIndex
from sa3train.evaluation.losses import LEVELS, measure_losses
from sa3train.reports.loss_change import compute_loss_change
from sa3train.reports.pick import is_comparable, pick_best
from sa3train.reports.run_files import BEST_ADAPTER_FILE, VALIDATION_FILE
from sa3train.training.callbacks.checkpoint import CheckpointCallback
from sa3train.training.callbacks.metrics import name_levels
from sa3train.training.distributed import all_reduce_sum, get_rank_and_world_size
from sa3train.training.ema import swap_parameters
from sa3train.training.loggers import LoggerCollection
from sa3train.training.module import AdapterModule, LoraModule, StepCallback
from sa3train.training.settings import ValidationSchedule, ValidationSettings
from sa3train.training.step import make_plain_draw

VAL, TRAIN_EVAL = "val", "train_eval"
"""The parts: held-out clips and training clips, by their prefix in metrics."""
PART_TITLES = {TRAIN_EVAL: "training clips", VAL: "held-out clips"}
_STATE = ("history", "best_loss", "best_step", "without_best", "strengths")
"""Attributes of the callback that are saved as they are."""
_logger = get_logger(__name__)


class ValidationClip(Protocol):
    """A clip to validate on: of each list the first is its own."""

    @property
    def keys(self) -> Sequence[str]:
        """Its key."""

    @property
    def prompts(self) -> Sequence[str]:
        """Its prompt."""


def list_heldout_clips(data: LatentDataModule, limit: int) -> list[ClipBatch]:
    """List the first held-out clips by key.

    Args:
        data: The data module.
        limit: Maximum number of clips.

    Returns:
        Each clip as a batch of one, without padding; empty when nothing is held out.
    """
    return split_clips((batch for loader in data.val_dataloader() for batch in loader), limit)


def list_training_clips(data: LatentDataModule, limit: int) -> list[ClipBatch]:
    """List training clips spread over the set, each with a fixed crop and prompt.

    Args:
        data: The data module.
        limit: Maximum number of clips.

    Returns:
        Each clip as a batch of one, without padding.
    """
    data.setup()
    samples = []
    for number, (source, clips) in enumerate(zip(data.sources, data.train_clips, strict=True)):
        if source.role == "train":
            frames = clips.compute_lengths(data.crop.frames)
            samples += [SampleIndex(number, clip, int(frames[clip]), clip) for clip in range(len(clips))]
    stride = max(1, len(samples) // max(1, limit))
    dataset = LatentDataset(data.train_clips, data.crop, data.builder, fixed_prompts=True)
    return split_clips(ValidationLoader(dataset, [[[sample]] for sample in samples[::stride][:limit]]), limit)


def measure_module_losses(module: LoraModule, clips: Sequence[ClipBatch], *, seed: int, batch_size: int) -> Tensor:
    """Measure the loss of every clip at every noise level, with the adapter as it is now.

    Ranks share the work. The module's random state and gradients are left alone.

    Args:
        module: The module.
        clips: Batches of one clip.
        seed: Seed of the fixed noise.
        batch_size: (clip, level) pairs per forward pass.

    Returns:
        loss_IN: mean squared velocity error, float64 on the CPU, the same on all ranks.
    """

    def predict(batch: ClipBatch, noise_SCF: Tensor, t_S: Tensor) -> Tensor:
        velocity_SCF: Tensor = module(batch, make_plain_draw(noise_SCF, t_S, batch.attention_mask_SF).to(device))
        return velocity_SCF

    rank, world_size = get_rank_and_world_size()
    device = module.device
    loss_IN = torch.zeros(len(clips), len(LEVELS), dtype=get_widest_float(device), device=device)
    per_pass = max(1, batch_size // len(LEVELS))
    mine = list(range(rank, len(clips), world_size))
    with module.start_evaluation():
        for start in range(0, -(-len(clips) // world_size), per_pass):
            numbers = mine[start : start + per_pass]
            # A rank with nothing left computes along: with a sharded base every forward pass needs all ranks.
            part_IN = measure_losses(predict, [clips[n] for n in numbers or [0]], device, seed=seed).to(loss_IN)
            if numbers:
                loss_IN.index_copy_(0, move_to_device(torch.tensor(numbers), device), part_IN)
    return all_reduce_sum(loss_IN).cpu().double()


class FixedValidationCallback(StepCallback, ABC):
    """Validates at intervals, before the first step and after the last, against the base on the same clips and noise.

    Without held-out clips only training clips are evaluated, and selection and early stopping are refused. A subclass
    says how clips are measured: `measure` gives a table of numbers, one row per clip.

    Args:
        run_dir: The run folder.
        loggers: Where metrics go.
        checkpoint: Writes the best adapter.
        heldout: Held-out clips; each has a key and a prompt.
        training: Training clips, likewise.
        settings: Interval, selection and early stopping.

    Raises:
        ConfigError: Selection or early stopping without held-out clips.
    """

    name: str
    levels: Sequence[float]

    def __init__(
        self,
        run_dir: Path,
        loggers: LoggerCollection,
        checkpoint: CheckpointCallback,
        heldout: Sequence[ValidationClip],
        training: Sequence[ValidationClip],
        settings: ValidationSchedule,
    ) -> None:
        if not heldout and (settings.select_best or settings.patience):
            raise ConfigError(
                "callbacks.validation.select_best and patience need held-out clips, and this data has none. "
                "Encode with split=0.1, or turn them off."
            )
        self.run_dir, self.loggers, self.checkpoint, self.schedule = run_dir, loggers, checkpoint, settings
        self.clips: dict[str, list[Any]] = {VAL: list(heldout), TRAIN_EVAL: list(training)}
        self.base: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.history: list[dict[str, Any]] = []
        self.strengths: list[dict[str, Any]] = []
        self.best_loss, self.best_step = float("inf"), -1
        self.without_best = 0

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint."""
        return "validation"

    def state_dict(self) -> dict[str, Any]:
        """Collect everything measured so far.

        Returns:
            The state of this callback.
        """
        keys = {part: [clip.keys[0] for clip in clips] for part, clips in self.clips.items()}
        measured = {"base": dict(self.base), "last": dict(self.last), "clips": keys}
        return {name: getattr(self, name) for name in _STATE} | measured

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was measured before the interruption; what was measured on other clips is not paired with these.

        Args:
            state_dict: What `state_dict` returned.
        """
        for name in _STATE:
            setattr(self, name, state_dict.get(name, getattr(self, name)))
        for part, clips in self.clips.items():
            before = state_dict.get("clips", {}).get(part)  # older states have none
            if before is not None and before != [clip.keys[0] for clip in clips]:
                for row in self.history:
                    row.get(part, {}).pop("by_clip", None)
                continue
            for name, tables in (("base", self.base), ("last", self.last)):
                loss_IN = state_dict[name].get(part)
                if loss_IN is not None and len(clips) == len(loss_IN):
                    tables[part] = loss_IN

    @report_stage("validating the base")
    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure the base once, and the adapter before the first step and where it was due when the run stopped."""
        assert isinstance(pl_module, AdapterModule)
        missing = [part for part, clips in self.clips.items() if clips and part not in self.base]
        if missing:
            with pl_module.injected.disable():
                self.base |= {part: self.measure(pl_module, self.clips[part]) for part in missing}
        if not self.history or (self._is_due(trainer) and self.history[-1]["step"] != trainer.global_step):
            self._validate(trainer, pl_module)
        if self._is_out_of_patience():
            trainer.should_stop = True  # it had stopped early before it was interrupted

    def on_step_end(self, trainer: lightning.Trainer, module: AdapterModule) -> None:
        """Validate at the interval; stop early if told to."""
        if self._is_due(trainer):
            self._validate(trainer, module)
            if self._is_out_of_patience():
                _logger.warning(
                    "stopped early after step %d: no validation loss below %.4f (step %d) in the last %d validations",
                    trainer.global_step, self.best_loss, self.best_step, self.schedule.patience,
                )  # fmt: skip
                trainer.should_stop = True

    def summarize(self) -> dict[str, Any]:
        """Summarize everything measured so far.

        Returns:
            The content of `validation.json`.
        """
        items = {
            part: [
                {"key": clip.keys[0], "prompt": clip.prompts[0], "base": float(base), "adapter": float(adapter)}
                for clip, base, adapter in zip(
                    self.clips[part], self.get_item_losses(self.base[part]), self.get_item_losses(table), strict=True
                )
            ]
            for part, table in self.last.items()
        }
        return {
            "measure": self.name,
            "levels": list(self.levels),
            "base": {part: self._summarize(table) for part, table in self.base.items()},
            "history": self.history,
            "best_step": self.best_step,
            "best_loss": self.best_loss if self.best_step >= 0 else None,
            "strengths": self.strengths,
            "items": items,
        }

    @abstractmethod
    def measure(self, module: AdapterModule, clips: Sequence[Any]) -> Tensor:
        """Measure clips with the adapter as it is now.

        Args:
            module: The module.
            clips: The clips.

        Returns:
            A table on the CPU, one row per clip, the same on all ranks.
        """

    @abstractmethod
    def get_item_losses(self, table_IN: Tensor) -> Tensor:
        """Get the loss of each clip from a table.

        Args:
            table_IN: What `measure` returned.

        Returns:
            (I,).
        """

    @abstractmethod
    def summarize_table(self, table_IN: Tensor) -> dict[str, Any]:
        """Average a table over the clips.

        Args:
            table_IN: What `measure` returned.

        Returns:
            `loss`, its values at each level as `by_level`, and more by name.
        """

    @staticmethod
    @abstractmethod
    def describe(summary: Mapping[str, Any]) -> list[str]:
        """Describe a validation in sentences.

        Args:
            summary: What `summarize` returned, with a validation in it.

        Returns:
            Lines with base and adapter.
        """

    @abstractmethod
    def name_metrics(self, part: str, summary: Mapping[str, Any]) -> dict[str, float]:
        """Name what is logged besides the loss.

        Args:
            part: `val` or `train_eval`.
            summary: What `summarize_table` returned.

        Returns:
            Values by metric.
        """

    def _is_due(self, trainer: lightning.Trainer) -> bool:
        return trainer.global_step % self.schedule.every == 0 or trainer.global_step == trainer.max_steps

    def _is_out_of_patience(self) -> bool:
        return bool(self.schedule.patience) and self.without_best >= (self.schedule.patience or 0)

    def _summarize(self, table_IN: Tensor) -> dict[str, Any]:
        """What `validation.json` has of a table: the losses of single clips too, for paired comparisons."""
        return {**self.summarize_table(table_IN), "by_clip": self.get_item_losses(table_IN).tolist()}

    @report_stage("validating")
    def _validate(self, trainer: lightning.Trainer, module: AdapterModule) -> None:
        step, self.strengths = trainer.global_step, []
        with swap_parameters(module.trainable, module.get_eval_parameters()):
            self.last = {part: self.measure(module, clips) for part, clips in self.clips.items() if clips}
        row: dict[str, Any] = {"step": step}
        metrics: dict[str, float] = {}
        for part, table in self.last.items():
            row[part], base = self._summarize(table), self.summarize_table(self.base[part])
            loss = row[part]["loss"]
            metrics |= {f"{part}/loss": loss, f"{part}/loss_delta": loss - base["loss"]}
            metrics |= self.name_metrics(part, row[part])
        if len(self.last) == 2:
            metrics["val/gap"] = row[VAL]["loss"] - row[TRAIN_EVAL]["loss"]
        self.history.append(row)
        self.loggers.log_metrics(metrics, step)
        if VAL in row:
            self._keep_best(trainer, module)
            if step == trainer.max_steps or self._is_out_of_patience():
                self._measure_strengths(module)
        if trainer.is_global_zero:
            write_json(self.run_dir / VALIDATION_FILE, self.summarize())

    def _keep_best(self, trainer: lightning.Trainer, module: AdapterModule) -> None:
        base_I = self.get_item_losses(self.base[VAL]).tolist()
        rows = [row for row in self.history if is_comparable(base_I, row[VAL].get("by_clip"))]
        best = rows[pick_best(base_I, [row[VAL]["by_clip"] for row in rows]).winner] if rows else None
        if best is None or best is not self.history[-1]:
            self.without_best += 1
            return
        self.best_loss, self.best_step, self.without_best = best[VAL]["loss"], trainer.global_step, 0
        if self.schedule.select_best and trainer.is_global_zero:
            self.checkpoint.write_adapter(BEST_ADAPTER_FILE, module, self.best_step)

    def _measure_strengths(self, module: AdapterModule) -> None:
        """Measure held-out clips at other strengths, so that the report can say which to play."""
        with swap_parameters(module.trainable, module.get_eval_parameters()):
            for strength in self.schedule.strengths:
                with module.injected.scale(strength):
                    table_IN = self.measure(module, self.clips[VAL])
                self.strengths.append({"strength": strength, "by_clip": self.get_item_losses(table_IN).tolist()})


class ValidationCallback(FixedValidationCallback):
    """Validates a diffusion model: the loss of fixed clips with fixed noise, at every noise level.

    Args:
        run_dir: The run folder.
        loggers: Where metrics go.
        checkpoint: Writes the best adapter.
        heldout: Held-out clips, batches of one.
        training: Training clips, likewise.
        settings: Interval, batch size, seed, selection and early stopping.
    """

    name, levels = "noise_levels", LEVELS

    def __init__(
        self,
        run_dir: Path,
        loggers: LoggerCollection,
        checkpoint: CheckpointCallback,
        heldout: Sequence[ClipBatch],
        training: Sequence[ClipBatch],
        settings: ValidationSettings,
    ) -> None:
        super().__init__(run_dir, loggers, checkpoint, heldout, training, settings)
        self.settings = settings

    @override
    def measure(self, module: AdapterModule, clips: Sequence[Any]) -> Tensor:
        """Measure the loss of every clip at every noise level."""
        assert isinstance(module, LoraModule)
        return measure_module_losses(module, clips, seed=self.settings.seed, batch_size=self.settings.batch_size)

    @override
    def get_item_losses(self, table_IN: Tensor) -> Tensor:
        """Average over noise levels."""
        return table_IN.mean(dim=1)

    @override
    def summarize_table(self, table_IN: Tensor) -> dict[str, Any]:
        """Average over clips: the loss over all noise levels, and at each."""
        return {"loss": float(table_IN.mean()), "by_level": table_IN.mean(dim=0).tolist()}

    @override
    def name_metrics(self, part: str, summary: Mapping[str, Any]) -> dict[str, float]:
        """Name the losses at each noise level."""
        return dict(zip(name_levels(part), summary["by_level"], strict=True))

    @override
    @staticmethod
    def describe(summary: Mapping[str, Any]) -> list[str]:
        """Describe the loss of base and adapter, and where the best was."""
        lines = []
        history = summary["history"]
        for part, base in summary["base"].items():
            if not history or part not in history[-1]:
                continue
            last, change = history[-1], compute_loss_change(summary, part)
            lines.append(
                f"loss on fixed noise and timesteps, {PART_TITLES[part]}: base {base['loss']:.4f} -> adapter "
                f"{last[part]['loss']:.4f}{f', {change.describe()},' if change else ''} at step {last['step']}"
            )
        if summary["best_step"] >= 0 and history and summary["best_step"] != history[-1]["step"]:
            lines.append(f"best validation loss {summary['best_loss']:.4f} was at step {summary['best_step']}")
        return lines
