"""`sa3-train`: train an adapter on latent shards. The configuration is `conf/train.yaml`."""

import dataclasses
import sys
from typing import TYPE_CHECKING

from sa3train.cli.hydra_app import run_hydra_job
from sa3train.cli.train_config import TrainConfig
from sa3train.core.log import get_rank

if TYPE_CHECKING:
    from sa3train.training.run import TrainingResult


def main(argv: list[str] | None = None) -> int:
    """Run the console command.

    Args:
        argv: Command-line arguments; None for `sys.argv`.

    Returns:
        Exit code.
    """
    return run_hydra_job(
        "train",
        TrainConfig,
        train,
        shorthand={"data": "data.dir", "model": "model.name"},
        paths=("run_dir", "resume", "paths.runs", "adapter.start_from"),
        resume="resume",
        argv=argv,
    )


def train(config: TrainConfig) -> int:
    """Train once.

    Args:
        config: The configuration.

    Returns:
        Exit code: 0, or 128 + the signal that stopped the run.
    """
    from sa3train.cli.train_setup import print_result, requeue

    result = run_training(config)
    if get_rank() == 0:
        print_result(result)
    if result.interrupted is not None:
        requeue(result.interrupted)
        return 128 + result.interrupted
    return 0


def run_training(config: TrainConfig) -> "TrainingResult":
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
    from sa3train.models.checkpoint import load_checkpoint
    from sa3train.training import step
    from sa3train.training.distributed import run_on_rank_zero, run_on_rank_zero_first
    from sa3train.training.trainer import resolve_precisions, uses_gpu

    run_dir = train_setup.get_run_dir(config)
    train_setup.check_run_dir(run_dir, config.data)
    train_setup.start_ranks(config)
    dtype, precision = resolve_precisions(config.model.dtype, config.trainer.precision, uses_gpu(config.trainer))
    data = train_setup.make_data_module(config.data, config.seed)  # first: its errors come before gigabytes load
    identity = {"data": data.manifest, "draws": f"{sampler.DRAWS_VERSION}.{step.DRAWS_VERSION}"}
    table = dataclasses.asdict(config) | {"run_dir": str(run_dir), "resume": None, "allow_resume_changes": []}
    resume, allowed = config.resume is not None, config.allow_resume_changes
    run = run_on_rank_zero(lambda: training.open_run(run_dir, table, identity, resume=resume, allowed=allowed))
    with run:
        model = run_on_rank_zero_first(
            lambda: load_checkpoint(config.model.name, dtype=dtype, parts=("dit", "conditioner"))
        )
        data.limit_frames(model.max_frames)
        data.check_autoencoder(model.name, model.autoencoder_fingerprint())
        base = model.fingerprint()
        run = run_on_rank_zero(lambda: run.begin(base=base))
        identity = run.identity
        text = training.PromptEmbedder(model.conditioner)
        text.prepare(data.list_prompts() or [])
        loggers = train_setup.make_loggers(config.logger, run, config.name, table, identity)
        result = training.train(
            run=run,
            model=model,
            data=data,
            text=text,
            spec=config.adapter.make_spec(),
            settings=dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, precision=precision)),
            loggers=loggers,
            provenance=train_setup.make_provenance(config, table, identity, run.run_id),
            start_from=load_adapter(config.adapter.start_from) if config.adapter.start_from else None,
        )
    loggers.close(failed=result.interrupted is not None)
    return result


if __name__ == "__main__":
    sys.exit(main())
