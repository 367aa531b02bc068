"""From the sections of a training configuration to the library's objects."""

import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sa3train.core.errors import ConfigError
from sa3train.core.log import get_logger, get_rank
from sa3train.core.signals import describe_signal
from sa3train.reports.run_files import METRICS_FILE

if TYPE_CHECKING:
    from sa3train.cli.train_config import TrainConfig
    from sa3train.data.loading.datamodule import LatentDataModule
    from sa3train.data.loading.settings import DataSettings
    from sa3train.training.loggers import LoggerCollection
    from sa3train.training.run import TrainingResult
    from sa3train.training.run_dir import RunDir
    from sa3train.training.settings import LoggingSettings

_logger = get_logger(__name__)


def start_ranks(config: "TrainConfig") -> None:
    """Start or join the ranks that train together; with several devices, this process becomes torchrun.

    Args:
        config: The configuration, whose overrides are checked first.
    """
    import torch

    from sa3train.core.device import limit_to_cores
    from sa3train.training.distributed import check_world_size, count_started_ranks, join_ranks
    from sa3train.training.trainer import count_devices, uses_gpu

    trainer = config.trainer
    if trainer.threads is not None:
        torch.set_num_threads(limit_to_cores("trainer.threads", trainer.threads))
    gpu, devices = uses_gpu(trainer), count_devices(trainer)
    if count_started_ranks() == 1 and trainer.num_nodes == 1 and devices > 1:
        relaunch_with_torchrun(devices)
    ranks = devices * trainer.num_nodes
    check_world_size(ranks)
    check_overrides_have_effect(config, get_overrides(), ranks)
    join_ranks(gpu)


def check_overrides_have_effect(config: "TrainConfig", given: Sequence[str], ranks: int) -> None:
    """Check that no setting of the command line is without effect in this run.

    Values from a recipe or a default are not checked: they may get an effect by another setting.

    Args:
        config: The configuration.
        given: `key=value` arguments.
        ranks: Ranks that train together.

    Raises:
        ConfigError: A setting can change nothing.
    """
    keys = {key for key, equals, _ in (argument.lstrip("+").partition("=") for argument in given) if equals}
    alone = config.data.batch_size * ranks == 1 and config.data.pack_frames is None
    steps, callbacks = config.trainer.max_steps, config.callbacks
    validations, kept_context = steps // callbacks.validation.every, dict(config.loss.inpainting, full=0)
    idle = [
        ("callbacks.validation.*", not callbacks.validation.enabled, "callbacks.validation.enabled=false"),
        ("callbacks.validation.patience", validations <= (callbacks.validation.patience or 0),
         f"{validations} validations in trainer.max_steps={steps}"),
        ("callbacks.checkpoint.keep_last", callbacks.checkpoint.every >= steps,
         f"callbacks.checkpoint.every={callbacks.checkpoint.every}: only the last step is saved"),
        ("callbacks.demos.*", not callbacks.demos.enabled, "callbacks.demos.enabled=false"),
        ("data.heldout_clips", not (callbacks.validation.enabled or callbacks.demos.enabled),
         "neither validation nor demos"),
        ("loss.context_weight", not any(kept_context.values()), "loss.inpainting: full masks keep no context"),
        ("loss.coupling", config.loss.coupling and alone, "one clip per micro-batch: raise data.batch_size"),
        ("data.silence_tail_seconds", config.data.silence_tail_seconds > 0 and not config.loss.silence_seconds,
         "loss.silence_seconds=0"),
        ("data.repeats", not config.data.more, "a single data source: it weighs sources against each other"),
        ("data.weight", not config.data.more, "a single data source: it weighs sources against each other"),
        ("logger.timeout", config.logger.name != "wandb", f"logger={config.logger.name}"),
        ("trainer.strategy", config.trainer.strategy == "fsdp" and ranks == 1, "one rank: there is nothing to shard"),
        ("trainer", config.trainer.strategy == "fsdp" and ranks == 1, "one rank: fsdp shards the base over several"),
        ("allow_resume_changes", config.resume is None, "a run that is not resumed"),
        *((key, config.resume is not None, f"resume={config.resume}") for key in ("run_dir", "paths.runs", "name")),
    ]  # fmt: skip
    for pattern, without, because in idle:
        for key in sorted(fnmatch.filter(keys, pattern)):
            if without and not key.endswith(".enabled"):
                raise ConfigError(f"{key} has no effect with {because}. Remove it, or change that.")
    for name in ("validation", "demos"):
        if f"callbacks.{name}.every" in keys and (every := getattr(callbacks, name).every) > steps:
            _logger.warning(
                "callbacks.%s.every=%d is above trainer.max_steps=%d: only at the start and the end.",
                name,
                every,
                steps,
            )


def get_overrides() -> list[str]:
    """Get the `key=value` arguments of this run as Hydra parsed them.

    Returns:
        The arguments; none outside of Hydra.
    """
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def get_run_dir(config: "TrainConfig") -> Path:
    """Get the run folder of this job: that of a sweep has one below it for each job, by its number.

    Args:
        config: The configuration.

    Returns:
        The folder.
    """
    from hydra.core.hydra_config import HydraConfig

    from sa3train.cli.hydra_app import is_sweep_job

    if config.resume is not None:
        return Path(config.resume)
    return Path(config.run_dir, f"{HydraConfig.get().job.num:03d}" if is_sweep_job() else "")


def check_run_dir(run_dir: Path, data: "DataSettings") -> None:
    """Check that a run folder is not part of the data.

    Args:
        run_dir: The run folder.
        data: Settings of the data.

    Raises:
        ConfigError: It is inside of a source.
    """
    for source in data.list_sources():
        if "://" not in source.path and run_dir.resolve().is_relative_to(Path(source.path).resolve()):
            raise ConfigError(f"the run folder {run_dir} is inside the latents {source.path}. Choose run_dir=FOLDER.")


def make_data_module(settings: "DataSettings", seed: int) -> "LatentDataModule":
    """Make the data module and set it up.

    Args:
        settings: Its settings.
        seed: Seed of the run.

    Returns:
        The data module.
    """
    from sa3train.data.loading.datamodule import LatentDataModule

    data = LatentDataModule(settings, seed=seed)
    data.setup()
    return data


def make_loggers(
    settings: "LoggingSettings", run: "RunDir", name: str, table: Mapping[str, Any], identity: Mapping[str, str]
) -> "LoggerCollection":
    """Make the loggers of a run: on rank 0 `metrics.csv` and the chosen one, on other ranks none.

    Args:
        settings: Which logger, and its arguments.
        run: The run folder.
        name: Name of the run.
        table: The whole configuration.
        identity: Hashes of data and base model.

    Returns:
        The loggers.
    """
    from sa3train.training.loggers import CSVLogger, LoggerCollection, RunLogger, TensorBoardLogger, WandbLogger

    if get_rank() != 0:
        return LoggerCollection()
    step = run.state[0] if run.state else None
    keep = (step or 0) if run.record["resumed"] else None
    loggers: list[RunLogger] = [CSVLogger(run.path / METRICS_FILE, keep_through=keep)]
    if settings.name == "tensorboard":
        loggers.append(TensorBoardLogger(run.path / "tensorboard", purge_from=None if step is None else step + 1))
    if settings.name == "wandb":
        identifiers = {"name": f"{name}-{run.run_id}", "run_id": run.run_id}
        logger = WandbLogger(run.path / "wandb", settings, config=table, **identifiers)
        index = Path(str(table["data"]["dir"])) / "index.json"
        logger.log_input("dataset", f"latents-{identity['data'][:12]}", {"manifest": identity["data"]}, index)
        base = {"name": table["model"]["name"], "hash": identity["base"]}
        logger.log_input("model", f"base-{identity['base'][:12]}", base)
        loggers.append(logger)
    return LoggerCollection(loggers)


def make_provenance(
    config: "TrainConfig", table: Mapping[str, Any], identity: Mapping[str, str], run_id: str
) -> dict[str, str]:
    """Make the metadata that every adapter file carries.

    Args:
        config: The configuration.
        table: The same as nested dictionaries.
        identity: Hashes of data and base model.
        run_id: Id of the run.

    Returns:
        Metadata by name.
    """
    return {
        "base_model": config.model.name,
        "base_hash": identity["base"],
        "data_manifest": identity["data"],
        "trigger": config.data.prompts.trigger,
        "run": run_id,
        "training_config": json.dumps(dict(table), sort_keys=True),
    }


def relaunch_with_torchrun(ranks: int) -> NoReturn:
    """Replace this process by torchrun with several ranks of the same command.

    Args:
        ranks: Number of ranks.

    Raises:
        ConfigError: In a sweep, which cannot be relaunched.
    """
    from sa3train.cli.hydra_app import QUIET_OVERRIDES, get_run_stamp, is_sweep_job

    if is_sweep_job():
        raise ConfigError(
            f"a sweep runs its trainings one after another in this process, but each needs {ranks} ranks. "
            f"Set trainer.devices=1, or use launcher=slurm."
        )
    get_run_stamp()
    arguments = [argument for argument in sys.argv[1:] if argument not in QUIET_OVERRIDES]
    torchrun = ["-m", "sa3train.cli.ranks", "--standalone", f"--nproc-per-node={ranks}"]
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", "sa3train.cli.train", *arguments])


def requeue(signal_number: int) -> None:
    """Requeue this SLURM job if SLURM warned of its time limit; SLURM itself requeues a preempted job.

    Args:
        signal_number: The signal that stopped the run.
    """
    import signal

    job = os.environ.get("SLURM_JOB_ID")
    if job and signal_number == signal.SIGUSR1 and get_rank() == 0:
        try:
            subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            _logger.warning("Could not requeue SLURM job %s (%s). Rerun the same command to resume.", job, error)


def print_result(result: "TrainingResult") -> None:
    """Print how the run ended, and where its files are.

    Args:
        result: The result.
    """
    from sa3train.training.run_dir import format_resume_command

    if result.interrupted is not None:
        print(f"stopped by {describe_signal(result.interrupted)} after step {result.steps}; the state is saved.")
        print(f"Resume: {format_resume_command(result.run_dir)}")
        return
    for line in result.summary:
        print(line)
    minutes, seconds = divmod(round(result.seconds), 60)
    print(f"{result.steps} steps, {minutes} min {seconds} s, peak memory {result.peak_memory_gib:.1f} GiB")
    print(f"adapter: {result.adapter}")
    print(f"run:     {result.run_dir}")
