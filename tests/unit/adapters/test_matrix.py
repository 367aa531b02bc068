"""What holds for every kind of adapter on every kind of layer and base."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import KINDS, AdapterSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOSE = {"fp32": 1e-5, "bf16": 3e-2}
"""Largest difference of outputs, relative to the largest: bf16 has 8 bits, and nine layers follow one another."""
MATRIX = list(itertools.product(KINDS, ("linear", "conv1d"), DTYPES))
every_case = pytest.mark.parametrize(("kind", "layer", "base"), MATRIX)


def spec_of(kind: str) -> AdapterSpec:
    return AdapterSpec(kind, rank=3, alpha=4.5)


def assert_outputs_close(found: Tensor, expected: Tensor, base: str) -> None:
    limit = CLOSE[base] * expected.float().abs().max().item()
    torch.testing.assert_close(found.float(), expected.float(), atol=limit, rtol=0)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@every_case
def test_identity_at_init(small: type[Any], kind: str, layer: str, base: str) -> None:
    model = small(layer, DTYPES[base])
    before = model()
    inject(model, spec_of(kind))
    after = model()
    assert after.dtype == before.dtype
    assert_outputs_close(after, before, base)


@every_case
def test_disabled_is_the_base_bit_for_bit(
    small: type[Any], steps: Callable[..., Any], kind: str, layer: str, base: str
) -> None:
    model = small(layer, DTYPES[base])
    before = model()
    injected = inject(model, spec_of(kind))
    steps(model, injected)
    changed = model()
    with injected.disable():
        assert torch.equal(model(), before)
    assert torch.equal(model(), changed)
    assert not torch.equal(changed, before)


@every_case
def test_strength_0_is_the_base_bit_for_bit(
    small: type[Any], trained: Callable[..., Adapter], kind: str, layer: str, base: str
) -> None:
    model = small(layer, DTYPES[base])
    weights, output = model.weights(), model()
    stack = AdapterStack(model)
    stack.add(trained(spec_of(kind), model))
    stack.apply()
    assert not torch.equal(model(), output)
    stack.set_strength(0.0)
    stack.apply()
    assert_same_bits(model.weights(), weights)
    assert torch.equal(model(), output)


@every_case
def test_continuous_at_strength_0(
    small: type[Any], trained: Callable[..., Adapter], kind: str, layer: str, base: str
) -> None:
    model = small(layer, DTYPES[base])
    weights = model.weights()
    stack = AdapterStack(model)
    stack.add(trained(spec_of(kind), model))
    stack.apply()
    full = {name: (tensor - weights[name]).float().norm() for name, tensor in model.weights().items()}
    rounding = torch.finfo(DTYPES[base]).eps
    for strength in (1e-2, 1e-4, 1e-6, -1e-4):
        stack.set_strength(strength)
        stack.apply()
        for name, tensor in model.weights().items():
            change = (tensor - weights[name]).float().norm()
            allowed = abs(strength) * full[name] * (1 + rounding) + rounding * weights[name].float().norm()
            assert change <= allowed, (name, strength)


@every_case
def test_baked_equals_live(small: type[Any], steps: Callable[..., Any], kind: str, layer: str, base: str) -> None:
    model = small(layer, DTYPES[base])
    output = model()
    injected = inject(model, spec_of(kind))
    steps(model, injected)
    live, adapter = model(), injected.export()
    with injected.scale(0.5):
        half = model()
    assert torch.equal(model(), live), "scaled inside the block alone"
    injected.remove()
    assert torch.equal(model(), output)
    stack = AdapterStack(model)
    stack.add(adapter)
    stack.apply()
    assert_outputs_close(model(), live, base)
    assert (model().float() - output.float()).abs().max() > 4 * CLOSE[base] * live.float().abs().max()
    stack.set_strength(0.5)
    stack.apply()
    assert_outputs_close(model(), half, base)


@every_case
def test_a_sum_has_no_order(
    small: type[Any], trained: Callable[..., Adapter], kind: str, layer: str, base: str
) -> None:
    model = small(layer, DTYPES[base])
    output = model()
    adapters = [trained(spec_of(kind), model, seed=1), trained(AdapterSpec("bora", rank=2), model, seed=2)]
    adapters.append(trained(AdapterSpec("lora", rank=4, include=["ff.up"]), model, seed=3))
    playing = list(zip(adapters, (0.7, -0.3, 1.2), strict=True))
    results = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        stack = AdapterStack(model)
        for index in order:
            stack.add(playing[index][0], playing[index][1])
        stack.apply()
        results.append(model.weights())
        stack.clear()
        assert torch.equal(model(), output)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@every_case
def test_saved_and_loaded_is_equal(
    small: type[Any], steps: Callable[..., Any], tmp_path: Path, kind: str, layer: str, base: str
) -> None:
    model = small(layer, DTYPES[base])
    injected = inject(model, spec_of(kind))
    steps(model, injected)
    live, adapter = model(), injected.export({"step": "3", "base_model": "small"})
    save_adapter(tmp_path / "exact.safetensors", adapter, dtype=None)
    save_adapter(tmp_path / "half.safetensors", adapter)
    exact, half = load_adapter(tmp_path / "exact.safetensors"), load_adapter(tmp_path / "half.safetensors")

    assert exact.spec == half.spec == adapter.spec
    assert exact.fingerprint == adapter.fingerprint
    assert half.metadata["step"] == "3"
    assert half.metadata["base_architecture"] == adapter.metadata["base_architecture"]
    for path, params in adapter.tensors.items():
        stored = {name: tensor if "magnitude" in name else tensor.half() for name, tensor in params.items()}
        assert_same_bits(dict(half.tensors[path]), stored)

    other = inject(small(layer, DTYPES[base]), spec_of(kind))
    other.load(exact)
    assert torch.equal(other.root(), live)
    other.load(half)
    assert_outputs_close(other.root(), live, "bf16")


@every_case
def test_only_adapter_parameters_get_gradients(
    small: type[Any], steps: Callable[..., Any], kind: str, layer: str, base: str
) -> None:
    model = small(layer, DTYPES[base])
    injected = inject(model, spec_of(kind))
    steps(model, injected)
    mine = {id(parameter) for parameter in injected.parameters()}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == mine
    assert len(mine) == len(injected.paths) * len(KINDS[kind].parameters)
    for name, parameter in injected.named_parameters().items():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in mine)


@every_case
def test_base_bytes_never_change(small: type[Any], steps: Callable[..., Any], kind: str, layer: str, base: str) -> None:
    model = small(layer, DTYPES[base])
    weights, names, output = model.weights(), list(model.state_dict()), model()
    modules = dict(model.named_modules())
    injected = inject(model, spec_of(kind))
    steps(model, injected)
    assert_same_bits(model.weights(), weights)
    adapter = injected.export()
    injected.remove()
    assert_same_bits(model.weights(), weights)
    assert list(model.state_dict()) == names
    assert all(module is modules[path] for path, module in model.named_modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())

    stack = AdapterStack(model)
    stack.add(adapter)
    stack.apply()
    stack.remove(0)
    stack.apply()
    assert_same_bits(model.weights(), weights)
    assert torch.equal(model(), output)


@every_case
def test_deterministic(small: type[Any], steps: Callable[..., Any], kind: str, layer: str, base: str) -> None:
    results = []
    for _ in range(2):
        model = small(layer, DTYPES[base])
        torch.manual_seed(5)
        injected = inject(model, AdapterSpec(kind, rank=3, dropout=0.2))
        losses = steps(model, injected)
        results.append((losses, injected.export().fingerprint))
    assert results[0] == results[1]
    assert results[0][0][-1] < results[0][0][0]
