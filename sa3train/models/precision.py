"""How precisely a device computes fastest: `auto` decided by measuring, and exact fp32 products by the faster library.

Rates are measured on products of the DiT's own shapes. A decision is kept in the cache, so that a machine answers alike
however busy it is, and the same seed gives the same audio.
"""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sa3train.core.errors import SA3Error
from sa3train.core.files import cache_dir, write_text
from sa3train.core.log import get_logger

logger = get_logger(__name__)

WORTHWHILE = 1.3  # times the rate of fp32; below it, rounding to bf16 is not worth the time it saves
_ROWS, _INNER, _OUTER = 256, 1024, 1024
_EXACT = 1e-5  # of the largest value: fp32 products stay a hundred times below, bf16 ones lie a hundred times above
_VERSION = 1


def auto_precision(device: torch.device) -> tuple[str, str]:
    """The precision's name for `device` and why, for the user to read.

    bf16 on GPUs that compute it and on CPUs where it is at least 1.3 times as fast as fp32; fp32 elsewhere.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU computes bf16"
        return "fp32", "this GPU does not compute bf16"
    if device.type != "cpu":
        return "fp32", f"bf16 is not measured on {device.type}"
    gain = cpu_gain()
    text = f"bf16 products run at {gain:.1f} times the rate of fp32 on this CPU"
    return ("bf16", text) if gain >= WORTHWHILE else ("fp32", f"{text}, less than {WORTHWHILE} times")


@functools.cache
def cpu_gain() -> float:
    """bf16's matmul rate over fp32's on this CPU: measured once per machine and torch version."""
    kept = cache_dir() / "precision" / f"v{_VERSION}-torch{torch.__version__}-{_processor_id()}.json"
    try:
        return float(json.loads(kept.read_text(encoding="utf-8"))["bf16_over_fp32"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet, or not by this version
    gain = measure_gain()
    try:
        write_text(kept, json.dumps({"bf16_over_fp32": round(gain, 3)}))
    except SA3Error as error:
        logger.debug(f"precision not kept: {error}")
    return gain


def measure_gain(rounds: int = 5) -> float:
    """bf16's matmul rate over fp32's, each by its fastest of `rounds`, in turn; about a tenth of a second."""
    x, weight = torch.ones(_ROWS, _INNER), torch.full((_OUTER, _INNER), 0.5)
    x16, weight16 = x.bfloat16(), weight.bfloat16()
    fast_fp32_products()
    pairs = [(_seconds(x16, weight16), _seconds(x, weight)) for _ in range(rounds + 1)][1:]
    return min(exact for _, exact in pairs) / min(half for half, _ in pairs)


def _seconds(x: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    return time.perf_counter() - start


@functools.cache
def fast_fp32_products() -> bool:
    """Have fp32 products on the CPU done by oneDNN where that changes nothing but their speed; say whether they are.

    torch multiplies fp32 matrices with MKL, on AMD processors two to three times as slow as oneDNN. oneDNN takes them
    over when rounding to bf16 is permitted ("medium" precision); without AMX it has no use for that permission and
    stays exact. So it is given on AMD processors only, and taken back should products turn out rounded. The setting is
    torch's, for the whole process; it also concerns GPUs, so where there is one it is left alone.
    """
    if torch.cuda.is_available() or not torch.backends.mkldnn.is_available():
        return False
    if _cpu_field("vendor_id") != "AuthenticAMD" or "amx_bf16" in _cpu_field("flags").split():
        return False
    if torch.get_float32_matmul_precision() != "highest":  # somebody has chosen already
        return False
    torch.set_float32_matmul_precision("medium")
    if largest_error() <= _EXACT:
        return True
    torch.set_float32_matmul_precision("highest")
    return False


def exact_fp32_convolutions() -> None:
    """Have GPUs convolve fp32 in fp32; torch's default is TF32, with 10 bits, though its products are exact.

    The setting is torch's, for the whole process. Where somebody lets products be rounded, convolutions stay so.
    """
    if torch.get_float32_matmul_precision() == "highest":
        torch.backends.cudnn.allow_tf32 = False


def largest_error() -> float:
    """Error of fp32 products as a share of their largest value, over the shapes and layouts that layers use."""
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


def _processor_id() -> str:
    """The processor's model as part of a file name."""
    name = "-".join(_cpu_field(key) for key in ("vendor_id", "cpu family", "model", "stepping"))
    return "".join(letter if letter.isalnum() or letter == "-" else "_" for letter in name)


@functools.cache
def _cpu_field(key: str) -> str:
    """A line of Linux's /proc/cpuinfo; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")
