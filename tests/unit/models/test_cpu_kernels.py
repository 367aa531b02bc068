"""The passes for inference on a CPU give what the plain formulas give, in fp32 and (where it is quick) in bf16."""

import pytest
import torch

from sa3train.models import cpu_kernels
from sa3train.models.blocks import CrossAttention, Rotary, SelfAttention, normalize_and_rotate, rotate
from sa3train.models.dit import HEAD_NORM
from sa3train.models.norms import DynamicTanh, RMSNorm

NORMS = [DynamicTanh, RMSNorm]
DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def tolerance(dtype: torch.dtype) -> float:
    return 2e-6 if dtype == torch.float32 else 0.06


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORMS)
def test_norm_and_turn(kind: type[DynamicTanh] | type[RMSNorm], dtype: torch.dtype) -> None:
    norm = kind(64).requires_grad_(False)
    for parameter in norm.parameters():
        parameter.copy_(draw(*parameter.shape))
    x_BLHD, rotary = draw(3, 7, 5, 64).to(dtype)[:, :, 1:4], Rotary()(torch.arange(7) + 1000)
    exact = rotate(norm(x_BLHD.float()), rotary)
    with torch.no_grad():
        found = normalize_and_rotate(norm.to(dtype), x_BLHD, rotary)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, atol=tolerance(dtype), rtol=0)


@pytest.mark.parametrize("differential", [False, True])
@pytest.mark.parametrize("norm", [DynamicTanh, HEAD_NORM])
def test_attention(norm: type[DynamicTanh], differential: bool) -> None:
    torch.manual_seed(0)
    attention = SelfAttention(128, norm, differential).requires_grad_(False)
    cross = CrossAttention(128, HEAD_NORM, differential).requires_grad_(False)
    x_BLD, context_BMD, rotary = draw(2, 9, 128), draw(2, 4, 128) + 1, Rotary()(torch.arange(9))
    plain = attention(x_BLD, rotary), cross(x_BLD, cross.project_context(context_BMD))
    with torch.inference_mode():
        found = attention(x_BLD, rotary), cross(x_BLD, cross.project_context(context_BMD))
    for mine, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=0)


def test_tanh_is_exact() -> None:
    x = torch.cat((torch.linspace(-12, 12, 5001), torch.logspace(-8, 0, 101), torch.tensor([torch.inf, -torch.inf])))
    torch.testing.assert_close(cpu_kernels.compute_tanh(x).double(), torch.tanh(x.double()), atol=1e-7, rtol=2e-7)
    assert cpu_kernels.compute_tanh(torch.tensor([torch.nan])).isnan().all()


def test_who_takes_it() -> None:
    x = draw(2, 2)
    assert not cpu_kernels.is_supported(x)
    with torch.no_grad():
        assert cpu_kernels.is_supported(x)
        assert not cpu_kernels.is_supported(x.half())
        assert cpu_kernels.is_supported(x.bfloat16()) == cpu_kernels.has_bf16_instructions()
