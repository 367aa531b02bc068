"""Run on the stand-in: trains nano-base once for each configuration it is given. Prints JSON.

Arguments: a folder to work in, and in JSON a list of `key=value` arguments for each name. For each name there is an
answer: `code` (that of sa3-train), `said` (its last lines), `adapter` (its file is there), `waits` (of the host for the
device, from the third step to the last but one), `left` (bytes that a memory plan leaves on the device), `held` (bytes
on the device before the third step and before the last) and `peak` (bytes at most, after the plan).
"""

import gc
import io
import json
import runpy
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from standin import ROOT, Watch, allow_blank_kernels

from sa3train.cli.train import main as sa3_train
from sa3train.models.checkpoint import load_checkpoint
from sa3train.training.callbacks import memory_plan
from sa3train.training.module import LoraModule

STEPS = 6
LAST = 3000
"""Characters that are kept of what a run says."""
SHARED = ("model=nano-base", "callbacks=none", "data.num_workers=0", "trainer.log_every=100")


def trained(arguments: list[str], run_dir: Path) -> dict[str, Any]:
    """One run, and what was seen of it."""
    code, said = 1, io.StringIO()
    with observed() as seen, redirect_stderr(said):
        try:
            code = sa3_train([*SHARED, *arguments, f"trainer.max_steps={STEPS}", f"run_dir={run_dir}"])
        except (Exception, SystemExit):  # noqa: BLE001 (the other runs are to be seen all the same)
            said.write(traceback.format_exc())
    adapter = run_dir / "adapter.safetensors"
    return seen | {"code": code, "said": said.getvalue()[-LAST:], "adapter": adapter.is_file()}


@contextmanager
def observed() -> Iterator[dict[str, Any]]:
    """What is seen of the run within, complete when it is over."""
    watch, watching, seen = Watch(), ExitStack(), dict[str, Any]()
    step, plan = LoraModule.training_step, memory_plan.make_plan

    def training_step(module: LoraModule, batch: Any, batch_idx: int) -> Any:
        place = divmod(batch_idx, module.trainer.accumulate_grad_batches)
        if place == (2, 0):
            seen["held"] = [torch.cuda.memory_allocated()]
            watching.enter_context(watch)
        if place == (STEPS - 1, 0):
            watching.close()
            seen["waits"] = watch.waits
            seen["held"].append(torch.cuda.memory_allocated())
        return step(module, batch, batch_idx)

    def make_plan(*args: Any, **kwargs: Any) -> Any:
        plan(*args, **kwargs)  # what is set up once for all, such as cuBLAS's workspace, is there after a first plan
        before = torch.cuda.memory_allocated()
        made = plan(*args, **kwargs)
        seen["left"] = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        return made

    LoraModule.training_step, memory_plan.make_plan = training_step, make_plan
    try:
        with watching:
            yield seen
    finally:
        LoraModule.training_step, memory_plan.make_plan = step, plan
    seen["peak"] = torch.cuda.max_memory_allocated()
    gc.collect()  # the next run begins with an empty device


def main(folder: Path, configurations: dict[str, list[str]]) -> dict[str, Any]:
    """All of them, one after the other, on twelve clips of 100 to 180 frames: on the stand-in length costs nothing."""
    allow_blank_kernels()
    sys.path.append(str(ROOT / "tests"))
    make_shards = runpy.run_path(str(ROOT / "tests" / "unit" / "training" / "trials.py"))["make_shards"]
    model = load_checkpoint("nano-base", parts=("dit", "conditioner"))
    lengths = [100 + 10 * (number % 9) for number in range(12)]
    fingerprint = model.autoencoder_fingerprint()
    shards = make_shards(folder / "shards", lengths, channels=model.latent_channels, fingerprint=fingerprint)
    return {name: trained([f"data={shards}", *given], folder / name) for name, given in configurations.items()}


with redirect_stdout(sys.stderr):
    answer = main(Path(sys.argv[1]), json.loads(sys.argv[2]))
print(json.dumps(answer))
