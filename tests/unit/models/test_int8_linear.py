"""Products of 8-bit integers: exact where the numbers are such integers, and close where they are rounded to them."""

import pytest
import torch
from torch import nn

from sa3train.models.int8_linear import Int8Linear, find_int8_fault

pytestmark = pytest.mark.skipif(find_int8_fault() is not None, reason=f"refused here: {find_int8_fault()}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_numbers_give_a_close_product_and_leave_the_input(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 40).to(dtype).requires_grad_(False), torch.randn(2, 7, 96).to(dtype)
    x[0, 0] = 0
    given = x.clone()
    found, exact = Int8Linear(linear)(x), linear(x)
    assert found.dtype == dtype and torch.equal(x, given)
    assert (found - exact).float().norm() < 0.015 * exact.float().norm()
    torch.testing.assert_close(found[0, 0], exact[0, 0])


def test_integers_are_multiplied_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 24, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.randint(-127, 128, (24, 64), generator=generator))
    x_TI = torch.randint(-127, 128, (9, 64), generator=generator).float()
    linear.weight[:, 0], x_TI[:, 1] = 127, -127
    torch.testing.assert_close(Int8Linear(linear)(x_TI), linear(x_TI), rtol=0, atol=0.5)
