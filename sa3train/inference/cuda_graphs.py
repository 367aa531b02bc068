"""CUDA graphs: the kernels of a denoiser's step, captured once per generation and launched together.

A step of a small model is a thousand launches, which take the host longer than the device takes to compute them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sa3train.core.log import get_logger

logger = get_logger(__name__)

Step = Callable[[Tensor, Tensor], Tensor]


class CUDAGraphRunner:
    """A `function(x, t)` for tensors of one shape: run eagerly the first time, captured the second, then replayed.

    All other memory it reads must stay at its address. Where capture fails, it runs eagerly and logs a warning.

    Args:
        function: The step: (B, C, T) and (B,) to (B, C, T).
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
            self._capture(x_BCT, t_B)
        if self._replay is None or self._inputs is None:
            return self.function(x_BCT, t_B)
        for static, given in zip(self._inputs, (x_BCT, t_B), strict=True):
            static.copy_(given)
        self._replay()
        return self._output.clone()  # samplers keep a velocity while they ask for the next

    def _capture(self, x_BCT: Tensor, t_B: Tensor) -> None:
        inputs = (x_BCT.clone(), t_B.clone())
        try:
            self._replay, self._output = capture_graph(self.function, inputs)
            self._inputs = inputs
        except RuntimeError as error:
            cause = error.__context__ or error  # ending a failed capture is an error too, and says less
            logger.warning("CUDA graph capture of the denoiser's step failed (%s). Steps run eagerly.", cause)


def capture_graph(function: Step, inputs: tuple[Tensor, Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture a function as a CUDA graph that reads the memory of its inputs.

    Other threads may use the device meanwhile (one draws noise into pinned memory). `torch.cuda.graph` is not used: it
    first releases all cached memory, pinned memory too, which would cost a generation more than the graph saves.

    Args:
        function: The function to capture.
        inputs: Its arguments.

    Returns:
        A function that replays the graph, and the memory its output will be in.
    """
    device = inputs[0].device
    stream, anchor = _get_capture_context(device)
    graph, output = _capture(lambda: function(*inputs), device, stream, anchor.pool())

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, output


def _capture(
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


class _CaptureContext(NamedTuple):
    """One stream for all captures, since cuBLAS keeps memory for every stream it has seen, and a first graph that stays
    and whose memory each generation captures into.
    """

    stream: torch.cuda.Stream
    anchor: torch.cuda.CUDAGraph


@functools.cache
def _get_capture_context(device: torch.device) -> _CaptureContext:
    stream = torch.cuda.Stream(device)
    anchor, _ = _capture(lambda: torch.zeros(1, device=device), device, stream)
    return _CaptureContext(stream, anchor)
