"""A whole training run on the autoencoder's decoder from its parts, as `training/run.py` has it for the DiT."""

import functools
from collections.abc import Mapping

import lightning.pytorch as lightning

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.spec import AdapterSpec
from sa3train.core.device_errors import explain_device_errors
from sa3train.core.log import get_logger, get_rank
from sa3train.models.checkpoint import StableAudio3
from sa3train.training.callbacks.checkpoint import CheckpointCallback
from sa3train.training.callbacks.metrics import MetricsCallback
from sa3train.training.callbacks.report import ReportCallback
from sa3train.training.decoder.clips import AudioClips, CropLoader
from sa3train.training.decoder.module import TERMS, DecoderModule, count_crop_samples
from sa3train.training.decoder.round_trips import RoundTripDemoCallback, RoundTripValidationCallback
from sa3train.training.decoder.settings import DecoderSettings
from sa3train.training.loggers import LoggerCollection
from sa3train.training.run import EndlessBatches, TrainingCallbacks, TrainingResult, end_run, start_adapter
from sa3train.training.run_dir import RunDir
from sa3train.training.trainer import choose_training_device, make_trainer

_logger = get_logger(__name__)


def train_decoder(
    *,
    run: RunDir,
    model: StableAudio3,
    clips: AudioClips,
    spec: AdapterSpec,
    settings: DecoderSettings,
    loggers: LoggerCollection,
    provenance: Mapping[str, str],
    start_from: Adapter | None = None,
) -> TrainingResult:
    """Train an adapter on the decoder from where the run stands, and write it to the run folder.

    Args:
        run: The run folder, new or to be resumed.
        model: The model, with its autoencoder.
        clips: What to train and validate on.
        spec: The adapter to train.
        settings: Everything else.
        loggers: Where metrics go.
        provenance: Metadata of every adapter file.
        start_from: An adapter of the same type to continue from.

    Returns:
        How the run ended.
    """
    injected = start_adapter(model.get_adapter_root("decoder"), spec, settings.seed, start_from)
    module = DecoderModule(model, injected, settings)
    module.train()
    callbacks = _build_callbacks(run, model, clips, settings, loggers, provenance)
    trainer = _fit(run, module, clips, callbacks)
    return end_run(run, trainer, module, callbacks, loggers)


def _build_callbacks(
    run: RunDir,
    model: StableAudio3,
    clips: AudioClips,
    settings: DecoderSettings,
    loggers: LoggerCollection,
    provenance: Mapping[str, str],
) -> TrainingCallbacks:
    trainer, wanted = settings.trainer, settings.callbacks
    saving = wanted.checkpoint
    checkpoint = CheckpointCallback(run.path, every=saving.every, keep_last=saving.keep_last, metadata=provenance)
    validation = demos = None
    if wanted.validation.enabled:
        if not clips.heldout:
            _logger.warning("no clips are held out: validation uses training clips only. Set data.split=0.1.")
        validation = RoundTripValidationCallback(run.path, loggers, checkpoint, clips, wanted.validation)
    if wanted.demos.enabled:
        demos = RoundTripDemoCallback(run.path, loggers, wanted.demos, clips, wanted.validation, checkpoint)
    losses = TERMS if settings.loss.round_trip else TERMS[:-1]
    frame_seconds = model.downsampling_ratio / model.sample_rate
    return TrainingCallbacks(
        None,
        MetricsCallback(loggers, trainer.log_every, trainer.max_steps, frame_seconds, losses),
        validation,
        demos,
        ReportCallback(run.path, functools.partial(clips.describe, model.name), checkpoint) if wanted.report else None,
        checkpoint,
    )


def _fit(run: RunDir, module: DecoderModule, clips: AudioClips, callbacks: TrainingCallbacks) -> lightning.Trainer:
    settings, data = module.settings.trainer, module.settings.data
    samples = count_crop_samples(module.autoencoder, data.crop_seconds)
    trainer = make_trainer(run.path, settings, callbacks.list_enabled())
    callbacks.checkpoint.after_save.insert(0, lambda *_: run.save())  # with the time so far
    loader = CropLoader(clips, samples, data.batch_size, module.settings.seed, get_rank())
    batches = EndlessBatches(loader)
    fixes = [
        f"data.batch_size={max(1, data.batch_size // 2)} trainer.accumulate={2 * settings.accumulate}",
        f"data.crop_seconds={data.crop_seconds / 2:g}",
    ]
    device = choose_training_device(settings)
    with explain_device_errors(
        device, f"training on {data.batch_size} crops of {data.crop_seconds:g} s", lambda: fixes
    ):
        trainer.fit(module, train_dataloaders=batches, ckpt_path=run.state[1] if run.state else None)
    return trainer
