"""Threads and dtypes of a bench."""

import contextlib
from collections.abc import Iterator

import torch

from sa3train.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(name: str) -> torch.dtype:
    """The dtype called `name`. Raises `ConfigError` for an unknown one."""
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}: there are {', '.join(DTYPES)}.")
    return DTYPES[name]


@contextlib.contextmanager
def own_threads(count: int) -> Iterator[None]:
    """Compute with `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
