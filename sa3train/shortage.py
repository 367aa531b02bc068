"""What a device says when its memory does not suffice, as an error that says what would help."""

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch

from sa3train.errors import MemoryShortageError

_HOST_SIGN = "can't allocate memory"
_SIGNS = ("out of memory", _HOST_SIGN, "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
GIB = 2**30


def is_shortage(error: BaseException) -> bool:
    """Whether `error` is how torch, on any device, or Python says that memory did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextlib.contextmanager
def memory_named(
    device: torch.device | str, what: str, remedies: Sequence[str] | Callable[[], Sequence[str]]
) -> Iterator[None]:
    """Raise `MemoryShortageError` where memory does not suffice for `what` ("generating 30 s"), naming the remedies.

    What the calls that failed held is let go, so that a next attempt finds room. `remedies` may be made up only then.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        traceback.clear_frames(error.__traceback__)
        on_host = isinstance(error, MemoryError) or _HOST_SIGN in str(error)
        where = _state_of(torch.device("cpu" if on_host else device))
        helps = _listed(remedies() if callable(remedies) else remedies)
        raise MemoryShortageError(f"{where} while {what}. {helps}") from error


def _state_of(device: torch.device) -> str:
    if device.type != "cuda":
        return f"the memory of {'this machine' if device.type == 'cpu' else device.type} ran out"
    try:
        free, total = (size / GIB for size in torch.cuda.mem_get_info(device))
        ours, name = torch.cuda.memory_reserved(device) / GIB, torch.cuda.get_device_name(device)
    except RuntimeError:  # so little is left that the device does not even say how much
        return f"the memory of {device} ran out"
    return f"the memory of {name} ran out (of {total:.1f} GiB, {ours:.1f} are this process's and {free:.1f} free)"


def _listed(remedies: Sequence[str]) -> str:
    if not remedies:
        return "Close what else uses it."
    *others, last = remedies
    return f"What helps: {'; '.join(others) + '; or ' if others else ''}{last}."
