"""Small training runs: latent shards to train on, runs by the library, and runs in processes that can be killed.

`serve` forks a fresh process for each run it is asked for, with everything imported and no autograd thread started yet
(torch refuses a backward pass in a process forked after one).
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
from helpers.shards import make_data_module, make_store
from sa3train.adapters.adapter import Adapter
from sa3train.adapters.spec import AdapterSpec
from sa3train.core.log import get_rank
from sa3train.models.checkpoint import load_checkpoint
from sa3train.reports.run_files import read_metrics
from sa3train.training.distributed import count_started_ranks, join_ranks, run_on_rank_zero
from sa3train.training.loggers import CSVLogger, LoggerCollection
from sa3train.training.module import LoraModule
from sa3train.training.prompt_embeddings import PromptEmbedder
from sa3train.training.run import TrainingResult, build_module, train
from sa3train.training.run_dir import open_run
from sa3train.training.settings import (
    CallbackSettings,
    CheckpointSettings,
    DemoSettings,
    LossSettings,
    OptimizerSettings,
    SchedulerSettings,
    TrainerSettings,
    TrainingSettings,
    ValidationSettings,
)

CHANNELS = 64
NO_DEMOS = DemoSettings(enabled=False)


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
    rng = np.random.default_rng(7)
    voice_C = rng.standard_normal(channels)

    def make(frames: int, number: int) -> np.ndarray:
        own_CT = rng.standard_normal((channels, frames)).cumsum(axis=1) * 0.1
        latent_CT: np.ndarray = (voice_C[:, None] + own_CT).astype(np.float16)
        return latent_CT

    caption = "caption {}".format
    return make_store(
        folder, lengths, heldout, prefix, make=make, fingerprint=fingerprint, channels=channels,
        caption=lambda number: caption(number % captions),
    )  # fmt: skip


@dataclass
class Trial:
    """One small training run by the library, with what the tests vary."""

    shards: Path
    run_dir: Path
    max_steps: int = 8
    batch_size: int = 2
    num_workers: int = 0
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=1e-3))
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    trainer: dict[str, Any] = field(default_factory=dict)
    save_every: int = 2
    validation: ValidationSettings = field(default_factory=lambda: ValidationSettings(enabled=False))
    spec: AdapterSpec = field(default_factory=lambda: AdapterSpec("dora-rows", rank=4))
    data: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | str = GOLDEN / "plain"
    seed: int = 3
    tail: float = 0.3
    stop_after: int | None = None
    stop_by: int | type[Exception] = signal.SIGTERM
    start_from: Adapter | None = None
    demos: DemoSettings = NO_DEMOS
    report: bool = False

    def make_settings(self) -> TrainingSettings:
        """The library's settings of this trial."""
        trainer = TrainerSettings(
            max_steps=self.max_steps, log_every=1, accelerator="cpu", activation_checkpointing="none", **self.trainer
        )
        saving = CheckpointSettings(self.save_every, 2)
        callbacks = CallbackSettings(saving, self.validation, self.demos, self.report)
        return TrainingSettings(self.optimizer, self.scheduler, trainer, self.seed, self.loss, callbacks)

    def run(self, resume: bool = False, **recorded: Any) -> TrainingResult:
        """Train; `recorded` is laid over the recorded configuration."""
        torch.set_num_threads(1)
        model = load_checkpoint(self.checkpoint, parts=("dit", "conditioner"))
        data = make_data_module(
            str(self.shards),
            self.batch_size,
            silence_tail_seconds=self.tail,
            num_workers=self.num_workers,
            seed=self.seed,
            pool=4,
            **self.data,
        )
        data.setup()
        join_ranks(gpu=False)
        settings = self.make_settings()
        table, identity = {"loop": self.max_steps, **recorded}, {"data": data.manifest}
        run = run_on_rank_zero(lambda: open_run(self.run_dir, table, identity, resume=resume).begin())
        keep_through = (run.state[0] if run.state else 0) if resume else None
        loggers = [CSVLogger(self.run_dir / "metrics.csv", keep_through)] if get_rank() == 0 else []
        text = PromptEmbedder(model.conditioner)
        text.prepare(data.list_prompts() or [])
        with run, stop_in_step(self.stop_after, self.stop_by):
            return train(
                run=run, model=model, data=data, text=text, spec=self.spec, settings=settings,
                loggers=LoggerCollection(loggers), provenance={"base_model": "golden"}, start_from=self.start_from,
            )  # fmt: skip


@contextlib.contextmanager
def stop_in_step(after: int | None, by: int | type[Exception]) -> Iterator[None]:
    """Within the context the last rank is sent a signal, or fails, in its micro-batch number `after`, from 1.

    A negative signal goes to its whole process group, its loader's workers among them, from a process outside.
    """
    whole = LoraModule.training_step

    def step(self: LoraModule, batch: Any, batch_idx: int) -> Any:
        if batch_idx + 1 == after and get_rank() == count_started_ranks() - 1:
            if not isinstance(by, int):
                raise by
            elif by > 0:
                os.kill(os.getpid(), by)
            else:
                script = f"kill -{-by} -{os.getpgrp()}"
                subprocess.run(["sh", "-c", script], check=True, start_new_session=True)
        return whole(self, batch, batch_idx)

    LoraModule.training_step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        LoraModule.training_step = whole  # type: ignore[method-assign]


def make_module(spec: AdapterSpec, settings: TrainingSettings | None = None) -> LoraModule:
    """The golden model with an adapter of `spec`, ready to train."""
    model = load_checkpoint(GOLDEN / "plain", parts=("dit", "conditioner"))
    return build_module(model, PromptEmbedder(model.conditioner), spec, settings or TrainingSettings())


def read_losses(run_dir: Path) -> dict[int, str]:
    """Logged training losses by step, digit for digit."""
    _, rows = read_metrics(run_dir / "metrics.csv")
    return {int(row["step"]): row["train/loss"] for row in rows if "train/loss" in row}


def read_adapter(run_dir: Path) -> dict[str, torch.Tensor]:
    """The tensors of the run's adapter file."""
    return load_file(run_dir / "adapter.safetensors")


def run_in_two_parts(trial: Trial, stop_after: int) -> TrainingResult:
    """Stop a run by its signal in micro-batch `stop_after`, then resume it to its end."""
    trial.stop_after = stop_after
    trial.run()
    trial.stop_after = None
    return trial.run(resume=True)


def assert_same_results(trial: Trial, expected: Trial) -> None:
    """Two runs logged the same losses, digit for digit, and made the same adapter."""
    assert read_losses(trial.run_dir) == read_losses(expected.run_dir)
    one, two = read_adapter(trial.run_dir), read_adapter(expected.run_dir)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in two)


class Children:
    """Runs in processes of their own, which can be killed. `start` gives a pid, `outcome` waits for it."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", "from helpers.training import serve; serve()"]
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


def serve() -> NoReturn:
    """Fork and poll children as asked on stdin, until it closes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a run prints must not mix with the answers
    while True:
        try:
            kind, *request = pickle.load(sys.stdin.buffer)
        except EOFError:
            os._exit(0)  # there is nothing to tidy up, and torch takes its time
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
