"""The library on CUDA without a GPU: devices, waits for the device, memory and endings, but no numbers.

A C library stands in for CUDA (see `runtime.c`): memory, copies, devices and streams are torch's real work, kernels
compute nothing. When the host waits, a GPU idles for as long as the host needs to queue work again.

What these tests caught since they exist, none of which another test saw (all would have needed a GPU):
- A batch of several items could not be pinned, so it failed on a GPU; likewise each run with `trainer.ema_decay`.
- Each run on a quantized base failed at its end, and nf4 waited for the device at each dequantization.
- The trial of the memory plan stayed in memory for the whole run, 5 GB for medium (on CPUs too).
- The check for memorized clips at the end of a run ran on the CPU.
- Each training step waited for the device four to six times and each sampling step three times; audio was copied back
  in three waits instead of one.
- Loading in fp16 held 9.9 GB of medium where 5.0 GB suffice; CUDA graphs were recorded on the wrong device.
- torch 2.14's varlen attention asks for cuDNN's version before it chooses a kernel.
They stay as long as no GPU is part of the checks.
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
    pytest.skip("the stand-in needs Linux on x86-64", allow_module_level=True)
if torch.version.cuda is None:
    pytest.skip("this torch was built without CUDA", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("there is a real GPU", allow_module_level=True)
if not (shutil.which("cc") and shutil.which("nm")):
    pytest.skip("building the stand-in needs a C compiler (cc) and nm", allow_module_level=True)

PACKED = ["data.pack_frames=400", "loss.silence_seconds=0", "data.silence_tail_seconds=0"]
CHECKPOINTED = "trainer.activation_checkpointing=blocks"
TRAININGS = {
    "default": [],
    "lora": ["adapter=lora"],
    "packed": PACKED,
    "checkpointed": [CHECKPOINTED],
    "bora-checkpointed": ["adapter=bora", CHECKPOINTED],
    "bora-xs": ["adapter=bora-xs"],
    "ema": ["trainer.ema_decay=0.9"],
    "int8": ["trainer.quantize=int8"],
    "fp8": ["trainer.quantize=fp8"],
    "nf4": ["trainer.quantize=nf4"],
    "accumulated-dropout": ["trainer.accumulate=2", "adapter.dropout=0.1"],
}
GENERATIONS = {
    "text": [44100],
    "unequal durations": [22050, 88200],
    "guidance": [44100],
    "init audio": [44100],
    "inpainting": [44100],
    "adapter in an interval": [44100],
    "cuda graphs": [44100],
    "fp16": [44100],
}
"""What run_generation.py generates: samples of each item."""


@pytest.fixture(scope="module")
def programs(start: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[], Any]]:
    """Start the two long programs side by side."""
    folder = tmp_path_factory.mktemp("training")
    return {
        "trained": start("run_training.py", folder, json.dumps(TRAININGS)),
        "generated": start("run_generation.py"),
    }


@pytest.fixture(scope="module")
def trained(programs: dict[str, Callable[[], Any]]) -> Any:
    """What run_training.py recorded of each run."""
    return programs["trained"]()


@pytest.fixture(scope="module")
def generated(programs: dict[str, Callable[[], Any]]) -> Any:
    """What run_generation.py recorded of each generation."""
    return programs["generated"]()


@pytest.fixture(scope="module")
def itself(start: Any) -> Any:
    """What run_itself.py recorded of the stand-in."""
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


@pytest.mark.parametrize("name", GENERATIONS)
def test_a_generation_succeeds_and_waits_once_for_its_audio(generated: Any, name: str) -> None:
    result = generated[name]
    assert result["error"] is None, result["error"]
    assert [channels for channels, _ in result["shapes"]] == [2] * len(GENERATIONS[name])
    assert [samples for _, samples in result["shapes"]] == GENERATIONS[name]
    assert result["launches"] > 0
    assert len(result["waits"]) == 1, "\n".join(result["waits"])


@pytest.mark.parametrize("name", TRAININGS)
def test_a_run_succeeds_and_writes_its_adapter(trained: Any, name: str) -> None:
    assert trained[name]["code"] == 0, trained[name]["log"]
    assert trained[name]["adapter"]


@pytest.mark.parametrize("name", TRAININGS)
def test_between_log_lines_no_step_waits_for_the_device(trained: Any, name: str) -> None:
    """A quantized base is dequantized by the device alone, so it waits no more than a whole one."""
    waits = trained[name]["waits"]
    assert not waits, "\n".join(dict.fromkeys(waits))


@pytest.mark.parametrize("name", TRAININGS)
def test_a_memory_plan_leaves_nothing_on_the_device(trained: Any, name: str) -> None:
    assert trained[name]["left"] == 0


def test_a_step_leaves_nothing_on_the_device(trained: Any) -> None:
    early, late = trained["default"]["allocated"]
    assert late < early + 2**20, "batches differ in length, by much less than this"
    assert early < trained["default"]["peak"] / 2


def test_activation_checkpointing_takes_less_memory(trained: Any) -> None:
    assert trained["checkpointed"]["peak"] < 0.8 * trained["default"]["peak"]
