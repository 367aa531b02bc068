"""Precision and memory of a model at inference."""

import torch

from sa3train.core.device import find_device_fault
from sa3train.core.dtypes import PRECISIONS, get_dtype
from sa3train.core.errors import ConfigError
from sa3train.core.log import get_logger
from sa3train.inference.resolve import ResolvedSettings
from sa3train.models.cpu_kernels import has_bf16_instructions
from sa3train.models.int8_linear import find_int8_fault
from sa3train.models.precision import choose_precision

logger = get_logger(__name__)


def choose_dtype(precision: str, device: torch.device) -> tuple[str, torch.dtype]:
    """Choose the precision to compute in.

    Args:
        precision: "fp32", "bf16", "fp16", "int8", or "auto": what the device computes fastest of bf16 and fp32,
            measured and logged.
        device: The device.

    Returns:
        The precision's name and dtype; "int8" is of products, the rest in what the processor has instructions for.

    Raises:
        ConfigError: When the name is unknown, or the device does not compute in it.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"unknown precision {precision!r}; choose {', '.join(PRECISIONS)}.")
    if precision == "int8":
        fault = f"it is for CPUs, not {device.type}" if device.type != "cpu" else find_int8_fault()
        if fault:
            raise ConfigError(f"precision=int8 does not run here: {fault}. Use auto.")
        rest = "bf16" if has_bf16_instructions() else "fp32"
        logger.info(f"precision int8: the denoiser's products; the rest in {rest}")
        return precision, get_dtype(rest)
    if precision == "auto":
        precision, why = choose_precision(device)
        logger.info(f"precision {precision}: {why}")
    if device.type not in ("cpu", "cuda") and (fault := find_device_fault(device, get_dtype(precision))):
        raise ConfigError(f"precision={precision} does not run on {device}: {fault}. Use auto or fp32.")
    return precision, get_dtype(precision)


def suggest_generation_fixes(
    device: torch.device, precision: str, settings: ResolvedSettings | None = None, cuda_graphs: bool = False
) -> list[str]:
    """List changes that save memory on a device.

    Args:
        device: The device that ran out of memory.
        precision: What the model is loaded in.
        settings: The generation; None while the model is loaded.
        cuda_graphs: Whether CUDA graphs are on.

    Returns:
        Fixes, the least costly first.
    """
    seconds = 0.0 if settings is None else max(settings.duration)
    cpu, bf16 = device.type == "cpu", device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    fixes = [
        ("a smaller batch", settings is not None and settings.batch_size > 1),
        (f"a duration below {seconds:g} s", settings is not None),
        ("chunked decoding", settings is not None and settings.chunked_decode is False),
        ("no CUDA graphs", cuda_graphs),
        (f"precision {'bf16' if bf16 else 'fp16'}", precision == "fp32" and (not cpu or has_bf16_instructions())),
        ("a smaller model", True),
        ("another device, such as cpu", not cpu),
    ]
    return [fix for fix, applies in fixes if applies]
