"""Devices and precision of a run, on machines that these tests make up."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sa3train.core import device
from sa3train.core.errors import ConfigError
from sa3train.training import trainer
from sa3train.training.settings import TrainerSettings
from sa3train.training.trainer import choose_training_device, count_ranks, make_trainer, resolve_precisions


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many devices of each type this machine has; all of them compute."""
    counts = {"cuda": 0, "xpu": 0, "mps": 0}
    for name in ("LOCAL_RANK", "SLURM_LOCALID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(device, "GPU_TYPES", {name: lambda name=name: counts[name] for name in counts})
    for module in (device, trainer):
        monkeypatch.setattr(module, "find_device_fault", lambda chosen, dtype=None: None)
    device._choose_best.cache_clear()
    return counts


@pytest.mark.parametrize(
    ("counts", "settings", "chosen", "ranks"),
    [
        ({}, {}, "cpu", 1),
        ({"cuda": 4}, {}, "cuda", 4),
        ({"cuda": 4}, {"accelerator": "gpu", "devices": 2}, "cuda", 2),
        ({"cuda": 4}, {"accelerator": "cuda:3"}, "cuda:3", 1),
        ({"cuda": 4}, {"accelerator": "cpu", "devices": 2}, "cpu", 2),
        ({"xpu": 2}, {"accelerator": "gpu"}, "xpu", 1),
        ({"xpu": 2, "mps": 1}, {"accelerator": "mps"}, "mps", 1),
    ],
)
def test_the_device_of_a_run(
    counts: dict[str, int], settings: dict[str, Any], chosen: str, ranks: int, machine: dict[str, int]
) -> None:
    machine |= counts
    made = TrainerSettings(**settings)
    assert choose_training_device(made) == torch.device(chosen)
    assert count_ranks(made) == ranks


@pytest.mark.parametrize(
    ("counts", "settings", "words"),
    [
        ({}, {"accelerator": "gpu"}, "trainer.accelerator=gpu, but torch sees no GPU"),
        ({}, {"accelerator": "cuda"}, "trainer.accelerator=cuda is not available. This machine has cpu"),
        ({}, {"accelerator": "tpu"}, "trainer.accelerator=tpu is unknown"),
        ({"cuda": 2}, {"devices": 3}, "trainer.devices=3, but this machine has 2 GPUs"),
        ({"cuda": 2}, {"accelerator": "cuda:1", "devices": 2}, "trainer.devices=2 is not supported"),
        ({"xpu": 2}, {"devices": 2, "strategy": "fsdp"}, "trainer.devices=2, trainer.strategy=fsdp is not supported"),
    ],
)
def test_a_device_that_cannot_be_had(
    counts: dict[str, int], settings: dict[str, Any], words: str, machine: dict[str, int]
) -> None:
    machine |= counts
    with pytest.raises(ConfigError, match=words):
        count_ranks(TrainerSettings(**settings))


def test_lightning_trains_on_the_gpu_that_it_does_not_know(
    machine: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine["xpu"] = 1
    monkeypatch.setattr(trainer, "choose_precision", lambda device: ("bf16", "measured"))
    made = make_trainer(tmp_path, TrainerSettings(), [])
    assert made.strategy.root_device == torch.device("xpu:0") and made.world_size == 1
    plugin: Any = made.precision_plugin
    assert (made.precision, plugin.device) == ("bf16-mixed", "xpu")


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "given", "found"),
    [
        (CPU, ("auto", "auto"), (torch.float32, "fp32")),
        (CPU, ("bf16", "auto"), (torch.bfloat16, "bf16-mixed")),
        (CPU, ("fp32", "bf16-mixed"), (torch.float32, "bf16-mixed")),
        (GPU, ("auto", "auto"), (torch.bfloat16, "bf16-mixed")),
        (GPU, ("fp32", "auto"), (torch.float32, "bf16-mixed")),
        (GPU, ("auto", "fp32"), (torch.float32, "fp32")),
    ],
)
def test_precision_is_decided_by_the_machine_where_it_is_left_open(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, given: tuple[str, Any], found: tuple[torch.dtype, str]
) -> None:
    monkeypatch.setattr(trainer, "choose_precision", lambda device: ("bf16", "measured"))
    monkeypatch.setattr(trainer, "find_device_fault", lambda device, dtype: None)
    assert resolve_precisions(*given, device) == found
    monkeypatch.setattr(trainer, "find_device_fault", lambda device, dtype: "BFloat16 is not supported on MPS")
    if found[1] == "bf16-mixed":
        with pytest.raises(ConfigError, match="does not run on .*BFloat16 is not supported"):
            resolve_precisions(*given, device)
