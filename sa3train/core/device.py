"""Devices: choosing one, transfers that do not block the host, random numbers, and out-of-memory messages."""

import contextlib
import os
import queue
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sa3train.core.errors import ConfigError, MemoryShortageError
from sa3train.core.log import get_logger

_logger = get_logger(__name__)

GIB = 2**30
_HOST_MESSAGE = "can't allocate memory"
_OOM_MESSAGES = ("out of memory", _HOST_MESSAGE, "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")

PREFETCH_LIMIT = 16
"""Tensors that are drawn ahead at most: a sampler's steps, or some chunks of a decoder (8 MB each in medium)."""

_PREFETCHED: dict[int, "queue.Queue[Tensor | BaseException]"] = {}
"""What a thread has drawn, by the id of the generator."""


def choose_device(device: str | torch.device | None = None, auto: Sequence[str] = ("cuda", "mps")) -> torch.device:
    """Choose a device and check that it exists.

    Args:
        device: Such as "cpu", "cuda", "cuda:1" or "mps". None and "auto" take the first of `auto` that exists, else the
            CPU.
        auto: Device types to prefer, in order.

    Returns:
        The device.

    Raises:
        ConfigError: The name is unknown or this machine has no such device.
    """
    available = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device is None or device == "auto":
        return torch.device(next((name for name in auto if available.get(name)), "cpu"))
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", *available):
            torch.zeros(1, device=chosen).item()  # a type that torch knows by name only holds no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(f"unknown device {device!r}. Use auto, cpu, cuda, cuda:0 or mps.") from error
    count = available.get(chosen.type)
    if count is not None and (chosen.index or 0) >= count:
        raise ConfigError(f"device {device} is not available: torch sees {count} {chosen.type} devices. Use cpu.")
    return chosen


def limit_to_cores(name: str, wanted: int, per_core: int = 1) -> int:
    """Limit threads or processes to what this machine can run, and say so where that is less than was asked for.

    Args:
        name: Full name of the setting, for the message.
        wanted: Its value.
        per_core: How many a core can serve.

    Returns:
        The number to use.
    """
    most = max(2, per_core * (os.cpu_count() or 1))
    if wanted > most:
        _logger.warning("%s=%d is more than this machine's %d cores can use: %d.", name, wanted, os.cpu_count(), most)
    return min(wanted, most)


def get_widest_float(device: torch.device) -> torch.dtype:
    """Get the floating-point dtype with the most digits on a device.

    Args:
        device: Where it is computed.

    Returns:
        float64, or float32 on Apple's GPUs, which have no float64.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def move_to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Move a tensor to a device, from the CPU to CUDA through pinned memory, which alone does not block the host.

    Args:
        tensor: Tensor anywhere.
        device: Target.

    Returns:
        The tensor on the device; the same object where it is there already.
    """
    target = torch.device(device)
    if target.type == "cuda" and tensor.device.type == "cpu":
        return tensor.contiguous().pin_memory().to(target, non_blocking=True)  # expanded, it could not be pinned
    return tensor.to(target)


def move_to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Move tensors to the CPU, from CUDA through pinned memory with one synchronization for all.

    Args:
        tensors: Tensors of one device.

    Returns:
        Contiguous tensors on the CPU.
    """
    if not tensors or not tensors[0].is_cuda:
        return [tensor.cpu().contiguous() for tensor in tensors]
    fetched = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for target, tensor in zip(fetched, tensors, strict=True):
        target.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return fetched


def randn(shape: Sequence[int], generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """Draw N(0, 1) in fp32 on the CPU, so that every device gets the same numbers, and move it to a device.

    Args:
        shape: Shape of the result.
        generator: CPU generator; None is torch's global one. Inside `prefetch_noise` the prefetched numbers are used.
        device: Where the result is needed. CUDA does not block the host.

    Returns:
        Noise in fp32.
    """
    pinned = _uses_pinned_memory(device)
    ready = None if generator is None else _PREFETCHED.get(id(generator))
    if ready is None:
        drawn = torch.randn(tuple(shape), generator=generator, pin_memory=pinned)
    else:
        drawn = _take_prefetched(ready, tuple(shape))
    return drawn.to(device, non_blocking=pinned)


def _uses_pinned_memory(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def _take_prefetched(ready: "queue.Queue[Tensor | BaseException]", shape: tuple[int, ...]) -> Tensor:
    drawn = ready.get()
    if isinstance(drawn, BaseException):
        raise drawn
    if tuple(drawn.shape) != shape:
        raise RuntimeError(f"noise {shape} was asked for where {tuple(drawn.shape)} was prefetched: a bug in sa3train.")
    return drawn


@contextlib.contextmanager
def prefetch_noise(
    generator: torch.Generator, shapes: Sequence[tuple[int, ...]], device: torch.device | str
) -> Iterator[None]:
    """Draw the noise that `randn` will be asked for in a background thread.

    Only on CUDA, where the host has time while the device computes: a few minutes of audio take tens of millions of
    numbers. The numbers are those that would have been drawn without prefetching. When the block is left early, the
    state of the generator is somewhere among them.

    Args:
        generator: CPU generator that the draws come from.
        shapes: Shapes of all draws inside the block, in order. Another draw is a bug and raises `RuntimeError`.
        device: Where the noise is needed.

    Yields:
        Nothing.
    """
    if not shapes or not uses_noise_prefetch(device):
        yield
        return
    if id(generator) in _PREFETCHED:
        raise RuntimeError("the noise of this generator is being prefetched already.")
    ready: queue.Queue[Tensor | BaseException] = queue.Queue(PREFETCH_LIMIT)
    stop = threading.Event()

    def put(drawn: Tensor | BaseException) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(drawn, timeout=0.05)

    def draw() -> None:
        try:
            for shape in shapes:
                if stop.is_set():
                    return
                put(torch.randn(shape, generator=generator, pin_memory=_uses_pinned_memory(device)))
            put(RuntimeError(f"more noise was asked for than the {len(shapes)} prefetched: a bug in sa3train."))
        except BaseException as error:  # noqa: BLE001 (it is raised where the noise is asked for)
            put(error)

    thread = threading.Thread(target=draw, name="noise-prefetch", daemon=True)
    try:
        _PREFETCHED[id(generator)] = ready
        thread.start()
        yield
    finally:
        stop.set()
        _PREFETCHED.pop(id(generator), None)
        thread.join()


def uses_noise_prefetch(device: torch.device | str) -> bool:
    """Tell whether noise for a device is prefetched.

    Args:
        device: Where the noise is needed.

    Returns:
        Whether the host has time to draw while the device computes.
    """
    return torch.device(device).type == "cuda"


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory is exhausted.

    Args:
        error: What torch, on any device, or Python raised.

    Returns:
        Whether it is an out-of-memory error.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _OOM_MESSAGES)


@contextlib.contextmanager
def explain_oom(
    device: torch.device | str, what: str, fixes: Sequence[str] | Callable[[], Sequence[str]]
) -> Iterator[None]:
    """Turn out-of-memory errors into `MemoryShortageError` with suggested fixes.

    What the failed calls hold is released, so that a next attempt has room.

    Args:
        device: Where the block computes.
        what: What the block does, such as "generating 30 s".
        fixes: What would help, such as "a shorter duration"; a function is called on an error only.

    Yields:
        Nothing.

    Raises:
        MemoryShortageError: The memory of the device or of the machine is exhausted.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        on_host = isinstance(error, MemoryError) or _HOST_MESSAGE in str(error)
        where = _describe_memory(torch.device("cpu" if on_host else device))
        helps = _list_fixes(fixes() if callable(fixes) else fixes)
        raise MemoryShortageError(f"Out of memory while {what}: {where}. {helps}") from error


def _describe_memory(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{'this machine' if device.type == 'cpu' else device.type} has no free memory left"
    try:
        free, total = (size / GIB for size in torch.cuda.mem_get_info(device))
        ours, name = torch.cuda.memory_reserved(device) / GIB, torch.cuda.get_device_name(device)
    except RuntimeError:  # so little is left that even the query fails
        return f"{device} has no free memory left"
    return f"of {name}'s {total:.1f} GiB, this process holds {ours:.1f} and {free:.1f} are free"


def _list_fixes(fixes: Sequence[str]) -> str:
    if not fixes:
        return "Close other programs that use it."
    *others, last = fixes
    return f"Try: {'; '.join(others) + '; or ' if others else ''}{last}."
