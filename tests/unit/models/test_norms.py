"""The modulated norm's own backward pass equals autograd's, and keeps no copy of the normed input."""

import pytest
import torch
from torch import Tensor

from sa3train.models import norms
from sa3train.models.norms import RMSNorm


@pytest.fixture(params=["few bytes", "few passes"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As on the CPU, and as on a GPU (there by a kernel that the CPU has not, but by the same calls)."""
    monkeypatch.setattr(norms, "uses_fused_kernel", lambda x: request.param == "few passes")
    return str(request.param)


def by_autograd(norm: RMSNorm, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    normed = x.float() * torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + norm.eps) * norm.gamma.float()
    return (normed * gain.float() + shift.float()).to(x.dtype)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, False)])
def test_gradients(wanted: tuple[bool, bool, bool], per_token: bool) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(32)
    torch.nn.init.normal_(norm.gamma)
    tokens = 5 if per_token else 1
    shapes = ((2, 5, 32), (2, tokens, 32), (2, tokens, 32))
    inputs = [torch.randn(shape, requires_grad=want) for shape, want in zip(shapes, wanted, strict=True)]
    upstream = torch.randn(2, 5, 32)
    found, expected = norm.modulate(*inputs), by_autograd(norm, *inputs)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    parameters = [tensor for tensor in (*inputs, norm.gamma) if tensor.requires_grad]
    mine = torch.autograd.grad(found, parameters, upstream)
    theirs = torch.autograd.grad(expected, parameters, upstream)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_without_modulation(trained: bool) -> None:
    torch.manual_seed(1)
    norm = RMSNorm(32)
    torch.nn.init.normal_(norm.gamma)
    norm.requires_grad_(trained)
    x, upstream = torch.randn(2, 5, 3, 32, requires_grad=True), torch.randn(2, 5, 3, 32)
    found, expected = norm(x), by_autograd(norm, x, torch.ones(()), torch.zeros(()))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(norm(x), found)
    parameters = [x, norm.gamma] if trained else [x]
    pairs = zip(*(torch.autograd.grad(out, parameters, upstream) for out in (found, expected)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_what_is_kept() -> None:
    norm, kept = RMSNorm(64).bfloat16(), []
    x = torch.randn(1, 100, 64).bfloat16().requires_grad_()
    gain, shift = torch.randn(2, 1, 1, 64, dtype=torch.bfloat16, requires_grad=True).unbind()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm.modulate(x, gain, shift)
    large = [tensor for tensor in kept if tensor.numel() >= x.numel()]
    assert len(large) == 1
    assert large[0].data_ptr() == x.data_ptr()
