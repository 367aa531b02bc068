"""fp16: layers that saturate or stray in it are found, kept in fp32 and named; the rest is fp16, and the sum right."""

import logging

import pytest
import torch
from torch import Tensor, nn

from helpers.golden import PLAIN
from sa3train.inference import Generator
from sa3train.models.checkpoint import StableAudio3, load_autoencoder, load_checkpoint
from sa3train.models.fp16_check import MAX_ERROR, MAX_FP16, LayerCheck, convert_autoencoder_to_fp16, convert_to_fp16


def model_with(saturating: int | None = None) -> StableAudio3:
    """A tiny model; block `saturating` computes the same as before by way of numbers that fp16 does not have."""
    model = load_checkpoint(PLAIN)
    if saturating is not None:
        expand, _, contract = model.dit.transformer.layers[saturating].ff.ff  # type: ignore[union-attr, misc]
        assert isinstance(contract, nn.Linear)
        half = contract.in_features
        with torch.no_grad():
            expand.proj.weight[:half] *= 2.0**20  # the half that is not gated: fp32 loses nothing by powers of two
            expand.proj.bias[:half] *= 2.0**20
            contract.weight *= 2.0**-20
    return model


@torch.no_grad()
def velocity(model: StableAudio3) -> Tensor:
    config, seeded = model.config.dit, torch.Generator().manual_seed(5)
    context = torch.randn(2, 5, config.context_width, generator=seeded)
    shape = (2, config.latent_width, 9)
    conditions = {
        "cross_attn_cond_BLD": context,
        "global_cond_BD": torch.randn(2, config.global_width, generator=seeded),
        "local_add_cond_BCT": torch.zeros(2, config.local_width, 9),
    }
    prepared = model.dit.prepare(shape, **conditions)
    out: Tensor = model.dit.predict_velocity(torch.randn(shape, generator=seeded), torch.tensor([0.3, 0.8]), prepared)
    return out


def dtypes(module: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters()}


def test_a_block_that_saturates_is_kept_and_named_and_the_others_are_halved(caplog: pytest.LogCaptureFixture) -> None:
    exact = velocity(model_with(saturating=1))
    naive = model_with(saturating=1)
    naive.dit.half()
    assert not torch.isfinite(velocity(naive)).all(), "otherwise this test shows nothing"
    model = model_with(saturating=1)
    with caplog.at_level(logging.INFO):
        verdicts = {verdict.layer: verdict for verdict in convert_to_fp16(model, "cpu")}
    assert [name for name, verdict in verdicts.items() if verdict.needs_fallback] == ["block 1"]
    assert verdicts["block 1"].largest > MAX_FP16 > verdicts["block 0"].largest > 0
    assert "kept in fp32: block 1 (values up to" in caplog.text
    blocks = model.dit.transformer.layers
    assert [dtypes(block) for block in blocks][:2] == [{torch.float16}, {torch.float32}]
    assert (
        dtypes(model.conditioner) == dtypes(model.autoencoder) == {torch.float16} and model.dit.dtype is torch.float16
    )
    found = velocity(model)
    assert found.dtype is torch.float32 and (found - exact).norm() <= MAX_ERROR * exact.norm()


def test_a_model_without_large_numbers_is_fp16_throughout(caplog: pytest.LogCaptureFixture) -> None:
    exact, model = velocity(model_with()), model_with()
    with caplog.at_level(logging.INFO):
        verdicts = convert_to_fp16(model, "cpu")
    assert not any(verdict.needs_fallback for verdict in verdicts) and "so kept in" not in caplog.text
    assert dtypes(model.dit) == {torch.float16}
    assert (velocity(model) - exact).norm() <= MAX_ERROR * exact.norm()


@pytest.mark.parametrize("output", [False, True])
def test_large_numbers_between_blocks_keep_all_that_they_pass_through(output: bool) -> None:
    """The residual stream leaves block 0 with numbers that no later block can take in fp16, nor, with `output`, what
    comes after them."""
    model = model_with()
    with torch.no_grad():
        model.dit.transformer.layers[0].ff.ff[2].weight *= 1e7  # type: ignore[index, union-attr]
        if not output:
            model.dit.transformer.project_out.weight *= 1e-6
    exact = velocity(model)
    kept = [verdict.layer for verdict in convert_to_fp16(model, "cpu") if verdict.needs_fallback]
    blocks = len(model.dit.transformer.layers)
    all_of_it = ["the denoiser as a whole"] if output else []
    assert kept == [*(f"block {index}" for index in range(blocks)), "project_out", *all_of_it]
    assert (velocity(model) - exact).norm() <= MAX_ERROR * exact.norm()


@pytest.mark.parametrize(
    ("error", "largest", "kept"),
    [(0.001, 10.0, False), (0.02, 10.0, True), (float("nan"), 10.0, True), (0.0, 70000.0, True)],
)
def test_a_layer_is_kept_for_error_saturation_or_what_is_no_number(error: float, largest: float, kept: bool) -> None:
    assert LayerCheck("x", error, largest).needs_fallback is kept


def test_the_generator_tries_layers_when_fp16_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        generator = Generator.from_pretrained(PLAIN, "cpu", "fp16")
    assert "fp16 in " in caplog.text and generator.precision == "fp16"
    assert next(generator.model.dit.parameters()).dtype is torch.float16


@torch.no_grad()
def test_a_block_is_small_before_the_next_one_runs() -> None:
    """So that a device, to which each comes when it runs, holds one of them in fp32 at a time."""
    model, met = model_with(saturating=1), []
    blocks = list(model.dit.transformer.layers)
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: met.append([dtypes(each) for each in blocks]))
    convert_to_fp16(model, "cpu")
    fp16, fp32 = {torch.float16}, {torch.float32}
    assert met[:4:2] == [[fp32] * len(blocks), [fp16] + [fp32] * (len(blocks) - 1)]
    kept = {id(tensor) for tensor in model.dit.parameters()}
    assert kept == {id(tensor) for tensor in model_parameters(model)}, "the same parameters, for adapters to find"


def model_parameters(model: StableAudio3) -> list[Tensor]:
    return list(model.get_adapter_root()["model"].parameters())


def test_what_is_kept_wide_is_not_rounded_to_fp16_on_its_way() -> None:
    exact, model = model_with(saturating=1), model_with(saturating=1)
    convert_to_fp16(model, "cpu")
    ours, theirs = (each.dit.transformer.layers[1].state_dict() for each in (model, exact))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_autoencoder_alone_is_tried_too(caplog: pytest.LogCaptureFixture) -> None:
    good, bad = load_autoencoder(PLAIN), load_autoencoder(PLAIN)
    with torch.no_grad():
        bad.decoder.layers[3].mapping.bias += 1e6  # type: ignore[union-attr, operator]
    with caplog.at_level(logging.INFO):
        assert not convert_autoencoder_to_fp16(good, "cpu").needs_fallback and good.dtype is torch.float16
        assert "fp16 in 1 of 1 layers" in caplog.text and "so kept in" not in caplog.text
        assert convert_autoencoder_to_fp16(bad, "cpu").needs_fallback and bad.dtype is torch.float32
    assert "kept in fp32: the autoencoder (values up to 1." in caplog.text
