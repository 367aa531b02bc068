"""What a run loses to W&B when its server is of no use: tracked steps against untracked ones of the same run.

One training per kind of failure, on nano, every step logged (a run logs every tenth unless told otherwise). Blocks of
ten steps with W&B follow blocks without, so that other work on the machine hits both; the ratio is the median over
pairs of blocks. What a run waits for once, at its start and end, is counted in seconds beside it.

Stand-ins on 127.0.0.1 for a W&B server that is of no use: what a run meets when the network or the service fails.
"""

import contextlib
import http.server
import json
import os
import socket
import statistics
import tempfile
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from sa3train.bench.checkpoints import random_checkpoint
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import dtype_of, run_apart
from sa3train.bench.train import random_shards, training_flags
from sa3train.models.checkpoint import load_checkpoint

KINDS = ("500", "silence", "refusal", "death")
"""Answers 500; takes connections and says nothing; is not there; takes the run, then says nothing more."""


class FaultyServer(http.server.BaseHTTPRequestHandler):
    """Answers everything with 500."""

    def answer(self) -> None:
        """Read the request, since an unread one would look like a broken connection."""
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.send_response(500)
        self.end_headers()

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *_: Any) -> None:
        """Say nothing on stderr."""


class DyingServer(FaultyServer):
    """Takes a run as W&B does; once metrics come it says nothing more, until it is shut down."""

    dead = threading.Event()
    over = threading.Event()

    def answer(self) -> None:
        """What wandb asks before it calls a run its own, then silence."""
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if "file_stream" in self.path:
            self.dead.set()
        if self.dead.is_set():
            self.close_connection = True
            self.over.wait()
            return
        answer = json.dumps({"data": _taken(body) if "graphql" in self.path else {}}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = answer


def _taken(body: bytes) -> dict[str, Any]:
    """The answer to a GraphQL question about a new run."""
    asked = json.loads(body)
    query, name = asked.get("query", ""), asked.get("variables", {}).get("name", "run")
    place = {"id": "P", "name": "p", "entity": {"id": "E", "name": "e"}}
    if "upsertBucket" in query:
        bucket = {"id": "B", "name": name, "displayName": "run", "config": "{}", "historyLineCount": 0}
        return {"upsertBucket": {"bucket": {**bucket, "sweepName": None, "project": place}, "inserted": True}}
    return {"model": {**place, "bucket": None}} if "RunResumeStatus" in query else {}


@contextlib.contextmanager
def dead_server(kind: str) -> Iterator[str]:
    """The address of a server of one of `KINDS`, for as long as the block lasts."""
    handlers = {"500": FaultyServer, "death": DyingServer}
    if kind in handlers:
        DyingServer.dead.clear()
        DyingServer.over.clear()
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handlers[kind])
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            DyingServer.over.set()
            server.shutdown()
            server.server_close()
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        if kind == "silence":
            listener.listen(50)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def pointed_at(server: str) -> dict[str, str]:
    """This process's environment with wandb sent to `server` and nowhere else."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return {**kept, "WANDB_BASE_URL": server, "WANDB_API_KEY": "a" * 40, "WANDB_ERROR_REPORTING": "false"}


BAR, BLOCK, FRAMES = 1.10, 10, 54
NAMES = {
    "500": "answers 500",
    "silence": "takes connections and says nothing",
    "refusal": "is not there",
    "death": "says nothing more after the run's start",
}

_PROGRAM = """
import json, sys, time
from sa3train.cli.train import main
from sa3train.training.module import LoraModule
from sa3train.training.loggers import WandbSink
block, *arguments = sys.argv[1:]
starts, once = [], []
log = WandbSink.metrics

def timed(method):
    def run(*given, **named):
        start = time.perf_counter()
        method(*given, **named)
        once.append(time.perf_counter() - start)
    return run

def in_turn(self, values, step):
    if (len(starts) - 1) // int(block) % 2:
        log(self, values, step)

LoraModule.on_train_batch_start = lambda self, *_: starts.append(time.perf_counter())
WandbSink.metrics = in_turn
WandbSink.__init__, WandbSink.close = timed(WandbSink.__init__), timed(WandbSink.close)
code = main(arguments)
if code:
    sys.exit(code)
print(json.dumps({"starts": starts, "once": once}))
"""


def run(options: Options) -> list[Figure]:
    """Figures of `arch` (nano), `repeats` pairs of blocks each."""
    arch = options.arch or "nano"
    folder = random_checkpoint(arch)
    model = load_checkpoint(folder, dtype=dtype_of(options.dtype), parts=("dit", "conditioner"))
    figures = []
    with tempfile.TemporaryDirectory() as place:
        shards = random_shards(Path(place) / "latents", model, FRAMES)
        for kind in KINDS:
            steps = BLOCK * (2 * options.repeats + 2) + 1  # one pair to warm up, one step to see the last one's end
            flags = training_flags(options, folder, shards, FRAMES)
            flags += [f"run_dir={Path(place) / f'run-{kind}'}", f"trainer.max_steps={steps}"]
            with dead_server(kind) as server:
                flags += ["logger=wandb", "logger.mode=online"]
                found = run_apart(_PROGRAM, BLOCK, *flags, environment=pointed_at(server))
            figures += _figures(arch, kind, found)
    return figures


def _figures(arch: str, kind: str, found: dict[str, Any]) -> list[Figure]:
    ratios, seconds = block_ratios(found["starts"], BLOCK)
    what = f"train {arch}, W&B server {NAMES[kind]}"
    return [
        Figure(
            f"{what}: tracked steps / untracked steps",
            statistics.median(ratios),
            "×",
            BAR,
            note=f"{seconds:.3f} s a step; pairs of blocks {min(ratios):.3g} to {max(ratios):.3g}",
        ),
        Figure(f"{what}: once, at start and end", sum(found["once"]), "s"),
    ]


def block_ratios(starts: list[float], block: int) -> tuple[list[float], float]:
    """Odd blocks of `block` steps over the even ones before them, the first pair left out; and seconds of an even step.

    `starts`: when each step began.
    """
    marks = starts[::block]
    lengths = [after - before for before, after in pairwise(marks)][2:]
    pairs = list(zip(lengths[0::2], lengths[1::2], strict=False))
    return [tracked / bare for bare, tracked in pairs], statistics.median(bare for bare, _ in pairs) / block
