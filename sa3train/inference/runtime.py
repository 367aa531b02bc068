"""Where and how precisely a model computes."""

import os
import shutil

import torch

from sa3train.core.errors import ConfigError
from sa3train.core.files import cache_dir
from sa3train.core.log import get_logger
from sa3train.inference.request import Request
from sa3train.models.cpu_kernels import has_bf16_instructions
from sa3train.models.dit import DiT
from sa3train.models.precision import auto_precision

logger = get_logger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(device: str | torch.device | None) -> torch.device:
    """`device`, or when None CUDA, then MPS, then the CPU. Raises `ConfigError` when it is not there."""
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {device!r}: use cpu, cuda, cuda:0 … or mps.") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device} was asked for, and {torch.cuda.device_count()} CUDA devices are here: use cpu."
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device mps was asked for, and there is none here: use cpu.")
    return chosen


def choose_dtype(precision: str, device: torch.device) -> tuple[str, torch.dtype]:
    """The precision's name and dtype; "auto" is what `device` computes fastest, measured and logged.

    Raises `ConfigError` for an unknown name.
    """
    if precision == "auto":
        precision, why = auto_precision(device)
        logger.info(f"precision {precision}: {why}")
    if precision not in DTYPES:
        raise ConfigError(f"unknown precision {precision!r}; choose auto, {', '.join(DTYPES)}.")
    return precision, DTYPES[precision]


def what_helps(
    device: torch.device, precision: str, request: Request | None = None, cuda_graphs: bool = False
) -> list[str]:
    """What may be changed where `device` holds too little for the model, or for `request` beside it."""
    seconds = 0.0 if request is None else max(request.duration)
    cpu, bf16 = device.type == "cpu", device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    found = [
        ("fewer items at a time", request is not None and request.batch_size > 1),
        (f"a duration under {seconds:g} s", request is not None),
        ("chunked decoding", request is not None and request.chunked_decode is False),
        ("no CUDA graphs", cuda_graphs),
        (f"precision {'bf16' if bf16 else 'fp16'}", precision == "fp32" and (not cpu or has_bf16_instructions())),
        ("a smaller model", True),
        ("another device, such as cpu", not cpu),
    ]
    return [words for words, would_help in found if would_help]


def compile_blocks(dit: DiT, backend: str = "inductor") -> None:
    """torch.compile each block of the denoiser, for any length of audio; it happens at the first step.

    What the compiler makes is kept in the cache folder (TORCHINDUCTOR_CACHE_DIR names another) and used again by later
    processes. Raises `ConfigError` when a CPU's compiler is not there.
    """
    on_cpu = next(dit.parameters()).device.type == "cpu"
    if backend == "inductor" and on_cpu and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ConfigError("compiling needs a C++ compiler: install g++, name one in CXX, or leave compile out.")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compiled"))
    for block in dit.transformer.layers:
        block.compile(backend=backend, dynamic=True)
