"""The PEFT layers against the formulae: outputs and every gradient, without a weight-sized tensor."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.golden import GoldenSet
from sa3train.adapters.apply.effective_weight import compute_effective_weight
from sa3train.adapters.layers.peft_layers import SA3LoraLayer
from sa3train.adapters.spec import KINDS, AdapterSpec

GOLDEN = GoldenSet("adapters")


def golden_layer(case: str, bias: bool = True) -> tuple[SA3LoraLayer, dict[str, Tensor], dict[str, Tensor]]:
    """A layer with a recorded case's tensors, its parameters for `compute_effective_weight`, and the frozen bases."""
    tensors, settings = GOLDEN.tensors(case), GOLDEN.settings(case)
    W = tensors["W"]
    base: nn.Linear | nn.Conv1d = nn.Linear(W.shape[1], W.shape[0], bias=bias)
    if W.ndim == 3:
        base = nn.Conv1d(W.shape[1], W.shape[0], W.shape[2], padding=1, stride=2, dilation=2, bias=bias)
    base.weight.data.copy_(W)
    base.requires_grad_(False)
    layer = SA3LoraLayer(base)
    layer.update_layer("default", AdapterSpec(case.rsplit(".", 1)[0], settings["rank"], settings["alpha"]), "layer")
    params = {key.split(":")[1]: value for key, value in tensors.items() if key.startswith("param:")}
    for name, value in params.items():
        getattr(layer, name)["default"].data.copy_(value)
    basis = {}
    for key, value in tensors.items():
        if key.startswith("basis:"):
            basis[key[6:]] = getattr(layer, f"basis_{key[6:]}")["default"]
            torch.testing.assert_close(basis[key[6:]], value, atol=1e-4, rtol=0)
    return layer, {name: value.clone().requires_grad_() for name, value in params.items()}, basis


def expected_output(layer: SA3LoraLayer, weight: Tensor, x: Tensor) -> Tensor:
    base = layer.base_layer
    if isinstance(base, nn.Conv1d):
        return F.conv1d(x, weight, base.bias, base.stride, base.padding, base.dilation)
    return F.linear(x, weight, base.bias)


def example_input(layer: SA3LoraLayer) -> Tensor:
    torch.manual_seed(3)
    return torch.randn(5, 10, 17) if isinstance(layer.base_layer, nn.Conv1d) else torch.randn(5, 7, 20)


def assert_gradients_close(layer: SA3LoraLayer, params: dict[str, Tensor], tolerance: float) -> None:
    for name, expected in params.items():
        assert expected.grad is not None
        found = getattr(layer, name)["default"].grad
        torch.testing.assert_close(found, expected.grad, atol=tolerance * expected.grad.abs().max().item(), rtol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", GOLDEN.names(""))
def test_output_and_gradients_are_those_of_the_effective_weight(case: str, bias: bool) -> None:
    layer, params, basis = golden_layer(case, bias)
    x, y = (example_input(layer).requires_grad_() for _ in range(2))
    scale = layer.scaling["default"]
    out = layer(x)
    expected = expected_output(
        layer, compute_effective_weight(case.rsplit(".", 1)[0], layer.weight, params | basis, scale), y
    )
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=0)
    assert_gradients_close(layer, params, 1e-5)


@pytest.mark.parametrize("case", ["dora-rows.linear", "bora.linear", "bora-xs.conv1d"])
def test_gradients_are_exact_where_magnitudes_are_zero_tiny_or_negative(case: str) -> None:
    layer, params, basis = golden_layer(case)
    name = "magnitude" if "magnitude" in params else "magnitude_r"
    with torch.no_grad():
        for tensor in (params[name], getattr(layer, name)["default"]):
            tensor[0], tensor[1], tensor[2] = 0.0, 1e-6, -1.0
    x, y = (example_input(layer).requires_grad_() for _ in range(2))
    out = layer(x)
    weight = compute_effective_weight(case.rsplit(".", 1)[0], layer.weight, params | basis, layer.scaling["default"])
    expected = expected_output(layer, weight, y)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream)
    assert_gradients_close(layer, params, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_zeros_gives_finite_gradients(kind: str) -> None:
    base = nn.Linear(12, 8).requires_grad_(False)
    base.weight.data.zero_()
    layer = SA3LoraLayer(base)
    layer.update_layer("default", AdapterSpec(kind, rank=2), "layer")
    x = torch.randn(3, 12, requires_grad=True)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in layer.named_parameters() if "base" not in n)
