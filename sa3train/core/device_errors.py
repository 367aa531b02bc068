"""What devices say in errors: memory that is exhausted, and operators that one lacks."""

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch

from sa3train.core.device import GIB, get_device_name, measure_device_memory
from sa3train.core.errors import LibraryError, MemoryShortageError

_HOST_MESSAGE = "can't allocate memory"
_OOM_MESSAGES = re.compile(
    rf"out of memory|{_HOST_MESSAGE}|BLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"  # CUDA, ROCm, MPS, XPU
    r"|Invalid buffer size|CallbackErrorOutOfMemory"  # Metal: a tensor larger than any buffer; a failed command
    r"|UR_RESULT_ERROR_OUT_OF_(DEVICE_MEMORY|HOST_MEMORY|RESOURCES)",  # Intel
    re.IGNORECASE,
)
_MISSING_OPERATOR = re.compile(
    r"The operator '(?P<name>[^']+)' is not currently (?:implemented|supported) (?:for|on) the (?P<type>MPS|XPU) "
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory is exhausted.

    Args:
        error: What torch, on any device, or Python raised.

    Returns:
        Whether it is an out-of-memory error.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _OOM_MESSAGES.search(str(error)) is not None


@contextlib.contextmanager
def explain_device_errors(
    device: torch.device | str, what: str, fixes: Sequence[str] | Callable[[], Sequence[str]]
) -> Iterator[None]:
    """Turn out-of-memory errors and those about operators that a device lacks into errors with suggested fixes.

    What the failed calls hold is released, so that a next attempt has room.

    Args:
        device: Where the block computes.
        what: What the block does, such as "generating 30 s".
        fixes: What would help, such as "a shorter duration"; a function is called on an error only.

    Yields:
        Nothing.

    Raises:
        MemoryShortageError: The memory of the device or of the machine is exhausted.
        LibraryError: The device has no kernel for an operator.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, NotImplementedError) and (missing := _MISSING_OPERATOR.search(str(error))):
            raise LibraryError(
                f"torch {torch.__version__} lacks the operator {missing['name']} on {missing['type'].lower()}, needed "
                f"for {what}. Set PYTORCH_ENABLE_{missing['type']}_FALLBACK=1 in the environment, so that the CPU "
                "computes it, or use the device cpu."
            ) from error
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        on_host = isinstance(error, MemoryError) or _HOST_MESSAGE in str(error)
        where = _describe_memory(torch.device("cpu" if on_host else device))
        helps = _list_fixes(fixes() if callable(fixes) else fixes)
        raise MemoryShortageError(f"Out of memory while {what}: {where}. {helps}") from error


def _describe_memory(device: torch.device) -> str:
    if device.type == "cpu":
        return "this machine has no free memory left"
    try:
        memory, name = measure_device_memory(device), get_device_name(device)
    except RuntimeError:  # so little is left that even the query fails
        return f"{device} has no free memory left"
    total, free, ours = memory.total / GIB, memory.free / GIB, memory.reserved / GIB
    return f"of {name}'s {total:.1f} GiB, this process holds {ours:.1f} and {free:.1f} are free"


def _list_fixes(fixes: Sequence[str]) -> str:
    if not fixes:
        return "Close other programs that use it."
    *others, last = fixes
    return f"Try: {'; '.join(others) + '; or ' if others else ''}{last}."
