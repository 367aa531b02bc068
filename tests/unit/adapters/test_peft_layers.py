"""The adapted layer in training: dropout, scales, what it computes in which precision, and what it never allocates."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sa3train.adapters.apply.effective_weight import compute_effective_weight
from sa3train.adapters.layers import weight_norms
from sa3train.adapters.layers.frozen_weight import FrozenWeight
from sa3train.adapters.layers.fused_linear import multiply_with_factor
from sa3train.adapters.layers.peft_layers import SA3LoraLayer
from sa3train.adapters.spec import KINDS, AdapterSpec


def layer_of(kind: str, base: nn.Linear | nn.Conv1d, **settings: Any) -> SA3LoraLayer:
    """One adapted layer away from its start: every parameter moved, in training mode."""
    base.requires_grad_(False)
    layer = SA3LoraLayer(base)
    layer.update_layer("default", AdapterSpec(kind, **({"rank": 3} | settings)), "layer")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapter_parameters(layer).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer


def adapter_parameters(layer: SA3LoraLayer) -> dict[str, nn.Parameter]:
    return {
        name.split(".")[0]: parameter
        for name, parameter in layer.named_parameters()
        if not name.startswith("base_layer")
    }


def params_of(layer: SA3LoraLayer) -> dict[str, Tensor]:
    """Its tensors, as `compute_effective_weight` wants them."""
    params = {
        name: parameter.detach().clone().requires_grad_() for name, parameter in adapter_parameters(layer).items()
    }
    if "M_xs" in params:
        params |= {"U": layer.basis_U["default"], "V": layer.basis_V["default"]}
    return params


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / math.sqrt(4))])
def test_rslora_divides_by_the_root(kind: str, rslora: bool, scale: float) -> None:
    layer = layer_of(kind, nn.Linear(12, 8), rank=4, alpha=6, rslora=rslora)
    x = torch.randn(5, 12)
    weight = compute_effective_weight(kind, layer.weight, params_of(layer), scale)
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias), atol=1e-5, rtol=1e-5)


def shares(kind: str, W: Tensor, params: dict[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """W and sΔ, flattened, each with the gains of the effective weight; their sum is that weight."""
    delta = params["U"] @ params["M_xs"] @ params["V"].T if "M_xs" in params else params["lora_B"] @ params["lora_A"]
    gain = compute_effective_weight(kind, W, params, scale).flatten(1) / (W.flatten(1) + scale * delta)
    return gain * W.flatten(1), gain * scale * delta


def two_path_output(kind: str, layer: SA3LoraLayer, params: dict[str, Tensor], x: Tensor, dropped: Tensor) -> Tensor:
    """A Linear's output when the low-rank path gets an input of its own."""
    of_weight, of_delta = shares(kind, layer.weight, params, layer.scaling["default"])
    return x @ of_weight.T + dropped @ of_delta.T + layer.bias


class TestDropout:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("conv", [False, True])
    def test_it_acts_on_the_input_of_the_adapter_alone(self, kind: str, conv: bool) -> None:
        base = nn.Conv1d(6, 8, 3, padding=1) if conv else nn.Linear(12, 8)
        layer = layer_of(kind, base, dropout=0.5)
        x = torch.randn(2, 6, 5) if conv else torch.randn(2, 12)
        torch.manual_seed(0)
        once = layer(x)
        assert not torch.equal(layer(x), once)
        torch.manual_seed(0)
        assert torch.equal(layer(x), once)

        W, params, scale = layer.weight, params_of(layer), layer.scaling["default"]
        of_weight, of_delta = (part.reshape(W.shape) for part in shares(kind, W, params, scale))
        whole = [F.conv1d(x, w, None, padding=1) if conv else F.linear(x, w) for w in (of_weight + of_delta, of_weight)]
        bias = layer.bias[:, None] if conv else layer.bias
        mean = (layer(x.repeat(4096, *[1] * (x.ndim - 1))) - bias).unflatten(0, (4096, len(x))).mean(dim=0)
        scatter = (whole[0] - whole[1]).abs().max()
        assert (mean - whole[0]).abs().max() < 0.2 * scatter + 1e-4
        with torch.no_grad():
            for name in ("lora_B", "M_xs"):
                for parameter in getattr(layer, name).values():
                    parameter.zero_()
        assert torch.equal(layer(x), layer(x))  # with B = 0 nothing of the dropped input reaches the output

    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_off_in_evaluation(self, kind: str) -> None:
        layer, without = (layer_of(kind, _seeded_linear(), dropout=rate) for rate in (0.9, 0.0))
        for name, parameter in adapter_parameters(layer).items():
            parameter.data.copy_(adapter_parameters(without)[name])
        x = torch.randn(4, 12)
        layer.eval()
        assert torch.equal(layer(x), without(x))
        layer.train()
        assert not torch.equal(layer(x), without(x))

    @pytest.mark.parametrize("kind", KINDS)
    def test_gradients_are_those_of_the_dropped_input(self, kind: str) -> None:
        layer = layer_of(kind, nn.Linear(12, 8), dropout=0.4)
        x = torch.randn(5, 12)
        upstream = torch.randn(5, 8)
        torch.manual_seed(7)
        (layer(x) * upstream).sum().backward()
        torch.manual_seed(7)
        dropped = F.dropout(x, 0.4)
        params = params_of(layer)
        out = two_path_output(kind, layer, params, x, dropped)
        (out * upstream).sum().backward()
        for name, parameter in adapter_parameters(layer).items():
            expected = params[name].grad
            limit = 1e-4 * expected.abs().max().item()
            torch.testing.assert_close(parameter.grad, expected, atol=limit, rtol=0)


class LargestOutput(TorchDispatchMode):
    """Notes every operation whose new output has as many values as a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.found = weight, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.numel() >= self.weight.numel():
                storage = tensor.untyped_storage().data_ptr()
                if storage != self.weight.untyped_storage().data_ptr():
                    self.found.append((str(func), tuple(tensor.shape)))
        return result


class TestNoDelta:
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("conv", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    def test_neither_forward_nor_backward_makes_a_weight_sized_tensor(
        self, kind: str, conv: bool, dtype: torch.dtype, dropout: float
    ) -> None:
        base: nn.Linear | nn.Conv1d = nn.Conv1d(32, 96, 3, padding=1) if conv else nn.Linear(96, 96)
        layer = layer_of(kind, base.to(dtype), dropout=dropout)
        x = torch.randn(2, 32, 10, dtype=dtype) if conv else torch.randn(2, 10, 96, dtype=dtype)
        layer(x).sum().backward()  # the norms of the frozen weight are known from here on
        x.requires_grad_()
        with LargestOutput(layer.weight) as watch:
            layer(x).square().sum().backward()
        assert watch.found == []
        assert x.grad is not None

    def test_the_watch_sees_a_delta(self) -> None:
        layer = layer_of("lora", nn.Linear(96, 96))
        with LargestOutput(layer.weight) as watch:
            F.linear(torch.randn(2, 96), compute_effective_weight("lora", layer.weight, params_of(layer), 1.0))
        assert watch.found


class TestGradients:
    @pytest.mark.parametrize("conv", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    def test_they_equal_autograd_through_the_effective_weight(self, kind: str, conv: bool) -> None:
        torch.manual_seed(11)
        base = nn.Conv1d(10, 24, 3, padding=2, stride=2, dilation=2) if conv else nn.Linear(40, 24)
        layer = layer_of(kind, base, rank=4, alpha=6)
        x = torch.randn(3, 10, 17) if conv else torch.randn(3, 5, 40)
        found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
        params = params_of(layer)
        weight = compute_effective_weight(kind, layer.weight, params, layer.scaling["default"])
        out = layer(found)
        reference = F.conv1d(expected, weight, layer.bias, 2, 2, 2) if conv else F.linear(expected, weight, layer.bias)
        torch.testing.assert_close(out, reference, atol=1e-4, rtol=0)
        upstream = torch.randn_like(out)
        (out * upstream).sum().backward()
        (reference * upstream).sum().backward()
        pairs = {name: (parameter.grad, params[name].grad) for name, parameter in adapter_parameters(layer).items()}
        for name, (mine, theirs) in (pairs | {"x": (found.grad, expected.grad)}).items():
            limit = 1e-4 * theirs.abs().max().item()
            torch.testing.assert_close(mine, theirs, atol=limit, rtol=0, msg=lambda text, name=name: f"{name}: {text}")

    @pytest.mark.parametrize("kind", KINDS)
    def test_an_fp32_adapter_on_a_bf16_base_computes_its_norms_in_fp32(self, kind: str) -> None:
        torch.manual_seed(12)
        layer = layer_of(kind, nn.Linear(256, 64).bfloat16(), rank=4)
        assert all(parameter.dtype == torch.float32 for parameter in adapter_parameters(layer).values())
        x = torch.randn(7, 256).bfloat16()
        weight = compute_effective_weight(kind, layer.weight, params_of(layer), layer.scaling["default"])
        exact = F.linear(x.float(), weight, layer.bias.float())
        out = layer(x)
        assert out.dtype == torch.bfloat16
        layer(x).add_(1)  # hooks may change outputs in place
        # bf16 rounds each product by 2⁻⁹; norms taken in bf16 would put whole rows off by 2⁻⁸.
        assert (out.float() - exact).abs().max() < 2**-6 * exact.abs().max()
        assert abs((out.float() * exact).sum() / exact.square().sum() - 1) < 2**-9

    @pytest.mark.parametrize("size", [0.05, 1.0])
    @pytest.mark.parametrize("gained", [False, True])
    def test_norms_on_a_bf16_base(self, gained: bool, size: float) -> None:
        """In fp32, far closer than bf16's own 2⁻⁹."""
        limit = 2**-20
        torch.manual_seed(13)
        W, A, B = torch.randn(192, 256).bfloat16(), torch.randn(8, 256) / 16, torch.randn(192, 8) / 8**0.5 * size * 16
        magnitude = torch.rand(192) + 0.5
        frozen, scale = FrozenWeight(W), 0.9
        V = W.double() + scale * B.double() @ A.double()
        H = V
        if gained:
            H = (magnitude.double() / V.norm(dim=1))[:, None] * V
            both = weight_norms.compute_both_norms(frozen, A, B, magnitude, scale)
            rows, columns = both.norm_O, both.norm_I
        else:
            rows, _ = weight_norms.compute_row_norms(frozen, A, B, scale)
            columns, _ = weight_norms.compute_column_norms(frozen, A, B, scale)
            _, product = multiply_with_factor(torch.zeros(1, 256).bfloat16(), A, W)
            from_16_bits, _ = weight_norms.compute_row_norms(frozen, A, B, scale, product)
            assert (from_16_bits / V.norm(dim=1) - 1).abs().max() < 2**-10  # less than bf16 rounds each output by
        assert (rows / V.norm(dim=1) - 1).abs().max() < limit
        assert (columns / H.norm(dim=0) - 1).abs().max() < limit

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    @pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.scales_rows or kind.scales_columns])
    def test_magnitudes_may_be_zero_tiny_or_negative(self, kind: str, dropout: float) -> None:
        """What the backward pass recovers by dividing by a gain must be had otherwise where the gain is near 0."""
        layer = layer_of(kind, nn.Linear(12, 8), dropout=dropout)
        for name, parameter in adapter_parameters(layer).items():
            if name.startswith("magnitude"):
                parameter.data[:4] = torch.tensor([0.0, 1e-9, 1e-3, -1.0])
        x, upstream = torch.randn(5, 12), torch.randn(5, 8)
        params = params_of(layer)
        torch.manual_seed(7)
        (layer(x) * upstream).sum().backward()
        torch.manual_seed(7)
        (two_path_output(kind, layer, params, x, F.dropout(x, dropout)) * upstream).sum().backward()
        for name, parameter in adapter_parameters(layer).items():
            limit = 1e-4 * params[name].grad.abs().max().item()
            torch.testing.assert_close(parameter.grad, params[name].grad, atol=limit, rtol=0)


def _seeded_linear() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(12, 8)
