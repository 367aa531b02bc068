"""Host to device without the host waiting for what the device is doing."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`. From the CPU to CUDA through pinned memory, which alone is copied without a wait."""
    target = torch.device(device)
    if target.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(target, non_blocking=True)
    return tensor.to(target)


def normal(shape: Sequence[int], generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """N(0, 1) in fp32 on `device`, drawn on the CPU: the same numbers on every device, and no wait for it."""
    pinned = torch.device(device).type == "cuda"
    return torch.randn(tuple(shape), generator=generator, pin_memory=pinned).to(device, non_blocking=pinned)
