"""A whole training run from its parts: `train(...)`. Everything here is plain Python values and library objects."""

import functools
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch.utils.data import IterableDataset

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.formats.io import load_adapter
from sa3train.adapters.layers.inject import Injected, inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.core.device import memory_named
from sa3train.core.files import write_bytes
from sa3train.core.log import get_logger
from sa3train.data.loading.datamodule import LatentDataModule
from sa3train.models.checkpoint import StableAudio3
from sa3train.reports.run_report import write_report
from sa3train.training.callbacks import validation
from sa3train.training.callbacks.checkpoint import ADAPTER, BEST_ADAPTER, Saver
from sa3train.training.callbacks.demos import Demos, demos_of, players
from sa3train.training.callbacks.memory_plan import Prepare
from sa3train.training.callbacks.metrics import Meter
from sa3train.training.callbacks.report import Reporter
from sa3train.training.callbacks.validation import FixedItem, heldout_items, training_items
from sa3train.training.checks import check_together, played_as_trained, what_helps
from sa3train.training.loggers import Tracker, peak_memory
from sa3train.training.memorization import examine
from sa3train.training.module import LoraModule, TextSource
from sa3train.training.optim import learning_rate_factor, make_optimizer
from sa3train.training.quantization import round_weights
from sa3train.training.run_dir import RunFolder
from sa3train.training.settings import (
    DemoSettings,
    JudgeSettings,
    LoopSettings,
    Objective,
    OptimizerSettings,
    SaveSettings,
    ScheduleSettings,
)
from sa3train.training.trainer import make_trainer, uses_gpu

_logger = get_logger(__name__)
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its tips and device lists; ours say what matters
warnings.filterwarnings("ignore", message=".*LeafSpec.*", module="lightning.*")

EVERY_CLIP = 1_000_000
"""More clips than a fixed evaluation ever reads."""


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended. `interrupted`: the number of the signal that stopped it, or None. `verdict`: lines to read."""

    run_dir: Path
    adapter: Path
    steps: int
    seconds: float
    peak_memory_gib: float
    interrupted: int | None
    verdict: list[str] = field(default_factory=list)


class EndlessBatches(IterableDataset[Any]):
    """The loader as one epoch of `total` micro-batches.

    Lightning steps the optimizer on the last batch of an epoch whatever the accumulation, and stalls between epochs;
    with one epoch neither happens. The position is the loader's own.
    """

    def __init__(self, loader: Any, total: int) -> None:
        self.loader, self.total = loader, total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Any:
        while True:
            yield from self.loader

    def state_dict(self) -> dict[str, Any]:
        """The loader's position."""
        state: dict[str, Any] = self.loader.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
        self.loader.load_state_dict(state)


def make_module(
    model: StableAudio3,
    injected: Injected,
    text: TextSource,
    *,
    objective: Objective,
    optimizer: OptimizerSettings,
    schedule: ScheduleSettings,
    loop: LoopSettings,
    seed: int,
) -> LoraModule:
    """The Lightning module with its optimizer and schedule by name."""
    betas = (optimizer.betas[0], optimizer.betas[1])
    return LoraModule(
        model,
        injected,
        text,
        objective,
        make_optimizer=lambda named: make_optimizer(
            optimizer.name,
            named,
            lr=optimizer.lr,
            betas=betas,
            weight_decay=optimizer.weight_decay,
            options=optimizer.options,
            lora_plus=optimizer.lora_plus,
        ),
        learning_rate_factor=learning_rate_factor(
            schedule.name,
            warmup_steps=schedule.warmup_steps,
            total_steps=loop.max_steps,
            options=schedule.options,
        ),
        seed=seed,
        average_decay=loop.average,
    )


def train(
    *,
    run: RunFolder,
    model: StableAudio3,
    data: LatentDataModule,
    text: TextSource,
    spec: AdapterSpec,
    start_from: Adapter | None = None,
    objective: Objective,
    optimizer: OptimizerSettings,
    schedule: ScheduleSettings,
    loop: LoopSettings,
    save: SaveSettings,
    judge: JudgeSettings,
    demos: DemoSettings | None = None,
    report: bool = False,
    tracker: Tracker,
    provenance: Mapping[str, str],
    seed: int = 0,
) -> TrainingResult:
    """Train an adapter of `spec` in `model` on `data`, from where `run` stands, and write it to the run folder.

    `text` gives prompt embeddings; `start_from` is an adapter of the same kind to continue. `demos` None plays nothing;
    `report` keeps `report.html` up to date. `provenance` goes into every adapter file.
    """
    started = time.perf_counter()
    check_together(model, data, objective, optimizer, loop)
    demos = played_as_trained(demos, objective)
    device = "cuda" if uses_gpu(loop) else "cpu"
    if loop.quantize != "none":
        round_weights(model.dit, loop.quantize)
    torch.manual_seed(seed)  # the adapter's initial values, the same on every rank
    injected = inject(model.adaptable(), spec)
    if start_from is not None:
        injected.load(start_from)
    module = make_module(
        model, injected, text, objective=objective, optimizer=optimizer, schedule=schedule, loop=loop, seed=seed
    )
    saver = Saver(run.path, tracker, every=save.every, keep=save.keep, metadata=lambda step: noted(provenance, step))
    frames, rows = largest_batch(data)
    remedies = functools.partial(what_helps, data, loop)
    prepare = Prepare(loop, optimizer.name, frames, rows, prompt=any_prompt(data), remedies=remedies)
    meter = Meter(tracker, loop.log_every, loop.max_steps, model.sample_rate, model.downsampling_ratio)
    heldout = heldout_items(data, judge.clips)
    judged = make_judge(run.path, tracker, saver, data, heldout, judge)
    callbacks: list[lightning.Callback] = [prepare, meter, *([judged] if judged else [])]
    if demos is not None and demos.enabled and demos_of(demos, heldout):
        models = players(model, str(model.path), demos.sibling)
        callbacks.append(Demos(run.path, tracker, demos, heldout, models, device=device))
    if report:
        callbacks.append(Reporter(run.path, data, saver))
    trainer = make_trainer(run.path, loop, [*callbacks, saver])
    data.rank, data.world = trainer.global_rank, trainer.world_size
    batches = EndlessBatches(data.train_dataloader(), loop.max_steps * loop.accumulate)
    module.train()  # the base has nothing that training mode changes; the adapter may have dropout
    with memory_named(device, f"training on {rows} x {frames} latent frames", lambda: remedies(prepare.recomputing)):
        trainer.fit(module, train_dataloaders=batches, ckpt_path=run.state[1] if run.state else None)
    if trainer.is_global_zero and saver.interrupted is None:
        finish(run, saver, module, trainer.global_step, judged if judge.select_best else None)
        if demos is not None and demos.enabled and demos.memorisation_clips:
            examine(
                run.path,
                str(model.path),
                load_adapter(run.path / ADAPTER),
                training_items(data, EVERY_CLIP),
                heldout_items(data, EVERY_CLIP),
                clips=demos.memorisation_clips,
                seconds=demos.duration,
                seed=demos.seed,
                device=device,  # not the module's: after a run Lightning has moved it to the CPU
                steps=demos.steps,
                cfg_scale=demos.cfg_scale,
            )
        tracker.adapter(run.path / ADAPTER, provenance, ("latest", f"step-{trainer.global_step}"))
    run.save(status="finished" if saver.interrupted is None else "interrupted", steps=trainer.global_step)
    if report and trainer.is_global_zero:
        write_report(run.path)
    return TrainingResult(
        run.path,
        run.path / ADAPTER,
        trainer.global_step,
        time.perf_counter() - started,
        peak_memory(),
        saver.interrupted,
        [*(validation.verdict(judged.summary()) if judged else []), *([prepare.verdict] if prepare.verdict else [])],
    )


def noted(provenance: Mapping[str, str], step: int) -> dict[str, str]:
    """An adapter's metadata at a step."""
    return {**provenance, "step": str(step)}


def finish(run: RunFolder, saver: Saver, module: LoraModule, step: int, judged: validation.Judge | None) -> None:
    """Leave the adapter that was asked for: the best by held-out loss when `judged` is given, else the last."""
    best = run.path / BEST_ADAPTER
    if judged is not None and best.is_file():
        write_bytes(run.path / ADAPTER, best.read_bytes())
        _logger.info("adapter.safetensors is that of step %d, the lowest held-out loss", judged.best_step)
    else:
        saver.write_adapter(ADAPTER, module, step)


def largest_batch(data: LatentDataModule) -> tuple[int, int]:
    """Frames and rows of the largest micro-batch that can come."""
    if data.pack_frames is not None:
        return data.pack_frames, data.batch_size
    return data.longest_crop + data.tail, data.batch_size


def any_prompt(data: LatentDataModule) -> str:
    """The prompt of the first training clip."""
    return training_items(data, 1)[0].clip.prompts[0]


def make_judge(
    run_dir: Path,
    tracker: Tracker,
    saver: Saver,
    data: LatentDataModule,
    heldout: Sequence[FixedItem],
    settings: JudgeSettings,
) -> validation.Judge | None:
    """The fixed evaluation, or None when it is off."""
    if not settings.enabled:
        return None
    if not heldout:
        _logger.warning("nothing is held out of this data: only training clips are judged. Encode with split=0.1.")
    return validation.Judge(
        run_dir,
        tracker,
        saver,
        heldout,
        training_items(data, settings.clips),
        every=settings.every,
        rows=settings.rows,
        seed=settings.seed,
        select_best=settings.select_best,
        patience=settings.patience,
    )
