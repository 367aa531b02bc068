"""The base in few bits: how far off, how small, and that training on it is training on the rounded weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.golden import GOLDEN
from helpers.training import Trial, assert_same_results, run_in_two_parts
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.models.checkpoint import load_checkpoint
from sa3train.training.quantization import (
    _NF4,
    METHODS,
    MIN_SIZE,
    QuantizedBase,
    list_quantizable_weights,
    round_weights,
)


@pytest.mark.parametrize("shape", [(96, 130), (64, 64, 3), (7, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_within_half_a_step_of_each_rows_largest(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    W = torch.randn(shape).to(dtype)
    encode, decode = METHODS["int8"]
    back = decode(encode(W))
    assert back.shape == W.shape and back.dtype == dtype
    step = W.float().flatten(1).abs().amax(dim=1) / 127
    allowed = step / 2 * 1.01 + (0.004 * W.float().flatten(1).abs().amax(dim=1) if dtype is torch.bfloat16 else 0)
    assert ((back.float() - W.float()).flatten(1).abs().amax(dim=1) <= allowed).all()
    assert encode(W).codes.nbytes == W.numel()


@pytest.mark.parametrize("shape", [(96, 130), (64, 64, 3), (7, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_keeps_three_bits_of_every_value_that_is_not_tiny_in_its_row(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    W = torch.randn(shape).to(dtype)
    encode, decode = METHODS["fp8"]
    back = decode(encode(W))
    assert back.shape == W.shape and back.dtype == dtype and torch.isfinite(back).all()
    exact = W.float().flatten(1)
    largest = exact.abs().amax(dim=1, keepdim=True)
    smallest_step = largest / 448 * 2**-9  # below 2 ** -6 e4m3 numbers are evenly spaced
    allowed = torch.maximum(exact.abs() * (2**-4 + 2**-8), smallest_step)
    assert ((back.float().flatten(1) - exact).abs() <= allowed).all()
    assert encode(W).codes.nbytes == W.numel()


@pytest.mark.parametrize("shape", [(96, 130), (64, 64, 3), (7, 33)])
def test_nf4_takes_the_nearest_of_sixteen_values_in_each_block(shape: tuple[int, ...]) -> None:
    W = torch.randn(shape)
    encode, decode = METHODS["nf4"]
    back, flat = decode(encode(W)), W.flatten()
    table = torch.tensor(_NF4)
    for start in range(0, flat.numel(), 64):
        block = flat[start : start + 64]
        scale = block.abs().max()
        expected = table[(block[:, None] / scale - table).abs().argmin(dim=1)] * scale
        torch.testing.assert_close(back.flatten()[start : start + 64], expected)
    assert encode(W).codes.nbytes == -(-W.numel() // 64) * 32
    assert float((back - W).norm() / W.norm()) < 0.12


@pytest.mark.parametrize("kind", sorted(METHODS))
def test_rounding_again_changes_nothing(kind: str) -> None:
    layer = nn.Linear(128, 64)
    round_weights(layer, kind)
    once = layer.weight.detach().clone()
    round_weights(layer, kind)
    torch.testing.assert_close(layer.weight.detach(), once, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", sorted(METHODS))
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("include", [None, ["self_attn"]])
def test_losses_and_gradients_are_those_of_the_rounded_weights(
    kind: str, checkpointing: bool, include: list[str] | None
) -> None:
    """Also for layers without an adapter, and with blocks recomputed in the backward pass."""
    found = []
    for coded in (False, True):
        model = load_checkpoint(GOLDEN / "plain", parts=("dit",))
        round_weights(model.dit, kind)
        torch.manual_seed(0)
        injected = inject(nn.ModuleDict({"model": model.dit}), AdapterSpec("dora-rows", rank=4, include=include))
        full = sum(weight.untyped_storage().nbytes() for weight in list_quantizable_weights(model.dit).values())
        if coded:
            keeper = QuantizedBase(model.dit, kind)
            held = sum(weight.untyped_storage().nbytes() for weight in list_quantizable_weights(model.dit).values())
            assert held == 0 and keeper.nbytes < full * (0.15 if kind == "nf4" else 0.27)
        model.dit.transformer.checkpointing = checkpointing
        torch.manual_seed(1)
        x = torch.randn(2, model.latent_channels, 9)
        for _ in range(2):
            out = model.dit(
                x,
                torch.tensor([0.2, 0.9]),
                cross_attn_cond_BLD=torch.randn(2, 5, 768, generator=torch.Generator().manual_seed(2)),
                global_cond_BD=torch.randn(2, 768, generator=torch.Generator().manual_seed(3)),
                local_add_cond_BCT=torch.randn(
                    2, model.latent_channels + 1, 9, generator=torch.Generator().manual_seed(4)
                ),
            )
            out.square().mean().backward()
        found.append((out.detach(), [p.grad.clone() for p in injected.parameters() if p.grad is not None]))
        if coded:
            held = sum(weight.untyped_storage().nbytes() for weight in list_quantizable_weights(model.dit).values())
            assert held <= max(weight.numel() for weight in list_quantizable_weights(model.dit).values()) * 4, (
                "one layer at a time"
            )
    (plain, plain_gradients), (coded_out, coded_gradients) = found
    assert torch.equal(plain, coded_out)
    assert len(plain_gradients) == len(coded_gradients) > 0
    for expected, gradient in zip(plain_gradients, coded_gradients, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_small_weights_stay_as_they_are() -> None:
    layer = nn.Linear(8, 8)
    assert layer.weight.numel() < MIN_SIZE and list_quantizable_weights(layer) == {}


@pytest.mark.parametrize("kind", ["int8", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fp8", "nf4"))])
def test_a_run_on_a_coded_base_learns_and_resumes_to_the_bit(shards: Path, tmp_path: Path, kind: str) -> None:
    values: dict[str, Any] = {"trainer": {"quantize": kind}, "max_steps": 4}
    whole, part = Trial(shards, tmp_path / "whole", **values), Trial(shards, tmp_path / "part", **values)
    whole.run()
    run_in_two_parts(part, stop_after=2)
    assert_same_results(part, whole)
