"""Adapters made from adapters: each tool does what it says, states what it loses, and keeps the metadata."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from helpers.golden import PLAIN
from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.layer_weight import layer_part
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.adapters.layer_filter import adaptable_layers
from sa3train.adapters.spec import KINDS, AdapterSpec
from sa3train.adapters.tools.edit import as_difference, differences, extracted, merged, resized, scaled, unfrozen
from sa3train.adapters.tools.inspect import compared, examined, inspected, plot_layers
from sa3train.adapters.tools.low_rank import Cut, cut_matrix, cut_product, inner_product
from sa3train.adapters.tools.merge_checkpoint import Ingredient, merge_into_checkpoint, rewrite_tensors
from sa3train.core.errors import AdapterError, SA3Error
from sa3train.core.files import atomic_folder, sha256_of
from sa3train.models.checkpoint import load_checkpoint

Trained = Callable[..., Adapter]


def golden(kind: str, which: str = "plain") -> Path:
    return PLAIN.parent / which / "adapters" / f"{kind}.safetensors"


@pytest.fixture(params=["linear", "conv1d"])
def base(small: type[Any], request: pytest.FixtureRequest) -> Any:
    return small(request.param)


def weights_of(root: Any) -> dict[str, Tensor]:
    return {path: layer.weight.detach() for path, layer in adaptable_layers(root).items()}  # type: ignore[operator]


def effective(adapter: Adapter, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {path: layer_part(adapter, path, weights[path]).weight(weights[path]) for path in adapter.tensors}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for path, tensor in found.items():
        torch.testing.assert_close(tensor, expected[path], atol=tolerance, rtol=0)


def history(adapter: Adapter) -> list[str]:
    return [entry["tool"] for entry in json.loads(adapter.metadata["sa3train_history"])]


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
@pytest.mark.parametrize("rank", [1, 3, 5, 8])
def test_a_cut_is_the_best_of_its_rank_and_states_what_it_lost(shape: tuple[int, int], rank: int) -> None:
    D = torch.randn(shape, dtype=torch.float64)
    S = torch.linalg.svdvals(D)
    for part in (cut_matrix(D, Cut(rank)), cut_product(D, torch.eye(shape[1]), Cut(rank))):
        assert (part.B_OR.shape, part.A_RI.shape) == ((shape[0], rank), (rank, shape[1]))
        assert part.total == pytest.approx(float(D.square().sum()))
        assert part.lost == pytest.approx(float(S[rank:].square().sum()), abs=1e-9)
        assert float((D - part.B_OR @ part.A_RI).square().sum()) == pytest.approx(part.lost, abs=1e-9)


def test_a_share_of_the_energy_gives_the_smallest_rank_that_keeps_it() -> None:
    D = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))  # squares 9, 4, 1 of 14
    for share, rank in ((0.5, 1), (9 / 14, 1), (0.7, 2), (13 / 14, 2), (0.95, 3), (1.0, 3)):
        assert cut_matrix(D, Cut(energy=share)).A_RI.shape[0] == rank
        assert cut_product(D, torch.eye(4), Cut(energy=share)).A_RI.shape[0] == rank
    assert cut_matrix(torch.zeros(3, 3), Cut(energy=0.9)).A_RI.shape[0] == 1
    for wrong in ({}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}):
        with pytest.raises(AdapterError):
            Cut(**wrong)


def test_inner_products_need_no_products() -> None:
    B, A, D, C = torch.randn(5, 2), torch.randn(2, 4), torch.randn(5, 3), torch.randn(3, 4)
    expected = float((B @ A * (D @ C)).sum())
    for pair in (((B, A), (D, C)), ((B @ A, None), (D, C)), ((B, A), (D @ C, None)), ((B @ A, None), (D @ C, None))):
        assert inner_product(*pair) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_resizing_to_no_less_than_the_rank_changes_nothing(kind: str, base: Any, trained: Trained) -> None:
    adapter, weights = trained(AdapterSpec(kind, rank=3, alpha=2.0, rank_pattern={"down": 2}), base), weights_of(base)
    for rank in (3, 7):
        larger, loss = resized(adapter, Cut(rank), weights)
        assert larger.spec.rank == rank
        assert larger.spec.kind == kind.removesuffix("-xs")
        assert loss.relative < 1e-6
        assert_close(effective(larger, weights), effective(adapter, weights))
        assert larger.metadata["base_model"] == "small"
        assert history(larger)[-1] == "resize"


def test_resizing_below_the_rank_states_what_the_weights_then_lack(base: Any, trained: Trained) -> None:
    adapter, weights = trained(AdapterSpec("lora", rank=4, include=["layers"]), base), weights_of(base)
    smaller, loss = resized(adapter, Cut(2))
    measured = differences(adapter, smaller, weights)
    assert loss.relative == pytest.approx(measured.relative, rel=1e-3)
    assert 0 < loss.relative < 1
    assert loss.worst[1] >= loss.relative
    assert smaller.spec.include == adapter.spec.include
    by_energy, loss = resized(adapter, Cut(energy=0.9))
    assert loss.relative**2 <= 0.1
    ranks = {by_energy.spec.rank_of(path) for path in by_energy.tensors}
    assert all(by_energy.tensors[path]["lora_A"].shape[0] == by_energy.spec.rank_of(path) for path in by_energy.tensors)
    assert max(ranks) <= 4


@pytest.mark.parametrize("kind", ["lora-xs", "bora-xs"])
def test_frozen_bases_need_the_model(kind: str, base: Any, trained: Trained) -> None:
    adapter, weights = trained(AdapterSpec(kind, rank=3), base), weights_of(base)
    with pytest.raises(AdapterError, match=r"needs the weights it was trained on: give --model NAME \(small\)"):
        resized(adapter, Cut(2))
    assert_close(effective(unfrozen(adapter, weights), weights), effective(adapter, weights))


@pytest.mark.parametrize("kind", ["lora", "lora-xs"])
def test_scaling_is_exact_and_leaves_the_tensors_alone(kind: str, base: Any, trained: Trained) -> None:
    spec = AdapterSpec(kind, rank=3, rank_pattern={"down": 2}, alpha_pattern={"layers.0": 5.0}, rslora=True)
    adapter, weights = trained(spec, base), weights_of(base)
    half = scaled(adapter, -0.5)
    for path, params in adapter.tensors.items():
        assert all(torch.equal(tensor, half.tensors[path][name]) for name, tensor in params.items())
        change = layer_part(adapter, path, weights[path]).weight(weights[path]) - weights[path]
        expected = weights[path] - 0.5 * change
        torch.testing.assert_close(layer_part(half, path, weights[path]).weight(weights[path]), expected)
    whole = scaled(as_difference(adapter, weights), -0.5)
    assert_close(effective(whole, weights), effective(half, weights))
    for factor in (0.0, float("nan"), float("inf")):
        with pytest.raises(AdapterError, match="finite number other than 0"):
            scaled(adapter, factor)


def test_kinds_with_magnitudes_are_scaled_as_a_lora_of_enough_rank(base: Any, trained: Trained) -> None:
    adapter, weights = trained(AdapterSpec("bora", rank=2), base), weights_of(base)
    with pytest.raises(AdapterError, match="not in proportion"):
        scaled(adapter, 0.5)
    half, loss = merged([adapter], [0.5], Cut(36), weights, tool="scale")
    assert loss.relative < 1e-6
    expected = {path: torch.lerp(weights[path], W, 0.5) for path, W in effective(adapter, weights).items()}
    assert_close(effective(half, weights), expected)


def test_a_merge_of_enough_rank_is_the_sum(base: Any, trained: Trained) -> None:
    weights = weights_of(base)
    first = trained(AdapterSpec("lora", rank=2, include=["layers[0-10]"]), base, seed=1)
    second = trained(AdapterSpec("lora", rank=3, alpha=1.0), base, seed=2)
    third = trained(AdapterSpec("dora-rows", rank=2, exclude=["layers.0"]), base, seed=3)
    for adapters, strengths, rank in (
        ([first, second], [0.7, -0.4], 5),
        ([first, second, third], [1.0, 0.5, 0.25], 36),
    ):
        one, loss = merged(adapters, strengths, Cut(rank), weights)
        assert loss.relative < 1e-6
        expected = {path: W.clone() for path, W in weights.items() if any(path in a.tensors for a in adapters)}
        for adapter, strength in zip(adapters, strengths, strict=True):
            for path, W in effective(adapter, weights).items():
                expected[path] += strength * (W - weights[path])
        assert_close(effective(one, weights), expected)
        assert one.metadata["base_model"] == "small"
        (entry,) = json.loads(one.metadata["sa3train_history"])
        assert [source["strength"] for source in entry["of"]] == strengths
    without_base, _ = merged([first, second], [0.7, -0.4], Cut(5))
    assert_close(
        effective(without_base, weights), effective(merged([first, second], [0.7, -0.4], Cut(5), weights)[0], weights)
    )
    with pytest.raises(AdapterError, match="needs the weights"):
        merged([first, third], [1.0, 1.0], Cut(4))
    _, lossy = merged([first, second], [1.0, 1.0], Cut(1))
    assert lossy.relative > 0.01


def test_an_extracted_adapter_is_the_difference(small: type[Any], trained: Trained, tmp_path: Path) -> None:
    base, tuned = small(), small()
    adapter = trained(AdapterSpec("lora", rank=3, exclude=["layers.10."]), base)
    stack = AdapterStack(tuned)
    stack.add(adapter)
    stack.apply()
    found, loss = extracted(weights_of(tuned), weights_of(base), Cut(3), {"base_model": "small"})
    assert found.tensors.keys() == adapter.tensors.keys()
    assert loss.relative < 1e-3
    assert_close(effective(found, weights_of(base)), weights_of_those(tuned, adapter), 1e-4)
    save_adapter(tmp_path / "x.safetensors", found)
    again = load_adapter(tmp_path / "x.safetensors")
    assert (again.spec.kind, again.spec.rank, history(again)) == ("lora", 3, ["extract"])
    with pytest.raises(AdapterError, match="nothing to extract"):
        extracted(weights_of(base), weights_of(base), Cut(3))
    with pytest.raises(AdapterError, match="different architecture"):
        extracted(weights_of(small("conv1d")), weights_of(base), Cut(3))


def weights_of_those(root: Any, adapter: Adapter) -> dict[str, Tensor]:
    weights = weights_of(root)
    return {path: weights[path] for path in adapter.tensors}


@pytest.mark.parametrize("kind", ["lora", "dora-rows", "bora-xs"])
def test_a_merged_checkpoint_is_the_model_with_the_adapter_in_it(kind: str, tmp_path: Path) -> None:
    model = load_checkpoint(PLAIN, parts=("dit", "conditioner"))
    root = model.adaptable()
    untouched = {name: tensor.clone() for name, tensor in root.state_dict().items()}
    adapter, other = load_adapter(golden(kind)), load_adapter(golden("lora-xs"))
    before = sha256_of(PLAIN / "model.safetensors")
    ingredients = [Ingredient(adapter, 0.8, conditioner_strength=0.3), Ingredient(other, -0.5)]
    merge_into_checkpoint(PLAIN, tmp_path / "merged", root, ingredients, model)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in root.state_dict().items())
    assert sha256_of(PLAIN / "model.safetensors") == before
    stack = AdapterStack(root)
    stack.add(adapter, 0.8, 0.3)
    stack.add(other, -0.5)
    stack.apply()
    again = load_checkpoint(tmp_path / "merged", parts=("dit", "conditioner"))
    baked, found = root.state_dict(), again.adaptable().state_dict()
    with safe_open(PLAIN / "model.safetensors", framework="pt") as file:
        stored_in = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        assert {key: file.get_slice(key).get_dtype() for key in file.keys()} == stored_in  # noqa: SIM118
        record = json.loads(file.metadata()["sa3train_merged"])
    assert [(item["kind"], item["strength"]) for item in record] == [(kind, 0.8), ("lora-xs", -0.5)]
    for name, tensor in baked.items():
        rounded = tensor.bfloat16().float() if stored_as_bf16(name, stored_in) else tensor
        assert torch.equal(found[name], rounded), name
    source, merged_file = load_file(PLAIN / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    others = [key for key in source if key.startswith("pretransform.") or "norm" in key]
    assert others
    assert all(torch.equal(source[key], merged_file[key]) for key in others)
    assert {item.name for item in (tmp_path / "merged").iterdir()} == {
        "model.safetensors",
        "model_config.json",
        "t5gemma",
    }


def stored_as_bf16(name: str, stored_in: dict[str, str]) -> bool:
    key = f"model.{name}" if name.startswith("model.") else f"conditioner.{name}"
    return stored_in[key] == "BF16"


def test_a_merge_that_fails_leaves_nothing_and_replaces_no_model(tmp_path: Path) -> None:
    model = load_checkpoint(PLAIN, parts=("dit", "conditioner"))
    root = model.adaptable()
    lora = load_adapter(golden("lora"))
    untouched = {name: tensor.clone() for name, tensor in root.state_dict().items()}
    with pytest.raises(AdapterError, match=r"only part of it fits|another architecture"):
        merge_into_checkpoint(PLAIN, tmp_path / "a", root, [Ingredient(load_adapter(golden("lora", "diff")))], model)
    key = "model.model.transformer.project_in.weight"
    bad = {"x" + key: torch.ones(128, 64)}, {key: torch.ones(2, 2)}, {key: torch.full((128, 64), float("nan"))}
    for changed, message in zip(bad, ("has no tensor", "has no tensor", "would not be finite"), strict=True):
        with pytest.raises(AdapterError, match=message), atomic_folder(tmp_path / "a", lambda _: True) as aside:
            rewrite_tensors(PLAIN / "model.safetensors", aside / "model.safetensors", changed, {})
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in root.state_dict().items())
    assert list(tmp_path.iterdir()) == []
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for name in ("model.safetensors", "model_config.json"):
        (downloaded / name).write_bytes((PLAIN / name).read_bytes())
    with pytest.raises(SA3Error, match="holds something else"):
        merge_into_checkpoint(PLAIN, downloaded, root, [Ingredient(lora)], model)
    merge_into_checkpoint(PLAIN, tmp_path / "mine", root, [Ingredient(lora)], model)
    first = sha256_of(tmp_path / "mine" / "model.safetensors")
    merge_into_checkpoint(PLAIN, tmp_path / "mine", root, [Ingredient(lora, 0.5)], model)
    assert sha256_of(tmp_path / "mine" / "model.safetensors") != first
    assert sorted(item.name for item in tmp_path.iterdir()) == ["downloaded", "mine"]


def test_inspection_needs_no_model_and_tells_norms(base: Any, trained: Trained) -> None:
    adapter, weights = trained(AdapterSpec("lora", rank=3, alpha=6.0), base), weights_of(base)
    found = inspected(adapter)
    assert (found["kind"], found["rank"], found["alpha"]) == ("lora", "3", "6")
    for path, W in effective(adapter, weights).items():
        assert found["layers"][path]["norm"] == pytest.approx(float((W - weights[path]).norm()), rel=1e-4)
    assert found["metadata"]["base_model"] == "small"
    json.dumps(found)
    report, refused = examined(adapter, base)
    assert refused is None
    assert report.effect["all"] > 0
    zero = adapter.with_tensors(
        {path: {name: torch.zeros_like(t) for name, t in params.items()} for path, params in adapter.tensors.items()}
    )
    assert inspected(zero)["all_zero"]
    refusal = examined(zero, base)[1]
    assert refusal is not None
    assert "it changes nothing" in refusal


def test_every_kind_is_inspected(tmp_path: Path) -> None:
    for kind in KINDS:
        found = inspected(load_adapter(golden(kind)))
        assert all(layer["norm"] > 0 for layer in found["layers"].values())
    plot_layers({path: layer["norm"] for path, layer in found["layers"].items()}, "norm", "t", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_finds_what_differs(base: Any, trained: Trained) -> None:
    weights = weights_of(base)
    first = trained(AdapterSpec("lora", rank=3), base)
    same = compared(first, first)
    assert same["identical"]
    assert all(row == {"relative_difference": 0.0, "cosine": pytest.approx(1)} for row in same["layers"].values())
    doubled = compared(first, scaled(first, 2.0))
    assert not doubled["identical"]
    assert doubled["settings"]["alpha"] == ["3", "6"]
    for row in doubled["layers"].values():
        assert row["relative_difference"] == pytest.approx(1.0, rel=1e-4)
        assert row["cosine"] == pytest.approx(1.0)
    narrower = trained(AdapterSpec("dora-rows", rank=2, include=["layers"]), base, seed=4)
    across = compared(first, narrower, weights)
    assert across["only_in_first"] == ["conditioners.seconds_total.embedder.embedding.1"]
    assert across["settings"]["kind"] == ["lora", "dora-rows"]
    for path, row in across["layers"].items():
        one, other = (effective(adapter, weights)[path] - weights[path] for adapter in (first, narrower))
        assert row["relative_difference"] == pytest.approx(float((one - other).norm() / one.norm()), rel=1e-3)
    frozen = compared(first, trained(AdapterSpec("lora-xs", rank=2), base))
    assert all(row["cosine"] is None for row in frozen["layers"].values())


def test_what_was_there_comes_back_after_a_kill_between_two_renames(tmp_path: Path) -> None:
    earlier = tmp_path / ".mine.a1b2c3d4.old"
    earlier.mkdir()
    (earlier / "model.safetensors").write_text("before")
    with pytest.raises(ValueError, match="stopped"), atomic_folder(tmp_path / "mine", lambda _: True):
        raise ValueError("stopped")
    assert (tmp_path / "mine" / "model.safetensors").read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]
