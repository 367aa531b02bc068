"""Checkpoints at intervals, so that a run can be killed at any moment, and the adapter beside them.

`adapter.safetensors` in the run folder is the newest adapter and at the end the chosen one; `checkpoints/` holds the
last few checkpoints; `adapter-best.safetensors` is there when `callbacks.validation.select_best` is on.

A checkpoint is one safetensors file: tensors as tensors, everything else as JSON in the header. No pickle is
written or read. The file appears whole or not at all, and carries a checksum of its tensors.
"""

import contextlib
import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from typing_extensions import override

from sa3train.adapters.formats.io import ADAPTER_ENTRY, CHECKPOINT_FORMAT, pack_adapter, save_adapter
from sa3train.adapters.formats.run_dir import ADAPTER_FILE, RECORD_FILE, get_checkpoint_path, list_checkpoints
from sa3train.core.errors import SA3Error
from sa3train.core.files import write_bytes
from sa3train.core.log import get_logger, get_rank
from sa3train.core.safetensors_file import hash_tensors
from sa3train.core.signals import REQUEUE_SIGNALS, STOP_SIGNALS, describe_signal, handle_signals, write_note
from sa3train.core.user_files import stat_file
from sa3train.reports.card import write_run_card
from sa3train.reports.run_files import CARD_FILE
from sa3train.training.distributed import all_reduce_max
from sa3train.training.module import AdapterModule, StepCallback

FORMAT = f"{CHECKPOINT_FORMAT}2"
"""Raise it when the content of a checkpoint changes, so that checkpoints of other versions are refused."""
MARK = "__kind__"
_logger = get_logger(__name__)


class RunCheckpointError(SA3Error):
    """A checkpoint that is damaged or something else."""


class CheckpointVersionError(SA3Error):
    """A checkpoint of another version of sa3train."""


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
    return {unpack(tensors, key): unpack(tensors, item) for key, item in value}


def write_run_checkpoint(path: str | Path, tree: Any) -> None:
    """Save a tree atomically.

    Args:
        path: File to write.
        tree: What `pack` accepts.
    """
    tensors, skeleton = pack(tree)
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {"format": FORMAT, "state": json.dumps(skeleton), "sha256": _hash_checkpoint(stored)}
    write_bytes(path, save(stored, metadata=header))


def read_run_checkpoint(path: str | Path) -> Any:
    """Load what `write_run_checkpoint` wrote.

    Args:
        path: File to read.

    Returns:
        The tree, its tensors on the CPU.

    Raises:
        RunCheckpointError: The file is missing, truncated, altered, or not a checkpoint.
        CheckpointVersionError: Another version of sa3train wrote it.
    """
    try:
        stat_file(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise RunCheckpointError(f"cannot read the checkpoint {path}: {error}.") from error
    found = header.get("format", "")
    if found != FORMAT and found.startswith(CHECKPOINT_FORMAT):
        raise CheckpointVersionError(
            f"the checkpoint {path} is of format {found}, and this version of sa3train reads {FORMAT}. Resume the "
            "run with the version that started it, or start a new run from its adapter: adapter.start_from=FILE."
        )
    if found != FORMAT:
        raise RunCheckpointError(f"{path} is not a checkpoint of sa3train ({FORMAT}).")
    if header.get("sha256") != _hash_checkpoint(tensors):
        raise RunCheckpointError(f"the checkpoint {path} is damaged: its checksum does not match.")
    return unpack(tensors, json.loads(header["state"]))


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value
        return {MARK: "tensor", "value": path}
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, torch.SymInt)):
        return value  # JSON as Python writes it has NaN and infinity
    if isinstance(value, list):
        return [_pack(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {MARK: "tuple", "value": _pack(list(value), path, tensors)}
    if isinstance(value, Mapping):
        pairs = [(key, _pack(item, f"{path}/{key}", tensors)) for key, item in value.items()]
        if all(isinstance(key, str) for key in value) and MARK not in value:
            return dict(pairs)
        return {MARK: "dict", "value": [[_pack(key, f"{path}/key", tensors), item] for key, item in pairs]}
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__} (at {path or 'its root'})")


def _hash_checkpoint(tensors: Mapping[str, Tensor]) -> str:
    parts: list[str | Tensor] = []
    for name, tensor in sorted(tensors.items()):
        parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}\n", tensor]
    return hash_tensors(parts)


class SafetensorsCheckpointIO(CheckpointIO):
    """Reads and writes Lightning's checkpoints with `write_run_checkpoint` and `read_run_checkpoint`."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        write_run_checkpoint(path, checkpoint)

    @override
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint on the CPU."""
        return dict(read_run_checkpoint(path))

    @override
    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


def find_latest_checkpoint(run_dir: Path) -> tuple[int, Path] | None:
    """Find the newest intact checkpoint; damaged ones are skipped with a warning.

    Args:
        run_dir: The run folder.

    Returns:
        Its step and file, or None.
    """
    checkpoints = list_checkpoints(run_dir)
    for step, path in reversed(checkpoints.items()):
        try:
            read_run_checkpoint(path)
            return step, path
        except RunCheckpointError as error:
            is_oldest = path == next(iter(checkpoints.values()))
            _logger.warning("%s %s", error, "None is left to resume from." if is_oldest else "Using the one before it.")
    return None


class CheckpointCallback(StepCallback):
    """Saves state and adapter every `every` optimizer steps, at the end, and when the run is stopped or fails.

    A stop signal is answered after the step that is being computed, on all ranks after the same one. When something
    else fails, the state after the last whole step is saved, unless several ranks train together: they may have failed
    in different steps.

    Args:
        run_dir: The run folder.
        every: Optimizer steps between checkpoints.
        keep_last: Checkpoints to keep.
        metadata: Provenance written into every adapter, to which the step is added.

    Attributes:
        interrupted: The signal that stopped the run once its state was saved, or None.
        after_save: Functions of trainer and module to call after each checkpoint.
    """

    def __init__(self, run_dir: Path, *, every: int, keep_last: int, metadata: Mapping[str, str]) -> None:
        self.run_dir, self.every, self.keep_last, self.metadata = run_dir, every, keep_last, metadata
        self.interrupted: int | None = None
        self.after_save: list[Callable[[lightning.Trainer, AdapterModule], None]] = []
        self._signal = 0
        self._signals = contextlib.ExitStack()
        self._saved = -1
        self._noted = -1  # the last whole step
        self._is_whole = False  # whether nothing but the loader has moved since

    def is_stopping(self) -> bool:
        """Check whether this rank received a stop signal.

        Returns:
            Whether the run stops after this step.
        """
        return self._signal != 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Handle stop signals in place of Lightning, which would stop without saving the state."""
        step = trainer.global_step
        self._saved = step if get_checkpoint_path(self.run_dir, step).is_file() else -1
        self._signals.enter_context(handle_signals(self._receive_signal, (*STOP_SIGNALS, *REQUEUE_SIGNALS)))
        self._note_step(trainer)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the adapter to the checkpoint, so that it can be used without the run."""
        assert isinstance(pl_module, AdapterModule)
        if trainer.is_global_zero:
            adapter = pl_module.export({**self.metadata, "step": str(trainer.global_step)})
            checkpoint[ADAPTER_ENTRY] = pack_adapter(adapter, torch.float16)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save what the interval has not, and restore the signal handlers."""
        assert isinstance(pl_module, AdapterModule)
        if self._saved != trainer.global_step:
            self.save(trainer, pl_module)
        self._signals.close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Save the state after the last whole step, if there is one, and restore the signal handlers."""
        assert isinstance(pl_module, AdapterModule)
        if trainer.global_step > self._noted >= 0:  # another callback failed, after the step
            self._note_step(trainer)
        step = trainer.global_step
        if self._is_whole and step > max(self._saved, 0) and trainer.world_size == 1:
            try:
                self.save(trainer, pl_module)
            except (OSError, RuntimeError, SA3Error) as error:  # a broken GPU raises RuntimeError
                _logger.warning("step %d cannot be saved either: %s", step, error)
        self._signals.close()

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: Any
    ) -> None:
        """Record that the weights are about to change."""
        self._is_whole = False

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record that a micro-batch has been counted, and act on a whole step."""
        self._is_whole = False
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: lightning.Trainer, module: AdapterModule) -> None:
        """Save at the interval, and when any rank received a signal."""
        self._note_step(trainer)
        step = trainer.global_step
        stop = all_reduce_max(self._signal, module.device)
        if stop or trainer.should_stop or step % self.every == 0 or step == trainer.max_steps:
            self.save(trainer, module)
        if stop:
            self.interrupted = stop
            trainer.should_stop = True

    def save(self, trainer: lightning.Trainer, module: AdapterModule) -> None:
        """Save state and adapter now, and delete the oldest states; call it on every rank, rank 0 writes.

        Args:
            trainer: The trainer.
            module: The module.

        Raises:
            SA3Error: The run folder is gone, or cannot be written.
        """
        step, self._is_whole = trainer.global_step, False
        if trainer.is_global_zero and not (self.run_dir / RECORD_FILE).is_file():
            raise SA3Error(
                f"step {step} cannot be saved: {self.run_dir} was removed or moved during the run. Everything that was "
                f"trained since step {max(self._saved, 0)} is lost. Leave the run folder in place."
            )
        if trainer.is_global_zero:  # first, so that a state on disk means that its adapter is there too
            self.write_adapter(ADAPTER_FILE, module, step)
        trainer.save_checkpoint(get_checkpoint_path(self.run_dir, step))
        self._saved, self._is_whole = step, True
        if trainer.is_global_zero:
            for old in list(list_checkpoints(self.run_dir).values())[: -self.keep_last]:
                with contextlib.suppress(PermissionError):  # Windows, while it is read: goes with the next
                    old.unlink(missing_ok=True)
        for action in self.after_save:
            action(trainer, module)
        if trainer.is_global_zero:
            self.write_card()

    def write_card(self) -> None:
        """Write the README.md of the run folder; failures are logged and never stop training. Call it on rank 0."""
        try:
            write_run_card(self.run_dir)
        except (OSError, SA3Error) as error:
            _logger.warning("no %s: %s", CARD_FILE, error)

    def write_adapter(self, name: str, module: AdapterModule, step: int) -> None:
        """Write the adapter; call it on rank 0.

        Args:
            name: File name in the run folder.
            module: The module.
            step: Optimizer steps taken.
        """
        save_adapter(self.run_dir / name, module.export({**self.metadata, "step": str(step)}))

    def _note_step(self, trainer: lightning.Trainer) -> None:
        trainer.train_dataloader.mark_position()  # type: ignore[union-attr]
        self._noted, self._is_whole = trainer.global_step, True

    def _receive_signal(self, number: int) -> None:
        self._signal = number
        if get_rank() == 0:
            way_out = " Press Ctrl-C again to end at once." if number == signal.SIGINT else ""
            write_note(f"{describe_signal(number)}: saving after this step.{way_out}")
