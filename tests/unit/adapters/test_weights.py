"""The family's formulae against the recorded ones: effective weights and every gradient, Linear and Conv1d."""

import pytest
import torch

from helpers.golden import GoldenSet
from sa3train.adapters.apply.effective_weight import (
    compute_effective_weight,
    detect_dora_type,
    flatten_weight,
    init_parameters,
)
from sa3train.adapters.spec import KINDS

GOLDEN = GoldenSet("adapters")
STRENGTHS = (0.5, 1.0, 1.7)


def test_every_kind_is_recorded() -> None:
    assert {case.rsplit(".", 1)[0] for case in GOLDEN.names("")} == set(KINDS)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("case", GOLDEN.names(""))
def test_effective_weight_and_gradients_equal_the_recorded_ones(case: str, strength: float) -> None:
    kind = case.rsplit(".", 1)[0]
    settings, tensors = GOLDEN.settings(case), GOLDEN.tensors(case)
    params = {k.split(":")[1]: v.requires_grad_() for k, v in tensors.items() if k.startswith("param:")}
    basis = {k.split(":")[1]: v for k, v in tensors.items() if k.startswith("basis:")}
    assert set(params) == set(KINDS[kind].parameters)

    weight = compute_effective_weight(
        kind, tensors["W"], params | basis, settings["alpha"] / settings["rank"] * strength
    )
    (weight * tensors["upstream"]).sum().backward()

    torch.testing.assert_close(weight.detach(), tensors[f"weight@{strength}"], atol=1e-5, rtol=0)
    for name, parameter in params.items():
        expected = tensors[f"grad@{strength}:{name}"]
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(6, 9), (6, 3, 3)])
def test_initial_parameters_leave_the_weight_as_it_is(kind: str, shape: tuple[int, ...]) -> None:
    W = torch.randn(shape)
    params = init_parameters(KINDS[kind], W, rank=2)
    basis = {"U": torch.randn(6, 2), "V": torch.randn(9, 2)}
    assert {name: tuple(tensor.shape) for name, tensor in params.items()} == KINDS[kind].shapes(6, 9, 2)
    torch.testing.assert_close(compute_effective_weight(kind, W, params | basis, 1.0), W, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("shape", "kind"), [((1, 9), "dora-cols"), ((6, 1), "dora-rows"), ((6,), "dora-rows")])
def test_legacy_dora_is_told_by_its_magnitude(shape: tuple[int, ...], kind: str) -> None:
    W = torch.randn(6, 9)
    params = {"lora_A": torch.randn(2, 9), "lora_B": torch.randn(6, 2), "magnitude": torch.rand(shape)}
    assert detect_dora_type(params["magnitude"]) == kind
    flat = params | {"magnitude": params["magnitude"].flatten()}
    assert torch.equal(compute_effective_weight("dora", W, params, 0.7), compute_effective_weight(kind, W, flat, 0.7))


def test_comfy_dora_divides_rows_by_the_norms_of_the_untouched_weight_and_columns_by_those_of_the_changed_one() -> None:
    W, A, B = torch.randn(6, 9), torch.randn(2, 9), torch.randn(6, 2)
    by_row, by_column = torch.rand(6, 1), torch.rand(1, 9)
    V = W + 0.5 * B @ A
    rows = compute_effective_weight("comfy", W, {"lora_A": A, "lora_B": B, "magnitude": by_row}, 0.5)
    torch.testing.assert_close(rows, V * by_row / W.norm(dim=1, keepdim=True))
    cols = compute_effective_weight("comfy", W, {"lora_A": A, "lora_B": B, "magnitude": by_column}, 0.5)
    torch.testing.assert_close(cols, V * by_column / V.norm(dim=0, keepdim=True))


def test_a_difference_is_added_and_keeps_the_shape() -> None:
    W, diff = torch.randn(4, 3, 3).bfloat16(), torch.randn(4, 3, 3)
    result = compute_effective_weight("diff", W, {"diff": diff}, 0.5)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, W.float() + 0.5 * diff)
    assert flatten_weight(W).shape == (4, 9)
