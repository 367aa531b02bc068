"""Devices, precision and strategy of a run, and Lightning's trainer with them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy

from sa3train.core.dtypes import get_dtype
from sa3train.core.errors import ConfigError
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
    _, precision = resolve_precisions("auto", settings.precision, uses_gpu(settings))
    trainer = lightning.Trainer(
        max_steps=settings.max_steps,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.gradient_clip or None,
        accelerator="gpu" if uses_gpu(settings) else "cpu",  # Lightning's own "auto" would take Apple's GPU
        devices=count_devices(settings),
        num_nodes=settings.num_nodes,
        strategy=_make_strategy(settings),
        precision="bf16-mixed" if precision == "bf16-mixed" else "32-true",
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


def resolve_precisions(dtype: str, precision: Precision, gpu: bool) -> tuple[torch.dtype, Precision]:
    """Resolve the dtype of the frozen weights and the precision of the computation.

    "auto" is bf16 for both on a GPU that supports it, else fp32: on a CPU, bit-exact resuming and equal ranks are worth
    more than bf16's speed. A bf16 base computes in bf16.

    Args:
        dtype: `model.dtype`.
        precision: `trainer.precision`.
        gpu: Whether training runs on a GPU.

    Returns:
        Dtype and precision.

    Raises:
        ConfigError: fp32 computation on a bf16 base.
    """
    fast = gpu and torch.cuda.is_bf16_supported()
    if dtype == "auto":
        dtype = "bf16" if fast and precision != "fp32" else "fp32"
    if precision == "auto":
        precision = "bf16-mixed" if fast or dtype == "bf16" else "fp32"
    if dtype == "bf16" and precision == "fp32":
        raise ConfigError(
            "trainer.precision=fp32 has no effect on a base in bf16, which computes in bf16. "
            "Set model.dtype=fp32, or trainer.precision=bf16-mixed."
        )
    return get_dtype(dtype), precision


def uses_gpu(settings: TrainerSettings) -> bool:
    """Check whether training runs on a GPU.

    Args:
        settings: The trainer's settings.

    Returns:
        Whether it does.

    Raises:
        ConfigError: A GPU is demanded and torch sees none.
    """
    if settings.accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu, but torch sees no GPU. Use trainer.accelerator=auto or cpu.")
    return settings.accelerator != "cpu" and torch.cuda.is_available()


def count_devices(settings: TrainerSettings) -> int:
    """Count the ranks per node.

    Args:
        settings: The trainer's settings.

    Returns:
        `trainer.devices`; for "auto" what a launcher started, else all GPUs or one CPU rank.

    Raises:
        ConfigError: More devices than this machine has.
    """
    if settings.devices != "auto":
        present = torch.cuda.device_count() if uses_gpu(settings) else os.cpu_count() or 1
        if settings.devices > max(2, present):
            kind = "GPUs" if uses_gpu(settings) else "cores"
            raise ConfigError(f"trainer.devices={settings.devices}, but this machine has {present} {kind}.")
        return settings.devices
    started = count_started_ranks()
    if started > 1:
        return max(1, started // settings.num_nodes)
    return torch.cuda.device_count() if uses_gpu(settings) else 1


def _make_strategy(settings: TrainerSettings) -> Any:
    if settings.strategy == "fsdp":
        return ShardedBaseStrategy()
    if settings.strategy == "ddp" or count_devices(settings) * settings.num_nodes > 1:
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=False)
    return "auto"
