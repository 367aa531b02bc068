"""From the sections of a training configuration to the library's objects."""

import dataclasses
import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sa3train.core.errors import ConfigError
from sa3train.core.log import get_logger, rank

if TYPE_CHECKING:
    import torch

    from sa3train.adapters.spec import AdapterSpec
    from sa3train.cli.train_config import AdapterSettings, DataSettings, TrainConfig
    from sa3train.data.loading.datamodule import LatentDataModule
    from sa3train.training.loggers import Tracker
    from sa3train.training.run import TrainingResult
    from sa3train.training.run_dir import RunFolder
    from sa3train.training.settings import Precision, TrackSettings

_logger = get_logger(__name__)


def precisions(dtype: str, precision: "Precision", gpu: bool) -> tuple["torch.dtype", "Precision"]:
    """The dtype of the frozen weights and the precision of the computation, with each "auto" decided.

    bf16 both on a GPU that has it, else fp32: on a CPU, resuming to the bit and equal ranks are worth more than bf16's
    speed. A base in bf16 is computed with in bf16. Raises `ConfigError` for fp32 computation on a base in bf16.
    """
    import torch

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
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], precision


def refuse_idle(config: "TrainConfig", given: Sequence[str], ranks: int) -> None:
    """Raise `ConfigError` for a `key=value` in `given` (the command line) that can change nothing in this run.

    Values that a recipe or a default sets are not held to this: they wait for what would give them an effect.
    """
    keys = {key for key, equals, _ in (argument.lstrip("+").partition("=") for argument in given) if equals}
    alone = config.data.batch_size * ranks == 1 and config.data.pack_frames is None
    idle = [
        ("callbacks.judge.*", not config.callbacks.judge.enabled, "callbacks.judge.enabled=false"),
        ("callbacks.demos.*", not config.callbacks.demos.enabled, "callbacks.demos.enabled=false"),
        ("objective.coupling", config.objective.coupling and alone, "one clip in a micro-batch: raise data.batch_size"),
        ("data.tail_seconds", config.data.tail_seconds > 0 and not config.objective.silence_seconds,
         "objective.silence_seconds=0"),
        ("data.repeats", not config.data.more, "one source of data: it weighs sources against each other"),
        ("data.weight", not config.data.more, "one source of data: it weighs sources against each other"),
        ("logger.timeout", config.logger.name != "wandb", f"logger={config.logger.name}"),
        ("trainer.strategy", config.trainer.strategy == "fsdp" and ranks == 1, "one rank: there is nothing to share"),
        ("trainer", config.trainer.strategy == "fsdp" and ranks == 1, "one rank: fsdp shares the base among several"),
        ("resume_changes", config.resume is None, "a run that is not resumed"),
    ]  # fmt: skip
    for pattern, without, because in idle:
        for key in sorted(fnmatch.filter(keys, pattern)):
            if without and not key.endswith(".enabled"):
                raise ConfigError(f"{key} has no effect with {because}. Leave it out, or change that.")


def command_line() -> list[str]:
    """The `key=value` arguments of this run, as Hydra has read them; none where Hydra is not at work."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def data_module(settings: "DataSettings", seed: int) -> "LatentDataModule":
    """The data module, set up; its sources are `dir` and those in `more`."""
    from sa3train.data.loading.datamodule import LatentDataModule

    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    first = {"path": values.pop("dir"), "repeats": values.pop("repeats"), "weight": values.pop("weight")}
    data = LatentDataModule([first, *values.pop("more")], seed=seed, **values)
    data.setup()
    return data


def adapter_spec(settings: "AdapterSettings") -> "AdapterSpec":
    """What adapter to train."""
    from sa3train.adapters.spec import AdapterSpec

    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    del values["start_from"]
    return AdapterSpec(**values)


def make_tracker(
    settings: "TrackSettings", run: "RunFolder", name: str, table: Mapping[str, Any], identity: Mapping[str, str]
) -> "Tracker":
    """Where this run's metrics go: on rank 0 `metrics.csv` and what was chosen, elsewhere nowhere."""
    from sa3train.training.loggers import CsvSink, Sink, TensorBoardSink, Tracker, WandbSink

    if rank() != 0:
        return Tracker()
    step = run.state[0] if run.state else None
    keep = (step or 0) if run.record["resumed"] else None
    sinks: list[Sink] = [CsvSink(run.path / "metrics.csv", keep_through=keep)]
    if settings.name == "tensorboard":
        sinks.append(TensorBoardSink(run.path / "tensorboard", purge_from=None if step is None else step + 1))
    if settings.name == "wandb":
        sink = WandbSink(
            run.path / "wandb",
            mode=settings.mode or "online",
            project=settings.project or "sa3train",
            entity=settings.entity,
            name=f"{name}-{run.run_id}",
            run_id=run.run_id,
            config=table,
            tags=settings.tags,
            group=settings.group,
            timeout=settings.timeout,
        )
        index = Path(str(table["data"]["dir"])) / "index.json"
        sink.used("dataset", f"latents-{identity['data'][:12]}", {"manifest": identity["data"]}, index)
        base = {"name": table["model"]["name"], "hash": identity["base"]}
        sink.used("model", f"base-{identity['base'][:12]}", base)
        sinks.append(sink)
    return Tracker(sinks)


def provenance(
    config: "TrainConfig", table: Mapping[str, Any], identity: Mapping[str, str], run_id: str
) -> dict[str, str]:
    """What every adapter file says about where it comes from."""
    return {
        "base_model": config.model.name,
        "base_hash": identity["base"],
        "data_manifest": identity["data"],
        "trigger": config.data.prompts.trigger,
        "run": run_id,
        "training_config": json.dumps(dict(table), sort_keys=True),
    }


def relaunch(ranks: int) -> NoReturn:
    """Become torchrun with so many ranks of this very command. Raises `ConfigError` in a sweep, which cannot."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from sa3train.cli.hydra_app import QUIET, run_stamp

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ConfigError(
            f"a sweep runs its trainings one after another in this process, and each wants {ranks} ranks. "
            f"Set trainer.devices=1, or use launcher=slurm."
        )
    run_stamp()
    arguments = [argument for argument in sys.argv[1:] if argument not in QUIET]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", "sa3train.cli.train", *arguments])


def requeue(signal_number: int) -> None:
    """Ask SLURM to queue this job again, when it warned of the end of its time; a preempted job is queued by SLURM."""
    import signal

    job = os.environ.get("SLURM_JOB_ID")
    if job and signal_number == signal.SIGUSR1 and rank() == 0:
        try:
            subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            _logger.warning("could not queue job %s again (%s); start the same command again to go on", job, error)


def print_result(result: "TrainingResult") -> None:
    """The run's end, for a person."""
    if result.interrupted is not None:
        print(f"stopped by signal {result.interrupted} after step {result.steps}; go on with:")
        print(f"  sa3-train resume={result.run_dir}")
        return
    for line in result.verdict:
        print(line)
    minutes, seconds = divmod(round(result.seconds), 60)
    print(f"{result.steps} steps, {minutes} min {seconds} s, peak memory {result.peak_memory_gib:.1f} GiB")
    print(f"adapter: {result.adapter}")
    print(f"run:     {result.run_dir}")
