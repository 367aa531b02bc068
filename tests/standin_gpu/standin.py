"""Helpers of programs that run on the stand-in: replace what blank kernels break, and record where the host waits."""

import ctypes
import traceback
import warnings
from pathlib import Path
from typing import Any, Self

import torch

from sa3train.core.device import move_to_device

ROOT = Path(__file__).parents[2]
FRAMES = 3
"""Innermost source lines of this repository that are reported for a wait."""


def allow_blank_kernels() -> None:
    """Patch the few places where the library reads numbers that the device computed.

    cuDNN asks the stand-in for more than it provides, so torch's own convolutions are used, and varlen attention (which
    asks for cuDNN's version from torch 2.14 on) uses its flash kernel.
    """
    from sa3train.adapters.apply import load_report
    from sa3train.inference import decoding
    from sa3train.training.callbacks import metrics, validation

    torch.backends.cudnn.enabled = False
    torch.backends.cudnn.version = lambda: None
    allclose = torch.allclose
    torch.allclose = lambda a, b, *args, **kwargs: (a.is_cuda and b.is_cuda) or allclose(a, b, *args, **kwargs)
    decoding._are_finite = lambda items: move_to_device(torch.ones(len(items)), items[0].device)
    # An adapter is refused if it changes a weight too much.
    load_report.compute_relative_norm = lambda change, size: 1.0
    # On one rank the sum over ranks is the values themselves, and some are divisors.
    metrics.all_reduce_sum = validation.all_reduce_sum = lambda values: torch.ones(values.shape).to(values.device)


def count_launches() -> int:
    """Count the kernels and matrix products that this process has launched."""
    return _read_counter("standin_launches")


def _read_counter(name: str) -> int:
    return ctypes.c_long.in_dll(ctypes.CDLL(None), name).value


class Watch:
    """Context manager that records in `waits` each wait of the host for the device, with our nearest source lines.

    torch reports its own waits. Others (`torch.cuda.synchronize`) are only counted by the stand-in.
    """

    def __init__(self) -> None:
        self.waits: list[str] = []

    def __enter__(self) -> Self:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._note
        torch.cuda.set_sync_debug_mode("warn")
        self._before = _read_counter("standin_waits")
        return self

    def __exit__(self, *_: object) -> None:
        silent = _read_counter("standin_waits") - self._before - len(self.waits)
        torch.cuda.set_sync_debug_mode("default")
        self._warnings.__exit__(None, None, None)
        self.waits += ["not reported by torch: torch.cuda.synchronize or similar"] * silent

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
