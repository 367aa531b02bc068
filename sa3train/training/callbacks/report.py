"""Files of a run folder about its data, adapter and system, and writing the report (drawn in `sa3train.reports`)."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as lightning
import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.layer_weight import get_layer_adapter
from sa3train.adapters.apply.load_report import measure_effect
from sa3train.adapters.layers.inject import InjectedAdapter
from sa3train.core.device import get_device_name
from sa3train.core.errors import SA3Error
from sa3train.core.files import write_json
from sa3train.core.log import get_logger
from sa3train.data.loading.datamodule import LatentDataModule
from sa3train.reports.run_files import ADAPTER_STATS_FILE, DATA_FILE, SYSTEM_FILE
from sa3train.reports.run_report import write_report
from sa3train.training.callbacks.checkpoint import CheckpointCallback
from sa3train.training.callbacks.memory_plan import MemoryPlanCallback
from sa3train.training.module import AdapterModule

_logger = get_logger(__name__)

SHOWN_PROMPTS = 12
CARD, CARD_CHARACTERS = "README.md", 20_000


class ReportCallback(lightning.Callback):
    """Updates `report.html` at every checkpoint, on rank 0; failures are logged and never stop training.

    Args:
        run_dir: The run folder.
        describe: Describes the data, for `data.json`.
        checkpoint: The callback to follow.
    """

    def __init__(
        self, run_dir: Path, describe: Callable[[], Mapping[str, Any]], checkpoint: CheckpointCallback
    ) -> None:
        self.run_dir, self.describe = run_dir, describe
        checkpoint.after_save.append(self.refresh)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write what is known of data and system, with the memory plan."""
        if trainer.is_global_zero:
            write_json(self.run_dir / DATA_FILE, self.describe())
            write_json(self.run_dir / SYSTEM_FILE, describe_system(trainer, pl_module.device))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write how accurate the memory plan was."""
        if trainer.is_global_zero:
            write_json(self.run_dir / SYSTEM_FILE, describe_system(trainer, pl_module.device))

    def refresh(self, trainer: lightning.Trainer, module: AdapterModule) -> None:
        """Measure the adapter as it is, and write the report.

        Args:
            trainer: The trainer.
            module: The module.
        """
        if not trainer.is_global_zero:
            return
        try:
            stats = measure_adapter(module.injected, module.export({}))
            if stats:
                write_json(self.run_dir / ADAPTER_STATS_FILE, {**stats, "step": trainer.global_step})
            write_report(self.run_dir)
        except (OSError, SA3Error) as error:
            _logger.warning("no report at step %d: %s", trainer.global_step, error)


@torch.no_grad()
def measure_adapter(injected: InjectedAdapter, adapter: Adapter) -> dict[str, Any]:
    """Measure an adapter on the base it trains in.

    Args:
        injected: The adapter layers, which hold the base weights.
        adapter: The adapter to measure.

    Returns:
        Type, size, and effect ‖W' − W‖ / ‖W‖ by layer, by group of layers and over all; empty when the base weights are
        quantized or sharded.
    """
    weights = {path: cast(Tensor, layer.get_base_layer().weight) for path, layer in injected.layers.items()}
    if not all(_is_plain(weight) for weight in weights.values()):
        return {}
    with torch.random.fork_rng(devices=[]):
        effect, layers = measure_effect((get_layer_adapter(adapter, path, W), W) for path, W in weights.items())
    layers = {path: value for path, value in layers.items() if math.isfinite(value)}  # a base weight may be all zero
    spec = adapter.spec
    return {
        "adapter_type": spec.adapter_type,
        "rank": spec.rank,
        "alpha": spec.rank if spec.alpha is None else spec.alpha,
        "parameters": sum(parameter.numel() for parameter in injected.parameters()),
        "effect": effect,
        "layers": layers,
    }


def describe_data(data: LatentDataModule) -> dict[str, Any]:
    """Describe the data of a run.

    Args:
        data: The data module.

    Returns:
        The content of `data.json`: sources with clips and seconds of each split, model and card; some prompts.
    """
    data.setup()
    sources = []
    for source, store in zip(data.sources, data.stores, strict=True):
        card = Path(source.path) / CARD
        sources.append(
            {
                "path": source.path,
                "role": source.role,
                "repeats": source.repeats,
                "weight": source.weight,
                "model": store.index["model"]["name"],
                "manifest": store.index["manifest"],
                "splits": store.index["splits"],
                "card": card.read_text(encoding="utf-8")[:CARD_CHARACTERS] if card.is_file() else "",
            }
        )
    return {"manifest": data.manifest, "sources": sources, "prompts": data.sample_prompts(SHOWN_PROMPTS)}


def describe_system(trainer: lightning.Trainer, device: torch.device) -> dict[str, Any]:
    """Describe devices and memory.

    Args:
        trainer: The trainer.
        device: Device of this rank.

    Returns:
        The content of `system.json`: device and ranks, the memory plan in bytes, and its accuracy once known.
    """
    name = f"CPU (threads: {torch.get_num_threads()})" if device.type == "cpu" else get_device_name(device)
    found: dict[str, Any] = {"device": f"{trainer.world_size} × {name}", "plan": None, "plan_accuracy": None}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, MemoryPlanCallback) and callback.plan is not None:
            sizes = dataclasses.asdict(callback.plan)
            found["plan"] = {part: size for part, size in sizes.items() if not isinstance(size, bool)}
            found["plan_accuracy"] = callback.accuracy
    return found


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight is neither quantized nor sharded."""
    has_values = weight.untyped_storage().nbytes() > 0  # a quantized weight is empty between uses
    return has_values and weight.is_floating_point() and type(weight) in (Tensor, torch.nn.Parameter)
