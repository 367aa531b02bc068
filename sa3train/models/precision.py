"""The precision in which a device computes fastest, by measuring; and exact fp32 products by the faster library.

Rates are measured on products of the DiT's own shapes. A decision is cached, so that a machine always decides alike
however busy it is, and one seed gives one result. Whether a device computes in bf16 at all depends on its age and, on a
Mac, on the system's, so it is tried.
"""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sa3train.core.device import find_device_fault, get_device_name, synchronize
from sa3train.core.errors import SA3Error
from sa3train.core.files import get_cache_dir, write_text
from sa3train.core.log import get_logger

logger = get_logger(__name__)

MIN_SPEEDUP = 1.3  # below it, rounding to bf16 is not worth the time it saves
_ROWS, _INNER, _OUTER = 256, 1024, 1024
_GPU_ROWS = 8192  # so that the product takes longer than its launch
_EXACT = 1e-5  # of the largest value: fp32 products stay a hundred times below, bf16 ones lie a hundred times above
_VERSION = 1


def choose_precision(device: torch.device) -> tuple[str, str]:
    """Choose the fastest precision of a device.

    bf16 on GPUs of the type cuda that compute it, and on other devices where it is at least 1.3 times as fast as fp32;
    fp32 elsewhere.

    Args:
        device: Where the model computes.

    Returns:
        "bf16" or "fp32", and the reason, for the log.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU supports bf16"
        return "fp32", "this GPU does not support bf16"
    if fault := find_device_fault(device, torch.bfloat16):
        return "fp32", f"bf16 does not run on {device} ({fault})"
    gain = get_bf16_speedup(device)
    text = f"bf16 matmuls are {gain:.1f} times as fast as fp32 on this {'CPU' if device.type == 'cpu' else 'GPU'}"
    return (
        ("bf16", text) if gain >= MIN_SPEEDUP else ("fp32", f"{text}; below {MIN_SPEEDUP} it is not worth the rounding")
    )


@functools.cache
def get_bf16_speedup(device: torch.device) -> float:
    """Get bf16's matmul rate over fp32's on a device, measured once per machine and torch version.

    Args:
        device: The device.

    Returns:
        The ratio.
    """
    path = get_cache_dir() / "precision" / f"v{_VERSION}-torch{torch.__version__}-{_identify_processor(device)}.json"
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["bf16_over_fp32"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet, or not by this version
    gain = measure_bf16_speedup(device)
    try:
        write_text(path, json.dumps({"bf16_over_fp32": round(gain, 3)}))
    except SA3Error as error:
        logger.debug(f"measured precision not cached: {error}")
    return gain


def measure_bf16_speedup(device: torch.device, rounds: int = 5) -> float:
    """Measure bf16's matmul rate over fp32's, each by its fastest round, in turn; takes about a tenth of a second.

    Args:
        device: The device.
        rounds: Rounds.

    Returns:
        The ratio.
    """
    rows = _ROWS if device.type == "cpu" else _GPU_ROWS
    x, weight = torch.ones(rows, _INNER, device=device), torch.full((_OUTER, _INNER), 0.5, device=device)
    x16, weight16 = x.bfloat16(), weight.bfloat16()
    if device.type == "cpu":
        enable_fast_fp32_matmul()
    pairs = [(_time_linear(x16, weight16), _time_linear(x, weight)) for _ in range(rounds + 1)][1:]
    return min(exact for _, exact in pairs) / min(half for half, _ in pairs)


def _time_linear(x: Tensor, weight: Tensor) -> float:
    synchronize(x.device)
    start = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    synchronize(x.device)
    return time.perf_counter() - start


@functools.cache
def enable_fast_fp32_matmul() -> bool:
    """Enable oneDNN for fp32 products on the CPU where that changes nothing but their speed.

    torch multiplies fp32 matrices with MKL, on AMD processors two to three times as slow as oneDNN. oneDNN takes over
    when rounding to bf16 is permitted ("medium" precision); without AMX it has no use for that permission and stays
    exact. So it is permitted on AMD processors only, and revoked should products turn out rounded. The setting is
    torch's, for the whole process; it also concerns GPUs, so it stays as it is where there is one.

    Returns:
        Whether it is enabled.
    """
    if torch.cuda.is_available() or not torch.backends.mkldnn.is_available():
        return False
    if _read_cpu_field("vendor_id") != "AuthenticAMD" or "amx_bf16" in _read_cpu_field("flags").split():
        return False
    if not _are_products_exact():  # the user has chosen
        return False
    torch.set_float32_matmul_precision("medium")
    if measure_matmul_error() <= _EXACT:
        return True
    torch.set_float32_matmul_precision("highest")
    return False


def disable_tf32_convolutions() -> None:
    """Make GPUs convolve fp32 in fp32: torch's default is TF32, with 10 bits, though its products are exact.

    The setting is torch's, for the whole process. It stays where the user lets products be rounded.
    """
    if _are_products_exact():
        torch.backends.cudnn.allow_tf32 = False


def _are_products_exact() -> bool:
    """Whether fp32 products are at torch's default; reading the setting raises where both ways to set it were used."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        return False


def measure_matmul_error() -> float:
    """Measure the error of fp32 products relative to their largest value, over the shapes and layouts that layers use.

    Returns:
        The largest error.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(_ROWS, _INNER, generator=generator), torch.randn(_OUTER, _INNER, generator=generator)
    rows, bias = x.unflatten(1, (16, -1)).transpose(0, 1), torch.randn(_OUTER, generator=generator)
    products: list[Callable[[torch.dtype], Tensor]] = [
        lambda dtype: torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)),
        lambda dtype: x.to(dtype) @ weight.to(dtype),
        lambda dtype: x.to(dtype).T @ x.to(dtype),
        lambda dtype: rows.to(dtype) @ rows.to(dtype).mT,
    ]
    errors = []
    for product in products:
        exact = product(torch.float64)
        errors.append(((product(torch.float32) - exact).abs().max() / exact.abs().max()).item())
    return max(errors)


def _identify_processor(device: torch.device) -> str:
    """Return the processor's or GPU's model as part of a file name."""
    fields = ("vendor_id", "cpu family", "model", "stepping")
    name = "-".join(map(_read_cpu_field, fields)) if device.type == "cpu" else get_device_name(device)
    return "".join(letter if letter.isalnum() or letter == "-" else "_" for letter in name)


@functools.cache
def _read_cpu_field(key: str) -> str:
    """Read a field of Linux's /proc/cpuinfo; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")
