"""Devices, precision and strategy of a run, and Lightning's trainer with them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from sa3train.core.device import choose_device, count_devices, find_device_fault
from sa3train.core.dtypes import get_dtype
from sa3train.core.errors import ConfigError
from sa3train.models.precision import choose_precision
from sa3train.training.callbacks.checkpoint import SafetensorsCheckpointIO
from sa3train.training.distributed import ShardedBaseStrategy, check_world_size, count_started_ranks
from sa3train.training.settings import Precision, TrainerSettings


def make_trainer(
    run_dir: Path, settings: TrainerSettings, callbacks: Sequence[lightning.Callback]
) -> lightning.Trainer:
    """Make Lightning's trainer.

    Args:
        run_dir: The run folder.
        settings: The trainer's settings.
        callbacks: In the order they run.

    Returns:
        The trainer, whose ranks have been checked.
    """
    plugins: list[Any] = [SafetensorsCheckpointIO()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # CheckpointCallback handles the signals
    device = choose_training_device(settings)
    _, precision = resolve_precisions("auto", settings.precision, device)
    if precision == "bf16-mixed":
        plugins.append(MixedPrecision("bf16-mixed", device.type))
    trainer = lightning.Trainer(
        max_steps=settings.max_steps,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.gradient_clip or None,
        accelerator=_XPUAccelerator() if device.type == "xpu" else device.type,
        devices=count_ranks(settings) if device.index is None or device.type == "cpu" else [device.index],
        num_nodes=settings.num_nodes,
        strategy=_make_strategy(settings, device),
        callbacks=list(callbacks),
        plugins=plugins,
        logger=False,
        default_root_dir=run_dir,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    check_world_size(trainer.world_size)
    return trainer


def resolve_precisions(dtype: str, precision: Precision, device: torch.device) -> tuple[torch.dtype, Precision]:
    """Resolve the dtype of the frozen weights and the precision of the computation.

    "auto" is bf16 for both on a GPU that is faster in it, else fp32: on a CPU, bit-exact resuming and equal ranks are
    worth more than bf16's speed. A bf16 base computes in bf16.

    Args:
        dtype: `model.dtype`.
        precision: `trainer.precision`.
        device: Where training runs.

    Returns:
        Dtype and precision.

    Raises:
        ConfigError: fp32 computation on a bf16 base, or bf16 on a device that does not compute in it.
    """
    fast = "auto" in (dtype, precision) and device.type != "cpu" and choose_precision(device)[0] == "bf16"
    if dtype == "auto":
        dtype = "bf16" if fast and precision != "fp32" else "fp32"
    if precision == "auto":
        precision = "bf16-mixed" if fast or dtype == "bf16" else "fp32"
    if dtype == "bf16" and precision == "fp32":
        raise ConfigError(
            "trainer.precision=fp32 has no effect on a base in bf16, which computes in bf16. "
            "Set model.dtype=fp32, or trainer.precision=bf16-mixed."
        )
    if precision == "bf16-mixed" and (fault := find_device_fault(device, torch.bfloat16)):
        raise ConfigError(f"trainer.precision=bf16-mixed does not run on {device}: {fault}. Use fp32.")
    return get_dtype(dtype), precision


def choose_training_device(settings: TrainerSettings) -> torch.device:
    """Choose the device that a run trains on, and check that it can do what is set.

    Args:
        settings: The trainer's settings.

    Returns:
        The device; CUDA without an index where each rank takes its own.

    Raises:
        ConfigError: There is no such device, or it cannot do what is set.
    """
    name = settings.accelerator
    device = choose_device("auto" if name == "gpu" else name, "trainer.accelerator")
    if name == "gpu" and device.type == "cpu":
        raise ConfigError("trainer.accelerator=gpu, but torch sees no GPU that works. Use auto or cpu.")
    is_one, is_mps = device.type in ("mps", "xpu") or name.startswith("cuda:"), device.type == "mps"
    limits = {
        f"trainer.devices={settings.devices}": is_one and settings.devices not in ("auto", 1),
        f"trainer.num_nodes={settings.num_nodes}": is_one and settings.num_nodes > 1,
        f"trainer.strategy={settings.strategy}": is_one and settings.strategy != "auto",
        # torch cannot empty and refill the storage of a weight there
        f"trainer.quantize={settings.quantize}": is_mps and settings.quantize != "none",
        "trainer.compile=true": is_mps and settings.compile,
    }
    if refused := [limit for limit, is_set in limits.items() if is_set]:
        raise ConfigError(f"{', '.join(refused)} is not supported with trainer.accelerator={device}. Use the default.")
    return torch.device("cuda") if device.type == "cuda" and ":" not in name else device


def count_ranks(settings: TrainerSettings) -> int:
    """Count the ranks per node.

    Args:
        settings: The trainer's settings.

    Returns:
        `trainer.devices`; for "auto" what a launcher started, else all GPUs of CUDA or one rank.

    Raises:
        ConfigError: More devices than this machine has.
    """
    device = choose_training_device(settings)
    is_cuda = device.type == "cuda"
    present = 1 if is_cuda and device.index is not None else count_devices(device.type)
    if settings.devices != "auto":
        most = present if is_cuda else os.cpu_count() or 1
        if settings.devices > max(2, most):
            kind = "GPUs" if is_cuda else "cores"
            raise ConfigError(f"trainer.devices={settings.devices}, but this machine has {most} {kind}.")
        return settings.devices
    started = count_started_ranks()
    if started > 1:
        return max(1, started // settings.num_nodes)
    return present if is_cuda else 1


def _make_strategy(settings: TrainerSettings, device: torch.device) -> Any:
    if settings.strategy == "fsdp":
        return ShardedBaseStrategy()
    if settings.strategy == "ddp" or count_ranks(settings) * settings.num_nodes > 1:
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=False)
    return SingleDeviceStrategy(torch.device("xpu", device.index or 0)) if device.type == "xpu" else "auto"


class _XPUAccelerator(Accelerator):
    """One of Intel's GPUs, which Lightning has no accelerator for."""

    def setup_device(self, device: torch.device) -> None:
        torch.xpu.set_device(device)

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("xpu", index) for index in (devices if isinstance(devices, list) else range(devices))]

    @staticmethod
    def auto_device_count() -> int:
        return count_devices("xpu")

    @staticmethod
    def is_available() -> bool:
        return count_devices("xpu") > 0

    @staticmethod
    def name() -> str:
        return "xpu"

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}
