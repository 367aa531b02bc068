"""What the run folder should know of its data and its adapter, so that the report needs nothing else."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.layer_weight import layer_part
from sa3train.adapters.apply.load_report import group_of, squared_norms
from sa3train.adapters.layers.inject import Injected
from sa3train.core.errors import SA3Error
from sa3train.core.files import write_json
from sa3train.core.log import get_logger
from sa3train.data.loading.datamodule import LatentDataModule
from sa3train.reports.run_files import DATA, INSPECTION, MACHINE
from sa3train.reports.run_report import write_report
from sa3train.training.callbacks.checkpoint import Saver
from sa3train.training.callbacks.memory_plan import Prepare
from sa3train.training.module import LoraModule

_logger = get_logger(__name__)

SHOWN_PROMPTS = 12
CARD, CARD_CHARACTERS = "README.md", 20_000


class Reporter(lightning.Callback):
    """Keeps `report.html` up to date: at the start, and whenever `saver` has saved. On rank 0.

    A report that cannot be written is said aloud and does not stop the run.
    """

    def __init__(self, run_dir: Path, data: LatentDataModule, saver: Saver) -> None:
        self.run_dir, self.data = run_dir, data
        saver.after_save.append(self.refresh)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note what the data is, the machine, and the memory plan made for it."""
        if trainer.is_global_zero:
            write_json(self.run_dir / DATA, describe_data(self.data))
            write_json(self.run_dir / MACHINE, describe_machine(trainer, pl_module.device))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note how far off the memory plan was."""
        if trainer.is_global_zero:
            write_json(self.run_dir / MACHINE, describe_machine(trainer, pl_module.device))

    def refresh(self, trainer: lightning.Trainer, module: LoraModule) -> None:
        """Inspect the adapter as it is, and write the report."""
        if not trainer.is_global_zero:
            return
        try:
            found = inspect_adapter(module.injected, module.export({}))
            if found:
                write_json(self.run_dir / INSPECTION, {**found, "step": trainer.global_step})
            write_report(self.run_dir)
        except (OSError, SA3Error) as error:
            _logger.warning("no report at step %d: %s", trainer.global_step, error)


@torch.no_grad()
def inspect_adapter(injected: Injected, adapter: Adapter) -> dict[str, Any]:
    """Kind, size, and ‖W' − W‖ / ‖W‖ of `adapter` by layer, by group of layers and over all, on the base it trains in.

    Empty when the base weights are not here as they are: quantized, or shared out over ranks.
    """
    weights = {path: base_weight(layer) for path, layer in injected.layers.items()}
    if not all(plain(weight) for weight in weights.values()):
        return {}
    sums: dict[str, list[float]] = {}
    layers = {}
    with torch.random.fork_rng(devices=[]):
        for path, W in weights.items():
            change, size = squared_norms(W, layer_part(adapter, path, W).weight(W))
            layers[path] = _ratio(change, size)
            for group in ("all", group_of(path)):
                total = sums.setdefault(group, [0.0, 0.0])
                total[0], total[1] = total[0] + change, total[1] + size
    spec = adapter.spec
    return {
        "kind": spec.kind,
        "rank": spec.rank,
        "alpha": spec.rank if spec.alpha is None else spec.alpha,
        "parameters": sum(parameter.numel() for parameter in injected.parameters()),
        "effect": {group: _ratio(*total) for group, total in sums.items()},
        "layers": layers,
    }


def describe_data(data: LatentDataModule) -> dict[str, Any]:
    """The sources of a run: how many clips and seconds of each split, made by what, with their cards; some prompts."""
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
    return {"manifest": data.manifest, "sources": sources, "prompts": some_of(data.distinct_prompts() or [])}


def describe_machine(trainer: lightning.Trainer, device: torch.device) -> dict[str, Any]:
    """Device and ranks, and the memory plan with its verdict once there is one; sizes in bytes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU (threads: {torch.get_num_threads()})"
    found: dict[str, Any] = {"device": f"{trainer.world_size} × {name}", "plan": None, "verdict": None}
    for prepare in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(prepare, Prepare) and prepare.plan is not None:
            sizes = dataclasses.asdict(prepare.plan)
            found["plan"] = {part: size for part, size in sizes.items() if not isinstance(size, bool)}
            found["verdict"] = prepare.verdict
    return found


def some_of(values: Sequence[str], most: int = SHOWN_PROMPTS) -> list[str]:
    """At most `most` of the values, evenly spread."""
    return list(values[:: max(1, -(-len(values) // most))])


def base_weight(layer: BaseTunerLayer) -> Tensor:
    """The untouched weight under an adapter layer."""
    weight = layer.get_base_layer().weight
    assert isinstance(weight, Tensor)
    return weight


def plain(weight: Tensor) -> bool:
    """Whether a weight is numbers in their shape: neither quantized nor a part of one."""
    there = weight.untyped_storage().nbytes() > 0  # a weight kept in few bits is empty between uses
    return there and weight.is_floating_point() and type(weight) in (Tensor, torch.nn.Parameter)


def _ratio(change: float, size: float) -> float:
    return (change / size) ** 0.5 if size else 0.0
