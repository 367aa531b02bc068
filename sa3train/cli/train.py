"""`sa3-train`: train an adapter on latent shards. The configuration is `conf/train.yaml`."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sa3train.cli.hydra_app import hydra_job
from sa3train.cli.train_config import TrainConfig
from sa3train.core.errors import SA3Error
from sa3train.core.log import rank

if TYPE_CHECKING:
    from sa3train.training.run import TrainingResult


def main(argv: list[str] | None = None) -> int:
    """The console command."""
    return hydra_job(
        "train",
        TrainConfig,
        train,
        shorthand={"data": "data.dir", "model": "model.name"},
        paths=("run_dir", "resume", "paths.runs", "adapter.start_from"),
        resume="resume",
        argv=argv,
    )


def train(config: TrainConfig) -> int:
    """Run one training from its configuration; the exit code is 128 + the signal when one stopped it."""
    from sa3train.cli.train_setup import print_result, requeue

    result = run_training(config)
    if rank() == 0:
        print_result(result)
    if result.interrupted is not None:
        requeue(result.interrupted)
        return 128 + result.interrupted
    return 0


def run_training(config: TrainConfig) -> "TrainingResult":
    """Load what the configuration names, build everything, train."""
    import torch

    from sa3train.adapters.formats.io import load_adapter
    from sa3train.cli import train_setup as parts
    from sa3train.models.checkpoint import load_checkpoint
    from sa3train.training.distributed import check_world, join_ranks, on_rank_zero, on_rank_zero_first, started_ranks
    from sa3train.training.prompt_embeddings import PromptBank
    from sa3train.training.run import train as train_adapter
    from sa3train.training.run_dir import open_run
    from sa3train.training.trainer import devices_of, uses_gpu

    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    gpu = uses_gpu(config.trainer)
    if started_ranks() == 1 and config.trainer.num_nodes == 1 and devices_of(config.trainer) > 1:
        parts.relaunch(devices_of(config.trainer))
    ranks = devices_of(config.trainer) * config.trainer.num_nodes
    check_world(ranks)
    parts.refuse_idle(config, parts.command_line(), ranks)
    join_ranks(gpu)
    dtype, precision = parts.precisions(config.model.dtype, config.trainer.precision, gpu)
    data = parts.data_module(config.data, config.seed)  # first: what is wrong with it is said before gigabytes load
    model = on_rank_zero_first(lambda: load_checkpoint(config.model.name, dtype=dtype, parts=("dit", "conditioner")))
    data.limit(model.max_frames)
    data.check_autoencoder(model.name, model.autoencoder_fingerprint())
    identity = {"data": data.manifest, "base": model.fingerprint()}
    run_dir = Path(config.resume or config.run_dir)
    table = dataclasses.asdict(config) | {"run_dir": str(run_dir), "resume": None, "resume_changes": []}
    run = on_rank_zero(
        lambda: open_run(run_dir, table, identity, resume=config.resume is not None, allowed=config.resume_changes)
    )
    try:
        text = PromptBank(model.conditioner)
        text.prepare(data.distinct_prompts() or [])
        tracker = parts.make_tracker(config.logger, run, config.name, table, identity)
        result = train_adapter(
            run=run,
            model=model,
            data=data,
            text=text,
            spec=parts.adapter_spec(config.adapter),
            start_from=load_adapter(config.adapter.start_from) if config.adapter.start_from else None,
            objective=config.objective,
            optimizer=config.optimizer,
            schedule=config.scheduler,
            loop=dataclasses.replace(config.trainer, precision=precision),
            save=config.callbacks.save,
            judge=config.callbacks.judge,
            demos=config.callbacks.demos,
            report=config.callbacks.report,
            tracker=tracker,
            provenance=parts.provenance(config, table, identity, run.run_id),
            seed=config.seed,
        )
    except SA3Error:
        run.abandon()
        raise
    tracker.close(failed=result.interrupted is not None)
    return result


if __name__ == "__main__":
    sys.exit(main())
