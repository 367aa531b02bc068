"""Putting adapters into a model for training: filters, ranks, scales, dropout, learning rates, bases and gradients."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.small_model import Small, train, train_adapter
from sa3train.adapters.adapter import DECODER
from sa3train.adapters.apply import svd_basis
from sa3train.adapters.layer_filter import find_adaptable_layers, is_included
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.layers.peft_layers import SA3LoraLayer
from sa3train.adapters.spec import KINDS, AdapterSpec
from sa3train.core.errors import AdapterError
from sa3train.core.files import get_cache_dir
from sa3train.training.run import start_adapter

BLOCK = "model.transformer.layers.{}.ff.{}"
XS = [name for name, kind in KINDS.items() if kind.is_xs]


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
    def test_ranges_are_of_whole_numbers(self, include: list[str], taken: set[int]) -> None:
        injected = inject(Small(), AdapterSpec("lora", rank=2, include=include))
        assert set(injected.paths) == {BLOCK.format(index, name) for index in taken for name in ("up", "down")}

    def test_exclude_comes_after_include(self) -> None:
        spec = AdapterSpec("lora", rank=2, include=["layers[0-11]"], exclude=["ff.down", "layers[10-11]"])
        assert inject(Small(), spec).paths == [BLOCK.format(0, "up"), BLOCK.format(1, "up")]

    def test_without_filters_every_layer_is_taken(self) -> None:
        model = Small()
        every = list(find_adaptable_layers(model))
        assert sorted(inject(model, AdapterSpec("lora", rank=2)).paths) == sorted(every)
        assert len(every) == 9

    @pytest.mark.parametrize("layers", range(12))
    def test_a_range_means_each_of_its_layers_by_name(self, layers: int) -> None:
        path = f"model.transformer.layers.{layers}.self_attn.to_qkv"
        assert is_included(path, ["layers[0-11]"])
        assert not is_included(path.replace(f".{layers}.", f".{layers + 12}."), ["layers[0-11]"])
        assert not is_included(path.replace("layers", "blocks"), ["layers[0-11]"])

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"include": ["layers.7"]}, r"'layers\.7' matches none of the 9"),
            ({"include": ["layers.1", "to_qkv"]}, "'to_qkv' matches none"),
            ({"exclude": ["to_qkv"]}, "'to_qkv' matches none"),
            ({"include": ["layers.1"], "exclude": ["layers.1"]}, "No layer is left"),
            ({"include": ["layers[3-1]"]}, "ends before it starts"),
            ({"include": ["layers[a-b]"]}, "needs a range"),
            ({"include": ["layers[0-1"]}, "unmatched bracket"),
            ({"rank_pattern": {"layers.7": 2}}, "matches none"),
            ({"include": ["layers.1"], "alpha_pattern": {"layers.0": 2.0}}, "matches none"),
        ],
    )
    def test_a_filter_without_effect_is_an_error(self, settings: dict[str, Any], message: str) -> None:
        model = Small()
        with pytest.raises(AdapterError, match=message):
            inject(model, AdapterSpec("lora", rank=2, **settings))
        assert not any(isinstance(module, SA3LoraLayer) for module in model.modules())


class TestScales:
    def test_rank_and_alpha_by_pattern(self) -> None:
        spec = AdapterSpec(
            "lora",
            rank=4,
            rank_pattern={"layers.1.ff.down": 3, "layers.1": 6, "layers[10-11]": 2},
            alpha_pattern={"layers.0": 8.0, "conditioners": 1.0},
        )
        injected = inject(Small(), spec)
        ranks = {path: params["lora_A"].shape[0] for path, params in injected.tensors().items()}
        scales = {path: layer.scaling["default"] for path, layer in injected.layers.items()}
        expected = {(0, "up"): (4, 2.0), (1, "up"): (6, 1.0), (1, "down"): (3, 1.0), (10, "up"): (2, 1.0)}
        for where, (rank, scale) in expected.items():
            assert (ranks[BLOCK.format(*where)], scales[BLOCK.format(*where)]) == (rank, scale)
        assert scales["conditioners.seconds_total.embedder.embedding.1"] == 0.25

    def test_patterns_and_rslora_survive_the_file(self, tmp_path: Path) -> None:
        from sa3train.adapters.formats.io import load_adapter, save_adapter

        spec = AdapterSpec("bora", 4, rslora=True, rank_pattern={"layers.1": 2}, alpha_pattern={"layers[10-11]": 3.0})
        adapter = train_adapter(spec, Small())
        save_adapter(tmp_path / "a.safetensors", adapter)
        loaded = load_adapter(tmp_path / "a.safetensors")
        for path in adapter.tensors:
            assert loaded.spec.get_rank(path) == spec.get_rank(path)
            assert loaded.spec.get_scale(path) == pytest.approx(spec.get_scale(path), rel=1e-12)

    @pytest.mark.parametrize(("rslora", "says"), [(True, True), (False, False)])
    def test_several_scales_are_said_at_the_start(
        self, rslora: bool, says: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        spec = AdapterSpec("lora", 4, rslora=rslora, rank_pattern={"layers.1": 2})
        start_adapter(Small(), spec, 0, None)
        assert ("other tools know one" in caplog.text) == says

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

    def test_a_rank_above_the_singular_vectors(self) -> None:
        with pytest.raises(AdapterError, match="rank 13 is above the 12 singular vectors"):
            inject(Small(), AdapterSpec("lora-xs", rank=13))


class TestBases:
    @pytest.mark.parametrize("kind", XS)
    def test_they_are_frozen_and_neither_trained_nor_saved(self, kind: str) -> None:
        model = Small()
        injected = inject(model, AdapterSpec(kind, rank=3))
        layers = {path: layer for path, layer in injected.layers.items() if isinstance(layer, SA3LoraLayer)}
        before = {
            path: (layer.basis_U["default"].clone(), layer.basis_V["default"].clone()) for path, layer in layers.items()
        }
        train(model, injected)
        for path, (U, V) in before.items():
            assert torch.equal(layers[path].basis_U["default"], U)
            assert torch.equal(layers[path].basis_V["default"], V)
            assert not layers[path].basis_U["default"].requires_grad
            torch.testing.assert_close(U.T @ U, torch.eye(3), atol=1e-5, rtol=0)
            top = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
            assert (top > 0).all()
        assert not any("basis" in name for name in model.state_dict())
        assert {name for params in injected.tensors().values() for name in params} == set(KINDS[kind].parameters)

    def test_they_are_computed_once_per_weight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        counted = []
        exact = svd_basis.compute_singular_basis
        monkeypatch.setattr(svd_basis, "compute_singular_basis", lambda W, rank: counted.append(1) or exact(W, rank))
        first = inject(Small(seed=77), AdapterSpec("lora-xs", rank=3))
        assert len(counted) == 9
        second = inject(Small(seed=77), AdapterSpec("bora-xs", rank=2))
        inject(Small(dtype=torch.bfloat16, seed=78).float(), AdapterSpec("lora-xs", rank=2))
        assert len(counted) == 18
        inject(Small(dtype=torch.bfloat16, seed=78), AdapterSpec("lora-xs", rank=2))  # the same values in bf16
        assert len(counted) == 18
        for path, layer in first.layers.items():
            assert torch.equal(layer.basis_U["default"][:, :2], second.layers[path].basis_U["default"])  # type: ignore[index]
        inject(Small(seed=77), AdapterSpec("lora-xs", rank=4))  # a higher rank than was kept
        assert len(counted) == 27

    def test_a_damaged_cache_is_computed_again(self) -> None:
        W = Small(seed=79)["model"]["transformer"]["layers"]["0"]["ff"]["up"].weight
        U, V = svd_basis.get_singular_basis(W, 3)
        name = svd_basis.hash_weight(W)
        file = get_cache_dir() / "svd" / name[:2] / f"{name}.safetensors"
        file.write_bytes(file.read_bytes()[:-5])
        again = svd_basis.get_singular_basis(W, 3)
        assert torch.equal(again[0], U)
        assert torch.equal(again[1], V)


def test_an_adapter_in_training_must_be_removed_before_another() -> None:
    model = Small()
    injected = inject(model, AdapterSpec("lora", rank=2))
    with pytest.raises(AdapterError, match="(?i)remove it"):
        inject(model, AdapterSpec("bora", rank=2))
    injected.remove()
    inject(model, AdapterSpec("bora", rank=2))


def test_continuing_needs_the_same_kind_scale_layers_and_shapes() -> None:
    model = Small()
    adapter = train_adapter(AdapterSpec("lora", rank=2), model)
    for settings, message in (
        ({"adapter_type": "bora", "rank": 2}, r"training is of bora\. Set adapter=lora\."),
        ({"adapter_type": "lora", "rank": 3}, "has rank 2 at .* but training has 3"),
        ({"adapter_type": "lora", "rank": 2, "alpha": 4}, "scale 1 .* training has 2"),
        ({"adapter_type": "lora", "rank": 2, "include": ["layers.1"]}, "7 of its layers are not in training"),
    ):
        injected = inject(model, AdapterSpec(**settings))
        with pytest.raises(AdapterError, match=message):
            injected.load(adapter)
        injected.remove()


def test_continuing_from_an_adapter_of_another_part_is_refused() -> None:
    model = Small()
    adapter = train_adapter(AdapterSpec("lora", rank=2), model)
    tensors = {f"{DECODER}{path}": params for path, params in adapter.tensors.items()}
    with pytest.raises(AdapterError, match="is on the autoencoder's decoder, and this training is not"):
        inject(model, AdapterSpec("bora", rank=2)).load(dataclasses.replace(adapter, tensors=tensors))


def test_continuing_from_an_adapter_that_diverged_is_refused() -> None:
    model = Small()
    adapter = train_adapter(AdapterSpec("lora", rank=2), model)
    next(iter(adapter.tensors.values()))["lora_B"].fill_(math.nan)
    with pytest.raises(AdapterError, match="NaN"):
        inject(model, AdapterSpec("lora", rank=2)).load(adapter)
