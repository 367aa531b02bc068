"""Run on the stand-in: check that it reports what it should. Print JSON."""

import json
from collections.abc import Callable
from typing import Any

import torch
from standin import Watch, count_launches


def get_error(action: Callable[[], Any]) -> str | None:
    """Return torch's error message."""
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return None


def measure_allocation(size: int) -> int:
    """Measure the bytes that torch counts for a tensor of `size` bytes."""
    before = torch.cuda.memory_allocated()
    tensor = torch.empty(size, dtype=torch.uint8, device="cuda")
    assert tensor.is_cuda
    return torch.cuda.memory_allocated() - before


def main() -> dict[str, Any]:
    """Run all checks; the device is set up before it is watched."""
    device = torch.ones(4, device="cuda")
    before = count_launches()
    product = (device[None] @ device[:, None]) * 2
    launched = count_launches() - before
    with Watch() as quiet:
        torch.ones(4).pin_memory().to("cuda", non_blocking=True) + device
    with Watch() as item:
        product.sum().item()  # the line to report
    with Watch() as silent:
        torch.cuda.synchronize()
    return {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "copied": torch.arange(5).cuda().cpu().tolist(),
        "allocated": measure_allocation(1 << 20),
        "launched": launched,
        "quiet": quiet.waits,
        "item": item.waits,
        "silent": silent.waits,
        "mixed": get_error(lambda: device + torch.ones(4)),
    }


print(json.dumps(main()))
