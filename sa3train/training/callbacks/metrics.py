"""Training metrics and the progress bar. Values are read from the device only when they are logged.

Shape legend: S clips of a micro-batch, N bins of noise level.
"""

import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import psutil
import torch
from torch import Tensor

from sa3train.core.device import GIB, GPU_TYPES, count_devices, measure_peak_bytes
from sa3train.core.log import get_logger, get_rank
from sa3train.evaluation.losses import BINS, LEVELS
from sa3train.training.distributed import all_reduce_sum
from sa3train.training.loggers import LoggerCollection
from sa3train.training.module import AdapterModule

_logger = get_logger(__name__)

_GRADIENT_NORM = "gradient_norm"
_COUNTS = ("micro", "steps", "frames")
"""Summed on the host; a new name likewise."""


def name_levels(prefix: str) -> list[str]:
    """Name the metrics of the ten bins of noise level.

    Args:
        prefix: First part of the name, such as "train".

    Returns:
        `prefix/level/0.05` to `prefix/level/0.95`, after the centers of the bins.
    """
    return [f"{prefix}/level/{level:.2f}" for level in LEVELS]


def measure_peak_memory() -> float:
    """Measure the most memory that this process has held so far.

    Returns:
        GiB: on the GPU if it used one, else resident; where the system keeps no high-water mark (macOS), what is
        resident now.
    """
    gpus = [torch.device(name) for name in GPU_TYPES if count_devices(name)]
    if peak := max((measure_peak_bytes(gpu) or 0 for gpu in gpus), default=0):
        return peak / GIB
    try:  # psutil has Linux's high-water mark not; ru_maxrss counts the peak of the process that started this one
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line[:5] == "VmHWM") / 2**20
    except OSError:
        held = psutil.Process().memory_info()
        return int(getattr(held, "peak_wset", held.rss)) / GIB  # Windows has the first


class MetricsCallback(lightning.Callback):
    """Logs means over the last `every` optimizer steps of all ranks: losses, gradient norm, speed, peak memory.

    A terminal gets a progress bar, any other output a line for each of them.

    The sums are part of the checkpoint, so that a resumed run logs exactly the numbers of an uninterrupted one.

    Args:
        loggers: Where metrics go.
        every: Optimizer steps between log lines.
        max_steps: Optimizer steps of the run.
        frame_seconds: Duration of a latent frame.
        losses: What `training_step` returns under `logged`. All are summed on the device; a new name starts at zero
            when an older run is resumed.
    """

    def __init__(
        self,
        loggers: LoggerCollection,
        every: int,
        max_steps: int,
        frame_seconds: float,
        losses: Sequence[str] = ("loss", "context_loss"),
    ) -> None:
        self.loggers, self.every, self.max_steps, self.frame_seconds = loggers, every, max_steps, frame_seconds
        self._losses = tuple(losses)
        self._bar: Any = None
        self._since: float | None = None
        self._callback_seconds = 0.0
        self._steps_since = 0
        self.loss = float("nan")
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._reset(torch.device("cpu"))

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint."""
        return "metrics"

    def state_dict(self) -> dict[str, Any]:
        """Collect the sums since the last log line.

        Returns:
            The state of this callback.
        """
        return {
            "sums": dict(self._sums),
            "counts": dict(self._counts),
            "level_loss": self._level_loss_N,
            "level_count": self._level_count_N,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the sums; what an older version did not sum starts at zero.

        Args:
            state_dict: What `state_dict` returned.
        """
        self._sums |= {name: value for name, value in state_dict["sums"].items() if name in self._sums}
        self._counts |= {name: int(value) for name, value in state_dict["counts"].items() if name in _COUNTS}
        self._level_loss_N, self._level_count_N = state_dict["level_loss"], state_dict["level_count"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Open the progress bar at the current step, and say from which step a run is resumed."""
        from tqdm import tqdm

        device = pl_module.device
        self._sums = {name: value.to(device) for name, value in self._sums.items()}
        self._level_loss_N, self._level_count_N = self._level_loss_N.to(device), self._level_count_N.to(device)
        hidden = get_rank() != 0 or not sys.stderr.isatty()
        self._bar = tqdm(
            total=self.max_steps, initial=trainer.global_step, desc="training", unit="step", disable=hidden,
            dynamic_ncols=True,
        )  # fmt: skip
        if trainer.global_step:
            _logger.info("resumed after step %d of %d", trainer.global_step, self.max_steps)
        self._since, self._steps_since = None, 0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock at the first step, after what other callbacks do before it."""
        assert isinstance(pl_module, AdapterModule)
        if self._since is None:
            self._since, self._callback_seconds = time.perf_counter(), pl_module.callback_seconds

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a micro-batch to the sums; log at every `every`th optimizer step."""
        assert isinstance(pl_module, AdapterModule)
        sums = self._sums
        for name in self._losses:
            sums[name] += outputs["logged"][name]
        self._counts["micro"] += 1
        self._counts["frames"] += outputs["frames"]
        if "t_B" in outputs:
            bins_S = (outputs["t_B"] * BINS).long().clamp(0, BINS - 1)
            self._level_loss_N.index_add_(0, bins_S, outputs["item_loss_B"].float())
            self._level_count_N.index_add_(0, bins_S, torch.ones_like(outputs["t_B"]))
        if not pl_module.has_stepped:
            return
        sums[_GRADIENT_NORM] += pl_module.gradient_norm
        self._counts["steps"] += 1
        self._steps_since += 1
        self._bar.update()
        step = trainer.global_step
        if step % self.every == 0 or step == self.max_steps:
            self._log(trainer, pl_module, step)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Close the progress bar."""
        self._bar.close()

    def _reset(self, device: torch.device) -> None:
        self._sums = {name: torch.zeros((), device=device) for name in (*self._losses, _GRADIENT_NORM)}
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._level_loss_N, self._level_count_N = torch.zeros(BINS, device=device), torch.zeros(BINS, device=device)

    def _log(self, trainer: lightning.Trainer, module: AdapterModule, step: int) -> None:
        device = self._level_loss_N.device
        counts = torch.tensor([float(self._counts[name]) for name in _COUNTS], device=device)
        sums = torch.stack([*self._sums.values()])
        totals = all_reduce_sum(torch.cat((counts, sums, self._level_loss_N, self._level_count_N))).cpu()
        value = dict(zip((*_COUNTS, *self._sums), totals.tolist(), strict=False))
        loss_N, count_N = totals[-2 * BINS :].split(BINS)
        assert self._since is not None
        now = time.perf_counter()
        took = now - self._since - (module.callback_seconds - self._callback_seconds)
        speed = self._steps_since / max(took, 1e-9)
        seconds = value["frames"] / value["steps"] * trainer.world_size * self.frame_seconds
        self.loss = value["loss"] / value["micro"]
        metrics = {
            **{f"train/{name}": value[name] / value["micro"] for name in self._losses},
            "train/gradient_norm": value[_GRADIENT_NORM] / value["steps"],
            "train/learning_rate": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "time/steps_per_second": speed,
            "time/audio_seconds_per_second": speed * seconds,
            "time/peak_memory_gib": measure_peak_memory(),
        }
        names = name_levels("train")
        metrics |= {names[n]: float(loss_N[n] / count_N[n]) for n in range(BINS) if count_N[n] > 0}
        self.loggers.log_metrics(metrics, step)
        self._bar.set_postfix(loss=f"{self.loss:.4f}")
        if self._bar.disable:  # on other ranks the logger is silent, too
            left = datetime.timedelta(seconds=round((self.max_steps - step) / speed))
            rate = metrics["train/learning_rate"]
            _logger.info(
                "step %d of %d: loss %.4f, learning rate %.3g, %.3g steps/s, %s left",
                step, self.max_steps, self.loss, rate, speed, left,
            )  # fmt: skip
        self._reset(device)
        self._since, self._callback_seconds, self._steps_since = now, module.callback_seconds, 0
