"""Devices: choosing one, memory, and transfers that do not block the host.

All that differs between types of devices is here, in `device_errors` and `noise`, or in `sa3train.models.precision`.
GPUs of AMD (ROCm) are "cuda" to torch and to us.
"""

import functools
import itertools
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from sa3train.core.config import DEVICES
from sa3train.core.errors import ConfigError
from sa3train.core.log import get_logger

_logger = get_logger(__name__)

GIB = 2**30
GPU_TYPES: dict[str, Callable[[], int]] = {
    "cuda": lambda: torch.cuda.device_count(),
    "xpu": lambda: torch.xpu.device_count(),
    "mps": lambda: int(torch.backends.mps.is_available()),
}
"""How to count the devices of each type, the type to prefer first."""


class DeviceMemory(NamedTuple):
    """Memory of a device in bytes.

    Attributes:
        total: What the device has; on Apple's GPUs, what the system recommends to take of the machine's memory.
        free: What nobody has taken.
        reserved: What torch has taken in this process.
        allocated: What tensors use of it.
    """

    total: int
    free: int
    reserved: int
    allocated: int


def count_devices(device_type: str) -> int:
    """Count the devices of a type.

    Args:
        device_type: Such as "cuda".

    Returns:
        Their number; 1 for "cpu", 0 for a type that sa3train does not know.
    """
    return 1 if device_type == "cpu" else GPU_TYPES.get(device_type, lambda: 0)()


def choose_device(device: str | torch.device | None = None, setting: str = "device") -> torch.device:
    """Choose a device that computes.

    Processes that a launcher started on one machine use a GPU each.

    Args:
        device: Such as "cpu", "cuda", "cuda:1", "xpu" or "mps". None and "auto" take the best that computes, which is
            logged with the reason.
        setting: Name of what the user has set, for errors.

    Returns:
        The device.

    Raises:
        ConfigError: The name is unknown, or this machine has no such device, or it fails to compute.
    """
    present = {device_type: count for device_type in GPU_TYPES if (count := count_devices(device_type))}
    if device is None or device == "auto":
        return _choose_best(tuple(_spread_ranks(torch.device(name), count) for name, count in present.items()))
    unknown = ConfigError(f"{setting}={device} is unknown. Use auto, {DEVICES}.")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise unknown from error
    if chosen.type not in ("cpu", *GPU_TYPES):
        raise unknown
    if chosen.type == "cpu":
        return chosen
    if (chosen.index or 0) >= present.get(chosen.type, 0):
        raise ConfigError(f"{setting}={device} is not available. {_list_choices(setting, present)}")
    chosen = _spread_ranks(chosen, present[chosen.type])
    if fault := find_device_fault(chosen):
        raise ConfigError(f"{setting}={device} does not compute: {fault}. {_list_choices(setting, present)}")
    return chosen


def _list_choices(setting: str, present: dict[str, int]) -> str:
    names = [name for kind, count in present.items() for name in (kind, *(f"{kind}:{n}" for n in range(1, count)))]
    built = "" if present else f" (torch {torch.__version__} sees no GPU)"
    return f"This machine has {', '.join([*names, 'cpu'])}{built}. Set {setting} to one of these or to auto."


def _spread_ranks(device: torch.device, count: int) -> torch.device:
    rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", ""))
    return torch.device(device.type, int(rank) % count) if device.index is None and rank.isdigit() else device


@functools.cache
def _choose_best(candidates: tuple[torch.device, ...]) -> torch.device:
    """Choose the first that computes; cached, so that it is said once."""
    present = {device.type: device for device in (*candidates, torch.device("cpu"))}
    failed: list[str] = []
    for device in present.values():
        fault = find_device_fault(device)
        if fault is None:
            break
        _logger.warning("%s does not compute: %s.", _label(device), fault)
        failed.append(device.type)
    better = itertools.takewhile(lambda name: name != device.type, GPU_TYPES)
    absent = [name for name in better if name not in present]
    reasons = [f"no {_join_choices(absent)} device"] if absent else []
    reasons += [f"{' and '.join(failed)} failed"] if failed else []
    _logger.info("Using %s: %s", _label(device), "; ".join(reasons) or "the first choice")
    return device


def _label(device: torch.device) -> str:
    name = get_device_name(device)
    return str(device) if name == device.type else f"{device} ({name})"


def _join_choices(items: Sequence[str]) -> str:
    *others, last = items
    return f"{', '.join(others)} or {last}" if others else last


def find_device_fault(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Find out by a tiny product whether a device computes, such as with a torch that was built for newer GPUs.

    Args:
        device: A device that torch counts.
        dtype: What to compute in.

    Returns:
        The first sentence of the error; None if it computes.
    """
    try:
        ones = torch.ones(8, 8, device=device, dtype=dtype)
        (ones @ ones).sum().item()
    except (RuntimeError, TypeError, AssertionError) as error:  # TypeError: a dtype that macOS has only later
        return re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".")
    return None


def get_device_name(device: torch.device) -> str:
    """Get the name of a device's hardware.

    Args:
        device: The device.

    Returns:
        Such as "NVIDIA H200" or "Apple M2"; the type where the system does not say.
    """
    try:
        if device.type in ("cuda", "xpu"):
            return str(torch.get_device_module(device).get_device_name(device))
        if device.type == "mps":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, encoding="utf-8", check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError, RuntimeError, AssertionError):
        pass
    return device.type


def measure_device_memory(device: torch.device) -> DeviceMemory:
    """Measure the memory of a device.

    Args:
        device: The device; for the CPU what is measured is the machine's memory.

    Returns:
        Its memory. On Apple's GPUs, which share the machine's, no more is free than the machine has.

    Raises:
        RuntimeError: So little is left that even the query fails.
    """
    machine = psutil.virtual_memory()
    if device.type == "mps":
        total, reserved = torch.mps.recommended_max_memory(), torch.mps.driver_allocated_memory()
        free = max(0, min(total - reserved, machine.available))
        return DeviceMemory(total, free, reserved, torch.mps.current_allocated_memory())
    if device.type == "cpu":
        held = psutil.Process().memory_info().rss
        return DeviceMemory(machine.total, machine.available, held, held)
    module = torch.get_device_module(device)
    free, total = module.mem_get_info(device)
    return DeviceMemory(total, free, module.memory_reserved(device), module.memory_allocated(device))


def measure_peak_bytes(device: torch.device) -> int | None:
    """Measure the most memory of a GPU that this process has held so far.

    Args:
        device: The GPU.

    Returns:
        Bytes of tensors, on Apple's GPUs of torch's cache; None on the CPU, whose process holds more than tensors.
    """
    if device.type == "cpu":
        return None
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    return int(torch.get_device_module(device).max_memory_allocated(device))


def empty_cache(device: torch.device) -> None:
    """Give back the memory that torch keeps for later.

    Args:
        device: The device; nothing happens for the CPU.
    """
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work.

    Args:
        device: The device; nothing happens for the CPU.
    """
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


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
