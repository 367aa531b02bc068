"""`sa3-train`: train an adapter, on latent shards (`conf/train.yaml`) or on audio (`conf/decoder.yaml`)."""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3train.adapters.formats.run_dir import locate_adapter
from sa3train.adapters.spec import INFERENCE_ONLY_TYPES
from sa3train.cli.hydra_app import run_hydra_job
from sa3train.cli.train_config import DecoderTrainConfig, TrainConfig
from sa3train.core.errors import AdapterError, ConfigError
from sa3train.core.files import check_exists
from sa3train.core.log import get_rank, report_stage
from sa3train.core.signals import explain_stop
from sa3train.models.hub import check_checkpoint, find_checkpoint
from sa3train.reports.run_files import CONFIG_FILE

if TYPE_CHECKING:
    import torch

    from sa3train.adapters.adapter import Part
    from sa3train.data.loading.datamodule import LatentDataModule
    from sa3train.training.run import TrainingResult
    from sa3train.training.run_dir import RunDir

DECODER = "decoder"
"""The recipe that trains on audio instead of latents, with a configuration of its own."""
RATE_FACTOR = 10
"""By how much a model that wants a higher rate raises those of recipes, which differ: to continue takes half of one."""
RATED_OPTIMIZERS = ("adamw", "adamw-8bit")
"""Optimizers whose rates it raises: those of others are of another size."""
MAX_WARMUP_SHARE = 0.05
"""Share of the steps that a recipe's warm-up takes at most: longer ones cost what they keep from being learned."""

NOT_BEGUN = " before the training began: nothing new is saved. The same command starts again."


def main(argv: list[str] | None = None) -> int:
    """Run the console command.

    Args:
        argv: Command-line arguments; None for `sys.argv`.

    Returns:
        Exit code.
    """
    paths = ("run_dir", "resume", "paths.runs", "adapter.start_from")
    if trains_decoder(sys.argv[1:] if argv is None else argv):
        return run_hydra_job(
            "decoder",
            DecoderTrainConfig,
            train,
            shorthand={"model": "model.name", "weights": "model.weights"},
            paths=(*paths, "source"),
            resume="resume",
            suggest=suggest_adapter,
            check=check_run,
            argv=argv,
        )
    return run_hydra_job(
        "train",
        TrainConfig,
        train,
        shorthand={"data": "data.dir", "model": "model.name", "weights": "model.weights"},
        paths=paths,
        resume="resume",
        suggest=suggest_settings,
        check=check_run,
        argv=argv,
    )


@explain_stop(NOT_BEGUN)
def check_run(config: TrainConfig | DecoderTrainConfig) -> None:
    """Check what needs neither data nor weights.

    Args:
        config: The configuration.

    Raises:
        ConfigError: A setting cannot be used, or the decoder's recipe is one of several in a sweep.
        CheckpointError: The model is not at hand and cannot be downloaded.
        DataError: The data is not there.
        AdapterError: The adapter to start from is not there, or not of the part, type and rank that is trained.
    """
    from hydra.core.hydra_config import HydraConfig

    recipe = HydraConfig.get().runtime.choices.get("recipe") if HydraConfig.initialized() else None
    if recipe == DECODER and isinstance(config, TrainConfig):
        raise ConfigError(f"recipe={DECODER} trains on audio, which other recipes do not: run it by itself.")
    from sa3train.cli import train_setup

    is_latent = isinstance(config, TrainConfig)
    if config.resume is not None:
        train_setup.locate_inputs(config, Path(config.resume))  # what has moved is said before anything is loaded
        train_setup.check_resume(config, train_setup.get_overrides())
        if train_setup.is_finished(config, Path(config.resume)):
            return
    else:  # before anything heavy is imported
        check_checkpoint(config.model.source)
        for path in _list_sources(config):
            check_exists(path, f"a folder of {'latents that sa3-encode made' if is_latent else 'audio'}")
        from sa3train.cli.hydra_app import is_sweep_job
        from sa3train.training.run_dir import check_startable, is_requeued

        if get_rank() == 0 and not is_sweep_job() and not is_requeued():
            check_startable(train_setup.get_run_dir(config))
        if config.adapter.start_from is not None:
            locate_adapter(config.adapter.start_from)
            from sa3train.adapters.formats.io import load_adapter
            from sa3train.adapters.start import check_start

            part: Part = "dit" if is_latent else "decoder"
            check_start(load_adapter(config.adapter.start_from), config.adapter.make_spec(), part)
        if is_latent:
            from sa3train.data.shards.reader import check_not_audio

            for path in _list_sources(config):
                check_not_audio(path, config.model.source)
    from sa3train.training.optim import check_optimization
    from sa3train.training.trainer import count_ranks

    check_optimization(config)
    ranks = count_ranks(config.trainer) * config.trainer.num_nodes
    train_setup.check_overrides_have_effect(config, train_setup.get_overrides(), ranks)


def _list_sources(config: TrainConfig | DecoderTrainConfig) -> list[str]:
    return [each.path for each in config.data.list_sources()] if isinstance(config, TrainConfig) else [config.source]


def suggest_adapter(values: Mapping[str, Any]) -> dict[str, Any]:
    """Suggest type, rank, scale and layers of the adapter that training starts from.

    Args:
        values: The configuration.

    Returns:
        Values by key; nothing without such an adapter, or for one that cannot be trained, as `check_run` says.
    """
    section = values.get("adapter")
    path = section.get("start_from") if isinstance(section, Mapping) else None
    if not isinstance(path, str):
        return {}
    from sa3train.adapters.formats.io import load_adapter

    try:
        spec = load_adapter(path).spec
    except AdapterError:
        return {}
    if spec.adapter_type in INFERENCE_ONLY_TYPES:
        return {}
    has_unit_scale = spec.alpha == spec.rank and not spec.rank_pattern
    found = dataclasses.asdict(spec) | ({"alpha": None} if has_unit_scale else {})
    found |= {name: found[name] and list(found[name]) for name in ("include", "exclude")}
    return {f"adapter.{name}": value for name, value in found.items() if name != "dropout"}


def suggest_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Suggest the learning rate that suits a model, a warm-up that suits the length of the run, and the adapter.

    Args:
        values: The configuration.

    Returns:
        Values by key; nothing where those of the recipes suit.
    """
    found = suggest_adapter(values)
    model = values.get("model")
    info = find_checkpoint(str(model.get("name"))) if isinstance(model, Mapping) else None
    optimizer = values["optimizer"]
    is_adamw = optimizer.get("name") in RATED_OPTIMIZERS
    if info and info.learning_rate and is_adamw and isinstance(rate := optimizer["lr"], int | float):
        raised = float(f"{RATE_FACTOR * rate:.6g}")  # 0.0003, not 0.00030000000000000003
        found["optimizer.lr"] = max(rate, min(raised, info.learning_rate))
    steps, warmup = values["trainer"]["max_steps"], values["scheduler"]["warmup_steps"]
    if isinstance(steps, int) and isinstance(warmup, int):  # both are checked later
        found["scheduler.warmup_steps"] = min(warmup, int(MAX_WARMUP_SHARE * steps))
    return found


def trains_decoder(arguments: Sequence[str]) -> bool:
    """Check whether a command line is for the autoencoder's decoder.

    Args:
        arguments: Of the command line.

    Returns:
        Whether it chooses that recipe, or resumes a run of it.
    """
    given = {key: value.strip("'\"") for key, _, value in (argument.partition("=") for argument in arguments)}
    config = Path(given.get("resume", ""), CONFIG_FILE)
    if "resume" in given and os.path.isfile(config):  # noqa: PTH113 (no error for a name that is too long)
        return any(line.startswith("source:") for line in config.read_text("utf-8", "replace").splitlines())
    return given.get("recipe") == DECODER


def train(config: TrainConfig | DecoderTrainConfig) -> int:
    """Train once.

    Args:
        config: The configuration.

    Returns:
        Exit code: 0, or 128 + the signal that stopped the run.
    """
    from sa3train.cli.train_setup import describe_extension, get_run_dir, is_finished, print_result, requeue

    if is_finished(config, run_dir := get_run_dir(config)):
        if get_rank() == 0:
            steps = config.trainer.max_steps
            print(f"nothing to do: {run_dir} is at step {steps:,} of {steps:,}.")
            print(f"longer:  {describe_extension(config, run_dir)}")
        return 0
    result = run_training(config)
    if get_rank() == 0:
        print_result(result, config)
    if result.interrupted is not None:
        requeue(result.interrupted)
        return 128 + result.interrupted
    return 0


@explain_stop(NOT_BEGUN)
def run_training(config: TrainConfig | DecoderTrainConfig) -> "TrainingResult":
    """Load what a configuration names, and train.

    Args:
        config: The configuration.

    Returns:
        How the run ended.
    """
    from sa3train import training
    from sa3train.adapters.formats.io import load_adapter
    from sa3train.cli import train_setup
    from sa3train.data.loading import sampler
    from sa3train.training import step
    from sa3train.training.decoder import clips
    from sa3train.training.distributed import run_on_rank_zero
    from sa3train.training.trainer import choose_training_device, resolve_precisions

    run_dir = train_setup.get_run_dir(config)
    table = train_setup.make_table(config, run_dir)
    if config.resume is not None:
        config = train_setup.locate_inputs(config, run_dir)
    if isinstance(config, TrainConfig):
        identity = {"draws": f"{sampler.DRAWS_VERSION}.{step.DRAWS_VERSION}"}
    else:
        identity = {"draws": str(clips.DRAWS_VERSION)}
    train_setup.check_run_dir(run_dir, _list_sources(config))
    train_setup.start_ranks(config)
    device = choose_training_device(config.trainer)
    dtype, precision = resolve_precisions(config.model.dtype, config.trainer.precision, device)
    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, precision=precision))
    data = None
    if isinstance(config, TrainConfig):
        data = train_setup.make_data_module(config.data, config.seed)  # first: its errors come before gigabytes load
        identity["data"] = data.manifest
    resume, allowed = config.resume is not None, config.allow_resume_changes
    run = run_on_rank_zero(lambda: training.open_run(run_dir, table, identity, resume=resume, allowed=allowed))
    with run, explain_stop(""):  # from here on, the run says what is saved
        if isinstance(config, TrainConfig):
            assert data is not None
            run, fit, described = _load_latent_training(config, run, data, dtype)
        else:
            run, fit, described = _load_decoder_training(config, run, dtype)
        loggers = train_setup.make_loggers(config, run, table)
        start = None if run.state else config.adapter.start_from
        result = fit(
            run=run,
            spec=config.adapter.make_spec(),
            settings=config,
            loggers=loggers,
            provenance=train_setup.make_provenance(config, table, run) | described,
            start_from=load_adapter(start) if start else None,
        )
    loggers.close(failed=result.interrupted is not None)
    return result


def _load_latent_training(
    config: TrainConfig, run: "RunDir", data: "LatentDataModule", dtype: "torch.dtype"
) -> "tuple[RunDir, Callable[..., TrainingResult], dict[str, str]]":
    """Begin the run; returns it, what trains, and the description of the data for the adapter's metadata."""
    from sa3train import training
    from sa3train.adapters.adapter import BASE_SAMPLE
    from sa3train.cli.train_setup import describe_training_data
    from sa3train.models.checkpoint import load_checkpoint
    from sa3train.training.distributed import run_on_rank_zero, run_on_rank_zero_first

    parts = ("dit", "conditioner")
    with report_stage(f"loading {config.model.name}"):
        model = run_on_rank_zero_first(lambda: load_checkpoint(config.model.source, dtype=dtype, parts=parts))
        data.limit_frames(model.max_frames)
        data.check_autoencoder(model.name, model.autoencoder_fingerprint())
        base = model.fingerprint()
    run = run_on_rank_zero(lambda: run.begin(base=base))
    text = training.PromptEmbedder(model.conditioner)
    with report_stage("encoding prompts"):
        text.prepare(data.list_prompts() or [])
    fit = functools.partial(training.train, model=model, data=data, text=text)
    described = describe_training_data(data, config.data.shared_prompts)
    return run, fit, {BASE_SAMPLE: model.sample_weights(), **described}


def _load_decoder_training(
    config: DecoderTrainConfig, run: "RunDir", dtype: "torch.dtype"
) -> "tuple[RunDir, Callable[..., TrainingResult], dict[str, str]]":
    """The same for the autoencoder's decoder."""
    from sa3train.adapters.adapter import BASE_SAMPLE
    from sa3train.models.checkpoint import load_checkpoint
    from sa3train.reports.card import DATA_SUMMARY, summarize_data
    from sa3train.training.decoder.clips import AudioClips
    from sa3train.training.decoder.run import train_decoder
    from sa3train.training.distributed import run_on_rank_zero, run_on_rank_zero_first

    with report_stage(f"loading {config.model.name}"):
        model = run_on_rank_zero_first(
            lambda: load_checkpoint(config.model.source, dtype=dtype, parts=("autoencoder",))
        )
    clips = AudioClips(config.source, model.sample_rate, config.data.split)
    base, manifest = model.autoencoder_fingerprint(), clips.manifest
    run = run_on_rank_zero(lambda: run.begin(base=base, data=manifest))
    fit = functools.partial(train_decoder, model=model, clips=clips)
    described = summarize_data(clips.describe(model.name))
    return run, fit, {BASE_SAMPLE: model.sample_weights("decoder"), DATA_SUMMARY: described}


if __name__ == "__main__":
    sys.exit(main())
