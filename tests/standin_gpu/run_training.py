"""Run on the stand-in: train nano-base once for each configuration. Print JSON.

Arguments: a folder to work in, and in JSON a list of `key=value` arguments for each name. For each name it has: `code`
(exit code of sa3-train), `log` (its end), `adapter` (whether the file exists), `waits` (of the host for the device,
from the third step to the last but one), `left` (bytes that a memory plan leaves on the device), `allocated` (bytes on
the device before the third step and before the last) and `peak` (peak bytes after the plan).
"""

import gc
import io
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from standin import Watch, allow_blank_kernels

from helpers.training import make_shards
from sa3train.cli.train import main as sa3_train
from sa3train.models.checkpoint import load_checkpoint
from sa3train.training.callbacks import memory_plan
from sa3train.training.module import LoraModule

STEPS = 6
LOG_END = 3000
"""Characters of a run's log that are kept."""
COMMON = ("model=nano-base", "callbacks=none", "data.num_workers=0", "trainer.log_every=100")


def train(arguments: list[str], run_dir: Path) -> dict[str, Any]:
    """Train once, and record what happens."""
    code, log = 1, io.StringIO()
    with observe() as record, redirect_stderr(log):
        try:
            code = sa3_train([*COMMON, *arguments, f"trainer.max_steps={STEPS}", f"run_dir={run_dir}"])
        except (Exception, SystemExit):  # noqa: BLE001 (the other runs are recorded all the same)
            log.write(traceback.format_exc())
    adapter = run_dir / "adapter.safetensors"
    return record | {"code": code, "log": log.getvalue()[-LOG_END:], "adapter": adapter.is_file()}


@contextmanager
def observe() -> Iterator[dict[str, Any]]:
    """Record a run inside the block; the record is complete at its end."""
    watch, watching, record = Watch(), ExitStack(), dict[str, Any]()
    step, plan = LoraModule.training_step, memory_plan.make_memory_plan

    def training_step(module: LoraModule, batch: Any, batch_idx: int) -> Any:
        position = divmod(batch_idx, module.trainer.accumulate_grad_batches)
        if position == (2, 0):
            record["allocated"] = [torch.cuda.memory_allocated()]
            watching.enter_context(watch)
        if position == (STEPS - 1, 0):
            watching.close()
            record["waits"] = watch.waits
            record["allocated"].append(torch.cuda.memory_allocated())
        return step(module, batch, batch_idx)

    def make_plan(*args: Any, **kwargs: Any) -> Any:
        plan(*args, **kwargs)  # a first plan sets up what stays, such as cuBLAS's workspace
        before = torch.cuda.memory_allocated()
        made = plan(*args, **kwargs)
        record["left"] = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        return made

    LoraModule.training_step, memory_plan.make_memory_plan = training_step, make_plan
    try:
        with watching:
            yield record
    finally:
        LoraModule.training_step, memory_plan.make_memory_plan = step, plan
    record["peak"] = torch.cuda.max_memory_allocated()
    gc.collect()  # the next run starts with an empty device


def main(folder: Path, configurations: dict[str, list[str]]) -> dict[str, Any]:
    """Run all trainings on twelve clips of 100 to 180 frames; on the stand-in, length costs no time."""
    allow_blank_kernels()
    model = load_checkpoint("nano-base", parts=("dit", "conditioner"))
    lengths = [100 + 10 * (number % 9) for number in range(12)]
    fingerprint = model.autoencoder_fingerprint()
    shards = make_shards(folder / "shards", lengths, channels=model.latent_channels, fingerprint=fingerprint)
    return {name: train([f"data={shards}", *overrides], folder / name) for name, overrides in configurations.items()}


with redirect_stdout(sys.stderr):
    answer = main(Path(sys.argv[1]), json.loads(sys.argv[2]))
print(json.dumps(answer))
