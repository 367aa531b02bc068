"""Noise that is the same on every device: drawn on the CPU, ahead of a device that computes meanwhile."""

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

PREFETCH_LIMIT = 16
"""Tensors that are drawn ahead at most: a sampler's steps, or some chunks of a decoder (8 MB each in medium)."""

_PREFETCHED: dict[int, queue.Queue[Tensor | BaseException]] = {}
"""What a thread has drawn, by the id of the generator."""


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


def _take_prefetched(ready: queue.Queue[Tensor | BaseException], shape: tuple[int, ...]) -> Tensor:
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
