"""For programs that run on the stand-in: what its blank kernels cannot do, and a record of where the host waits."""

import ctypes
import traceback
import warnings
from pathlib import Path
from typing import Any, Self

import torch

from sa3train.core.device import to_device

ROOT = Path(__file__).parents[2]
FRAMES = 3
"""Innermost source lines of this repository that are told of a wait."""


def allow_blank_kernels() -> None:
    """Let through the few places where the library looks at numbers that the device has computed.

    cuDNN chooses its algorithms by asking for more than the stand-in answers: torch's own convolutions are used, and
    varlen attention (which from torch 2.14 on asks for cuDNN's version) takes its flash kernel.
    """
    from sa3train.adapters.apply import stack
    from sa3train.inference import sampling
    from sa3train.training.callbacks import metrics, validation

    torch.backends.cudnn.enabled = False
    torch.backends.cudnn.version = lambda: None
    allclose, norms = torch.allclose, stack.squared_norms
    torch.allclose = lambda a, b, *args, **kwargs: (a.is_cuda and b.is_cuda) or allclose(a, b, *args, **kwargs)
    sampling.all_finite = lambda items: to_device(torch.ones(len(items)), items[0].device)
    # An adapter is refused by how much it changes a weight.
    stack.squared_norms = lambda W, changed: tuple(1.0 for _ in norms(W, changed))
    # On one rank the sum over ranks is the values themselves, among them counts that are divided by.
    metrics.summed = validation.summed = lambda values: torch.ones(values.shape).to(values.device)


def launches() -> int:
    """Kernels and matrix products that this process has launched."""
    return _counter("standin_launches")


def _counter(name: str) -> int:
    return ctypes.c_long.in_dll(ctypes.CDLL(None), name).value


class Watch:
    """Within this context, every time the host waits for the device: `waits`, each with our nearest lines.

    torch reports those it makes itself. Others (`torch.cuda.synchronize`) are counted by the stand-in alone.
    """

    def __init__(self) -> None:
        self.waits: list[str] = []

    def __enter__(self) -> Self:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._note
        torch.cuda.set_sync_debug_mode("warn")
        self._before = _counter("standin_waits")
        return self

    def __exit__(self, *_: object) -> None:
        silent = _counter("standin_waits") - self._before - len(self.waits)
        torch.cuda.set_sync_debug_mode("default")
        self._warnings.__exit__(None, None, None)
        self.waits += ["not reported by torch: torch.cuda.synchronize or the like"] * silent

    def _note(self, message: Warning | str, *_: Any, **__: Any) -> None:
        if "called a synchronizing CUDA operation" not in str(message):
            return
        ours = [
            frame
            for frame in traceback.extract_stack()
            if Path(frame.filename).is_relative_to(ROOT)
            and ".venv" not in frame.filename
            and frame.filename != __file__
        ]
        lines = [f"{Path(f.filename).relative_to(ROOT)}:{f.lineno} {f.line}" for f in reversed(ours[-FRAMES:])]
        self.waits.append(" <- ".join(lines) or "outside of this repository")
