"""The library on CUDA without a GPU: devices, waits for the device, memory, and how it ends; never a number.

A C library stands in for CUDA (see `runtime.c`): memory, copies, devices and streams are torch's own real work, kernels
compute nothing. A wait of the host costs a GPU the time that the host needs to queue work again.
"""

import json
import platform
import shutil
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

if sys.platform != "linux" or platform.machine() != "x86_64":
    pytest.skip("the stand-in is preloaded into processes of Linux on x86-64", allow_module_level=True)
if torch.version.cuda is None:
    pytest.skip("this torch was built without CUDA", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("there is a real GPU here, and nothing to stand in for", allow_module_level=True)
if not (shutil.which("cc") and shutil.which("nm")):
    pytest.skip("building the stand-in takes a C compiler (cc) and nm", allow_module_level=True)

PACKED = ["data.pack_frames=400", "objective.silence_seconds=0", "data.tail_seconds=0"]
RECOMPUTED = "trainer.activation_checkpointing=blocks"
TRAININGS = {
    "default": [],
    "lora": ["adapter=lora"],
    "packed": PACKED,
    "recomputed": [RECOMPUTED],
    "bora-recomputed": ["adapter=bora", RECOMPUTED],
    "bora-xs": ["adapter=bora-xs"],
    "average": ["trainer.average=0.9"],
    "int8": ["trainer.quantize=int8"],
    "fp8": ["trainer.quantize=fp8"],
    "nf4": ["trainer.quantize=nf4"],
    "accumulated-dropout": ["trainer.accumulate=2", "adapter.dropout=0.1"],
}
REQUESTS = {
    "text": [44100],
    "unequal durations": [22050, 88200],
    "guidance": [44100],
    "init audio": [44100],
    "inpainting": [44100],
    "adapter in an interval": [44100],
    "cuda graphs": [44100],
    "fp16": [44100],
}
"""What run_generation.py asks for: samples of each item."""


@pytest.fixture(scope="module")
def programs(start: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[], Any]]:
    """The two long programs, side by side."""
    folder = tmp_path_factory.mktemp("training")
    return {
        "trained": start("run_training.py", folder, json.dumps(TRAININGS)),
        "generated": start("run_generation.py"),
    }


@pytest.fixture(scope="module")
def trained(programs: dict[str, Callable[[], Any]]) -> Any:
    """What run_training.py saw of every run."""
    return programs["trained"]()


@pytest.fixture(scope="module")
def generated(programs: dict[str, Callable[[], Any]]) -> Any:
    """What run_generation.py saw of every request."""
    return programs["generated"]()


@pytest.fixture(scope="module")
def itself(start: Any) -> Any:
    """What run_itself.py saw of the stand-in."""
    return start("run_itself.py")()


def test_the_stand_in_is_one_gpu_with_memory_and_blank_kernels(itself: Any) -> None:
    assert itself["device"] == "stand-in H200"
    assert itself["capability"] == [9, 0]
    assert itself["copied"] == [0, 1, 2, 3, 4]
    assert itself["allocated"] == 2**20
    assert itself["launched"] == 2, "one matrix product and one multiplication"


def test_the_stand_in_reports_a_wait_with_its_line_and_nothing_else(itself: Any) -> None:
    assert itself["quiet"] == []
    (item,) = itself["item"]
    assert item.startswith("tests/standin_gpu/run_itself.py:")
    assert "product.sum().item()" in item


def test_the_stand_in_counts_a_wait_that_torch_does_not_report(itself: Any) -> None:
    assert len(itself["silent"]) == 1


def test_on_the_stand_in_tensors_of_two_devices_do_not_mix(itself: Any) -> None:
    assert "same device" in itself["mixed"]


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_ends_and_waits_once_for_its_audio(generated: Any, name: str) -> None:
    seen = generated[name]
    assert seen["error"] is None, seen["error"]
    assert [channels for channels, _ in seen["shapes"]] == [2] * len(REQUESTS[name])
    assert [samples for _, samples in seen["shapes"]] == REQUESTS[name]
    assert seen["launches"] > 0
    assert len(seen["waits"]) == 1, "\n".join(seen["waits"])


@pytest.mark.parametrize("name", TRAININGS)
def test_a_run_ends_well_and_leaves_its_adapter(trained: Any, name: str) -> None:
    assert trained[name]["code"] == 0, trained[name]["said"]
    assert trained[name]["adapter"]


@pytest.mark.parametrize("name", TRAININGS)
def test_between_log_lines_no_step_waits_for_the_device(trained: Any, name: str) -> None:
    """A base in few bits is decoded by the device alone, so it waits no more than one that is kept whole."""
    waits = trained[name]["waits"]
    assert not waits, "\n".join(dict.fromkeys(waits))


@pytest.mark.parametrize("name", TRAININGS)
def test_a_memory_plan_leaves_nothing_on_the_device(trained: Any, name: str) -> None:
    assert trained[name]["left"] == 0


def test_between_steps_nothing_of_a_step_stays(trained: Any) -> None:
    early, late = trained["default"]["held"]
    assert late < early + 2**20, "batches of latents differ in length, by much less than this"
    assert early < trained["default"]["peak"] / 2


def test_recomputed_blocks_take_less_memory(trained: Any) -> None:
    assert trained["recomputed"]["peak"] < 0.8 * trained["default"]["peak"]
