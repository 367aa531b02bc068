"""Small training runs for the tests of this folder: shards without an autoencoder, and runs in killable processes.

Also a program: it forks a fresh process for each run it is asked for, with everything imported and no autograd thread
started yet (torch refuses a backward pass in a process forked after one).
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors.torch import load_file

from helpers.golden import GOLDEN
from sa3train.adapters.adapter import Adapter
from sa3train.adapters.spec import AdapterSpec
from sa3train.core.log import rank
from sa3train.data.loading.datamodule import LatentDataModule
from sa3train.data.shards.index import SILENCE, build_index
from sa3train.data.shards.writer import ShardWriter
from sa3train.models.checkpoint import load_checkpoint
from sa3train.reports.run_files import read_metrics
from sa3train.training.distributed import join_ranks, on_rank_zero
from sa3train.training.loggers import CsvSink, Tracker
from sa3train.training.module import LoraModule
from sa3train.training.prompt_embeddings import PromptBank
from sa3train.training.run import TrainingResult, train
from sa3train.training.run_dir import open_run
from sa3train.training.settings import (
    DemoSettings,
    JudgeSettings,
    LoopSettings,
    Objective,
    OptimizerSettings,
    SaveSettings,
    ScheduleSettings,
)

NAME = "training_trials"
"""What this file is called as a module, in pytest and in the program alike, so that runs can be sent to it."""
CHANNELS = 64


def make_shards(
    folder: Path,
    lengths: Sequence[int],
    heldout: int = 0,
    channels: int = CHANNELS,
    captions: int = 4,
    fingerprint: str = "f" * 64,
    prefix: str = "clip",
) -> Path:
    """Clips of smooth random latents, `lengths` in frames, the last `heldout` held out, in the layout of sa3-encode."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(7)
    voice_C = generator.standard_normal(channels)
    splits = {"train": range(len(lengths) - heldout), "heldout": range(len(lengths) - heldout, len(lengths))}
    for split, numbers in splits.items():
        with ShardWriter(folder, split) as writer:
            for number in numbers:
                own_CT = generator.standard_normal((channels, lengths[number])).cumsum(axis=1) * 0.1
                record = {
                    "key": f"{prefix}-{number:03d}",
                    "clip": f"{prefix}-{number:03d}",
                    "view": "original",
                    "caption": f"caption {number % captions}",
                    "tags": {},
                    "source": f"clip{number}.wav",
                    "seconds": lengths[number] * 4096 / 44100,
                }
                writer.add((voice_C[:, None] + own_CT).astype(np.float16), record)
    np.save(folder / SILENCE, np.full((channels, 16), -1, np.float16))
    model = {"name": "tiny", "fingerprint": fingerprint, "sample_rate": 44100, "downsampling_ratio": 4096}
    build_index(folder, {"model": model}, {})
    return folder


@dataclass
class Trial:
    """One small training run by the library, with what the tests vary."""

    shards: Path
    run_dir: Path
    max_steps: int = 8
    batch_size: int = 2
    workers: int = 0
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=1e-3))
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    objective: Objective = field(default_factory=Objective)
    loop: dict[str, Any] = field(default_factory=dict)
    save_every: int = 2
    judge: JudgeSettings = field(default_factory=lambda: JudgeSettings(enabled=False))
    spec: AdapterSpec = field(default_factory=lambda: AdapterSpec("dora-rows", rank=4))
    data: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | str = GOLDEN / "plain"
    seed: int = 3
    tail: float = 0.3
    stop_after: int | None = None
    stop_by: int = signal.SIGTERM
    start_from: Adapter | None = None
    demos: DemoSettings | None = None
    report: bool = False

    def run(self, resume: bool = False, **settings: Any) -> TrainingResult:
        """Train; `settings` are laid over the recorded configuration."""
        torch.set_num_threads(1)
        model = load_checkpoint(self.checkpoint, parts=("dit", "conditioner"))
        data = LatentDataModule(
            str(self.shards),
            self.batch_size,
            tail_seconds=self.tail,
            num_workers=self.workers,
            seed=self.seed,
            pool=4,
            **self.data,
        )
        data.setup()
        loop = LoopSettings(
            max_steps=self.max_steps, log_every=1, accelerator="cpu", activation_checkpointing="none", **self.loop
        )
        join_ranks(gpu=False)
        table, identity = {"loop": loop.max_steps, **settings}, {"data": data.manifest}
        run = on_rank_zero(lambda: open_run(self.run_dir, table, identity, resume=resume))
        step = run.state[0] if run.state else 0
        sinks = [CsvSink(self.run_dir / "metrics.csv", keep_through=step if resume else None)] if rank() == 0 else []
        text = PromptBank(model.conditioner)
        text.prepare(data.distinct_prompts() or [])
        with stopping(self.stop_after, self.stop_by):
            return self.train(run, model, data, text, loop, sinks)

    def train(self, run: Any, model: Any, data: Any, text: Any, loop: Any, sinks: Any) -> TrainingResult:
        """The library's `train` with this trial's settings."""
        return train(
            run=run, model=model, data=data, text=text, spec=self.spec, objective=self.objective,
            optimizer=self.optimizer, schedule=self.schedule, loop=loop, save=SaveSettings(self.save_every, 2),
            judge=self.judge, tracker=Tracker(sinks), provenance={"base_model": "golden"}, seed=self.seed,
            start_from=self.start_from, demos=self.demos, report=self.report,
        )  # fmt: skip


@contextlib.contextmanager
def stopping(after: int | None, number: int) -> Iterator[None]:
    """Within the context a run is sent the signal `number` in its micro-batch number `after` (counted from 1)."""
    whole = LoraModule.training_step

    def step(self: LoraModule, batch: Any, batch_idx: int) -> Any:
        if batch_idx + 1 == after:
            os.kill(os.getpid(), number)
        return whole(self, batch, batch_idx)

    LoraModule.training_step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        LoraModule.training_step = whole  # type: ignore[method-assign]


def losses_of(run_dir: Path) -> dict[int, str]:
    """Logged training losses by step, digit for digit."""
    _, rows = read_metrics(run_dir / "metrics.csv")
    return {int(row["step"]): row["train/loss"] for row in rows if "train/loss" in row}


def adapter_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """The tensors of the run's adapter file."""
    return load_file(run_dir / "adapter.safetensors")


class Children:
    """Runs in processes of their own, which can be killed. `start` gives a pid, `outcome` waits for it."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def start(self, run: Trial, environment: dict[str, str] | None = None, **arguments: Any) -> int:
        """Start `run.run(**arguments)` in a process group of its own."""
        return int(self._ask("start", run, environment or {}, arguments))

    def two_ranks(self, run: Trial, **arguments: Any) -> list[int]:
        """Start `run` on two ranks that find each other as under torchrun; their pids."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        common |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
        places = ({"RANK": str(number), "LOCAL_RANK": str(number)} for number in range(2))
        return [self.start(run, common | place, **arguments) for place in places]

    def outcome(self, pid: int, limit: float = 300.0) -> int:
        """Wait at most `limit` seconds; the exit code, or minus the signal that ended it."""
        until = time.monotonic() + limit
        while (code := self._ask("poll", pid)) is None:
            if time.monotonic() > until:
                os.killpg(pid, signal.SIGKILL)
            time.sleep(0.02)
        return int(code)

    def close(self) -> None:
        """End the program."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(60)

    def _ask(self, *request: Any) -> Any:
        assert self.server.stdin is not None and self.server.stdout is not None
        pickle.dump(request, self.server.stdin)
        self.server.stdin.flush()
        return pickle.load(self.server.stdout)


def serve() -> None:
    """Fork and poll children as asked on stdin, until it closes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a run prints must not mix with the answers
    while True:
        try:
            kind, *request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if kind == "poll":
            ended, status = os.waitpid(request[0], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        else:
            answer = os.fork() or _child(*request)
            os.setpgid(answer, answer)  # here too: whoever is told the pid may kill the group at once
        pickle.dump(answer, answers)
        answers.flush()


def _child(run: Trial, environment: dict[str, str], arguments: dict[str, Any]) -> NoReturn:
    code = 1
    try:
        os.setpgid(0, 0)
        os.environ.update(environment)
        run.run(**arguments)
        code = 0
    except BaseException:  # noqa: BLE001 (a child must not go on as the server)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.modules[NAME] = sys.modules["__main__"]
    for kind in (Trial, Children):
        kind.__module__ = NAME
    serve()
    os._exit(0)  # there is nothing to tidy up, and torch takes its time
