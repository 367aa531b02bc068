"""Devices: prefetched noise is what would have been drawn, and out-of-memory errors suggest fixes."""

import logging
import re
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from helpers.golden import GOLDEN
from sa3train.core import device, noise
from sa3train.core.device import GIB, choose_device, move_to_device
from sa3train.core.device_errors import explain_device_errors, is_out_of_memory
from sa3train.core.errors import ConfigError, LibraryError, MemoryShortageError
from sa3train.core.noise import prefetch_noise, randn
from sa3train.inference import Generator
from sa3train.models.checkpoint import load_autoencoder

SHAPES = [(3, 4), (5,), (2, 2, 7)]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefetch on the CPU too, where it would not pay."""
    monkeypatch.setattr(noise, "uses_noise_prefetch", lambda device: True)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_same_numbers_and_the_same_state_behind_them() -> None:
    plain, ahead = seeded(), seeded()
    expected = [randn(shape, plain, "cpu") for shape in SHAPES]
    with prefetch_noise(ahead, SHAPES, "cpu"):
        found = [randn(shape, ahead, "cpu") for shape in SHAPES]
        elsewhere = randn((3,), seeded(7), "cpu")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    assert torch.equal(elsewhere, randn((3,), seeded(7), "cpu")), "other generators go on by themselves"
    assert torch.equal(ahead.get_state(), plain.get_state())
    assert torch.equal(randn((2,), ahead, "cpu"), randn((2,), plain, "cpu"))


@pytest.mark.parametrize("asked", [[(4, 3)], [*SHAPES, (1,)]])
def test_what_was_not_announced_is_an_error_and_never_waits(asked: list[tuple[int, ...]]) -> None:
    generator = seeded()
    with pytest.raises(RuntimeError, match="a bug in sa3train"), prefetch_noise(generator, SHAPES, "cpu"):
        for shape in asked:
            randn(shape, generator, "cpu")


def test_leaving_early_ends_the_thread() -> None:
    with pytest.raises(KeyboardInterrupt), prefetch_noise(seeded(), SHAPES * 1000, "cpu"):
        raise KeyboardInterrupt
    assert not any(thread.name == "noise-prefetch" for thread in threading.enumerate())
    assert not noise._PREFETCHED


def test_one_thread_a_generator() -> None:
    generator = seeded()
    with prefetch_noise(generator, SHAPES, "cpu"):
        with pytest.raises(RuntimeError, match="already"), prefetch_noise(generator, SHAPES, "cpu"):
            pass
        assert torch.equal(randn(SHAPES[0], generator, "cpu"), randn(SHAPES[0], seeded(), "cpu"))


def test_no_more_waits_than_the_room_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "PREFETCH_LIMIT", 2)
    ahead, plain = seeded(), seeded()
    with prefetch_noise(ahead, [(2,)] * 9, "cpu"):
        assert noise._PREFETCHED[id(ahead)].maxsize == 2
        found = [randn((2,), ahead, "cpu") for _ in range(9)]
    assert torch.equal(torch.stack(found), torch.stack([randn((2,), plain, "cpu") for _ in range(9)]))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", ["plain", "diff"])
def test_decoders_announce_what_they_draw(name: str, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder, drawn = load_autoencoder(GOLDEN / name), []
    from sa3train.models import resampler

    def noted(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
        drawn.append(tuple(shape))
        return randn(shape, generator, device)

    monkeypatch.setattr(resampler, "randn", noted)
    latents_BCT = torch.randn(2, autoencoder.latent_channels, 140)
    autoencoder.decode(latents_BCT, generator=seeded(), chunked=chunked)
    assert autoencoder.list_noise_shapes(2, 140, chunked) == drawn
    assert drawn


@pytest.mark.parametrize("sampler", ["pingpong", "euler"])
def test_a_generation_is_the_same(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gen, audio = Generator.from_pretrained("nano", device="cpu", precision="fp32"), []
    for pays in (True, False):
        monkeypatch.setattr(noise, "uses_noise_prefetch", lambda device, pays=pays: pays)
        out = gen.generate("koto", duration=[1.0, 2.0], steps=3, cfg_scale=1.0, sampler_type=sampler, seed=3)
        audio.append(out.audio)
    assert all(torch.equal(one, other) for one, other in zip(*audio, strict=True))


def test_to_the_cpu_nothing_is_pinned_or_copied() -> None:
    tensor = torch.ones(3)
    assert move_to_device(tensor, "cpu") is tensor


MISSING = "The operator 'aten::foo' is not currently {} the {} device. As a temporary fix"


def set_devices(monkeypatch: pytest.MonkeyPatch, faults: dict[str, str | None]) -> None:
    """Let this machine have one device of each type in `faults`, which fails with the text given there."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    monkeypatch.setattr(device, "GPU_TYPES", {name: lambda n=name: int(n in faults) for name in ("cuda", "xpu", "mps")})
    monkeypatch.setattr(device, "find_device_fault", lambda chosen, dtype=None: faults.get(chosen.type))
    monkeypatch.setattr(
        device, "get_device_name", lambda chosen: "cpu" if chosen.type == "cpu" else f"a {chosen.type} card"
    )
    device._choose_best.cache_clear()


@pytest.mark.parametrize(
    ("faults", "chosen", "line"),
    [
        ({}, "cpu", r"Using cpu: no cuda, xpu or mps device"),
        ({"mps": None}, "mps", r"Using mps \(a mps card\): no cuda or xpu device"),
        ({"xpu": None, "mps": None}, "xpu", r"Using xpu \(.*\): no cuda device"),
        ({"cuda": None, "mps": None}, "cuda", r"Using cuda \(a cuda card\): the first choice"),
        ({"cuda": "no kernel image", "mps": None}, "mps", r"does not compute: no kernel image\.[^$]*; cuda failed"),
        ({"cuda": "no kernel image"}, "cpu", r"Using cpu: no xpu or mps device; cuda failed"),
    ],
)
def test_auto_is_the_best_device_that_computes_and_says_why_once(
    faults: dict[str, str | None], chosen: str, line: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    set_devices(monkeypatch, faults)
    with caplog.at_level(logging.INFO):
        assert {choose_device(None), choose_device("auto")} == {torch.device(chosen)}
    assert caplog.text.count("Using") == 1 and re.search(line, caplog.text)
    device._choose_best.cache_clear()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("quantum", "flag=quantum is unknown. Use auto"),
        ("meta", "flag=meta is unknown. Use auto"),
        ("xpu", "flag=xpu is not available. This machine has cuda, mps, cpu. Set flag to"),
        ("cuda:1", "flag=cuda:1 is not available"),
        ("mps", "flag=mps does not compute: broken. This machine"),
    ],
)
def test_a_device_that_was_named_is_never_replaced(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_devices(monkeypatch, {"cuda": None, "mps": "broken"})
    with pytest.raises(ConfigError, match=re.escape(words)):
        choose_device(name, "flag")
    assert choose_device("cuda:0") == torch.device("cuda:0") and choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_processes_of_one_machine_take_a_device_each(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_devices(monkeypatch, {"cuda": None})
    monkeypatch.setitem(device.GPU_TYPES, "cuda", lambda: 2)
    monkeypatch.setenv(variable, "3")
    assert choose_device("cuda") == choose_device("auto") == torch.device("cuda:1")
    assert choose_device("cuda:0") == torch.device("cuda:0")


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: no kernel image\nmore."), TypeError("no bf16")])
def test_a_device_that_fails_is_found_by_a_tiny_product(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise error

    assert device.find_device_fault(torch.device("cpu"), torch.bfloat16) is None
    monkeypatch.setattr(torch, "ones", fail)
    assert device.find_device_fault(torch.device("cuda")) == str(error).partition("\n")[0]


@pytest.mark.parametrize(
    ("text", "name"),
    [(MISSING.format("implemented for", "MPS"), "MPS"), (MISSING.format("implemented for", "XPU"), "XPU")],
)
def test_an_operator_that_a_device_lacks_is_named_with_the_way_on(text: str, name: str) -> None:
    with (
        pytest.raises(LibraryError, match=rf"aten::foo on {name.lower()}, needed for generating.*_{name}_FALLBACK=1"),
        explain_device_errors(name.lower(), "generating", []),
    ):
        raise NotImplementedError(text)
    with pytest.raises(NotImplementedError, match="another"), explain_device_errors("mps", "x", []):
        raise NotImplementedError("another")


def test_the_memory_of_a_unified_machine_is_what_the_system_recommends(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"recommended_max": 12, "driver_allocated": 3, "current_allocated": 2}.items():
        monkeypatch.setattr(torch.mps, f"{name}_memory", lambda size=size: size * GIB)
    for available, free in ((20, 9), (4, 4)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda known=available: SimpleNamespace(available=known * GIB))
        found = device.measure_device_memory(torch.device("mps"))
        assert found == (12 * GIB, free * GIB, 3 * GIB, 2 * GIB)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_gpus_of_other_makers_are_asked_through_torchs_own_functions(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, called = getattr(torch, kind), []
    figures = {"mem_get_info": (5, 9), "memory_reserved": 3, "memory_allocated": 2, "max_memory_allocated": 4}
    for name, value in figures.items():
        monkeypatch.setattr(module, name, lambda device, value=value: value)
    for name in ("empty_cache", "synchronize"):
        monkeypatch.setattr(module, name, lambda *_, name=name: called.append(name))
    chosen = torch.device(kind)
    assert device.measure_device_memory(chosen) == (9, 5, 3, 2) and device.measure_peak_bytes(chosen) == 4
    device.empty_cache(chosen)
    device.synchronize(chosen)
    assert called == ["empty_cache", "synchronize"]


OOM_ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB)"),
    RuntimeError("Invalid buffer size: 19.38 GiB"),
    RuntimeError("Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"),
    RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError("HIP error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)


@pytest.mark.parametrize("error", OOM_ERRORS)
def test_however_a_device_says_it_the_fixes_are_named(error: Exception) -> None:
    assert is_out_of_memory(error)
    with (
        pytest.raises(MemoryShortageError, match=r"^Out of memory while generating 9 s: this machine .* a; b; or c"),
        explain_device_errors("cpu", "generating 9 s", ["a", "b", "c"]),
    ):
        raise error


def test_what_torch_really_says_is_known() -> None:
    with (
        pytest.raises(MemoryShortageError, match=r"while reading: .* Try: less\.$"),
        explain_device_errors("cpu", "reading", ["less"]),
    ):
        torch.empty(2**60, dtype=torch.uint8)


def test_it_is_the_memory_that_ran_out_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsaid(device: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for figures, expected in (
        (lambda device: (0, 8 * 2**30), r"of Card's 8\.0 GiB, this process holds 7\.0 and 0\.0 are free"),
        (unsaid, "while x: cuda has no free memory"),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", figures)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7 * 2**30)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7 * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
        with pytest.raises(MemoryShortageError, match=expected), explain_device_errors("cuda", "x", ["y"]):
            raise OOM_ERRORS[0]
    for host in OOM_ERRORS[1:3]:
        with (
            pytest.raises(MemoryShortageError, match="this machine"),
            explain_device_errors("cuda", "x", lambda: ["y"]),
        ):
            raise host


def test_what_failed_is_let_go() -> None:
    def fails() -> None:
        held = torch.ones(1)
        kept.append(weakref.ref(held))
        raise MemoryError

    kept: list[weakref.ref[torch.Tensor]] = []
    with pytest.raises(MemoryShortageError) as error, explain_device_errors("cpu", "x", ["y"]):
        fails()
    assert error.value.__cause__ is not None and kept[0]() is None


def test_other_errors_pass() -> None:
    for error in (RuntimeError("shapes do not match"), ConfigError("no"), MemoryShortageError("inner")):
        with pytest.raises(type(error), match=str(error)), explain_device_errors("cpu", "x", ["y"]):
            raise error
