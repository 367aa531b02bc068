"""Putting adapters into a model for training: filters, ranks, scales, dropout, learning rates, bases and gradients."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sa3train.adapters.apply import svd_basis
from sa3train.adapters.layer_filter import Filter, adaptable_layers
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.layers.peft_layers import FamilyLayer
from sa3train.adapters.spec import KINDS, AdapterSpec
from sa3train.core.errors import AdapterError
from sa3train.core.files import cache_dir

BLOCK = "model.transformer.layers.{}.ff.{}"
WITH_A = [name for name, kind in KINDS.items() if not kind.xs]
XS = [name for name, kind in KINDS.items() if kind.xs]


class TestFilters:
    @pytest.mark.parametrize(
        ("include", "taken"),
        [
            (["layers.1"], {1}),
            (["layers.1."], {1}),
            (["layers[1]"], {1}),
            (["layers.[1-1]"], {1}),
            (["layers[0-11]"], {0, 1, 10, 11}),
            (["layers[0-1]", "layers.11"], {0, 1, 11}),
            (["layers[0,10-11]"], {0, 10, 11}),
            (["layers[2-10]"], {10}),
            ("layers[0-1], layers.10", {0, 1, 10}),
        ],
    )
    def test_ranges_are_of_whole_numbers(self, small: type[Any], include: list[str], taken: set[int]) -> None:
        injected = inject(small(), AdapterSpec("lora", rank=2, include=include))
        assert set(injected.paths) == {BLOCK.format(index, name) for index in taken for name in ("up", "down")}

    def test_exclude_comes_after_include(self, small: type[Any]) -> None:
        spec = AdapterSpec("lora", rank=2, include=["layers[0-11]"], exclude=["ff.down", "layers[10-11]"])
        assert inject(small(), spec).paths == [BLOCK.format(0, "up"), BLOCK.format(1, "up")]

    def test_without_filters_every_layer_is_taken(self, small: type[Any]) -> None:
        model = small()
        every = list(adaptable_layers(model))
        assert sorted(inject(model, AdapterSpec("lora", rank=2)).paths) == sorted(every)
        assert len(every) == 9

    @pytest.mark.parametrize("layers", range(12))
    def test_a_range_means_each_of_its_layers_by_name(self, layers: int) -> None:
        path = f"model.transformer.layers.{layers}.self_attn.to_qkv"
        assert Filter(["layers[0-11]"]).matches(path)
        assert not Filter(["layers[0-11]"]).matches(path.replace(f".{layers}.", f".{layers + 12}."))
        assert not Filter(["layers[0-11]"]).matches(path.replace("layers", "blocks"))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"include": ["layers.7"]}, r"'layers\.7' matches none of the 9 layers"),
            ({"include": ["layers.1", "to_qkv"]}, "'to_qkv' matches none"),
            ({"exclude": ["to_qkv"]}, "'to_qkv' matches none"),
            ({"include": ["layers.1"], "exclude": ["layers.1"]}, "no layer is left"),
            ({"include": ["layers[3-1]"]}, "ends before it starts"),
            ({"include": ["layers[a-b]"]}, "needs a range"),
            ({"include": ["layers[0-1"]}, "bracket without its partner"),
            ({"rank_pattern": {"layers.7": 2}}, "matches none"),
            ({"include": ["layers.1"], "alpha_pattern": {"layers.0": 2.0}}, "matches none"),
        ],
    )
    def test_a_filter_without_effect_is_an_error(
        self, small: type[Any], settings: dict[str, Any], message: str
    ) -> None:
        model = small()
        with pytest.raises(AdapterError, match=message):
            inject(model, AdapterSpec("lora", rank=2, **settings))
        assert not any(isinstance(module, FamilyLayer) for module in model.modules())


class TestScales:
    def test_rank_and_alpha_by_pattern(self, small: type[Any]) -> None:
        spec = AdapterSpec(
            "lora",
            rank=4,
            rank_pattern={"layers.1.ff.down": 3, "layers.1": 6, "layers[10-11]": 2},
            alpha_pattern={"layers.0": 8.0, "conditioners": 1.0},
        )
        injected = inject(small(), spec)
        ranks = {path: params["lora_A"].shape[0] for path, params in injected.tensors().items()}
        scales = {path: layer.scaling["default"] for path, layer in injected.layers.items()}
        expected = {(0, "up"): (4, 2.0), (1, "up"): (6, 1.0), (1, "down"): (3, 1.0), (10, "up"): (2, 1.0)}
        for where, (rank, scale) in expected.items():
            assert (ranks[BLOCK.format(*where)], scales[BLOCK.format(*where)]) == (rank, scale)
        assert scales["conditioners.seconds_total.embedder.embedding.1"] == 0.25

    def test_patterns_and_rslora_survive_the_file(
        self, small: type[Any], trained: Callable[..., Any], tmp_path: Path
    ) -> None:
        from sa3train.adapters.formats.io import load_adapter, save_adapter

        spec = AdapterSpec("bora", 4, rslora=True, rank_pattern={"layers.1": 2}, alpha_pattern={"layers[10-11]": 3.0})
        adapter = trained(spec, small())
        save_adapter(tmp_path / "a.safetensors", adapter)
        loaded = load_adapter(tmp_path / "a.safetensors")
        for path in adapter.tensors:
            assert loaded.spec.rank_of(path) == spec.rank_of(path)
            assert loaded.spec.scale_of(path) == pytest.approx(spec.scale_of(path), rel=1e-12)

    @pytest.mark.parametrize(
        "settings",
        [
            {"rank": 0},
            {"rank": True},
            {"rank": 2.5},
            {"alpha": 0},
            {"alpha": math.nan},
            {"alpha": 10**400},
            {"dropout": 1.0},
            {"dropout": -0.1},
        ],
    )
    def test_impossible_settings(self, settings: dict[str, Any]) -> None:
        with pytest.raises(AdapterError, match=next(iter(settings))):
            AdapterSpec("lora", **settings)

    def test_unknown_kind_names_the_known(self) -> None:
        with pytest.raises(AdapterError, match="dora-rows-xs"):
            AdapterSpec("dora-row")

    def test_a_rank_above_the_singular_vectors(self, small: type[Any]) -> None:
        with pytest.raises(AdapterError, match="rank 13 is above the 12 singular vectors"):
            inject(small(), AdapterSpec("lora-xs", rank=13))


class TestLearningRates:
    @pytest.mark.parametrize("kind", WITH_A)
    def test_lora_plus_gives_B_a_rate_of_its_own(self, small: type[Any], kind: str) -> None:
        injected = inject(small(), AdapterSpec(kind, rank=2))
        slow, fast = injected.param_groups(1e-4, ratio=16.0)
        assert (slow["lr"], fast["lr"]) == (1e-4, pytest.approx(1.6e-3))
        named = injected.named_parameters()
        assert {id(p) for p in fast["params"]} == {id(p) for n, p in named.items() if n.endswith("lora_B")}
        assert len(slow["params"]) + len(fast["params"]) == len(named)

    @pytest.mark.parametrize("kind", XS)
    def test_without_B_it_is_refused(self, small: type[Any], kind: str) -> None:
        with pytest.raises(AdapterError, match="needs B matrices"):
            inject(small(), AdapterSpec(kind, rank=2)).param_groups(1e-4, ratio=16.0)

    def test_ratio_1_is_one_group(self, small: type[Any]) -> None:
        injected = inject(small(), AdapterSpec("lora-xs", rank=2))
        (group,) = injected.param_groups(1e-4)
        assert group["params"] == injected.parameters()


class TestBases:
    @pytest.mark.parametrize("kind", XS)
    def test_they_are_frozen_and_neither_trained_nor_saved(
        self, small: type[Any], steps: Callable[..., Any], kind: str
    ) -> None:
        model = small()
        injected = inject(model, AdapterSpec(kind, rank=3))
        layers = {path: layer for path, layer in injected.layers.items() if isinstance(layer, FamilyLayer)}
        before = {
            path: (layer.basis_U["default"].clone(), layer.basis_V["default"].clone()) for path, layer in layers.items()
        }
        steps(model, injected)
        for path, (U, V) in before.items():
            assert torch.equal(layers[path].basis_U["default"], U)
            assert torch.equal(layers[path].basis_V["default"], V)
            assert not layers[path].basis_U["default"].requires_grad
            torch.testing.assert_close(U.T @ U, torch.eye(3), atol=1e-5, rtol=0)
            top = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
            assert (top > 0).all()
        assert not any("basis" in name for name in model.state_dict())
        assert {name for params in injected.tensors().values() for name in params} == set(KINDS[kind].parameters)

    def test_they_are_computed_once_per_weight(self, small: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        counted = []
        exact = svd_basis.exact_basis
        monkeypatch.setattr(svd_basis, "exact_basis", lambda W, rank: counted.append(1) or exact(W, rank))
        first = inject(small(seed=77), AdapterSpec("lora-xs", rank=3))
        assert len(counted) == 9
        second = inject(small(seed=77), AdapterSpec("bora-xs", rank=2))
        inject(small(dtype=torch.bfloat16, seed=78).float(), AdapterSpec("lora-xs", rank=2))
        assert len(counted) == 18
        inject(small(dtype=torch.bfloat16, seed=78), AdapterSpec("lora-xs", rank=2))  # the same values in bf16
        assert len(counted) == 18
        for path, layer in first.layers.items():
            assert torch.equal(layer.basis_U["default"][:, :2], second.layers[path].basis_U["default"])  # type: ignore[index]
        inject(small(seed=77), AdapterSpec("lora-xs", rank=4))  # a higher rank than was kept
        assert len(counted) == 27

    def test_a_damaged_cache_is_computed_again(self, small: type[Any]) -> None:
        W = small(seed=79)["model"]["transformer"]["layers"]["0"]["ff"]["up"].weight
        U, V = svd_basis.singular_basis(W, 3)
        name = svd_basis.weight_hash(W)
        file = cache_dir() / "svd" / name[:2] / f"{name}.safetensors"
        file.write_bytes(file.read_bytes()[:-5])
        again = svd_basis.singular_basis(W, 3)
        assert torch.equal(again[0], U)
        assert torch.equal(again[1], V)


def test_an_adapter_in_training_must_be_removed_before_another(small: type[Any]) -> None:
    model = small()
    injected = inject(model, AdapterSpec("lora", rank=2))
    with pytest.raises(AdapterError, match="remove it"):
        inject(model, AdapterSpec("bora", rank=2))
    injected.remove()
    inject(model, AdapterSpec("bora", rank=2))


def test_continuing_needs_the_same_kind_scale_layers_and_shapes(small: type[Any], trained: Callable[..., Any]) -> None:
    model = small()
    adapter = trained(AdapterSpec("lora", rank=2), model)
    for settings, message in (
        ({"kind": "bora", "rank": 2}, "is lora, and bora"),
        ({"kind": "lora", "rank": 3}, "does not fit at"),
        ({"kind": "lora", "rank": 2, "alpha": 4}, "scale 1 .* 2 is being trained"),
        ({"kind": "lora", "rank": 2, "include": ["layers.1"]}, "7 of its layers are not in training"),
    ):
        injected = inject(model, AdapterSpec(**settings))
        with pytest.raises(AdapterError, match=message):
            injected.load(adapter)
        injected.remove()
