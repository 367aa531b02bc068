"""Overhead of W&B tracking when its server fails: tracked steps against untracked ones of the same run.

One training on nano for each kind of failure, every step logged (by default a run logs every tenth). Blocks of ten
steps with W&B follow blocks without, so that other work on the machine affects both; the ratio is the median over pairs
of blocks. What a run waits for once, at its start and end, is reported in seconds.

The servers that fail run on 127.0.0.1.
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

from sa3train.bench.checkpoints import make_random_checkpoint
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import run_in_subprocess
from sa3train.bench.tasks import measure_tracking
from sa3train.bench.train import list_training_flags, make_random_shards
from sa3train.core.dtypes import get_dtype
from sa3train.models.checkpoint import load_checkpoint

FAILURES = {
    "500": "answers 500",
    "silence": "accepts connections and never answers",
    "refusal": "refuses connections",
    "death": "stops answering after the run's start",
}
"""What a W&B server does, by the names that `run_faulty_server` knows."""
TARGET, BLOCK, FRAMES = 1.10, 10, 54


class FaultyServer(http.server.BaseHTTPRequestHandler):
    """A server that answers every request with 500."""

    def answer(self) -> None:
        """Read the request (an unread one would look like a broken connection) and refuse it."""
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.send_response(500)
        self.end_headers()

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *_: Any) -> None:
        """Log nothing to stderr.

        Args:
            *_: Ignored.
        """


class DyingServer(FaultyServer):
    """A server that accepts a run as W&B does, and stops answering when metrics arrive."""

    dead = threading.Event()
    over = threading.Event()

    def answer(self) -> None:
        """Return what wandb asks for before it starts a run; then keep connections open and return nothing."""
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if "file_stream" in self.path:
            self.dead.set()
        if self.dead.is_set():
            self.close_connection = True
            self.over.wait()
            return
        answer = json.dumps({"data": _answer_graphql(body) if "graphql" in self.path else {}}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = answer


def _answer_graphql(body: bytes) -> dict[str, Any]:
    """Answer a GraphQL query about a new run."""
    asked = json.loads(body)
    query, name = asked.get("query", ""), asked.get("variables", {}).get("name", "run")
    project = {"id": "P", "name": "p", "entity": {"id": "E", "name": "e"}}
    if "upsertBucket" in query:
        bucket = {"id": "B", "name": name, "displayName": "run", "config": "{}", "historyLineCount": 0}
        return {"upsertBucket": {"bucket": {**bucket, "sweepName": None, "project": project}, "inserted": True}}
    return {"model": {**project, "bucket": None}} if "RunResumeStatus" in query else {}


@contextlib.contextmanager
def run_faulty_server(kind: str) -> Iterator[str]:
    """Run a server that fails, for as long as the block lasts.

    Args:
        kind: Key of `FAILURES`.

    Yields:
        Its address.
    """
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


def make_wandb_environment(server: str) -> dict[str, str]:
    """Make the environment of a process whose W&B runs go to a server and nowhere else.

    Args:
        server: Address of the server.

    Returns:
        Environment variables.
    """
    others = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return {**others, "WANDB_BASE_URL": server, "WANDB_API_KEY": "a" * 40, "WANDB_ERROR_REPORTING": "false"}


def run(options: Options) -> list[Figure]:
    """Measure a run of `sa3-train` for each kind of failure.

    Args:
        options: `arch` (default nano), `repeats`: pairs of blocks.

    Returns:
        Ratio of steps and seconds at start and end, for each kind.
    """
    arch = options.arch or "nano"
    folder = make_random_checkpoint(arch)
    model = load_checkpoint(folder, dtype=get_dtype(options.dtype), parts=("dit", "conditioner"))
    steps = BLOCK * (2 * options.repeats + 2) + 1  # a pair to warm up, and one step to see the end of the last one
    figures = []
    with tempfile.TemporaryDirectory() as work:
        shards = make_random_shards(Path(work) / "latents", model, FRAMES)
        for kind, failure in FAILURES.items():
            flags = list_training_flags(options, folder, shards, FRAMES)
            flags += [f"run_dir={Path(work) / f'run-{kind}'}", f"trainer.max_steps={steps}"]
            flags += ["logger=wandb", "logger.mode=online"]
            with run_faulty_server(kind) as server:
                environment = make_wandb_environment(server)
                measured = run_in_subprocess(measure_tracking, flags, BLOCK, environment=environment)
            ratios, seconds = _compute_block_ratios(measured["starts"], BLOCK)
            what = f"train {arch}, W&B server {failure}"
            note = f"{seconds:.3f} s a step; pairs of blocks {min(ratios):.3g} to {max(ratios):.3g}"
            ratio = statistics.median(ratios)
            figures.append(Figure(f"{what}: tracked steps / untracked steps", ratio, "×", TARGET, note=note))
            figures.append(Figure(f"{what}: once, at start and end", sum(measured["once"]), "s"))
    return figures


def _compute_block_ratios(starts: list[float], block: int) -> tuple[list[float], float]:
    """Divide odd blocks of steps by the even ones before them, without the first pair.

    `starts` are the seconds at the start of each step. Returns the ratios, and the median seconds of an even step.
    """
    marks = starts[::block]
    lengths = [after - before for before, after in pairwise(marks)][2:]
    pairs = list(zip(lengths[0::2], lengths[1::2], strict=False))
    return [tracked / untracked for untracked, tracked in pairs], statistics.median(one for one, _ in pairs) / block
