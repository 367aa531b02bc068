"""Whole models with adapters against the recorded outputs of the released implementation, and the recorded files."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from helpers.golden import DEVICE, GOLDEN, GoldenSet
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.adapters.spec import KINDS
from sa3train.models.checkpoint import StableAudio3, load_checkpoint

ROOT = GOLDEN
GOLDEN = {kind: GoldenSet(f"{kind}/cases") for kind in ("plain", "diff")}
FILES = [path for kind in GOLDEN for path in sorted((ROOT / kind / "adapters").glob("*.safetensors"))]
TOLERANCE = 1e-4


def cases(prefix: str) -> list[tuple[str, str]]:
    return [(kind, name) for kind, golden in GOLDEN.items() for name in golden.names(prefix)]


@pytest.fixture(scope="module")
def models() -> dict[str, StableAudio3]:
    return {kind: load_checkpoint(ROOT / kind, DEVICE, parts=("dit", "conditioner")) for kind in GOLDEN}


@pytest.fixture(scope="module")
def stacks(models: dict[str, StableAudio3]) -> dict[str, AdapterStack]:
    """One stack per model for all cases, so that each case also shows the one before it left no trace."""
    return {kind: AdapterStack(model.get_adapter_root(), semantics="reference") for kind, model in models.items()}


@pytest.fixture(autouse=True)
def base_restored(models: dict[str, StableAudio3], stacks: dict[str, AdapterStack]) -> Iterator[None]:
    before = {kind: snapshot(model) for kind, model in models.items()}
    yield
    for kind, stack in stacks.items():
        stack.clear()
        after = snapshot(models[kind])
        assert all(torch.equal(before[kind][name], tensor) for name, tensor in after.items())


def snapshot(model: StableAudio3) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.get_adapter_root().state_dict().items()}


def play(stack: AdapterStack, kind: str, case: str) -> None:
    """Load the case's files into the stack with its settings and bake them for its noise level."""
    settings = GOLDEN[kind].settings(case)
    count = len(settings["files"])
    intervals = settings.get("intervals", [[0.0, 1.0]] * count)
    excluded = settings.get("excluded_layers", [""] * count)
    for file, strength, interval, exclude in zip(
        settings["files"], settings["strengths"], intervals, excluded, strict=True
    ):
        adapter = load_adapter(ROOT / kind / file)
        report = stack.add(adapter, strength, interval=tuple(interval), exclude_layers=exclude)
        assert report.matched == list(adapter.tensors)
        assert not report.is_partial
        assert not report.not_finite
    stack.apply(float(GOLDEN[kind].tensors(case)["t"][0]) if "intervals" in settings else None)


@torch.no_grad()
def assert_velocity(model: StableAudio3, kind: str, case: str) -> None:
    tensors = GOLDEN[kind].tensors(case, DEVICE)
    velocity_BCT = model.dit(
        tensors["x"],
        tensors["t"],
        cross_attn_cond_BLD=tensors["cross_attn_cond"],
        global_cond_BD=tensors["global_cond"],
        local_add_cond_BCT=tensors["local_add_cond"],
    )
    torch.testing.assert_close(velocity_BCT, tensors["velocity"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("kind", "case"), cases("adapter."))
@torch.no_grad()
def test_adapter(models: dict[str, StableAudio3], stacks: dict[str, AdapterStack], kind: str, case: str) -> None:
    play(stacks[kind], kind, case)
    assert_velocity(models[kind], kind, case)
    seconds_B = torch.tensor(GOLDEN[kind].settings(case)["seconds"], device=DEVICE)
    embedding_B1D = models[kind].conditioner.conditioners["seconds_total"](seconds_B)
    expected_B1D = GOLDEN[kind].tensors(case, DEVICE)["seconds_embedding"]
    torch.testing.assert_close(embedding_B1D, expected_B1D, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("kind", "case"), cases("stack."))
def test_stack(models: dict[str, StableAudio3], stacks: dict[str, AdapterStack], kind: str, case: str) -> None:
    play(stacks[kind], kind, case)
    assert_velocity(models[kind], kind, case)


@pytest.mark.parametrize(("kind", "case"), cases("interval."))
def test_interval(models: dict[str, StableAudio3], stacks: dict[str, AdapterStack], kind: str, case: str) -> None:
    play(stacks[kind], kind, case)
    assert_velocity(models[kind], kind, case)


@pytest.mark.parametrize("kind", GOLDEN)
def test_noise_levels_may_follow_one_another_on_one_stack(
    models: dict[str, StableAudio3], stacks: dict[str, AdapterStack], kind: str
) -> None:
    """As in sampling: the adapters stay loaded, and only the noise level falls."""
    falling = sorted(GOLDEN[kind].names("interval."), reverse=True)
    play(stacks[kind], kind, falling[0])
    for case in falling:
        stacks[kind].apply(float(GOLDEN[kind].tensors(case)["t"][0]))
        assert_velocity(models[kind], kind, case)


def test_every_kind_is_recorded_in_both_models() -> None:
    assert {file.stem for file in FILES} == set(KINDS)
    assert len(FILES) == 2 * len(KINDS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.parent.name}-{file.stem}")
def test_recorded_file_survives_loading_and_saving_bit_for_bit(file: Path, tmp_path: Path) -> None:
    adapter = load_adapter(file)
    save_adapter(tmp_path / "again.safetensors", adapter)
    before, after = load_file(file), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].view(torch.int16), after[key].view(torch.int16)) for key in before)
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    assert lora_config(file) == lora_config(tmp_path / "again.safetensors")

    again = load_adapter(tmp_path / "again.safetensors")
    assert again.spec == adapter.spec
    assert again.fingerprint == adapter.fingerprint


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.parent.name}-{file.stem}")
def test_spec_is_that_of_the_file(file: Path) -> None:
    adapter, config = load_adapter(file), lora_config(file)
    assert (adapter.spec.adapter_type, adapter.spec.rank, adapter.spec.alpha) == (
        file.stem,
        config["rank"],
        config["alpha"],
    )
    parameters = set(KINDS[file.stem].parameters)
    assert all(set(params) == parameters for params in adapter.tensors.values())
    assert all(path.startswith(("model.", "conditioners.")) for path in adapter.tensors)


def lora_config(file: Path) -> dict[str, object]:
    with safe_open(file, framework="pt") as opened:
        config: dict[str, object] = json.loads(opened.metadata()["lora_config"])
    return config
