"""Every backend computes what the written-out definition computes, for every pattern."""

import itertools

import pytest
import torch
from torch import Tensor

from sa3train.models import attention, blocked_attention
from sa3train.models.attention import Packed, Padded, Pattern, Window, attend, force_backend

LENGTHS = (130, 1, 64, 37)
TOTAL = sum(LENGTHS)
CONTEXTS = (9, 3, 5, 7)


def mask(*lengths: int) -> Tensor:
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


CASES: dict[str, tuple[tuple[int, int], tuple[int, int], Pattern]] = {
    "full": ((3, 20), (3, 20), None),
    "cross": ((3, 20), (3, 11), None),
    "padded": ((3, 20), (3, 20), Padded(mask(20, 13, 1))),
    "packed": ((1, TOTAL), (1, TOTAL), Packed(LENGTHS, LENGTHS)),
    "packed-cross": ((1, TOTAL), (1, sum(CONTEXTS)), Packed(LENGTHS, CONTEXTS)),
    "packed-equal": ((1, 40), (1, 12), Packed((10,) * 4, (3,) * 4)),
    "no-keys": ((2, 3), (2, 0), None),
    "window": ((1, TOTAL), (1, TOTAL), Window(LENGTHS, 17)),
    "window-wide": ((1, TOTAL), (1, TOTAL), Window(LENGTHS, 200)),
    "window-narrow": ((1, 64), (1, 64), Window((64,), 0)),
}


def inputs(queries: tuple[int, int], keys: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((*queries, 2, 64), (*keys, 2, 64), (*keys, 2, 64))
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return q, k, v


def emulated_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds_q: Tensor,
    bounds_k: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    window_size: tuple[int, int],
) -> Tensor:
    """What the CUDA kernels promise, on the CPU: sequence i of the queries sees sequence i of the keys."""
    radius = window_size[0]
    assert q.ndim == k.ndim == v.ndim == 3
    assert bounds_q.dtype == bounds_k.dtype == torch.int32
    assert len(bounds_q) == len(bounds_k)
    out = []
    spans = zip(itertools.pairwise(bounds_q.tolist()), itertools.pairwise(bounds_k.tolist()), strict=True)
    for (q0, q1), (k0, k1) in spans:
        assert q1 - q0 <= longest_q
        assert k1 - k0 <= longest_k
        scores = torch.einsum("lhd,mhd->hlm", q[q0:q1], k[k0:k1]) / 8
        if radius >= 0:
            far = (torch.arange(q1 - q0)[:, None] - torch.arange(k1 - k0)).abs() > radius
            scores = scores.masked_fill(far, -torch.inf)
        out.append(torch.einsum("hlm,mhd->lhd", scores.softmax(-1), v[k0:k1]))
    return torch.cat(out)


@pytest.mark.parametrize("backend", ["sdpa", "varlen", "flash"])
@pytest.mark.parametrize("case", CASES)
def test_backend_equals_reference(case: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_load_kernel", lambda name: emulated_kernel)
    queries, keys, pattern = CASES[case]
    tensors = inputs(queries, keys)
    weight = torch.randn(*queries, 2, 64, generator=torch.Generator().manual_seed(1))
    if isinstance(pattern, Padded):
        weight = weight * pattern.key_mask_BM[..., None, None]
    results = []
    for name in ("reference", backend):
        with force_backend(name):
            out = attend(*tensors, pattern)
        assert out.shape == (*queries, 2, 64)
        results.append((out * (weight != 0), *torch.autograd.grad((out * weight).sum(), tensors)))
    for found, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scores", [64, 2**10, 2**20])
@pytest.mark.parametrize("case", CASES)
def test_blocks_of_products_equal_reference(case: str, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a block: parts of the queries, of the heads, of the rows, or everything."""
    monkeypatch.setattr(blocked_attention, "SCORES_PER_BLOCK", scores)
    queries, keys, pattern = CASES[case]
    tensors = inputs(queries, keys)
    real = pattern.key_mask_BM if isinstance(pattern, Padded) else torch.ones(queries, dtype=torch.bool)
    weight = torch.randn(*queries, 2, 64, generator=torch.Generator().manual_seed(1)) * real[..., None, None]

    def run(backend: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        given = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        with force_backend(backend):
            out = attend(*given, pattern)
        return [out[real].float(), *torch.autograd.grad((out.float() * weight).sum(), given)]

    wanted = run("reference")
    torch.testing.assert_close(run("blocked"), wanted, atol=1e-5, rtol=1e-5)
    for found, exact in zip(run("blocked", torch.bfloat16), wanted, strict=True):
        assert (found.float() - exact).norm() <= 1e-2 * exact.norm()


def test_blocks_are_for_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_bf16_instructions", lambda: True)
    q = torch.zeros(1, 1, 1, 64)
    assert attention.choose_backend(q.bfloat16(), None) == "blocked"
    assert attention.choose_backend(q, None) == "sdpa"
    monkeypatch.setattr(attention, "has_bf16_instructions", lambda: False)
    assert attention.choose_backend(q.bfloat16(), None) == "sdpa"


def test_a_row_does_not_depend_on_the_lengths_of_others() -> None:
    q, k, v = (tensor.detach() for tensor in inputs((2, 12), (2, 12)))
    assert torch.equal(attend(q, k, v, Padded(mask(12, 12)))[0], attend(q, k, v, Padded(mask(12, 5)))[0])


def test_padding_is_never_seen() -> None:
    q, k, v = inputs((2, 12), (2, 12))
    pattern = Padded(mask(12, 5))
    hidden = ~pattern.key_mask_BM[..., None, None]
    before = attend(q, k, v, pattern)
    after = attend(q, k.masked_fill(hidden, 1e4), v.masked_fill(hidden, -1e4), pattern)
    assert torch.equal(before[pattern.key_mask_BM], after[pattern.key_mask_BM])


def test_no_gradient_after_inference_mode_is_lost() -> None:
    """Index tensors that a first call under inference mode leaves in the cache serve training too."""
    attention._build_window_blocks.cache_clear()
    q, k, v = inputs((1, 100), (1, 100))
    with torch.inference_mode():
        attend(q.detach(), k.detach(), v.detach(), Window((100,), 5))
    attend(q, k, v, Window((100,), 5)).sum().backward()
    assert q.grad is not None


def test_patterns_that_do_not_fit_are_refused() -> None:
    q, k, v = (x.detach() for x in inputs((1, 10), (1, 10)))
    for pattern in (Packed((4, 4), (5, 5)), Packed((5, 5), (5, 6)), Window((9,), 2)):
        with pytest.raises(ValueError, match="does not describe"):
            attend(q, k, v, pattern)
    with pytest.raises(ValueError, match="no attention backend 'magic'"), force_backend("magic"):
        pass


def test_force_backend_ends_with_its_block() -> None:
    assert attention.choose_backend(torch.zeros(1, 1, 1, 64), Window((1,), 1)) == "sdpa"
    with force_backend("reference"):
        assert attention._FORCED.get() == "reference"
    assert attention._FORCED.get() is None
