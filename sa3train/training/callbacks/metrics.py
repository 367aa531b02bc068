"""What a run says while it goes: progress on screen, numbers to the tracker. Reads the device only when it logs.

Shape legend: S clips of a micro-batch, N bins of noise level.
"""

import sys
import time
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor

from sa3train.core.log import rank
from sa3train.training.distributed import summed
from sa3train.training.loggers import Tracker, peak_memory
from sa3train.training.module import LoraModule

BINS = 10
_SUMS = ("loss", "context_loss", "gradient_norm")  # added up on the device
_COUNTS = ("micro", "steps", "frames")  # known to the host


def level_names(prefix: str) -> list[str]:
    """Metric names of the ten bins of noise level, by their centres: `train/level/0.05` … `0.95`."""
    return [f"{prefix}/level/{(index + 0.5) / BINS:.2f}" for index in range(BINS)]


class Meter(lightning.Callback):
    """Means over the last `every` optimizer steps, of all ranks: losses, loss by noise level, gradient norm, speed.

    Its sums are part of the training state, so that a resumed run logs the very numbers of an uninterrupted one.
    """

    def __init__(self, tracker: Tracker, every: int, max_steps: int, sample_rate: int, downsampling_ratio: int) -> None:
        self.tracker, self.every, self.max_steps = tracker, every, max_steps
        self.seconds_per_frame = downsampling_ratio / sample_rate
        self._sums: dict[str, Tensor] = {}
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._level_loss_N = torch.zeros(BINS)
        self._level_count_N = torch.zeros(BINS)
        self._bar: Any = None
        self._since = 0.0
        self._steps_since = 0
        self.loss = float("nan")

    @property
    def state_key(self) -> str:
        """The name of its state in a checkpoint."""
        return "meter"

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last log line."""
        return {
            "sums": dict(self._sums),
            "counts": dict(self._counts),
            "loss": self._level_loss_N,
            "count": self._level_count_N,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the sums."""
        sums = dict(state_dict["sums"])
        counts = state_dict.get("counts", sums)  # once they were all sums, on the device
        self._sums = {name: sums[name] for name in _SUMS if name in sums}
        self._counts = {name: int(counts[name]) for name in _COUNTS}
        self._level_loss_N, self._level_count_N = state_dict["loss"], state_dict["count"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Open the progress bar where the run stands."""
        from tqdm import tqdm

        device = pl_module.device
        self._sums = {name: value.to(device) for name, value in self._sums.items()} or self._zeros(device)
        self._level_loss_N, self._level_count_N = self._level_loss_N.to(device), self._level_count_N.to(device)
        hidden = rank() != 0 or not sys.stderr.isatty()
        self._bar = tqdm(
            total=self.max_steps, initial=trainer.global_step, desc="training", unit="step", disable=hidden,
            dynamic_ncols=True,
        )  # fmt: skip
        self._since, self._steps_since = time.perf_counter(), 0

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take a micro-batch into the sums; log at every `every`th optimizer step."""
        assert isinstance(pl_module, LoraModule)
        stepped = not trainer.fit_loop._should_accumulate()
        sums = self._sums
        sums["loss"] += outputs["generated_loss"]
        sums["context_loss"] += outputs["context_loss"]
        self._counts["micro"] += 1
        self._counts["frames"] += outputs["frames"]
        bins_S = (outputs["t_B"] * BINS).long().clamp(0, BINS - 1)
        self._level_loss_N.index_add_(0, bins_S, outputs["item_loss_B"].float())
        self._level_count_N.index_add_(0, bins_S, torch.ones_like(outputs["t_B"]))
        if not stepped:
            return
        sums["gradient_norm"] += pl_module.gradient_norm
        self._counts["steps"] += 1
        self._steps_since += 1
        self._bar.update()
        step = trainer.global_step
        if step % self.every == 0 or step == self.max_steps:
            self._log(trainer, step)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Close the bar."""
        self._bar.close()

    def _zeros(self, device: torch.device) -> dict[str, Tensor]:
        return {name: torch.zeros((), device=device) for name in _SUMS}

    def _log(self, trainer: lightning.Trainer, step: int) -> None:
        device = self._level_loss_N.device
        counts = torch.tensor([float(self._counts[name]) for name in _COUNTS], device=device)
        sums = torch.stack([self._sums[name] for name in _SUMS])
        together = summed(torch.cat((counts, sums, self._level_loss_N, self._level_count_N))).cpu()
        value = dict(zip((*_COUNTS, *_SUMS), together.tolist(), strict=False))
        loss_N, count_N = together[-2 * BINS :].split(BINS)
        now = time.perf_counter()
        speed = self._steps_since / max(now - self._since, 1e-9)
        seconds = value["frames"] / value["steps"] * trainer.world_size * self.seconds_per_frame
        self.loss = value["loss"] / value["micro"]
        metrics = {
            "train/loss": self.loss,
            "train/context_loss": value["context_loss"] / value["micro"],
            "train/gradient_norm": value["gradient_norm"] / value["steps"],
            "train/learning_rate": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "time/steps_per_second": speed,
            "time/audio_seconds_per_second": speed * seconds,
            "time/peak_memory_gib": peak_memory(),
        }
        names = level_names("train")
        metrics |= {names[n]: float(loss_N[n] / count_N[n]) for n in range(BINS) if count_N[n] > 0}
        self.tracker.metrics(metrics, step)
        self._bar.set_postfix(loss=f"{self.loss:.4f}")
        self._sums, self._counts = self._zeros(device), dict.fromkeys(_COUNTS, 0)
        self._level_loss_N, self._level_count_N = torch.zeros(BINS, device=device), torch.zeros(BINS, device=device)
        self._since, self._steps_since = now, 0
