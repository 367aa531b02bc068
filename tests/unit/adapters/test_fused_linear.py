"""Inputs made again from what autograd keeps: the same bits, and nothing kept twice."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sa3train.adapters.layers.fused_linear import find_recomputation
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import KINDS, AdapterSpec
from sa3train.models import norms
from sa3train.models.norms import RMSNorm


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def test_products_and_silu_are_made_again_to_the_same_bits() -> None:
    a, b = leaf(3, 5) * 1.5, leaf(3, 5) + 1
    for x in (a * b, F.silu(a)):
        recomputation = find_recomputation(x)
        assert recomputation is not None
        assert torch.equal(recomputation.run(recomputation.sources), x)
        assert not any(source.requires_grad for source in recomputation.sources)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("few", [False, True])
def test_norms_are_made_again_to_the_same_bits(
    few: bool, modulated: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "uses_fused_kernel", lambda x: few)
    norm, x = RMSNorm(8).requires_grad_(False), leaf(2, 5, 8).to(dtype)
    norm.gamma.data.uniform_(0.5, 2)
    normed = norm.modulate(x, leaf(2, 1, 8), leaf(2, 1, 8)) if modulated else norm(x)
    recomputation = find_recomputation(normed)
    assert recomputation is not None
    assert torch.equal(recomputation.run(recomputation.sources), normed)
    assert x.untyped_storage().data_ptr() == recomputation.sources[0].untyped_storage().data_ptr()
    assert find_recomputation(normed, norms=False) is None


@pytest.mark.parametrize("make", [lambda: torch.randn(3), lambda: leaf(3), lambda: leaf(3) + 1, lambda: leaf(3) * 2.0])
def test_other_inputs_have_no_recomputation(make: object) -> None:
    assert find_recomputation(make()) is None  # type: ignore[operator]


def test_there_is_no_recomputation_while_saved_tensors_are_packed() -> None:
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert find_recomputation(leaf(3) * leaf(3)) is None


class Gated(nn.Module):
    """A gated feed-forward, whose first layer's input is a norm's output and whose second layer's is a product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = RMSNorm(6), nn.Linear(6, 16), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(self.norm(x)).chunk(2, dim=-1)
        return self.down(value * F.silu(gate))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_with_and_without_a_recomputation_and_under_checkpointing(kind: str) -> None:
    model = Gated()
    injected = inject(model, AdapterSpec(kind, rank=2))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in injected.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    x = torch.randn(4, 6)

    def gradients(how: str) -> list[Tensor]:
        for parameter in injected.parameters():
            parameter.grad = None
        if how == "hooks":
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
                out = model(x)
        else:
            out = checkpoint(model, x, use_reentrant=False) if how == "checkpoint" else model(x)
        out.square().sum().backward()
        return [parameter.grad for parameter in injected.parameters() if parameter.grad is not None]

    plain = gradients("plain")
    assert len(plain) == len(injected.parameters())
    for how in ("hooks", "checkpoint"):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients(how), plain, strict=True))


@pytest.mark.parametrize(("kind", "kept_twice"), [("lora", True), ("dora-rows", False), ("bora", False)])
def test_a_norm_s_output_is_not_kept_where_rows_have_magnitudes(kind: str, kept_twice: bool) -> None:
    model = Gated().requires_grad_(False)
    injected = inject(model, AdapterSpec(kind, rank=1, include=["up"]))
    normed = model.norm(torch.randn(1000, 6, requires_grad=True))
    out = injected.layers["up"](normed)
    node = out.grad_fn.next_functions[0][0]
    kept = [tensor.untyped_storage().data_ptr() for tensor in node.saved_tensors if tensor is not None]
    assert (normed.untyped_storage().data_ptr() in kept) == kept_twice


def test_the_input_of_a_gated_layer_is_kept_once() -> None:
    """In plain Linear layers autograd keeps value and SiLU(gate); the adapter needs no third copy of their size."""
    model = Gated()
    injected = inject(model, AdapterSpec("lora", rank=1, include=["down"]))
    x = torch.randn(1000, 6, requires_grad=True)
    value, gate = model.up(x).chunk(2, dim=-1)
    product = value * F.silu(gate)
    out = injected.layers["down"](product)
    node = out.grad_fn.next_functions[0][0]
    kept = [tensor.untyped_storage().data_ptr() for tensor in node.saved_tensors if tensor is not None]
    assert product.untyped_storage().data_ptr() not in kept
    assert value.untyped_storage().data_ptr() in kept
