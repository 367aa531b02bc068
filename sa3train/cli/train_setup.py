"""From the sections of a training configuration to the library's objects."""

import dataclasses
import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from sa3train.core.errors import ConfigError, DataError
from sa3train.core.files import path_exists
from sa3train.core.log import get_logger, get_rank
from sa3train.core.processes import read_json
from sa3train.core.signals import REQUEUE_SIGNALS, describe_signal, handle_signals
from sa3train.reports.run_files import ADAPTER_FILE, CARD_FILE, METRICS_FILE, RECORD_FILE, REPORT_FILE

if TYPE_CHECKING:
    from sa3train.cli.train_config import DecoderTrainConfig, TrainConfig
    from sa3train.data.loading.datamodule import LatentDataModule
    from sa3train.data.loading.settings import DataSettings
    from sa3train.training.loggers import LoggerCollection
    from sa3train.training.run import TrainingResult
    from sa3train.training.run_dir import RunDir

_logger = get_logger(__name__)

AnyTrainConfig = TypeVar("AnyTrainConfig", bound="TrainConfig | DecoderTrainConfig")


def start_ranks(config: "TrainConfig | DecoderTrainConfig") -> None:
    """Start or join the ranks that train together; with several devices, this process becomes torchrun.

    Args:
        config: The configuration.
    """
    import torch

    from sa3train.core.device import limit_to_cores
    from sa3train.training.distributed import check_world_size, count_started_ranks, join_ranks
    from sa3train.training.trainer import choose_training_device, count_ranks

    trainer = config.trainer
    if trainer.threads is not None:
        torch.set_num_threads(limit_to_cores("trainer.threads", trainer.threads))
    gpu, devices = choose_training_device(trainer).type == "cuda", count_ranks(trainer)
    if count_started_ranks() == 1 and trainer.num_nodes == 1 and devices > 1:
        relaunch_with_torchrun(devices)
    ranks = devices * trainer.num_nodes
    check_world_size(ranks)
    join_ranks(gpu)


def check_overrides_have_effect(config: "TrainConfig | DecoderTrainConfig", given: Sequence[str], ranks: int) -> None:
    """Check that no setting of the command line is without effect in this run.

    Values from a recipe or a default are not checked: they may get an effect by another setting.

    Args:
        config: The configuration.
        given: `key=value` arguments.
        ranks: Ranks that train together.

    Raises:
        ConfigError: A setting can change nothing.
    """
    keys, steps, callbacks = _list_keys(given), config.trainer.max_steps, config.callbacks
    validations = steps // callbacks.validation.every
    idle = [
        *_list_idle_latent_settings(config, ranks),
        *_list_idle_validation_settings(config),
        ("callbacks.validation.patience", validations <= (callbacks.validation.patience or 0),
         f"{validations} validations in trainer.max_steps={steps}"),
        ("callbacks.checkpoint.keep_last", callbacks.checkpoint.every >= steps,
         f"callbacks.checkpoint.every={callbacks.checkpoint.every}: only the last step is saved"),
        ("callbacks.demos.*", not callbacks.demos.enabled, "callbacks.demos.enabled=false"),
        ("logger.timeout", config.logger.name != "wandb", f"logger={config.logger.name}"),
        ("trainer.strategy", config.trainer.strategy == "fsdp" and ranks == 1, "one rank: there is nothing to shard"),
        ("trainer", config.trainer.strategy == "fsdp" and ranks == 1, "one rank: fsdp shards the base over several"),
        ("allow_resume_changes", config.resume is None, "a run that is not resumed"),
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


def _list_keys(given: Sequence[str]) -> set[str]:
    return {key for key, equals, _ in (argument.lstrip("+").partition("=") for argument in given) if equals}


def _list_idle_validation_settings(config: "TrainConfig | DecoderTrainConfig") -> list[tuple[str, bool, str]]:
    """The same for validation; the decoder's demos play the round trips that validation is set to."""
    from sa3train.cli.train_config import TrainConfig

    demos, without = config.callbacks.demos.enabled, "callbacks.validation.enabled=false"
    is_shared = demos and not isinstance(config, TrainConfig)
    names = [field.name for field in dataclasses.fields(config.callbacks.validation)]
    idle = [name for name in names if not (is_shared and name in ("seconds", "round_trips", "seed"))]
    return [(f"callbacks.validation.{name}", not config.callbacks.validation.enabled, without) for name in idle]


def _list_idle_latent_settings(config: "TrainConfig | DecoderTrainConfig", ranks: int) -> list[tuple[str, bool, str]]:
    """Settings of a training on latents, whether each is without effect, and with what."""
    from sa3train.cli.train_config import TrainConfig

    if not isinstance(config, TrainConfig):
        return []
    alone = config.data.batch_size * ranks == 1 and config.data.pack_frames is None
    kept_context = dict(config.loss.inpainting, full=0)
    return [
        ("data.heldout_clips", not (config.callbacks.validation.enabled or config.callbacks.demos.enabled),
         "neither validation nor demos"),
        ("loss.context_weight", not any(kept_context.values()), "loss.inpainting: full masks keep no context"),
        ("loss.coupling", config.loss.coupling and alone, "one clip per micro-batch: raise data.batch_size"),
        ("data.silence_tail_seconds", config.data.silence_tail_seconds > 0 and not config.loss.silence_seconds,
         "loss.silence_seconds=0"),
        ("data.repeats", not config.data.more, "a single data source: it weighs sources against each other"),
        ("data.weight", not config.data.more, "a single data source: it weighs sources against each other"),
    ]  # fmt: skip


def get_overrides() -> list[str]:
    """Get the `key=value` arguments of this run as Hydra parsed them.

    Returns:
        The arguments; none outside of Hydra.
    """
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def get_run_dir(config: "TrainConfig | DecoderTrainConfig") -> Path:
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


def check_run_dir(run_dir: Path, sources: Sequence[str]) -> None:
    """Check that a run folder is not part of the data.

    Args:
        run_dir: The run folder.
        sources: Folders or URLs of the data.

    Raises:
        ConfigError: It is inside of a source.
    """
    for source in sources:
        if "://" not in source and run_dir.resolve().is_relative_to(Path(source).resolve()):
            raise ConfigError(f"the run folder {run_dir} is inside the data {source}. Choose run_dir=FOLDER.")


def locate_inputs(config: AnyTrainConfig, run_dir: Path) -> AnyTrainConfig:
    """Locate what a run to be resumed reads: relative paths are those from where it was started.

    Args:
        config: The configuration.
        run_dir: The run folder.

    Returns:
        The configuration with paths from here.

    Raises:
        DataError: Its data is not there.
    """
    from sa3train.core.config import build
    from sa3train.models.hub import find_checkpoint
    from sa3train.reports.run_files import CONFIG_FILE, load_settings
    from sa3train.training.run_dir import locate_from_run

    started, values = load_settings(run_dir / CONFIG_FILE), json.loads(json.dumps(dataclasses.asdict(config)))
    paths = [(values, started, "source"), (values["adapter"], started["adapter"], "start_from")]
    paths += [(values["data"], started["data"], name) for name in ("dir", "split")]
    if find_checkpoint(config.model.name) is None:
        paths.append((values["model"], started["model"], "name"))
    before = {source["path"]: source for source in started["data"].get("more", ())}
    paths += [(source, before.get(source["path"], {}), "path") for source in values["data"].get("more", ())]
    for settings, then, name in paths:
        path = settings.get(name)
        if isinstance(path, str) and path == then.get(name):
            settings[name] = locate_from_run(run_dir, path)
            if name in ("dir", "source") and "://" not in settings[name] and not path_exists(settings[name]):
                key = "data" if name == "dir" else name
                raise DataError(f"{run_dir} was trained on {path}, which is not there. If it moved, set {key}=FOLDER.")
    return build(type(config), values)


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
    config: "TrainConfig | DecoderTrainConfig", run: "RunDir", table: Mapping[str, Any]
) -> "LoggerCollection":
    """Make the loggers of a run: on rank 0 `metrics.csv` and the chosen one, on other ranks none.

    Args:
        config: The configuration.
        run: The run folder, begun.
        table: The configuration as the run was started with.

    Returns:
        The loggers.
    """
    from sa3train.cli.train_config import TrainConfig
    from sa3train.training.loggers import CSVLogger, LoggerCollection, RunLogger, TensorBoardLogger, WandbLogger

    if get_rank() != 0:
        return LoggerCollection()
    settings, step = config.logger, run.state[0] if run.state else None
    keep = (step or 0) if run.is_resumed else None
    loggers: list[RunLogger] = [CSVLogger(run.path / METRICS_FILE, keep_through=keep)]
    if settings.name == "tensorboard":
        loggers.append(TensorBoardLogger(run.path / "tensorboard", purge_from=None if step is None else step + 1))
    if settings.name == "wandb":
        identifiers = {"name": f"{config.name}-{run.run_id}", "run_id": run.run_id}
        logger = WandbLogger(run.path / "wandb", settings, config=table, **identifiers)
        data, base = run.identity["data"], run.identity["base"]
        index = Path(config.data.dir) / "index.json" if isinstance(config, TrainConfig) else None
        logger.log_input("dataset", f"data-{data[:12]}", {"manifest": data}, index)
        logger.log_input("model", f"base-{base[:12]}", {"name": config.model.name, "hash": base})
        loggers.append(logger)
    return LoggerCollection(loggers)


def make_provenance(
    config: "TrainConfig | DecoderTrainConfig", table: Mapping[str, Any], run: "RunDir"
) -> dict[str, str]:
    """Make the metadata that every adapter file carries.

    Args:
        config: The configuration.
        table: The same as nested dictionaries.
        run: The run folder, begun.

    Returns:
        Metadata by name.
    """
    from sa3train.adapters.adapter import TRAINING_CONFIG
    from sa3train.models.hub import PACKED

    return {
        "base_model": config.model.name.removesuffix(PACKED),
        "base_hash": run.identity["base"],
        "data_manifest": run.identity["data"],
        "trigger": table["data"].get("prompts", {}).get("trigger", ""),
        "run": run.run_id,
        TRAINING_CONFIG: json.dumps(dict(table), sort_keys=True),
    }


def describe_training_data(data: "LatentDataModule", prompts: int) -> dict[str, str]:
    """Describe the data in an adapter's metadata: how much it is and, if wanted, some of its prompts.

    Args:
        data: The data module.
        prompts: Most prompts.

    Returns:
        Metadata by name.
    """
    from sa3train.adapters.adapter import PROMPTS
    from sa3train.reports.card import DATA_SUMMARY, summarize_data
    from sa3train.training.callbacks.report import describe_data

    shared = {PROMPTS: json.dumps(data.sample_prompts(prompts), ensure_ascii=False)} if prompts else {}
    return {DATA_SUMMARY: summarize_data(describe_data(data)), **shared}


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
    os.environ["PYTHONSAFEPATH"] = "1"  # a folder named sa3train here, such as the clone, would hide the package
    command = [sys.executable, *torchrun, "-m", "sa3train.cli.train", *arguments]
    if os.name == "nt":  # there exec would give the terminal back while the ranks go on; Ctrl-C reaches them too
        with handle_signals(lambda _: None):
            sys.exit(subprocess.run(command).returncode)
    os.execv(sys.executable, command)


def requeue(signal_number: int) -> None:
    """Requeue this SLURM job if SLURM warned of its time limit; SLURM itself requeues a preempted job.

    Args:
        signal_number: The signal that stopped the run.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job and signal_number in REQUEUE_SIGNALS and get_rank() == 0:
        try:
            subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            _logger.warning("Could not requeue SLURM job %s (%s). Rerun the same command to resume.", job, error)


def print_result(result: "TrainingResult", config: "TrainConfig | DecoderTrainConfig") -> None:
    """Print how the run ended, where its files are, and how to train for more steps.

    Args:
        result: The result.
        config: The configuration.
    """
    from sa3train.reports.run_files import read_run
    from sa3train.reports.verdict import NEXT, describe_verdict
    from sa3train.training.run_dir import format_resume_command

    if result.interrupted is not None:
        print(f"stopped by {describe_signal(result.interrupted)} after step {result.steps}; the state is saved.")
        print(f"Resume: {format_resume_command(result.run_dir)}")
        return
    for line in result.summary:
        print(line)
    for answer in describe_verdict(read_run(result.run_dir)):
        if answer.question == NEXT:
            print(f"next:    {answer.text}")
    minutes, seconds = divmod(round(result.seconds), 60)
    print(f"{result.steps} steps, {minutes} min {seconds} s, peak memory {result.peak_memory_gib:.1f} GiB")
    print(f"adapter: {result.adapter}")
    print(f"run:     {result.run_dir}")
    if result.steps >= config.trainer.max_steps:  # else it ran out of patience
        print(f"longer:  {describe_extension(config, result.run_dir)}")


def describe_extension(config: "TrainConfig | DecoderTrainConfig", run_dir: Path) -> str:
    """Describe how to train on after the last step.

    Args:
        config: The configuration of the finished run.
        run_dir: Its folder.

    Returns:
        The command, or the setting of another run where the learning rate has fallen towards the end.
    """
    from sa3train.training.run_dir import format_resume_command
    from sa3train.training.schedules import keeps_rates

    scheduler, steps = dataclasses.asdict(config.scheduler), config.trainer.max_steps
    if keeps_rates(scheduler, steps, 2 * steps, steps):
        return f"{format_resume_command(run_dir)} trainer.max_steps={2 * steps}"
    return f"another run with adapter.start_from={run_dir}; scheduler={scheduler['name']} has ended"


def is_finished(config: "TrainConfig | DecoderTrainConfig", run_dir: Path) -> bool:
    """Check whether a run to be resumed has taken its last step and has all of its files, and no other is asked for.

    Args:
        config: The configuration to resume with.
        run_dir: The run folder.

    Returns:
        Whether nothing is left to do.

    Raises:
        ConfigError: The run in the folder is another one.
    """
    from sa3train.training.run_dir import is_requeued

    record, steps = read_json(run_dir / RECORD_FILE), config.trainer.max_steps
    files = (ADAPTER_FILE, CARD_FILE, *([REPORT_FILE] if config.callbacks.report else []))
    is_over = record.get("status") == "finished" and record.get("steps") == steps
    if not (is_over and (config.resume is not None or is_requeued()) and all((run_dir / f).is_file() for f in files)):
        return False
    return _find_changes(config, run_dir).keys() <= {"run_dir"}


def check_resume(config: "TrainConfig | DecoderTrainConfig", given: Sequence[str]) -> None:
    """Check that a run can be resumed with these settings, before anything heavy is imported.

    Args:
        config: The configuration to resume with.
        given: `key=value` arguments.

    Raises:
        ConfigError: A setting differs that may not, or can have no effect.
    """
    if idle := sorted(_list_keys(given) & {"run_dir", "paths.runs", "name"}):
        raise ConfigError(f"{idle[0]} has no effect with resume={config.resume}. Remove it, or change that.")
    _find_changes(config, Path(str(config.resume)))


def _find_changes(config: "TrainConfig | DecoderTrainConfig", run_dir: Path) -> dict[str, tuple[Any, Any]]:
    """What differs from the run as it was started; an error where that may not."""
    from sa3train.training.run_dir import RunDir

    return RunDir(run_dir, make_table(config, run_dir), {}, config.allow_resume_changes).check_changes()


def make_table(config: "TrainConfig | DecoderTrainConfig", run_dir: Path) -> dict[str, Any]:
    """Make the configuration that a run folder keeps.

    Args:
        config: The configuration.
        run_dir: The run folder.

    Returns:
        Nested dictionaries.
    """
    return dataclasses.asdict(config) | {"run_dir": str(run_dir), "resume": None, "allow_resume_changes": []}
