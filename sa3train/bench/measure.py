"""Times and memory, measured so that a busy machine disturbs ratios little.

Tasks that are compared run in turn within one round, and a ratio is the median over rounds of the round's own ratio:
load that comes and goes hits both sides of it.

Programs measured in a process of their own, so that what ran before cannot lend them memory or imports.

Threads and dtypes of a bench.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from sa3train.core.errors import ConfigError, SA3Error

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Timings:
    """Seconds of every task in every round, and the processor seconds that this process spent on it."""

    rounds: dict[str, tuple[float, ...]]
    work: dict[str, tuple[float, ...]]

    def median(self, task: str) -> float:
        """Seconds."""
        return statistics.median(self.rounds[task])

    def best(self, task: str) -> float:
        """Seconds of the fastest round."""
        return min(self.rounds[task])

    def ratio(self, task: str, base: str) -> float:
        """The median over rounds of task / base."""
        pairs = zip(self.rounds[task], self.rounds[base], strict=True)
        return statistics.median(mine / other for mine, other in pairs)

    def spread(self, task: str, base: str) -> str:
        """The ratio in single rounds, and in processor time, which other load disturbs less, as text."""
        ratios = [mine / other for mine, other in zip(self.rounds[task], self.rounds[base], strict=True)]
        work = statistics.median(mine / other for mine, other in zip(self.work[task], self.work[base], strict=True))
        return f"rounds {min(ratios):.3g} to {max(ratios):.3g}, in processor time {work:.3g}"


def interleaved(
    tasks: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu", warm_up: int = 1
) -> Timings:
    """Run every task once per round, `warm_up` rounds unmeasured and then `repeats` measured ones."""
    rounds: dict[str, list[float]] = {name: [] for name in tasks}
    work: dict[str, list[float]] = {name: [] for name in tasks}
    for index in range(warm_up + repeats):
        for name, task in tasks.items():
            wait(device)
            start, start_work = time.perf_counter(), time.process_time()
            task()
            wait(device)
            if index >= warm_up:
                rounds[name].append(time.perf_counter() - start)
                work[name].append(time.process_time() - start_work)
    return Timings(_fixed(rounds), _fixed(work))


def _fixed(rounds: Mapping[str, list[float]]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(seconds) for name, seconds in rounds.items()}


def wait(device: str) -> None:
    """Let a CUDA device finish what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_allocated(task: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes that torch held at once for tensors made in `task`.

    On the CPU it is counted from the profiler's record of every allocation: unlike resident memory it does not depend
    on what the process had used before. Scratch memory inside kernels is not in it.
    """
    if device.startswith("cuda"):
        with PeakMemory(device) as memory:
            task()
        return memory.bytes
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        task()
    held = peak = 0
    results = recorded.profiler.kineto_results if recorded.profiler is not None else None
    events = [] if results is None else [event for event in results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class PeakMemory:
    """Peak memory inside a `with` block, in bytes over what was there at its start.

    `bytes`: on CUDA what torch's allocator held; on Linux the process's own (anonymous) memory, sampled every 5 ms, and
    `with_files` that with mapped file pages, from the kernel's high-water mark. Elsewhere both are 0.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.bytes = 0
        self.with_files = 0
        self._start = {"RssAnon": 0, "VmRSS": 0}
        self._peak = 0
        self._stop = threading.Event()
        self._sampler: threading.Thread | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start["RssAnon"] = torch.cuda.memory_allocated(self.device)
        elif _STATUS.exists():
            _CLEAR.write_text("5", encoding="ascii")  # the high-water mark starts anew
            self._start = status("RssAnon", "VmRSS")
            self._peak = self._start["RssAnon"]
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.startswith("cuda"):
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._start["RssAnon"]
        elif self._sampler is not None:
            self._stop.set()
            self._sampler.join()
            found = status("RssAnon", "VmHWM")
            self.bytes = max(self._peak, found["RssAnon"]) - self._start["RssAnon"]
            self.with_files = found["VmHWM"] - self._start["VmRSS"]

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, status("RssAnon")["RssAnon"])


def status(*keys: str) -> dict[str, int]:
    """Bytes of the given lines of /proc/self/status."""
    found = dict.fromkeys(keys, 0)
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key in found:
            found[key] = int(value.split()[0]) * 1024
    return found


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, on Linux; None elsewhere."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    for line in path.read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def run_apart(program: str, *arguments: object, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run Python code with `arguments` as its `sys.argv[1:]`; the last line it prints is JSON and is returned.

    `environment`: in place of this process's own. Raises `SA3Error` with the end of its messages when it fails.
    """
    command = [sys.executable, "-c", program, *map(str, arguments)]
    given = os.environ if environment is None else environment
    done = subprocess.run(command, capture_output=True, text=True, env=given, check=False)
    if done.returncode:
        raise SA3Error(f"a measuring process failed: {done.stderr.strip()[-500:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(name: str) -> torch.dtype:
    """The dtype called `name`. Raises `ConfigError` for an unknown one."""
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}: there are {', '.join(DTYPES)}.")
    return DTYPES[name]


@contextlib.contextmanager
def own_threads(count: int) -> Iterator[None]:
    """Compute with `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
