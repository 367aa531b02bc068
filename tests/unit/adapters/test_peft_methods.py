"""PEFT's own methods by name: trained, saved, loaded and played, with hostile settings refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.small_model import PEFT_OPTIONS, Small, train, train_adapter
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.adapters.layer_filter import find_adaptable_layers
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import PEFT_METHODS, AdapterSpec
from sa3train.core.errors import AdapterError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOSE = {"fp32": 1e-5, "bf16": 3e-2}
"""Largest difference of outputs, relative to the largest: bf16 has 8 bits, and nine layers follow one another."""
CASES = [(kind, "linear", "fp32") for kind in PEFT_METHODS]
CASES += [(kind, "conv1d", "fp32") for kind in ("lokr", "loha", "hira")]
CASES += [(kind, "linear", "bf16") for kind in ("lokr", "loha", "oft")]


def assert_close(found: Tensor, expected: Tensor, base: str) -> None:
    limit = CLOSE[base] * expected.float().abs().max().item()
    torch.testing.assert_close(found.float(), expected.float(), atol=limit, rtol=0)


@pytest.mark.parametrize(("kind", "layer", "base"), CASES)
def test_trained_saved_loaded_and_played(tmp_path: Path, kind: str, layer: str, base: str) -> None:
    model = Small(layer, DTYPES[base])
    weights, output = model.weights(), model()
    torch.manual_seed(0)
    injected = inject(model, AdapterSpec(kind, rank=4, options=PEFT_OPTIONS.get(kind, {})))
    assert_close(model(), output, base)
    train(model, injected, lr=5e-2)
    assert all(parameter.dtype == torch.float32 for parameter in injected.parameters())
    live = model()
    with injected.disable():
        assert torch.equal(model(), output)
    save_adapter(tmp_path / "a.safetensors", injected.export(), dtype=None)
    save_adapter(tmp_path / "peft", injected.export(), dtype=None)
    injected.remove()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.weights().items())

    for saved in ("a.safetensors", "peft"):
        loaded = load_adapter(tmp_path / saved)
        stack = AdapterStack(model)
        assert sorted(stack.add(loaded).matched) == sorted(find_adaptable_layers(model))
        stack.apply()
        assert_close(model(), live, base)
        assert not torch.equal(model(), output)
        stack.set_strength(0.0)
        stack.apply()
        assert torch.equal(model(), output)

    loaded = load_adapter(tmp_path / "a.safetensors")
    again = inject(model, loaded.spec)
    again.load(loaded)
    assert_close(model(), live, base)


@pytest.mark.parametrize("kind", ["lokr", "loha"])
@pytest.mark.parametrize(
    "patterns",
    [
        {"alpha_pattern": {"layers.1": 9.0}},
        {"alpha": 6.0, "alpha_pattern": {"layers[10-11].ff.up": 1.0}},
        {"rank_pattern": {"layers.1": 2}},
        {"rank_pattern": {"layers[0-1]": 3}, "alpha_pattern": {"conditioners": 8.0}},
    ],
)
def test_ranks_and_alphas_by_pattern_mean_the_same_live_and_baked(
    tmp_path: Path, kind: str, patterns: dict[str, Any]
) -> None:
    model = Small()
    injected = inject(model, AdapterSpec(kind, rank=4, **patterns))
    train(model, injected)
    live, adapter = model(), injected.export()
    injected.remove()
    save_adapter(tmp_path / "a.safetensors", adapter, dtype=None)
    save_adapter(tmp_path / "peft", adapter, dtype=None)
    for played in (adapter, load_adapter(tmp_path / "a.safetensors"), load_adapter(tmp_path / "peft")):
        stack = AdapterStack(model)
        stack.add(played)
        stack.apply()
        assert_close(model(), live, "fp32")
        stack.clear()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("oft", {"num_cayley_neumann_terms": 2**31}),
        ("oft", {"num_cayley_neumann_terms": None}),
        ("oft", {"bias": None}),
        ("peanut", {"depth": 2**20}),
        ("fourierft", {"scaling": 10**400}),
        ("fourierft", {"n_frequency_pattern": None}),
        ("delora", {"delora_lambda": float("nan")}),
        ("hira", {"init_weights": -1}),
        ("lokr", {"target_modules": "x"}),
        ("lokr", {"x" * 5000: 1}),
    ],
)
def test_hostile_options_are_refused(kind: str, options: dict[str, Any]) -> None:
    """`options` may come from a file: nothing but an `AdapterError`, and no endless loop."""
    model = Small()
    adapter = train_adapter(AdapterSpec(kind, rank=4, include=["layers.1."], options=PEFT_OPTIONS.get(kind, {})), model)
    hostile = replace(adapter, spec=replace(adapter.spec, options=PEFT_OPTIONS.get(kind, {}) | options))
    with pytest.raises(AdapterError) as caught:
        AdapterStack(model).add(hostile)
    assert 20 < len(str(caught.value)) < 2000
