"""Latent shards without an autoencoder and the smallest real checkpoint, for everything that trains."""

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.spec import AdapterSpec
from sa3train.data.datamodule import LatentDataModule
from sa3train.data.index import SILENCE, build_index
from sa3train.data.shards import ShardWriter
from sa3train.log import rank
from sa3train.models.checkpoint import load_checkpoint
from sa3train.training.folder import open_run
from sa3train.training.module import LoraModule
from sa3train.training.parallel import join_ranks, on_rank_zero
from sa3train.training.run import TrainingResult, train
from sa3train.training.settings import (
    DemoSettings,
    JudgeSettings,
    LoopSettings,
    Objective,
    OptimizerSettings,
    SaveSettings,
    ScheduleSettings,
)
from sa3train.training.text import PromptBank
from sa3train.training.tracking import CsvSink, Tracker, read_metrics

GOLDEN = Path(__file__).parents[2] / "golden"
CHANNELS = 64


def make_shards(
    folder: Path,
    lengths: Sequence[int],
    heldout: int = 0,
    channels: int = CHANNELS,
    captions: int = 4,
    fingerprint: str = "f" * 64,
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
                    "key": f"clip-{number:03d}",
                    "clip": f"clip-{number:03d}",
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


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and four held-out clips of 8 to 16 frames."""
    return make_shards(tmp_path_factory.mktemp("data"), [8 + number % 9 for number in range(16)], heldout=4)


@pytest.fixture
def shard_maker(tmp_path: Path) -> Callable[..., Path]:
    """`shard_maker("name", lengths, heldout=1)`."""
    return lambda name, *args, **kwargs: make_shards(tmp_path / name, *args, **kwargs)


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
    judge: JudgeSettings = field(default_factory=lambda: JudgeSettings(clips=0))
    spec: AdapterSpec = field(default_factory=lambda: AdapterSpec("dora-rows", rank=4))
    data: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path = GOLDEN / "plain"
    tail: float = 0.3
    stop_after: int | None = None
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
            seed=1,
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
        with stopping(self.stop_after):
            return self.train(run, model, data, text, loop, sinks)

    def train(self, run: Any, model: Any, data: Any, text: Any, loop: Any, sinks: Any) -> TrainingResult:
        """The library's `train` with this trial's settings."""
        return train(
            run=run, model=model, data=data, text=text, spec=self.spec, objective=self.objective,
            optimizer=self.optimizer, schedule=self.schedule, loop=loop, save=SaveSettings(self.save_every, 2),
            judge=self.judge, tracker=Tracker(sinks), provenance={"base_model": "golden"}, seed=3,
            start_from=self.start_from, demos=self.demos, report=self.report,
        )  # fmt: skip


@contextlib.contextmanager
def stopping(after: int | None) -> Iterator[None]:
    """Within the context a run is sent SIGTERM in its micro-batch number `after` (counted from 1)."""
    whole = LoraModule.training_step

    def step(self: LoraModule, batch: Any, batch_idx: int) -> Any:
        if batch_idx + 1 == after:
            os.kill(os.getpid(), signal.SIGTERM)
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


def in_child(function: Callable[[], object], environment: dict[str, str] | None = None) -> int:
    """Run `function` in a forked process group of its own (everything is imported already); returns its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            os.environ.update(environment or {})
            function()
            code = 0
        except BaseException:  # noqa: BLE001 (a child must not go on into pytest)
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def outcome(pid: int, limit: float = 120.0) -> int:
    """Wait for a child, at most `limit` seconds; its exit code, or minus the signal that ended it."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def two_ranks(run: "Trial", **arguments: Any) -> list[int]:
    """Start `run` on two ranks that find each other as under torchrun; their pids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    return [
        in_child(lambda: run.run(**arguments), common | {"RANK": str(number), "LOCAL_RANK": str(number)})
        for number in range(2)
    ]


@pytest.fixture
def trial(shards: Path, tmp_path: Path) -> Callable[..., Trial]:
    """`trial("name", max_steps=4, …)`."""
    return lambda name, **values: Trial(values.pop("shards", shards), tmp_path / name, **values)


@pytest.fixture(scope="session")
def helpers() -> SimpleNamespace:
    """The functions of this file, since test folders are not packages."""
    return SimpleNamespace(
        losses_of=losses_of,
        adapter_of=adapter_of,
        in_child=in_child,
        outcome=outcome,
        two_ranks=two_ranks,
        make_shards=make_shards,
    )


@pytest.fixture(scope="session")
def make_trial() -> type[Trial]:
    """`make_trial(shards, run_dir, max_steps=4, …)`, for fixtures of a wider scope."""
    return Trial
