"""Measure time and memory in ways that other work on the machine disturbs little.

Tasks that are compared run in turn within one round, and a ratio is the median over rounds of each round's own ratio,
so load that comes and goes affects both sides. Tasks whose memory or imports must not depend on earlier work run in a
process of their own.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sa3train.bench.figures import Figure
from sa3train.core.device import synchronize
from sa3train.core.errors import SA3Error

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Timings:
    """Wall-clock and processor seconds of each task in each round."""

    rounds: dict[str, list[float]]
    processor: dict[str, list[float]]

    def median(self, task: str) -> float:
        """Return the median wall-clock time of a task.

        Args:
            task: Name of the task.

        Returns:
            Seconds.
        """
        return statistics.median(self.rounds[task])

    def best(self, task: str) -> float:
        """Return the wall-clock time of a task's fastest round.

        Args:
            task: Name of the task.

        Returns:
            Seconds.
        """
        return min(self.rounds[task])

    def compare(self, name: str, task: str, base: str, target: float | None = None) -> Figure:
        """Make the figure of `task` / `base`.

        Its note has the seconds of both, the range of the ratio over rounds, and the same ratio in processor time.

        Args:
            name: Name of the figure.
            task: Name of the task.
            base: Name of the task it is compared with.
            target: Ratio to reach at most; None if there is none.

        Returns:
            The figure.
        """
        ratios = _divide(self.rounds[task], self.rounds[base])
        processor = statistics.median(_divide(self.processor[task], self.processor[base]))
        note = (
            f"{self.median(task):.2f} s against {self.median(base):.2f} s; "
            f"rounds {min(ratios):.3g} to {max(ratios):.3g}, in processor time {processor:.3g}"
        )
        return Figure(name, statistics.median(ratios), "×", target, note=note)


def _divide(numerators: list[float], denominators: list[float]) -> list[float]:
    return [one / other for one, other in zip(numerators, denominators, strict=True)]


def time_interleaved(
    tasks: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu", warm_up: int = 1
) -> Timings:
    """Time tasks that run in turn, once per round.

    Args:
        tasks: Functions to time, by name.
        repeats: Measured rounds.
        device: Device to wait for before and after each task.
        warm_up: Rounds before the measured ones.

    Returns:
        The times of all measured rounds.
    """
    timings = Timings({name: [] for name in tasks}, {name: [] for name in tasks})
    for index in range(warm_up + repeats):
        for name, task in tasks.items():
            wait(device)
            start, start_processor = time.perf_counter(), time.process_time()
            task()
            wait(device)
            if index >= warm_up:
                timings.rounds[name].append(time.perf_counter() - start)
                timings.processor[name].append(time.process_time() - start_processor)
    return timings


def wait(device: str) -> None:
    """Wait until a device has finished its work.

    Args:
        device: Name of the device; nothing happens for the CPU.
    """
    synchronize(torch.device(device))


def measure_peak_allocation(task: Callable[[], object], device: str = "cpu") -> int:
    """Measure the most bytes that torch held at once for tensors made by a task.

    On a CPU it is computed from the profiler's record of all allocations. Unlike resident memory it does not depend on
    what the process did before. Scratch memory inside kernels is not counted.

    Args:
        task: Function to run.
        device: Device on which it allocates.

    Returns:
        Bytes above what was allocated before.
    """
    if device.startswith("cuda"):
        with PeakMemory(device) as memory:
            task()
        return memory.bytes
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        task()
    allocated = peak = 0
    results = recorded.profiler.kineto_results if recorded.profiler is not None else None
    events = [] if results is None else [event for event in results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


class PeakMemory:
    """Context manager that measures peak memory in bytes above what was in use at its start.

    Attributes:
        bytes: On CUDA, memory held by torch's allocator. On Linux, the process's own (anonymous) memory, sampled every
            5 ms. Elsewhere 0.
        with_files: On Linux, the same with mapped file pages, from the kernel's high-water mark. Elsewhere 0.
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
            _CLEAR.write_text("5", encoding="ascii")  # resets the high-water mark
            self._start = _read_status("RssAnon", "VmRSS")
            self._peak = self._start["RssAnon"]
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.startswith("cuda"):
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._start["RssAnon"]
        elif self._sampler is not None:
            self._stop.set()
            self._sampler.join()
            status = _read_status("RssAnon", "VmHWM")
            self.bytes = max(self._peak, status["RssAnon"]) - self._start["RssAnon"]
            self.with_files = status["VmHWM"] - self._start["VmRSS"]

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, _read_status("RssAnon")["RssAnon"])


def _read_status(*keys: str) -> dict[str, int]:
    """Read lines of /proc/self/status, in bytes. psutil has neither the anonymous part nor the high-water mark."""
    values = dict.fromkeys(keys, 0)
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key in values:
            values[key] = int(value.split()[0]) * 1024
    return values


def run_in_subprocess(task: Callable[..., Any], *arguments: object, timeout: float | None = None) -> Any:
    """Call a function in a fresh Python process.

    Args:
        task: A function at the top level of a module.
        *arguments: Its positional arguments, of types that JSON has.
        timeout: Seconds after which the process is stopped.

    Returns:
        What the function returned, as JSON has it.

    Raises:
        SA3Error: The process failed or took too long. The message has the end of its stderr.
    """
    program = (
        f"import json, sys; from {task.__module__} import {task.__name__} as task; "
        "print(json.dumps(task(*json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", program, json.dumps(arguments)]
    try:
        process = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise SA3Error(f"stopped after {timeout:g} s") from error
    if process.returncode:
        raise SA3Error(f"a benchmark process failed: {process.stderr.strip()[-500:]}")
    return json.loads(process.stdout.strip().splitlines()[-1])


@contextlib.contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Compute with a number of torch threads inside the block.

    Args:
        count: Threads of one operation.

    Yields:
        Nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
