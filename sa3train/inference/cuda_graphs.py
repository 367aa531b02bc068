"""CUDA graphs: the kernels of a denoiser's step, recorded once in a request and sent to the device as one.

A step of a small model is a thousand launches, which take the host longer than the device takes to compute them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sa3train.core.log import get_logger

logger = get_logger(__name__)

Step = Callable[[Tensor, Tensor], Tensor]


class Recorded:
    """`function(x, t)` for tensors of one shape: run as it is the first time, recorded the second, then replayed.

    What it reads besides must stay where it is. Where recording fails, it goes on being run as it is, and says so.
    """

    def __init__(self, function: Step) -> None:
        self.function = function
        self._calls = 0
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._replay: Callable[[], None] | None = None
        self._output = torch.empty(0)

    def __call__(self, x_BCT: Tensor, t_B: Tensor) -> Tensor:
        self._calls += 1
        if self._calls == 2:
            self._record(x_BCT, t_B)
        if self._replay is None or self._inputs is None:
            return self.function(x_BCT, t_B)
        for kept, given in zip(self._inputs, (x_BCT, t_B), strict=True):
            kept.copy_(given)
        self._replay()
        return self._output.clone()  # samplers keep a velocity while they ask for the next

    def _record(self, x_BCT: Tensor, t_B: Tensor) -> None:
        inputs = (x_BCT.clone(), t_B.clone())
        try:
            self._replay, self._output = capture(self.function, inputs)
            self._inputs = inputs
        except RuntimeError as error:
            why = error.__context__ or error  # ending a recording that has failed is an error too, and says less
            logger.warning("the denoiser's steps could not be recorded (%s); they are launched one by one.", why)


def capture(function: Step, inputs: tuple[Tensor, Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What replays `function` on the memory of `inputs`, and the memory its output will be in.

    Other threads may use the device meanwhile (noise is drawn into pinned memory by one). Not by `torch.cuda.graph`,
    which first gives back all cached memory, pinned memory too: a request would pay for that more than it gains.
    """
    device = inputs[0].device
    place = _place(device)
    graph, output = _recorded(lambda: function(*inputs), device, place.stream, place.anchor.pool())

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, output


def _recorded(
    function: Callable[[], Tensor], device: torch.device, stream: torch.cuda.Stream, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        stream.wait_stream(current)
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            output = function()
        finally:
            graph.capture_end()
    current.wait_stream(stream)
    return graph, output


@dataclass(frozen=True)
class Place:
    """Where recordings are made: one stream, since cuBLAS keeps memory for every stream it has seen, and the memory of
    a first graph, which stays, so that each request records into the memory of the last.
    """

    stream: torch.cuda.Stream
    anchor: torch.cuda.CUDAGraph


@functools.cache
def _place(device: torch.device) -> Place:
    stream = torch.cuda.Stream(device)
    anchor, _ = _recorded(lambda: torch.zeros(1, device=device), device, stream)
    return Place(stream, anchor)
