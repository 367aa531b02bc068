"""The machine a run is on: devices, precision, strategy, and Lightning's trainer over them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment

from sa3train.core.errors import ConfigError
from sa3train.training.callbacks.checkpoint import StateIO
from sa3train.training.distributed import check_world, started_ranks
from sa3train.training.settings import LoopSettings


def make_trainer(run_dir: Path, loop: LoopSettings, callbacks: Sequence[lightning.Callback]) -> lightning.Trainer:
    """Lightning's trainer on the machine `loop` describes. Raises `ConfigError` when ranks do not see each other."""
    plugins: list[Any] = [StateIO()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # Saver answers the signals
    trainer = lightning.Trainer(
        max_steps=loop.max_steps,
        accumulate_grad_batches=loop.accumulate,
        gradient_clip_val=loop.clip or None,
        accelerator="gpu" if uses_gpu(loop) else "cpu",  # Lightning's own "auto" would take Apple's GPU
        devices=devices_of(loop),
        num_nodes=loop.num_nodes,
        strategy=_strategy(loop),
        precision="bf16-mixed" if precision_of(loop) == "bf16-mixed" else "32-true",
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
    check_world(trainer.world_size)
    return trainer


def precision_of(loop: LoopSettings) -> str:
    """fp32 or bf16-mixed, with "auto" decided by the machine."""
    if loop.precision != "auto":
        return loop.precision
    return "bf16-mixed" if uses_gpu(loop) and torch.cuda.is_bf16_supported() else "fp32"


def uses_gpu(loop: LoopSettings) -> bool:
    """Whether training will run on a GPU."""
    if loop.accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu, but torch sees no GPU. Use trainer.accelerator=auto or cpu.")
    return loop.accelerator != "cpu" and torch.cuda.is_available()


def devices_of(loop: LoopSettings) -> int:
    if loop.devices != "auto":
        return loop.devices
    started = started_ranks()
    if started > 1:
        return max(1, started // loop.num_nodes)
    return torch.cuda.device_count() if uses_gpu(loop) else 1


def _strategy(loop: LoopSettings) -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    several = devices_of(loop) * loop.num_nodes > 1
    if loop.strategy == "fsdp":
        from sa3train.training.distributed import ShardedBaseStrategy

        return ShardedBaseStrategy()
    if loop.strategy == "ddp" or several:
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=False)
    return "auto"
