"""Checkpoints, so that a run can be killed at any moment: training states at intervals, and the adapter beside them.

`adapter.safetensors` in the run folder is the newest adapter and at the end the chosen one; `checkpoints/` holds the
last few training states; `adapter-best.safetensors` is there when `callbacks.validation.select_best` is on.

A training state is one safetensors file: tensors as tensors, everything else as JSON in the header. No pickle is
written or read. The file appears whole or not at all, and carries a checksum of its tensors.
"""

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
from typing_extensions import override

from sa3train.adapters.formats.io import save_adapter
from sa3train.core.errors import SA3Error
from sa3train.core.files import write_bytes
from sa3train.core.log import get_logger
from sa3train.core.safetensors_file import hash_tensors
from sa3train.reports.run_files import ADAPTER_FILE, CHECKPOINTS_DIR
from sa3train.training.distributed import all_reduce_max
from sa3train.training.module import LoraModule, StepCallback

FORMAT = "sa3train-state-2"
"""Raise it when the content of a training state changes, so that states of other versions are refused."""
MARK = "__kind__"
_STATE_NAME = re.compile(r"step-(\d{8})\.safetensors")
_logger = get_logger(__name__)


class StateError(SA3Error):
    """A training state that is damaged or something else."""


class StateVersionError(SA3Error):
    """A training state of another version of sa3train."""


def pack(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Pack a tree into named tensors and a JSON skeleton.

    Args:
        tree: Nested dictionaries, lists, tuples, numbers, text and tensors.

    Returns:
        The tensors by name, and the rest as JSON-compatible values.

    Raises:
        TypeError: Something else is in it, which would need code to restore.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _pack(tree, "", tensors)


def unpack(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Unpack what `pack` returned, key types and tuples included.

    Args:
        tensors: The tensors by name.
        skeleton: The rest.

    Returns:
        The tree.
    """
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
    """Save a tree atomically.

    Args:
        path: File to write.
        tree: What `pack` accepts.
    """
    tensors, skeleton = pack(tree)
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {"format": FORMAT, "state": json.dumps(skeleton), "sha256": _hash_state(stored)}
    write_bytes(path, save(stored, metadata=header))


def load_state(path: str | Path) -> Any:
    """Load what `save_state` wrote.

    Args:
        path: File to read.

    Returns:
        The tree, its tensors on the CPU.

    Raises:
        StateError: The file is missing, truncated, altered, or no training state.
        StateVersionError: Another version of sa3train wrote it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise StateError(f"cannot read the training state {path}: {error}.") from error
    found = header.get("format", "")
    if found != FORMAT and found.startswith(FORMAT.rstrip("0123456789")):
        raise StateVersionError(
            f"the training state {path} is of format {found}, and this version of sa3train reads {FORMAT}. Resume the "
            "run with the version that started it, or start a new run from its adapter: adapter.start_from=FILE."
        )
    if found != FORMAT:
        raise StateError(f"{path} is not a training state of sa3train ({FORMAT}).")
    if header.get("sha256") != _hash_state(tensors):
        raise StateError(f"the training state {path} is damaged: its checksum does not match.")
    return unpack(tensors, json.loads(header["state"]))


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value
        return {MARK: "tensor", "value": path}
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, torch.SymInt)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {MARK: "float", "value": str(value)}
    if isinstance(value, list):
        return [_pack(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {MARK: "tuple", "value": _pack(list(value), path, tensors)}
    if isinstance(value, Mapping):
        pairs = [(key, _pack(item, f"{path}/{key}", tensors)) for key, item in value.items()]
        if all(isinstance(key, str) for key in value) and MARK not in value:
            return dict(pairs)
        return {MARK: "dict", "value": [[_pack(key, f"{path}/key", tensors), item] for key, item in pairs]}
    raise TypeError(f"a training state cannot hold {type(value).__name__} (at {path or 'its root'})")


def _hash_state(tensors: Mapping[str, Tensor]) -> str:
    parts: list[str | Tensor] = []
    for name, tensor in sorted(tensors.items()):
        parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}\n", tensor]
    return hash_tensors(parts)


class SafetensorsCheckpointIO(CheckpointIO):
    """Reads and writes Lightning's checkpoints with `save_state` and `load_state`."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a training state."""
        save_state(path, checkpoint)

    @override
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a training state on the CPU."""
        return dict(load_state(path))

    @override
    def remove_checkpoint(self, path: Any) -> None:
        """Delete a training state."""
        Path(path).unlink(missing_ok=True)


def get_checkpoint_path(run_dir: Path, step: int) -> Path:
    """Get the path of a training state.

    Args:
        run_dir: The run folder.
        step: Optimizer steps taken.

    Returns:
        The file that holds the state after them.
    """
    return run_dir / CHECKPOINTS_DIR / f"step-{step:08d}.safetensors"


def list_checkpoints(run_dir: Path) -> dict[int, Path]:
    """List the training states of a run.

    Args:
        run_dir: The run folder.

    Returns:
        Files by step, oldest first.
    """
    paths = sorted((run_dir / CHECKPOINTS_DIR).glob("step-*.safetensors"))
    return {int(match.group(1)): path for path in paths if (match := _STATE_NAME.fullmatch(path.name))}


def find_latest_checkpoint(run_dir: Path) -> tuple[int, Path] | None:
    """Find the newest intact training state; damaged ones are skipped with a warning.

    Args:
        run_dir: The run folder.

    Returns:
        Its step and file, or None.
    """
    for step, path in reversed(list_checkpoints(run_dir).items()):
        try:
            load_state(path)
            return step, path
        except StateError as error:
            _logger.warning("%s Using the checkpoint before it.", error)
    return None


class CheckpointCallback(StepCallback):
    """Saves state and adapter every `every` optimizer steps, at the end, and on SIGTERM or SIGUSR1.

    Args:
        run_dir: The run folder.
        every: Optimizer steps between checkpoints.
        keep_last: Training states to keep.
        metadata: Provenance written into every adapter, to which the step is added.

    Attributes:
        interrupted: The signal that stopped the run once its state was saved, or None.
        after_save: Functions of trainer and module to call after each checkpoint.
    """

    def __init__(self, run_dir: Path, *, every: int, keep_last: int, metadata: Mapping[str, str]) -> None:
        self.run_dir, self.every, self.keep_last, self.metadata = run_dir, every, keep_last, metadata
        self.interrupted: int | None = None
        self.after_save: list[Callable[[lightning.Trainer, LoraModule], None]] = []
        self._signal = 0
        self._handlers: dict[int, Any] = {}
        self._saved = -1

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Handle a scheduler's signals in place of Lightning, which would stop without saving the state."""
        self._saved = trainer.global_step if find_latest_checkpoint(self.run_dir) else -1
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._handlers[number] = signal.signal(number, self._receive_signal)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save what the interval has not, and restore the signal handlers."""
        assert isinstance(pl_module, LoraModule)
        if self._saved != trainer.global_step:
            self.save(trainer, pl_module)
        self._restore_handlers()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Restore the signal handlers; the last saved state stands."""
        self._restore_handlers()

    def on_step_end(self, trainer: lightning.Trainer, module: LoraModule) -> None:
        """Save at the interval, and when any rank received a signal."""
        step = trainer.global_step
        stop = all_reduce_max(self._signal, module.device)
        if stop or trainer.should_stop or step % self.every == 0 or step == trainer.max_steps:
            self.save(trainer, module)
        if stop:
            self.interrupted = stop
            _logger.warning("stopped by signal %d after step %d; the state is saved", self.interrupted, step)
            trainer.should_stop = True

    def save(self, trainer: lightning.Trainer, module: LoraModule) -> None:
        """Save state and adapter now, and delete the oldest states; call it on every rank, rank 0 writes.

        Args:
            trainer: The trainer.
            module: The module.
        """
        step = trainer.global_step
        if trainer.is_global_zero:  # first, so that a state on disk means that its adapter is there too
            self.write_adapter(ADAPTER_FILE, module, step)
        trainer.save_checkpoint(get_checkpoint_path(self.run_dir, step))
        self._saved = step
        if trainer.is_global_zero:
            for old in list(list_checkpoints(self.run_dir).values())[: -self.keep_last]:
                old.unlink(missing_ok=True)
        for action in self.after_save:
            action(trainer, module)

    def write_adapter(self, name: str, module: LoraModule, step: int) -> None:
        """Write the adapter; call it on rank 0.

        Args:
            name: File name in the run folder.
            module: The module.
            step: Optimizer steps taken.
        """
        save_adapter(self.run_dir / name, module.export({**self.metadata, "step": str(step)}))

    def _receive_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
