"""Saving a run so that it can be killed anywhere: whole training states at intervals, and the adapter beside them.

A run folder holds `adapter.safetensors` (the newest, at the end the chosen one),
`checkpoints/step-XXXXXXXX.safetensors`
(training states, the last few) and, when selection is on, `adapter-best.safetensors`.
"""

import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as lightning
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from sa3train.adapters.formats import save_adapter
from sa3train.log import get_logger
from sa3train.training.module import LoraModule
from sa3train.training.parallel import largest
from sa3train.training.state import StateError, load_state, save_state
from sa3train.training.tracking import Tracker

_logger = get_logger(__name__)

STATES = "checkpoints"
ADAPTER = "adapter.safetensors"
BEST_ADAPTER = "adapter-best.safetensors"
_STATE_NAME = re.compile(r"step-(\d{8})\.safetensors")


class StateIO(CheckpointIO):
    """Lightning's checkpoints as `sa3train.training.state` files: no pickle, whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a training state."""
        save_state(path, checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a training state on the CPU."""
        state: dict[str, Any] = load_state(path)
        return state

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a training state."""
        Path(path).unlink(missing_ok=True)


def state_path(run_dir: Path, step: int) -> Path:
    """Where the training state after `step` optimizer steps is kept."""
    return run_dir / STATES / f"step-{step:08d}.safetensors"


def saved_states(run_dir: Path) -> dict[int, Path]:
    """Training states of a run by step, oldest first."""
    found = {}
    for path in (run_dir / STATES).glob("step-*.safetensors"):
        match = _STATE_NAME.fullmatch(path.name)
        if match:
            found[int(match.group(1))] = path
    return dict(sorted(found.items()))


def newest_state(run_dir: Path) -> tuple[int, Path] | None:
    """The newest training state that is whole; damaged ones are said aloud and passed over."""
    for step, path in reversed(saved_states(run_dir).items()):
        try:
            load_state(path)
        except StateError as error:
            _logger.warning("%s The one before it is used.", error)
            continue
        return step, path
    return None


class Saver(lightning.Callback):
    """Saves every `every` optimizer steps, at the end, and when asked to stop by SIGTERM or SIGUSR1.

    Keeps the last `keep` training states. `metadata(step)` is the provenance written into each adapter. After a signal
    `interrupted` holds its number, and the run stops once the state is on disk.
    """

    def __init__(
        self, run_dir: Path, tracker: Tracker, *, every: int, keep: int, metadata: Callable[[int], Mapping[str, str]]
    ) -> None:
        self.run_dir, self.tracker, self.every, self.keep = run_dir, tracker, every, keep
        self.metadata = metadata
        self.interrupted: int | None = None
        self.after_save: list[Callable[[lightning.Trainer, LoraModule], None]] = []
        self._signal = 0
        self._handlers: dict[int, Any] = {}
        self._saved = -1

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Listen for a scheduler's signals, in place of Lightning's handlers, which would stop without a state."""
        self._saved = trainer.global_step if newest_state(self.run_dir) else -1
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._handlers[number] = signal.signal(number, self._note)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save what the interval has not, and give the signals back."""
        assert isinstance(pl_module, LoraModule)
        if self._saved != trainer.global_step:
            self.save(trainer, pl_module)
        self._restore_handlers()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back; the last saved state stands."""
        self._restore_handlers()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After an optimizer step: save when it is time, or when a signal came to any rank."""
        assert isinstance(pl_module, LoraModule)
        if trainer.fit_loop._should_accumulate():
            return
        step = trainer.global_step
        stop = largest(self._signal, pl_module.device)
        if stop or trainer.should_stop or step % self.every == 0 or step == trainer.max_steps:
            self.save(trainer, pl_module)
        if stop:
            self.interrupted = stop
            _logger.warning("stopped by signal %d after step %d; the state is saved", self.interrupted, step)
            trainer.should_stop = True

    def save(self, trainer: lightning.Trainer, module: LoraModule) -> None:
        """Write state and adapter now, and drop the oldest states. On every rank; rank 0 writes."""
        step = trainer.global_step
        if trainer.is_global_zero:  # first, so that a state on disk means that its adapter is there too
            self.write_adapter(ADAPTER, module, step)
        trainer.save_checkpoint(state_path(self.run_dir, step))
        self._saved = step
        if trainer.is_global_zero:
            for old in list(saved_states(self.run_dir).values())[: -self.keep]:
                old.unlink(missing_ok=True)
        for action in self.after_save:
            action(trainer, module)

    def write_adapter(self, name: str, module: LoraModule, step: int) -> None:
        """Write the adapter as it is to be judged to `name` in the run folder. On rank 0."""
        save_adapter(self.run_dir / name, module.export(self.metadata(step)))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
