"""Memory that does not suffice is said in words, and what would help."""

import pytest
import torch

from sa3train.errors import ConfigError, MemoryShortageError
from sa3train.shortage import is_shortage, memory_named

SAID = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)


@pytest.mark.parametrize("error", SAID)
def test_however_a_device_says_it_the_remedies_are_named(error: Exception) -> None:
    assert is_shortage(error)
    with (
        pytest.raises(
            MemoryShortageError, match=r"^the memory of this machine ran out while .* 9 s\. What .* a; b; or c"
        ),
        memory_named("cpu", "generating 9 s", ["a", "b", "c"]),
    ):
        raise error


def test_what_torch_really_says_is_known() -> None:
    with (
        pytest.raises(MemoryShortageError, match=r"while reading\. What helps: less\.$"),
        memory_named("cpu", "reading", ["less"]),
    ):
        torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_pass() -> None:
    for error in (RuntimeError("shapes do not match"), ConfigError("no"), MemoryShortageError("inner")):
        with pytest.raises(type(error), match=str(error)), memory_named("cpu", "x", ["y"]):
            raise error
