"""Run on the stand-in: does it see what it must? Prints JSON."""

import json
from collections.abc import Callable
from typing import Any

import torch
from standin import Watch, launches


def complaint(action: Callable[[], Any]) -> str | None:
    """What torch says against it."""
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return None


def allocated(size: int) -> int:
    """Bytes that torch counts for a tensor of `size` bytes."""
    before = torch.cuda.memory_allocated()
    kept = torch.empty(size, dtype=torch.uint8, device="cuda")
    assert kept.is_cuda
    return torch.cuda.memory_allocated() - before


def main() -> dict[str, Any]:
    """Everything at once; the device is set up before it is watched."""
    device = torch.ones(4, device="cuda")
    before = launches()
    product = (device[None] @ device[:, None]) * 2
    launched = launches() - before
    with Watch() as quiet:
        torch.ones(4).pin_memory().to("cuda", non_blocking=True) + device
    with Watch() as item:
        product.sum().item()  # the line that is to be reported
    with Watch() as silent:
        torch.cuda.synchronize()
    return {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "copied": torch.arange(5).cuda().cpu().tolist(),
        "allocated": allocated(1 << 20),
        "launched": launched,
        "quiet": quiet.waits,
        "item": item.waits,
        "silent": silent.waits,
        "mixed": complaint(lambda: device + torch.ones(4)),
    }


print(json.dumps(main()))
