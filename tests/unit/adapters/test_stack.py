"""Adapters at play: strengths, intervals, filters, swaps, the least of re-baking, and the base back bit for bit."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.small_model import Small, train_adapter
from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.layer_weight import get_layer_adapter
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.layer_filter import find_adaptable_layers, is_included
from sa3train.adapters.spec import KINDS, AdapterSpec
from sa3train.core.errors import AdapterError

CONDITIONER = "conditioners.seconds_total.embedder.embedding.1"
SPECS = {
    "lora": AdapterSpec("lora", rank=3),
    "bora": AdapterSpec("bora", rank=2, alpha=4, exclude=["layers.0"]),
    "rows-xs": AdapterSpec("dora-rows-xs", rank=4, include=["layers[0-1]", "conditioners"]),
    "one": AdapterSpec("dora-cols", rank=2, include=["layers.10."]),
}

FP32_ENDS = [float(torch.tensor(end)) for end in (0.2, 0.7)]
"""As they come from an fp32 schedule: one is above what Python writes so, the other below."""
SIGMAS = [(sigma, True) for sigma in (0.2, *FP32_ENDS, 0.4, 0.7, None)]
SIGMAS += [(sigma, False) for sigma in (0.0, 0.19, 0.71, 1.0)]


@pytest.fixture
def model() -> Any:
    return Small()


@pytest.fixture(scope="module")
def adapters() -> dict[str, Adapter]:
    return {name: train_adapter(spec, Small(), seed=index) for index, (name, spec) in enumerate(SPECS.items())}


@pytest.fixture
def baked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the layers baked since it was last cleared."""
    paths: list[str] = []
    bake = AdapterStack._bake

    def counted(self: AdapterStack, path: str, active: Any) -> None:
        paths.append(path)
        bake(self, path, active)

    monkeypatch.setattr(AdapterStack, "_bake", counted)
    return paths


def weights(model: Any) -> dict[str, Tensor]:
    return {path: layer.weight.detach().clone() for path, layer in find_adaptable_layers(model).items()}  # type: ignore[operator]


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [path for path in expected if not torch.equal(found[path], expected[path])] == []


def change(adapter: Adapter, base: dict[str, Tensor], path: str) -> Tensor:
    """Wᵢ' − W at full strength, 0 where the adapter has nothing."""
    if path not in adapter.tensors:
        return torch.zeros_like(base[path])
    return get_layer_adapter(adapter, path, base[path]).weight(base[path]) - base[path]


def assert_sum(model: Any, base: dict[str, Tensor], *playing: tuple[Adapter, float | Callable[[str], float]]) -> None:
    for path, weight in weights(model).items():
        expected = base[path].clone()
        for adapter, strength in playing:
            expected += (strength(path) if callable(strength) else strength) * change(adapter, base, path)
        torch.testing.assert_close(weight, expected, atol=2e-6, rtol=0)


class TestStrength:
    def test_it_means_the_share_of_each_change(self, model: Any, adapters: dict[str, Adapter]) -> None:
        base, stack = weights(model), AdapterStack(model)
        for name in SPECS:
            stack.add(adapters[name], 1.0)
        stack.set_strength(0.5, 1)
        stack.set_strength(-0.25, 2)
        stack.set_strength(1.7, 3)
        assert stack.apply()
        assert_sum(model, base, *zip(adapters.values(), (1.0, 0.5, -0.25, 1.7), strict=True))
        stack.set_strength(2.0)
        stack.apply()
        assert_sum(model, base, *((adapter, 2.0) for adapter in adapters.values()))

    def test_16_bit_weights_are_rounded_once(self, adapters: dict[str, Adapter]) -> None:
        model = Small(dtype=torch.bfloat16)
        base, stack = weights(model), AdapterStack(model)
        for name in SPECS:
            stack.add(adapters[name], 0.6)
        stack.apply()
        for path, weight in weights(model).items():
            exact = base[path].float() + 0.6 * sum(change(adapter, base, path) for adapter in adapters.values())
            torch.testing.assert_close(weight.float(), exact, rtol=1.01 * 2**-8, atol=1e-6)

    @pytest.mark.parametrize("name", SPECS)
    def test_at_1_the_effective_weight_is_exact(self, model: Any, adapters: dict[str, Adapter], name: str) -> None:
        base, stack = weights(model), AdapterStack(model)
        stack.add(adapters[name])
        stack.apply()
        for path in adapters[name].tensors:
            assert torch.equal(
                weights(model)[path], get_layer_adapter(adapters[name], path, base[path]).weight(base[path])
            )

    def test_the_conditioner_has_a_strength_of_its_own(self, model: Any, adapters: dict[str, Adapter]) -> None:
        base, stack = weights(model), AdapterStack(model)
        adapter = adapters["lora"]
        stack.add(adapter, 0.8, conditioner_strength=0.25)
        stack.apply()
        assert_sum(model, base, (adapter, lambda path: 0.25 if path == CONDITIONER else 0.8))
        stack.set_strength(0.5, 0, conditioner_strength=0.0)
        stack.apply()
        assert torch.equal(weights(model)[CONDITIONER], base[CONDITIONER])
        stack.set_strength(0.5, 0)
        stack.apply()
        assert_sum(model, base, (adapter, 0.5))
        stack.set_strength(0.0, 0, conditioner_strength=1.0)
        stack.apply()
        assert_sum(model, base, (adapter, lambda path: float(path == CONDITIONER)))

    def test_one_that_leaves_little_of_the_model_is_named(self, model: Any, adapters: dict[str, Adapter]) -> None:
        stack = AdapterStack(model)
        effect = stack.add(adapters["lora"], base=None).effect["all"]
        assert stack.list_excesses() == []
        for strength in (-2 / effect, (0.5, -2 / effect)):
            stack.set_strength(strength)
            (warning,) = stack.list_excesses()
            assert f"at strength {-2 / effect:g} changes the weights by 200%" in warning

    @pytest.mark.parametrize("strength", [float("nan"), float("inf"), 1e300, 10**400, True, "1", None])
    def test_only_numbers(self, model: Any, adapters: dict[str, Adapter], strength: Any) -> None:
        stack = AdapterStack(model)
        with pytest.raises(AdapterError, match="finite number"):
            stack.add(adapters["lora"], strength)
        assert len(stack) == 0
        stack.add(adapters["lora"])
        with pytest.raises(AdapterError, match="finite number"):
            stack.set_strength(strength)


class TestInterval:
    @pytest.mark.parametrize(("sigma", "on"), SIGMAS)
    def test_the_adapter_is_on_inside_ends_included(
        self, model: Any, adapters: dict[str, Adapter], sigma: float | None, on: bool
    ) -> None:
        base, stack = weights(model), AdapterStack(model)
        adapter = adapters["lora"]
        stack.add(adapter, 0.6, interval=(0.2, 0.7))
        stack.apply(sigma)
        # The conditioner runs once, before there is a noise level.
        assert_sum(model, base, (adapter, lambda path: 0.6 if on or path == CONDITIONER else 0.0))

    def test_the_weights_are_constant_between_interval_ends(self, model: Any, adapters: dict[str, Adapter]) -> None:
        stack = AdapterStack(model)
        stack.add(adapters["lora"], interval=(0.25, 0.75))
        stack.add(adapters["one"], interval=(0.0, 0.5))
        stack.apply(1.0)
        changes = [sigma / 100 for sigma in range(100, -1, -1) if stack.apply(sigma / 100)]
        assert changes == [0.75, 0.5, 0.24]

    @pytest.mark.parametrize("interval", [(0.5, 0.2), (-0.1, 1), (0, 1.5), (0.5,), 0.5, (0, "x"), (float("nan"), 1)])
    def test_impossible_intervals(self, model: Any, adapters: dict[str, Adapter], interval: Any) -> None:
        with pytest.raises(AdapterError, match="interval"):
            AdapterStack(model).add(adapters["lora"], interval=interval)


class TestFilter:
    def test_excluded_layers_keep_their_weights(self, model: Any, adapters: dict[str, Adapter]) -> None:
        base, stack = weights(model), AdapterStack(model)
        report = stack.add(adapters["lora"], exclude_layers=["layers[0-1]", "ff.up"])
        assert len(report.matched) == 9
        stack.apply()
        assert_sum(
            model, base, (adapters["lora"], lambda path: float(is_included(path, None, ["layers[0-1]", "ff.up"])))
        )

    @pytest.mark.parametrize("filters", [["layers.7"], ["layers", "conditioners"], ["layers[1-0]"]])
    def test_a_filter_without_effect_or_without_rest(
        self, model: Any, adapters: dict[str, Adapter], filters: list[str]
    ) -> None:
        stack = AdapterStack(model)
        with pytest.raises(AdapterError, match=r"(?i)layer pattern|no layer is left"):
            stack.add(adapters["lora"], exclude_layers=filters)
        assert len(stack) == 0


class TestSwapping:
    def test_remove_and_add(self, model: Any, adapters: dict[str, Adapter]) -> None:
        base, stack = weights(model), AdapterStack(model)
        stack.add(adapters["lora"], 0.5)
        stack.add(adapters["bora"], 0.7, conditioner_strength=0.1, interval=(0.0, 0.5), exclude_layers=["ff.up"])
        stack.add(adapters["one"], 0.9)
        stack.apply()
        stack.remove(0)
        stack.remove(0)
        stack.add(adapters["rows-xs"], 0.7, conditioner_strength=0.1, interval=(0.0, 0.5), exclude_layers=["ff.up"])
        stack.apply(0.3)
        played = lambda path: 0.1 if path == CONDITIONER else 0.0 if "ff.up" in path else 0.7  # noqa: E731
        assert_sum(model, base, (adapters["one"], 0.9), (adapters["rows-xs"], played))
        stack.apply(0.6)
        assert_sum(model, base, (adapters["one"], 0.9), (adapters["rows-xs"], lambda path: 0.1 * (path == CONDITIONER)))
        assert [report.adapter_type for report in stack.reports] == ["dora-cols", "dora-rows-xs"]
        stack.clear()
        assert_same_bits(weights(model), base)

    def test_an_adapter_is_measured_on_the_base_whatever_plays(self, model: Any, adapters: dict[str, Adapter]) -> None:
        stack = AdapterStack(model)
        alone = stack.add(adapters["rows-xs"])
        stack.remove(0)
        stack.add(adapters["lora"], 3.0)
        stack.apply()
        assert stack.add(adapters["rows-xs"]).effect == alone.effect

    def test_there_is_no_such_adapter(self, model: Any, adapters: dict[str, Adapter]) -> None:
        stack = AdapterStack(model)
        stack.add(adapters["lora"])
        for act in (stack.remove, lambda i: stack.set_strength(1.0, i)):
            for index in (1, -1):
                with pytest.raises(AdapterError, match=f"index {index}; 1 are loaded"):
                    act(index)

    def test_references_to_weights_stay_valid(self, model: Any, adapters: dict[str, Adapter]) -> None:
        pointers = {path: layer.weight.data_ptr() for path, layer in find_adaptable_layers(model).items()}  # type: ignore[operator]
        stack = AdapterStack(model)
        stack.add(adapters["lora"])
        stack.apply()
        stack.clear()
        assert {path: layer.weight.data_ptr() for path, layer in find_adaptable_layers(model).items()} == pointers  # type: ignore[operator]

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("semantics", ["sum", "reference"])
    def test_any_history_ends_where_a_fresh_stack_would(
        self, adapters: dict[str, Adapter], semantics: Any, seed: int
    ) -> None:
        model, draw = Small(dtype=torch.bfloat16), random.Random(seed)
        base, stack = weights(model), AdapterStack(model, semantics)
        state: list[tuple[str, float, tuple[float, float]]] = []
        for _ in range(12):
            step = draw.choice(["add", "add", "remove", "strength"]) if state else "add"
            index = draw.randrange(len(state)) if state else 0
            name, strength = draw.choice(list(SPECS)), draw.choice([0.0, 0.3, 1.0, -0.5])
            if step == "add":
                interval = draw.choice([(0.0, 1.0), (0.0, 0.5), (0.4, 0.8)])
                state.append((name, strength, interval))
                stack.add(adapters[name], strength, interval=interval)
            elif step == "remove":
                del state[index]
                stack.remove(index)
            else:
                state[index] = (state[index][0], strength, state[index][2])
                stack.set_strength(strength, index)
            sigma = draw.choice([None, 0.1, 0.45, 0.7, 0.9])
            stack.apply(sigma)
        reached = weights(model)
        stack.clear()
        assert_same_bits(weights(model), base)
        fresh = AdapterStack(model, semantics)
        for name, strength, interval in state:
            fresh.add(adapters[name], strength, interval=interval)
        fresh.apply(sigma)
        assert_same_bits(reached, weights(model))


class TestLeastBaking:
    def test_nothing_changed_bakes_nothing(self, model: Any, adapters: dict[str, Adapter], baked: list[str]) -> None:
        stack = AdapterStack(model)
        assert not stack.apply()
        stack.add(adapters["lora"], interval=(0.2, 0.8))
        assert stack.apply(0.5)
        assert sorted(baked) == sorted(adapters["lora"].tensors)
        baked.clear()
        for sigma in (0.5, 0.8, 0.3, 0.2):
            assert not stack.apply(sigma)
        stack.set_strength(1.0, 0)
        assert not stack.apply(0.5)
        assert baked == []

    def test_only_touched_layers_are_baked(self, model: Any, adapters: dict[str, Adapter], baked: list[str]) -> None:
        stack = AdapterStack(model)
        stack.add(adapters["lora"])
        stack.add(adapters["one"], interval=(0.0, 0.5))
        stack.apply(1.0)
        assert sorted(baked) == sorted(adapters["lora"].tensors)
        for act, sigma, paths in (
            (None, 0.4, adapters["one"].tensors),
            (None, 0.3, ()),
            (None, 0.6, adapters["one"].tensors),
            (lambda: stack.set_strength(1.0, 0, conditioner_strength=0.2), 0.6, [CONDITIONER]),
            (lambda: stack.set_strength(0.3, 1), 0.6, ()),  # closed at 0.6
            (lambda: stack.remove(1), 0.6, ()),
            (lambda: stack.add(adapters["rows-xs"]), 0.6, adapters["rows-xs"].tensors),
            (lambda: stack.remove(1), 0.6, adapters["rows-xs"].tensors),
        ):
            baked.clear()
            if act is not None:
                act()
            assert stack.apply(sigma) == bool(paths)
            assert sorted(baked) == sorted(paths)

    def test_strength_0_needs_no_copy_of_the_base(
        self, model: Any, adapters: dict[str, Adapter], baked: list[str]
    ) -> None:
        stack = AdapterStack(model)
        stack.add(adapters["lora"], 0.0)
        assert not stack.apply()
        assert baked == []

    def test_what_is_final_stays(self, model: Any, adapters: dict[str, Adapter]) -> None:
        found = []
        for final in (True, False):
            fresh = copy.deepcopy(model)
            stack = AdapterStack(fresh)
            for name, strength in (("lora", 1.0), ("one", 0.7), ("rows-xs", 0.4)):
                stack.add(adapters[name], strength)
            assert stack.apply(final=final)
            found.append(weights(fresh))
            assert not stack.apply()
            stack.set_strength(0.5)
            if final:
                with pytest.raises(AdapterError, match="load the model again"):
                    stack.apply()
                assert_same_bits(weights(fresh), found[0])
        assert_same_bits(*found)


class TestReferenceSemantics:
    def test_each_acts_on_what_the_one_before_left(self, model: Any, adapters: dict[str, Adapter]) -> None:
        base = weights(model)
        results = []
        for order in (("lora", "bora"), ("bora", "lora")):
            stack = AdapterStack(model, semantics="reference")
            for name in order:
                stack.add(adapters[name], 0.5)
            stack.apply()
            results.append(weights(model))
            for path, weight in results[-1].items():
                expected = base[path]
                for name in order:
                    if path in adapters[name].tensors:
                        expected = get_layer_adapter(adapters[name], path, base[path]).weight(expected, 0.5)
                assert torch.equal(weight, expected)
            stack.clear()
            assert_same_bits(weights(model), base)
        assert any(not torch.equal(results[0][path], results[1][path]) for path in base)

    def test_strength_scales_the_low_rank_product_alone_and_0_is_absence(
        self, model: Any, adapters: dict[str, Adapter]
    ) -> None:
        base, stack = weights(model), AdapterStack(model, semantics="reference")
        stack.add(adapters["one"], 1e-7)
        stack.apply()
        path = next(iter(adapters["one"].tensors))
        jump = (weights(model)[path] - base[path]).norm() / base[path].norm()
        assert jump > 1e-3  # the trained magnitudes stay
        stack.set_strength(0.0)
        stack.apply()
        assert_same_bits(weights(model), base)

    def test_other_semantics_are_unknown(self, model: Any) -> None:
        with pytest.raises(AdapterError, match="'sum' or 'reference'"):
            AdapterStack(model, semantics="chain")  # type: ignore[arg-type]


def test_several_of_every_kind_at_once() -> None:
    model = Small()
    base, stack = weights(model), AdapterStack(model)
    every = [
        train_adapter(AdapterSpec(kind, rank=2 + index % 3), Small(), seed=index) for index, kind in enumerate(KINDS)
    ]
    for index, adapter in enumerate(every):
        stack.add(adapter, 0.1 * (index + 1))
    stack.apply()
    assert_sum(model, base, *((adapter, 0.1 * (index + 1)) for index, adapter in enumerate(every)))
