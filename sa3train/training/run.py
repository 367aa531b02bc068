"""A whole training run from its parts: build module and callbacks, fit, end. No configuration files here."""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import nn
from torch.utils.data import IterableDataset

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.formats.io import load_adapter
from sa3train.adapters.formats.native import has_several_scales
from sa3train.adapters.layers.inject import InjectedAdapter, inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.core.device_errors import explain_device_errors
from sa3train.core.files import write_bytes
from sa3train.core.log import get_logger
from sa3train.data.loading.datamodule import LatentDataModule
from sa3train.models.checkpoint import StableAudio3
from sa3train.reports.run_files import ADAPTER_FILE, BEST_ADAPTER_FILE
from sa3train.reports.run_report import write_report
from sa3train.training.callbacks.checkpoint import CheckpointCallback
from sa3train.training.callbacks.demos import DemoCallback, FixedDemoCallback, list_demo_models
from sa3train.training.callbacks.memory_plan import MemoryPlanCallback, suggest_training_fixes
from sa3train.training.callbacks.metrics import MetricsCallback, measure_peak_memory
from sa3train.training.callbacks.report import ReportCallback, describe_data
from sa3train.training.callbacks.validation import (
    FixedValidationCallback,
    ValidationCallback,
    list_heldout_clips,
    list_training_clips,
)
from sa3train.training.checks import check_compatibility, match_demo_steps
from sa3train.training.loggers import LoggerCollection
from sa3train.training.memorization import evaluate_memorization
from sa3train.training.module import AdapterModule, LoraModule, TextSource
from sa3train.training.quantization import round_weights
from sa3train.training.run_dir import RunDir
from sa3train.training.settings import TrainerSettings, TrainingSettings
from sa3train.training.trainer import choose_training_device, make_trainer

_logger = get_logger(__name__)
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # hide its tips and device lists
warnings.filterwarnings("ignore", message=".*LeafSpec.*", module="lightning.*")

ALL_CLIPS = 1_000_000
"""More clips than any data set has."""
EPOCH = 2**53
"""More micro-batches than any run has; without a length, Lightning would fetch one ahead of the position."""


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        run_dir: The run folder.
        adapter: The adapter file.
        steps: Optimizer steps taken.
        seconds: Duration of all its starts together, from the first preparation.
        peak_memory_gib: Peak memory in GiB.
        interrupted: The signal that stopped it, or None.
        summary: Lines for the user.
    """

    run_dir: Path
    adapter: Path
    steps: int
    seconds: float
    peak_memory_gib: float
    interrupted: int | None
    summary: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TrainingCallbacks:
    """The callbacks of a run; None where one is disabled."""

    memory_plan: MemoryPlanCallback | None
    metrics: MetricsCallback
    validation: FixedValidationCallback | None
    demos: FixedDemoCallback | None
    report: ReportCallback | None
    checkpoint: CheckpointCallback

    def list_enabled(self) -> list[lightning.Callback]:
        """List the enabled callbacks.

        Returns:
            In the order they run; checkpoints come last, so that they hold the state of the others.
        """
        every = (self.memory_plan, self.metrics, self.validation, self.demos, self.report, self.checkpoint)
        return [callback for callback in every if callback is not None]


class EndlessBatches(IterableDataset[Any]):
    """A loader as one epoch that no run comes to the end of: steps are counted, whatever they accumulate.

    Lightning steps the optimizer on the last batch of an epoch whatever the accumulation, and stalls between epochs;
    with one epoch neither happens. The position that is saved is the loader's own at the last mark, as a step that
    fails has taken batches already.

    Args:
        loader: Iterates over batches, and tells and takes its position by `state_dict` and `load_state_dict`.
    """

    def __init__(self, loader: Any) -> None:
        self.loader, self.position = loader, dict(loader.state_dict())

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> Any:
        while True:
            yield from self.loader

    def mark_position(self) -> None:
        """Mark the loader's position as the one to save."""
        self.position = dict(self.loader.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Get the position of the last mark.

        Returns:
            What the loader returned.
        """
        return self.position

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position.

        Args:
            state: What `state_dict` returned.
        """
        self.loader.load_state_dict(state)


def train(
    *,
    run: RunDir,
    model: StableAudio3,
    data: LatentDataModule,
    text: TextSource,
    spec: AdapterSpec,
    settings: TrainingSettings,
    loggers: LoggerCollection,
    provenance: Mapping[str, str],
    start_from: Adapter | None = None,
) -> TrainingResult:
    """Train an adapter from where the run stands, and write it to the run folder.

    Args:
        run: The run folder, new or to be resumed.
        model: The base model.
        data: The data module, set up.
        text: Gives prompt embeddings.
        spec: The adapter to train.
        settings: Everything else.
        loggers: Where metrics go.
        provenance: Metadata of every adapter file.
        start_from: An adapter of the same type to continue from.

    Returns:
        How the run ended.

    Raises:
        ConfigError: Settings cancel each other.
    """
    check_compatibility(model, data, settings)
    settings = match_demo_steps(settings)
    module = build_module(model, text, spec, settings, start_from)
    callbacks = _build_callbacks(run.path, model, data, settings, loggers, provenance)
    trainer = _fit(run, module, data, callbacks, settings.trainer)
    demos = settings.callbacks.demos

    def evaluate() -> None:
        if demos.enabled and demos.memorization_clips:
            evaluate_memorization(
                run.path,
                str(model.path),
                load_adapter(run.path / ADAPTER_FILE),
                list_training_clips(data, ALL_CLIPS),
                list_heldout_clips(data, ALL_CLIPS),
                demos,
                choose_training_device(settings.trainer),  # not the module's: Lightning moved it to the CPU
            )

    return end_run(run, trainer, module, callbacks, loggers, evaluate)


def end_run(
    run: RunDir,
    trainer: lightning.Trainer,
    module: AdapterModule,
    callbacks: TrainingCallbacks,
    loggers: LoggerCollection,
    evaluate: Callable[[], None] = lambda: None,
) -> TrainingResult:
    """End a run: write the adapter that was asked for unless the run was stopped, its record, card and report.

    Args:
        run: The run folder.
        trainer: The trainer, whose fit is over.
        module: The trained module.
        callbacks: The run's callbacks.
        loggers: Where the adapter is published.
        evaluate: Evaluates the adapter file of a finished run, on rank 0.

    Returns:
        How the run ended.
    """
    checkpoint, validation, step = callbacks.checkpoint, callbacks.validation, trainer.global_step
    interrupted, adapter, best = checkpoint.interrupted, run.path / ADAPTER_FILE, run.path / BEST_ADAPTER_FILE
    if trainer.is_global_zero and interrupted is None:
        if callbacks.demos is not None and run.state and run.state[0] == step:  # resumed after its last step
            callbacks.demos.play_missing(trainer, module)
        if validation is not None and validation.schedule.select_best and best.is_file():
            write_bytes(adapter, best.read_bytes())
            _logger.info("%s is of step %d, the lowest validation loss", ADAPTER_FILE, validation.best_step)
        else:
            checkpoint.write_adapter(ADAPTER_FILE, module, step)
        evaluate()
        loggers.log_adapter(adapter, checkpoint.metadata, ("latest", f"step-{step}"))
    run.save(status="finished" if interrupted is None else "interrupted", steps=step)
    if trainer.is_global_zero:
        checkpoint.write_card()
        if callbacks.report is not None:
            write_report(run.path)
    summary = validation.describe(validation.summarize()) if validation is not None and validation.history else []
    if callbacks.memory_plan is not None and callbacks.memory_plan.accuracy:
        summary = [*summary, callbacks.memory_plan.accuracy]
    seconds, peak = run.record["seconds"], measure_peak_memory()
    return TrainingResult(run.path, adapter, step, seconds, peak, interrupted, summary)


def build_module(
    model: StableAudio3,
    text: TextSource,
    spec: AdapterSpec,
    settings: TrainingSettings,
    start_from: Adapter | None = None,
) -> LoraModule:
    """Build the Lightning module, with an adapter injected into the model.

    Args:
        model: The base model; its weights are rounded if they are to be quantized.
        text: Gives prompt embeddings.
        spec: The adapter to train.
        settings: Everything else.
        start_from: An adapter to continue from.

    Returns:
        The module, in training mode.
    """
    if settings.trainer.quantize != "none":
        round_weights(model.dit, settings.trainer.quantize)
    injected = start_adapter(model.get_adapter_root(), spec, settings.seed, start_from)
    module = LoraModule(model, injected, text, settings)
    module.train()  # nothing in the base depends on the mode; the adapter may have dropout
    return module


def start_adapter(root: nn.Module, spec: AdapterSpec, seed: int, start_from: Adapter | None) -> InjectedAdapter:
    """Inject the adapter to train.

    Args:
        root: The frozen base.
        spec: The adapter.
        seed: Seed of its initial values, the same on every rank.
        start_from: An adapter of the same type to continue from.

    Returns:
        The adapter inside the base.
    """
    torch.manual_seed(seed)
    injected = inject(root, spec)
    if has_several_scales(spec.adapter_type, map(spec.get_scale, injected.layers)):
        _logger.warning(
            "with these ranks and alphas, layers have several scales, and other tools know one. Before you play the "
            "adapter elsewhere: sa3-adapter convert RUN NEW.safetensors (-xs types: --to sa3cpp --model NAME)"
        )
    if start_from is not None:
        injected.load(start_from)
    return injected


def _build_callbacks(
    run_dir: Path,
    model: StableAudio3,
    data: LatentDataModule,
    settings: TrainingSettings,
    loggers: LoggerCollection,
    provenance: Mapping[str, str],
) -> TrainingCallbacks:
    trainer, wanted = settings.trainer, settings.callbacks
    saving = wanted.checkpoint
    checkpoint = CheckpointCallback(run_dir, every=saving.every, keep_last=saving.keep_last, metadata=provenance)
    frames = data.longest_crop + data.tail if data.settings.pack_frames is None else data.settings.pack_frames
    prompt = list_training_clips(data, 1)[0].prompts[0]
    suggest = functools.partial(suggest_training_fixes, data, trainer)
    heldout = list_heldout_clips(data, wanted.validation.clips)
    validation = demos = None
    if wanted.validation.enabled:
        if not heldout:
            _logger.warning("no clips are held out: validation uses training clips only. Encode with split=0.1.")
        training = list_training_clips(data, wanted.validation.clips)
        chosen = wanted.validation
        if chosen.strengths and (trainer.compile or trainer.strategy == "fsdp"):
            # Compiled blocks would not notice that the adapter is scaled; a sharded base is not at hand beside it.
            _logger.info("other strengths are not measured with trainer.compile or fsdp. Run sa3-eval afterwards.")
            chosen = replace(chosen, strengths=[])
        validation = ValidationCallback(run_dir, loggers, checkpoint, heldout, training, chosen)
    if wanted.demos.enabled:
        if not heldout and (wanted.demos.heldout_prompts or wanted.demos.inpaint):
            _logger.warning("no clips are held out: demos play callbacks.demos.prompts only. Encode with split=0.1.")
        models = list_demo_models(model, str(model.path), wanted.demos.also_post_trained)
        device = str(choose_training_device(trainer))
        demos = DemoCallback(run_dir, loggers, wanted.demos, heldout, models, device, checkpoint.is_stopping)
    return TrainingCallbacks(
        MemoryPlanCallback(trainer, settings.optimizer.name, frames, data.settings.batch_size, prompt, suggest),
        MetricsCallback(loggers, trainer.log_every, trainer.max_steps, model.downsampling_ratio / model.sample_rate),
        validation,
        demos,
        ReportCallback(run_dir, functools.partial(describe_data, data), checkpoint) if wanted.report else None,
        checkpoint,
    )


def _fit(
    run: RunDir, module: LoraModule, data: LatentDataModule, callbacks: TrainingCallbacks, settings: TrainerSettings
) -> lightning.Trainer:
    trainer = make_trainer(run.path, settings, callbacks.list_enabled())
    callbacks.checkpoint.after_save.insert(0, lambda *_: run.save())  # with the time so far
    data.trainer = trainer  # the loader asks it for rank and world size
    plan = callbacks.memory_plan
    assert plan is not None
    device = choose_training_device(settings)
    with (
        contextlib.closing(data.train_dataloader()) as loader,  # ends its workers
        explain_device_errors(device, f"training on {plan.rows} x {plan.frames} latent frames", plan.suggest_savings),
    ):
        batches = EndlessBatches(loader)
        trainer.fit(module, train_dataloaders=batches, ckpt_path=run.state[1] if run.state else None)
    return trainer
