"""Adapters made from adapters: each tool does what it says, states what it loses, and keeps the metadata."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from helpers.golden import PLAIN
from helpers.small_model import Small, train_adapter
from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.layer_weight import get_layer_adapter
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.adapters.spec import KINDS, AdapterSpec
from sa3train.adapters.tools.base_weights import get_weights
from sa3train.adapters.tools.combine import combine
from sa3train.adapters.tools.edit import (
    convert_to_diff,
    drop_bias_changes,
    expand_bases,
    extract,
    merge,
    resize,
    scale,
)
from sa3train.adapters.tools.inspect import compare_adapters, inspect_adapter, plot_layers
from sa3train.adapters.tools.low_rank import Truncation, compute_inner_product, truncate_matrix, truncate_product
from sa3train.adapters.tools.measure import measure_difference
from sa3train.adapters.tools.merge_checkpoint import WeightedAdapter, merge_into_checkpoint, rewrite_tensors
from sa3train.adapters.tools.service import merge_adapters
from sa3train.core.errors import AdapterError, SA3Error
from sa3train.core.files import hash_file, replace_folder
from sa3train.models.checkpoint import load_checkpoint
from sa3train.models.config_reader import read_config_file
from sa3train.models.parse import complete_config

FACTORS = {"lora_A": torch.randn(2, 4), "lora_B": torch.randn(4, 2)}


def golden(kind: str, which: str = "plain") -> Path:
    return PLAIN.parent / which / "adapters" / f"{kind}.safetensors"


@pytest.fixture(params=["linear", "conv1d"])
def base(request: pytest.FixtureRequest) -> Any:
    return Small(request.param)


def effective(adapter: Adapter, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {path: get_layer_adapter(adapter, path, weights[path]).weight(weights[path]) for path in adapter.tensors}


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
    for part in (truncate_matrix(D, Truncation(rank)), truncate_product(D, torch.eye(shape[1]), Truncation(rank))):
        assert (part.B_OR.shape, part.A_RI.shape) == ((shape[0], rank), (rank, shape[1]))
        assert part.total == pytest.approx(float(D.square().sum()))
        assert part.error == pytest.approx(float(S[rank:].square().sum()), abs=1e-9)
        assert float((D - part.B_OR @ part.A_RI).square().sum()) == pytest.approx(part.error, abs=1e-9)


def test_a_share_of_the_energy_gives_the_smallest_rank_that_keeps_it() -> None:
    D = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))  # squares 9, 4, 1 of 14
    for share, rank in ((0.5, 1), (9 / 14, 1), (0.7, 2), (13 / 14, 2), (0.95, 3), (1.0, 3)):
        assert truncate_matrix(D, Truncation(explained_variance=share)).A_RI.shape[0] == rank
        assert truncate_product(D, torch.eye(4), Truncation(explained_variance=share)).A_RI.shape[0] == rank
    assert truncate_matrix(torch.zeros(3, 3), Truncation(explained_variance=0.9)).A_RI.shape[0] == 1
    for wrong in (
        {},
        {"rank": 2, "explained_variance": 0.5},
        {"rank": 0},
        {"explained_variance": 0.0},
        {"explained_variance": 1.5},
    ):
        with pytest.raises(AdapterError):
            Truncation(**wrong)


def test_inner_products_need_no_products() -> None:
    B, A, D, C = torch.randn(5, 2), torch.randn(2, 4), torch.randn(5, 3), torch.randn(3, 4)
    expected = float((B @ A * (D @ C)).sum())
    for pair in (((B, A), (D, C)), ((B @ A, None), (D, C)), ((B, A), (D @ C, None)), ((B @ A, None), (D @ C, None))):
        assert compute_inner_product(*pair) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("others", [{}, {"magnitude": torch.rand(4)}])
def test_changes_of_biases_are_merged_and_left_out_only_where_the_format_has_none(
    others: dict[str, Tensor], tmp_path: Path
) -> None:
    W, bias = {"model.one": torch.randn(4, 4), "model.two": torch.randn(4, 4)}, torch.randn(4)
    layers = {"model.one": {"diff": torch.randn(4, 4), "diff_b": bias}, "model.two": {"diff_b": bias}}
    plain = Adapter(
        AdapterSpec("lora", rank=2), {"model.one": {**FACTORS, "diff_b": bias}, "model.two": {"diff_b": bias}}
    )
    one = {"model.one": {**FACTORS, **others}}
    kind = Adapter(AdapterSpec("dora-rows" if others else "lora", rank=2), one)
    merged, _ = combine([plain, kind], [2.0, 1.0], W) or merge([plain, kind], [2.0, 1.0], Truncation(4), W)
    assert set(merged.tensors) == {"model.one", "model.two"}
    for path in W:
        torch.testing.assert_close(merged.tensors[path]["diff_b"], 2 * bias)
    torch.testing.assert_close(effective(merged, W)["model.two"], W["model.two"])
    save_adapter(tmp_path / "a.safetensors", Adapter(AdapterSpec("diff"), layers), None)
    for target, biases in (("b.safetensors", {"model.one", "model.two"}), ("b", set())):
        result = merge_adapters([(tmp_path / "a.safetensors", 1.0)], tmp_path / target, truncation=Truncation(4))
        written = load_adapter(tmp_path / target).tensors
        assert {path for path, params in written.items() if "diff_b" in params} == biases
        assert len(result.to_dict()["not_carried"]) == 2 - len(biases)
        assert sum("bias" in warning for warning in result.warnings) == (not biases)
    biases_alone = Adapter(AdapterSpec("lora"), {"model.two": {"diff_b": bias}})
    for made, _ in (resize(biases_alone, Truncation(4)), merge([biases_alone], [1.0], Truncation(4))):
        assert made.tensors["model.two"]["diff_b"].equal(bias)
    with pytest.raises(AdapterError, match="only biases"):
        drop_bias_changes(Adapter(AdapterSpec("diff"), {"model.two": layers["model.two"]}))


def test_a_merge_has_the_prompts_of_the_adapters_that_were_added() -> None:
    texts = (["a koto", "a shamisen"], ["a taiko", "a koto"], ["a whistle"])
    adapters = [Adapter(AdapterSpec("lora", rank=2), {"model.one": FACTORS}, {"prompts": json.dumps(x)}) for x in texts]
    merged, _ = merge(adapters, [0.5, 1.0, -1.0], Truncation(2))
    assert merged.prompts == ["a koto", "a taiko", "a shamisen"]


@pytest.mark.parametrize("kind", KINDS)
def test_resizing_to_no_less_than_the_rank_changes_nothing(kind: str, base: Any) -> None:
    adapter, weights = (
        train_adapter(AdapterSpec(kind, rank=3, alpha=2.0, rank_pattern={"down": 2}), base),
        get_weights(base),
    )
    for rank in (3, 7):
        larger, loss = resize(adapter, Truncation(rank), weights)
        assert larger.spec.rank == rank
        assert larger.spec.adapter_type == kind.removesuffix("-xs")
        assert loss.relative < 1e-6
        assert_close(effective(larger, weights), effective(adapter, weights))
        assert larger.metadata["base_model"] == "small"
        assert history(larger)[-1] == "resize"


def test_resizing_below_the_rank_states_what_the_weights_then_lack(base: Any) -> None:
    adapter, weights = train_adapter(AdapterSpec("lora", rank=4, include=["layers"]), base), get_weights(base)
    smaller, loss = resize(adapter, Truncation(2))
    measured = measure_difference(adapter, smaller, weights)
    assert loss.relative == pytest.approx(measured.relative, rel=1e-3)
    assert 0 < loss.relative < 1
    assert loss.worst[1] >= loss.relative
    assert smaller.spec.include == adapter.spec.include
    by_variance, loss = resize(adapter, Truncation(explained_variance=0.9))
    assert loss.relative**2 <= 0.1
    ranks = {by_variance.spec.get_rank(path) for path in by_variance.tensors}
    assert all(
        by_variance.tensors[path]["lora_A"].shape[0] == by_variance.spec.get_rank(path) for path in by_variance.tensors
    )
    assert max(ranks) <= 4


@pytest.mark.parametrize("kind", ["lora-xs", "bora-xs"])
def test_frozen_bases_need_the_model(kind: str, base: Any) -> None:
    adapter, weights = train_adapter(AdapterSpec(kind, rank=3), base), get_weights(base)
    with pytest.raises(AdapterError, match=r"needs the weights it was trained on\. Set model=NAME \(small\)"):
        resize(adapter, Truncation(2))
    assert_close(effective(expand_bases(adapter, weights), weights), effective(adapter, weights))


@pytest.mark.parametrize("kind", ["lora", "lora-xs"])
def test_scaling_is_exact_and_leaves_the_tensors_alone(kind: str, base: Any) -> None:
    spec = AdapterSpec(kind, rank=3, rank_pattern={"down": 2}, alpha_pattern={"layers.0": 5.0}, rslora=True)
    adapter, weights = train_adapter(spec, base), get_weights(base)
    half = scale(adapter, -0.5)
    for path, params in adapter.tensors.items():
        assert all(torch.equal(tensor, half.tensors[path][name]) for name, tensor in params.items())
        change = get_layer_adapter(adapter, path, weights[path]).weight(weights[path]) - weights[path]
        expected = weights[path] - 0.5 * change
        torch.testing.assert_close(get_layer_adapter(half, path, weights[path]).weight(weights[path]), expected)
    whole = scale(convert_to_diff(adapter, weights), -0.5)
    assert_close(effective(whole, weights), effective(half, weights))
    for factor in (0.0, float("nan"), float("inf")):
        with pytest.raises(AdapterError, match="finite number other than 0"):
            scale(adapter, factor)


def test_kinds_with_magnitudes_are_scaled_as_a_lora_of_enough_rank(base: Any) -> None:
    adapter, weights = train_adapter(AdapterSpec("bora", rank=2), base), get_weights(base)
    with pytest.raises(AdapterError, match="not proportional"):
        scale(adapter, 0.5)
    half, loss = merge([adapter], [0.5], Truncation(36), weights, tool="scale")
    assert loss.relative < 1e-6
    expected = {path: torch.lerp(weights[path], W, 0.5) for path, W in effective(adapter, weights).items()}
    assert_close(effective(half, weights), expected)


@pytest.mark.parametrize("kind", ["dora-rows", "dora-cols", "dora-rows-xs", "dora-cols-xs"])
def test_adapters_with_magnitudes_are_scaled_and_merged_exactly(kind: str, base: Any) -> None:
    weights, axis = get_weights(base), kind.split("-")[1]
    first = train_adapter(AdapterSpec(kind, rank=2, alpha=3.0), base, seed=1)
    second = train_adapter(AdapterSpec(kind, rank=3, exclude=["layers.0"]), base, seed=2)
    plain = train_adapter(AdapterSpec("lora", rank=2, include=["layers[0-10]"]), base, seed=3)
    for adapters, strengths in (
        ([first], [0.5]),
        ([first], [-1.3]),
        ([first, second, plain], [0.6, 0.5, -0.4]),
    ):
        found = combine(adapters, strengths, weights)
        assert found is not None
        one, loss = found
        assert (one.spec.adapter_type, loss.relative) == (f"dora-{axis}", 0.0)
        expected = {path: W.clone() for path, W in weights.items() if any(path in a.tensors for a in adapters)}
        for adapter, strength in zip(adapters, strengths, strict=True):
            for path, W in effective(adapter, weights).items():
                expected[path] += strength * (W - weights[path])
        assert_close(effective(one, weights), expected)
        assert all(
            len(params["lora_A"]) == sum(a.spec.rank for a in adapters if path in a.tensors)
            for path, params in one.tensors.items()
        )


@pytest.mark.parametrize("kind", ["dora-rows", "dora-cols"])
def test_magnitudes_are_kept_where_the_rank_does_not_suffice(kind: str, base: Any) -> None:
    weights = get_weights(base)
    adapters = [train_adapter(AdapterSpec(kind, rank=2), base, seed=seed) for seed in (1, 2)]
    found = [combine(adapters, [1.0, 1.0], weights, truncation) for truncation in (None, Truncation(3))]
    (whole, _), (cut, loss) = (each or pytest.fail("refused") for each in found)
    assert cut.spec.rank == 3
    assert measure_difference(whole, cut, weights).relative == pytest.approx(loss.relative, rel=0.1)
    assert loss.relative < 0.9 * merge(adapters, [1.0, 1.0], Truncation(3), weights)[1].relative


def test_magnitudes_of_both_kinds_cannot_be_merged_into_one_adapter(base: Any) -> None:
    weights = get_weights(base)
    rows, cols, both = (train_adapter(AdapterSpec(kind, rank=2), base) for kind in ("dora-rows", "dora-cols", "bora"))
    for adapters in ([rows, cols], [rows, both], [both]):
        assert combine(adapters, [1.0] * len(adapters), weights) is None
    path = next(iter(rows.tensors))
    V = weights[path].flatten(1) + rows.tensors[path]["lora_B"] @ rows.tensors[path]["lora_A"]
    gain = float(rows.tensors[path]["magnitude"][0] / V[0].norm())
    assert combine([rows], [1 / (1 - gain)], weights) is None  # at which nothing is left of a row's own weight
    with pytest.raises(AdapterError, match="needs the weights"):
        combine([rows], [0.5], None)


def test_a_merge_of_enough_rank_is_the_sum(base: Any) -> None:
    weights = get_weights(base)
    first = train_adapter(AdapterSpec("lora", rank=2, include=["layers[0-10]"]), base, seed=1)
    second = train_adapter(AdapterSpec("lora", rank=3, alpha=1.0), base, seed=2)
    third = train_adapter(AdapterSpec("dora-rows", rank=2, exclude=["layers.0"]), base, seed=3)
    for adapters, strengths, rank in (
        ([first, second], [0.7, -0.4], 5),
        ([first, second, third], [1.0, 0.5, 0.25], 36),
    ):
        one, loss = merge(adapters, strengths, Truncation(rank), weights)
        assert loss.relative < 1e-6
        expected = {path: W.clone() for path, W in weights.items() if any(path in a.tensors for a in adapters)}
        for adapter, strength in zip(adapters, strengths, strict=True):
            for path, W in effective(adapter, weights).items():
                expected[path] += strength * (W - weights[path])
        assert_close(effective(one, weights), expected)
        assert one.metadata["base_model"] == "small"
        (entry,) = json.loads(one.metadata["sa3train_history"])
        assert [source["strength"] for source in entry["of"]] == strengths
    without_base, _ = merge([first, second], [0.7, -0.4], Truncation(5))
    assert_close(
        effective(without_base, weights),
        effective(merge([first, second], [0.7, -0.4], Truncation(5), weights)[0], weights),
    )
    with pytest.raises(AdapterError, match="needs the weights"):
        merge([first, third], [1.0, 1.0], Truncation(4))
    _, lossy = merge([first, second], [1.0, 1.0], Truncation(1))
    assert lossy.relative > 0.01


def test_an_extracted_adapter_is_the_difference(tmp_path: Path) -> None:
    base, tuned = Small(), Small()
    adapter = train_adapter(AdapterSpec("lora", rank=3, exclude=["layers.10."]), base)
    stack = AdapterStack(tuned)
    stack.add(adapter)
    stack.apply()
    found, loss = extract(get_weights(tuned), get_weights(base), Truncation(3), {"base_model": "small"})
    assert found.tensors.keys() == adapter.tensors.keys()
    assert loss.relative < 1e-3
    assert_close(effective(found, get_weights(base)), weights_of_those(tuned, adapter), 1e-4)
    save_adapter(tmp_path / "x.safetensors", found)
    again = load_adapter(tmp_path / "x.safetensors")
    assert (again.spec.adapter_type, again.spec.rank, history(again)) == ("lora", 3, ["extract"])
    with pytest.raises(AdapterError, match="nothing to extract"):
        extract(get_weights(base), get_weights(base), Truncation(3))
    with pytest.raises(AdapterError, match="different architectures"):
        extract(get_weights(Small("conv1d")), get_weights(base), Truncation(3))


def weights_of_those(root: Any, adapter: Adapter) -> dict[str, Tensor]:
    weights = get_weights(root)
    return {path: weights[path] for path in adapter.tensors}


@pytest.mark.parametrize("kind", ["lora", "dora-rows", "bora-xs"])
def test_a_merged_checkpoint_is_the_model_with_the_adapter_in_it(kind: str, tmp_path: Path) -> None:
    model = load_checkpoint(PLAIN, parts=("dit", "conditioner"))
    root = model.get_adapter_root()
    untouched = {name: tensor.clone() for name, tensor in root.state_dict().items()}
    adapter, other = load_adapter(golden(kind)), load_adapter(golden("lora-xs"))
    before = hash_file(PLAIN / "model.safetensors")
    ingredients = [WeightedAdapter(adapter, 0.8, conditioner_strength=0.3), WeightedAdapter(other, -0.5)]
    rounding = merge_into_checkpoint(model, tmp_path / "merged", ingredients).rounding
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in root.state_dict().items())
    assert hash_file(PLAIN / "model.safetensors") == before
    stack = AdapterStack(root)
    stack.add(adapter, 0.8, 0.3)
    stack.add(other, -0.5)
    stack.apply()
    again = load_checkpoint(tmp_path / "merged", parts=("dit", "conditioner"))
    baked, found = root.state_dict(), again.get_adapter_root().state_dict()
    with safe_open(PLAIN / "model.safetensors", framework="pt") as file:
        stored_in = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        assert {key: file.get_slice(key).get_dtype() for key in file.keys()} == stored_in  # noqa: SIM118
        record = json.loads(file.metadata()["sa3train_merged"])
    assert [(item["adapter_type"], item["strength"]) for item in record] == [(kind, 0.8), ("lora-xs", -0.5)]
    for name, tensor in baked.items():
        rounded = tensor.bfloat16().float() if stored_as_bf16(name, stored_in) else tensor
        assert torch.equal(found[name], rounded), name
    lost = sum(float((found[name] - tensor).double().square().sum()) for name, tensor in baked.items())
    change = sum(float((tensor - untouched[name]).double().square().sum()) for name, tensor in baked.items())
    assert rounding.relative == pytest.approx((lost / change) ** 0.5, rel=1e-4)
    assert 1e-3 < rounding.relative < 1
    source, merged_file = load_file(PLAIN / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    others = [key for key in source if key.startswith("pretransform.") or "norm" in key]
    assert others
    assert all(torch.equal(source[key], merged_file[key]) for key in others)
    assert {item.name for item in (tmp_path / "merged").iterdir()} == {
        "model.safetensors",
        "model_config.json",
        "t5gemma",
    }
    config = json.loads((tmp_path / "merged" / "model_config.json").read_text())
    assert config == complete_config(read_config_file(PLAIN / "model_config.json"), "plain")


def stored_as_bf16(name: str, stored_in: dict[str, str]) -> bool:
    key = f"model.{name}" if name.startswith("model.") else f"conditioner.{name}"
    return stored_in[key] == "BF16"


def test_a_merge_that_fails_leaves_nothing_and_replaces_no_model(tmp_path: Path) -> None:
    model = load_checkpoint(PLAIN, parts=("dit", "conditioner"))
    root = model.get_adapter_root()
    lora = load_adapter(golden("lora"))
    untouched = {name: tensor.clone() for name, tensor in root.state_dict().items()}
    with pytest.raises(AdapterError, match=r"only some of its layers fit|another architecture"):
        merge_into_checkpoint(model, tmp_path / "a", [WeightedAdapter(load_adapter(golden("lora", "diff")))])
    key = "model.model.transformer.project_in.weight"
    bad = {key: torch.full((128, 64), float("nan"))}
    with pytest.raises(AdapterError, match="would not be finite"), replace_folder(tmp_path / "a", bool) as aside:
        rewrite_tensors(model.weights, aside / "model.safetensors", bad, {})
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in root.state_dict().items())
    assert list(tmp_path.iterdir()) == []
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for name in ("model.safetensors", "model_config.json"):
        (downloaded / name).write_bytes((PLAIN / name).read_bytes())
    with pytest.raises(SA3Error, match="is something else"):
        merge_into_checkpoint(model, downloaded, [WeightedAdapter(lora)])
    merge_into_checkpoint(model, tmp_path / "mine", [WeightedAdapter(lora)])
    first = hash_file(tmp_path / "mine" / "model.safetensors")
    merge_into_checkpoint(model, tmp_path / "mine", [WeightedAdapter(lora, 0.5)])
    assert hash_file(tmp_path / "mine" / "model.safetensors") != first
    assert sorted(item.name for item in tmp_path.iterdir()) == ["downloaded", "mine"]


def test_inspection_needs_no_model_and_tells_norms(base: Any) -> None:
    adapter, weights = train_adapter(AdapterSpec("lora", rank=3, alpha=6.0), base), get_weights(base)
    found = inspect_adapter(adapter)
    assert (found.adapter_type, found.rank, found.alpha, found.load_report) == ("lora", "3", "6", None)
    for path, W in effective(adapter, weights).items():
        assert found.layers[path].norm == pytest.approx(float((W - weights[path]).norm()), rel=1e-4)
    assert found.metadata["base_model"] == "small"
    report = inspect_adapter(adapter, base).load_report
    json.dumps(inspect_adapter(adapter, base).to_dict())
    assert report is not None
    assert report.refusal is None
    assert report.effect["all"] > 0
    zero = replace(
        adapter,
        tensors={
            path: {name: torch.zeros_like(t) for name, t in params.items()} for path, params in adapter.tensors.items()
        },
    )
    found = inspect_adapter(zero, base)
    assert found.all_zero
    assert found.load_report is not None
    assert "it changes nothing" in str(found.load_report.refusal)


def test_every_kind_is_inspected(tmp_path: Path) -> None:
    for kind in KINDS:
        found = inspect_adapter(golden(kind))
        assert all(layer.norm is not None and layer.norm > 0 for layer in found.layers.values())
    plot_layers(found, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_finds_what_differs(base: Any) -> None:
    weights = get_weights(base)
    first = train_adapter(AdapterSpec("lora", rank=3), base)
    same = compare_adapters(first, first)
    assert same.identical
    assert all((row.relative_difference, row.cosine) == (0.0, pytest.approx(1)) for row in same.layers.values())
    doubled = compare_adapters(first, scale(first, 2.0))
    assert not doubled.identical
    assert doubled.settings["alpha"] == ["3", "6"]
    for row in doubled.layers.values():
        assert row.relative_difference == pytest.approx(1.0, rel=1e-4)
        assert row.cosine == pytest.approx(1.0)
    narrower = train_adapter(AdapterSpec("dora-rows", rank=2, include=["layers"]), base, seed=4)
    across = compare_adapters(first, narrower, base)
    assert across.only_in_first == ["conditioners.seconds_total.embedder.embedding.1"]
    assert across.settings["adapter_type"] == ["lora", "dora-rows"]
    for path, row in across.layers.items():
        one, other = (effective(adapter, weights)[path] - weights[path] for adapter in (first, narrower))
        assert row.relative_difference == pytest.approx(float((one - other).norm() / one.norm()), rel=1e-3)
    frozen = compare_adapters(first, train_adapter(AdapterSpec("lora-xs", rank=2), base))
    assert all(row.cosine is None for row in frozen.layers.values())
    exact = convert_to_diff(narrower, weights)
    apart = compare_adapters(narrower, exact)  # without the base, the product of a DoRA is not its change
    assert all(row.cosine is None for row in apart.layers.values())
    assert "depends on the base model" in apart.warnings[0]
    assert all(row.relative_difference < 1e-5 for row in compare_adapters(narrower, exact, base).layers.values())


def test_what_was_there_comes_back_after_a_kill_between_two_renames(tmp_path: Path) -> None:
    earlier = tmp_path / ".mine.a1b2c3d4.old"
    earlier.mkdir()
    (earlier / "model.safetensors").write_text("before")
    with pytest.raises(ValueError, match="stopped"), replace_folder(tmp_path / "mine", lambda _: True):
        raise ValueError("stopped")
    assert (tmp_path / "mine" / "model.safetensors").read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]
