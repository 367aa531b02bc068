"""Memory that does not suffice is said in words, and what would help."""

import weakref

import pytest
import torch

from sa3train.core.device import is_shortage, memory_named
from sa3train.core.errors import ConfigError, MemoryShortageError

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


def test_it_is_the_memory_that_ran_out_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsaid(device: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for figures, expected in (
        (
            lambda device: (0, 8 * 2**30),
            r"memory of Card ran out \(of 8\.0 GiB, 7\.0 are this process's and 0\.0 free\)",
        ),
        (unsaid, "memory of cuda ran out while"),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", figures)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7 * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
        with pytest.raises(MemoryShortageError, match=expected), memory_named("cuda", "x", ["y"]):
            raise SAID[0]
    for host in SAID[1:3]:
        with pytest.raises(MemoryShortageError, match="of this machine"), memory_named("cuda", "x", lambda: ["y"]):
            raise host


def test_what_failed_is_let_go() -> None:
    def fails() -> None:
        held = torch.ones(1)
        kept.append(weakref.ref(held))
        raise MemoryError

    kept: list[weakref.ref[torch.Tensor]] = []
    with pytest.raises(MemoryShortageError) as error, memory_named("cpu", "x", ["y"]):
        fails()
    assert error.value.__cause__ is not None and kept[0]() is None


def test_other_errors_pass() -> None:
    for error in (RuntimeError("shapes do not match"), ConfigError("no"), MemoryShortageError("inner")):
        with pytest.raises(type(error), match=str(error)), memory_named("cpu", "x", ["y"]):
            raise error
