"""From the sections of a training configuration to the library's objects."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sa3train.errors import ConfigError
from sa3train.log import get_logger, rank

if TYPE_CHECKING:
    import torch

    from sa3train.adapters.spec import AdapterSpec
    from sa3train.data.datamodule import LatentDataModule
    from sa3train.jobs.train import AdapterSettings, DataSettings, TrainConfig
    from sa3train.training.folder import RunFolder
    from sa3train.training.run import TrainingResult
    from sa3train.training.settings import TrackSettings
    from sa3train.training.tracking import Tracker

_logger = get_logger(__name__)


def torch_dtype(name: str, gpu: bool) -> "torch.dtype":
    """The dtype of the frozen weights; auto is bf16 on a GPU that has it, else fp32."""
    import torch

    if name == "auto":
        name = "bf16" if gpu and torch.cuda.is_bf16_supported() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def data_module(settings: "DataSettings", seed: int, max_frames: int) -> "LatentDataModule":
    """The data module, set up; its sources are `dir` and those in `more`."""
    from sa3train.data.datamodule import LatentDataModule

    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    first = {"path": values.pop("dir"), "repeats": values.pop("repeats"), "weight": values.pop("weight")}
    data = LatentDataModule([first, *values.pop("more")], seed=seed, max_frames=max_frames, **values)
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
    from sa3train.training.tracking import CsvSink, Sink, TensorBoardSink, Tracker, WandbSink

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

    from sa3train.jobs.runtime import QUIET, run_stamp

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ConfigError(
            f"a sweep runs its trainings one after another in this process, and each wants {ranks} ranks. "
            f"Set trainer.devices=1, or use launcher=slurm."
        )
    run_stamp()
    arguments = [argument for argument in sys.argv[1:] if argument not in QUIET]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", "sa3train.jobs.train", *arguments])


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
