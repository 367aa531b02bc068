"""Saving a run so that it can be killed anywhere: whole training states at intervals, and the adapter beside them.

A run folder holds `adapter.safetensors` (the newest, at the end the chosen one),
`checkpoints/step-XXXXXXXX.safetensors`
(training states, the last few) and, when selection is on, `adapter-best.safetensors`.

A whole training state in one safetensors file: tensors as tensors, everything else as JSON in the header.

No pickle is written or read. The file appears whole or not at all, and carries a checksum of its tensors.
"""

import hashlib
import json
import math
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sa3train.adapters.formats.io import save_adapter
from sa3train.core.errors import SA3Error
from sa3train.core.files import write_bytes
from sa3train.core.log import get_logger
from sa3train.training.distributed import largest
from sa3train.training.loggers import Tracker
from sa3train.training.module import LoraModule

FORMAT = "sa3train-state-1"
MARK = "__kind__"


class StateError(SA3Error):
    """A saved training state that is damaged or of another kind."""


def pack(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Split nested dictionaries, lists, tuples, numbers, text and tensors into named tensors and a JSON skeleton.

    Raises `TypeError` naming the place of anything else: it would need code to restore.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _pack(tree, "", tensors)


def unpack(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """The inverse of `pack`, key types and tuples included."""
    if isinstance(skeleton, list):
        return [unpack(tensors, item) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    kind = skeleton.get(MARK)
    if kind is None:
        return {key: unpack(tensors, value) for key, value in skeleton.items()}
    value = skeleton["value"]
    if kind == "tensor":
        return tensors[value]
    if kind == "tuple":
        return tuple(unpack(tensors, item) for item in value)
    if kind == "float":
        return float(value)
    return {unpack(tensors, key): unpack(tensors, item) for key, item in value}


def save_state(path: str | Path, tree: Any) -> None:
    """Write `tree` to `path` atomically (see `pack` for what it may hold)."""
    tensors, skeleton = pack(tree)
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {"format": FORMAT, "state": json.dumps(skeleton), "sha256": _digest(stored)}
    write_bytes(path, save(stored, metadata=header))


def load_state(path: str | Path) -> Any:
    """Read what `save_state` wrote, on the CPU.

    Raises `StateError` when the file is missing, cut short, altered, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise StateError(f"cannot read the training state {path}: {error}.") from error
    if header.get("format") != FORMAT:
        raise StateError(f"{path} is not a training state of sa3train ({FORMAT}).")
    if header.get("sha256") != _digest(tensors):
        raise StateError(f"the training state {path} is damaged: its checksum does not match.")
    return unpack(tensors, json.loads(header["state"]))


def _pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[place] = value
        return {MARK: "tensor", "value": place}
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, torch.SymInt)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {MARK: "float", "value": str(value)}
    if isinstance(value, list):
        return [_pack(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        packed = [_pack(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]
        return {MARK: "tuple", "value": packed}
    if isinstance(value, Mapping):
        pairs = [(key, _pack(item, f"{place}/{key}", tensors)) for key, item in value.items()]
        if all(isinstance(key, str) for key in value) and MARK not in value:
            return dict(pairs)
        return {MARK: "dict", "value": [[_pack(key, f"{place}/key", tensors), item] for key, item in pairs]}
    raise TypeError(f"a training state cannot hold {type(value).__name__} (at {place or 'its root'})")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_logger = get_logger(__name__)

STATES = "checkpoints"
ADAPTER = "adapter.safetensors"
BEST_ADAPTER = "adapter-best.safetensors"
_STATE_NAME = re.compile(r"step-(\d{8})\.safetensors")


class StateIO(CheckpointIO):
    """Lightning's checkpoints as `sa3train.training.callbacks.checkpoint` files: no pickle, whole or not at all."""

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
