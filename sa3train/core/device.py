"""Host to device without the host waiting for what the device is doing.

What a device says when its memory does not suffice, as an error that says what would help.
"""

import contextlib
import queue
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sa3train.core.errors import MemoryShortageError

_AHEAD: dict[int, "queue.Queue[Tensor | BaseException]"] = {}
"""By the generator's id: what its thread has drawn."""

DRAWN_AHEAD = 16
"""Tensors that wait to be taken at most: a sampler's steps, or some chunks of a decoder (8 MB each in medium)."""


def widest(device: torch.device) -> torch.dtype:
    """The floating point type with the most digits on `device`: float64, but on Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`. From the CPU to CUDA through pinned memory, which alone is copied without a wait."""
    target = torch.device(device)
    if target.type == "cuda" and tensor.device.type == "cpu":
        return tensor.contiguous().pin_memory().to(target, non_blocking=True)  # expanded, it could not be pinned
    return tensor.to(target)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`tensors`, all of one device, on the CPU; from CUDA through pinned memory, with one wait for all."""
    if not tensors or not tensors[0].is_cuda:
        return [tensor.cpu().contiguous() for tensor in tensors]
    fetched = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for room, tensor in zip(fetched, tensors, strict=True):
        room.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return fetched


def normal(shape: Sequence[int], generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """N(0, 1) in fp32 on `device`, drawn on the CPU: the same numbers on every device, and no wait for it."""
    pinned = _pins(device)
    ahead = None if generator is None else _AHEAD.get(id(generator))
    if ahead is None:
        drawn = torch.randn(tuple(shape), generator=generator, pin_memory=pinned)
    else:
        drawn = _taken(ahead, tuple(shape))
    return drawn.to(device, non_blocking=pinned)


def _pins(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def _taken(ahead: "queue.Queue[Tensor | BaseException]", shape: tuple[int, ...]) -> Tensor:
    drawn = ahead.get()
    if isinstance(drawn, BaseException):
        raise drawn
    if tuple(drawn.shape) != shape:
        raise RuntimeError(f"{shape} was to be drawn, and {tuple(drawn.shape)} was announced: a mistake in sa3train.")
    return drawn


@contextlib.contextmanager
def drawn_ahead(
    generator: torch.Generator, shapes: Sequence[tuple[int, ...]], device: torch.device | str
) -> Iterator[None]:
    """Inside, `normal` gives numbers of `generator` that a thread draws meanwhile: `shapes`, in the order of asking.

    Only for CUDA, where the host has time while the device computes: a few minutes of audio take tens of millions of
    numbers. Where the block is left early, the generator stands somewhere among them.
    """
    if not shapes or not pays_ahead(device):
        yield
        return
    if id(generator) in _AHEAD:
        raise RuntimeError("the numbers of this generator are being drawn ahead already.")
    ready: queue.Queue[Tensor | BaseException] = queue.Queue(DRAWN_AHEAD)
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
                put(torch.randn(shape, generator=generator, pin_memory=_pins(device)))
            put(RuntimeError(f"more was drawn than the {len(shapes)} announced: a mistake in sa3train."))
        except BaseException as error:  # noqa: BLE001 (it is raised where the numbers are asked for)
            put(error)

    thread = threading.Thread(target=draw, name="draws", daemon=True)
    try:
        _AHEAD[id(generator)] = ready
        thread.start()
        yield
    finally:
        stop.set()
        _AHEAD.pop(id(generator), None)
        thread.join()


def pays_ahead(device: torch.device | str) -> bool:
    """Whether the host has time to draw while `device` computes."""
    return torch.device(device).type == "cuda"


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
