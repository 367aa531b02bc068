"""Optimizers and schedules by name: what they are, what they refuse, and that all of them resume to the bit."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sa3train.core.errors import ConfigError
from sa3train.training.ema import RunningAverage, swapped_in
from sa3train.training.optim import (
    OPTIMIZERS,
    averaged_by_optimizer,
    learning_rate_factor,
    make_optimizer,
    make_scheduler,
)
from sa3train.training.settings import OptimizerSettings

HERE = [name for name in OPTIMIZERS if name != "adamw-8bit"]


def parameters() -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.lora_A": (4, 6), "a.lora_B": (6, 4), "a.magnitude": (6,)}
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]


def build(name: str, named: list[tuple[str, nn.Parameter]], **values: Any) -> torch.optim.Optimizer:
    given: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.01, "options": {}} | values
    return make_optimizer(name, named, **given)


@pytest.mark.parametrize("name", HERE)
def test_every_optimizer_lowers_a_loss(name: str) -> None:
    named = parameters()
    optimizer = build(name, named, lr=1.0 if name == "prodigy" else 1e-2)
    losses = []
    for _ in range(60):
        loss = sum((parameter**2).sum() for _, parameter in named)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_adamw_is_torchs_with_the_public_trainers_values() -> None:
    settings = OptimizerSettings()
    optimizer = build("adamw", parameters(), lr=settings.lr, betas=tuple(settings.betas), weight_decay=0.01)
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.9, 0.95), 0.01)


def test_lora_plus_gives_the_b_matrices_their_own_rate() -> None:
    named = parameters()
    groups = build("adamw", named, lora_plus=16.0).param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert {name: rates[id(p)] for name, p in named} == {"a.lora_A": 1e-2, "a.lora_B": 0.16, "a.magnitude": 1e-2}
    without = [(name, p) for name, p in named if not name.endswith("lora_B")]
    with pytest.raises(ConfigError, match="no B matrices"):
        build("adamw", without, lora_plus=2.0)
    with pytest.raises(ConfigError, match="one step size for all"):
        build("prodigy", named, lora_plus=2.0)


def test_muon_orthogonalises_matrices_and_leaves_vectors_to_adamw() -> None:
    named = parameters()
    groups = build("muon", named, options={"adamw_lr": 1e-3}).param_groups
    kinds = {id(p): (group["use_muon"], group["lr"]) for group in groups for p in group["params"]}
    assert [kinds[id(p)] for _, p in named] == [(True, 1e-2), (True, 1e-2), (False, 1e-3)]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("adam", {}, "choose one of: adamw"),
        ("adamw", {"options": {"amsgard": True}}, "Did you mean 'amsgrad'"),
        ("lion", {"options": {"nesterov": True}}, "has no option 'optimizer.options.nesterov'"),
    ],
)
def test_unknown_names_and_options_are_refused(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, parameters(), **values)


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ConfigError, match=r'pip install "sa3train\[optim\]"'):
        build("prodigy", parameters())
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r'pip install "sa3train\[quant\]"'):
        build("adamw-8bit", parameters())


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        build("adamw", [])


@pytest.mark.parametrize(
    ("name", "options", "formula"),
    [
        ("constant", {}, lambda n: 1.0),
        ("cosine", {"floor": 0.1}, lambda n: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * n / 90))),
        ("inverse", {"gamma": 20.0, "power": 0.5}, lambda n: (1 + n / 20) ** -0.5),
    ],
)
def test_the_rate_rises_straight_and_then_follows_its_schedule(
    name: str, options: dict[str, float], formula: Any
) -> None:
    factor = learning_rate_factor(name, warmup_steps=10, total_steps=100, options=options)
    assert [factor(step) for step in range(10)] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert [factor(step) for step in range(10, 101)] == pytest.approx([formula(n) for n in range(91)])
    optimizer = build("adamw", parameters(), lr=0.5)
    scheduler = make_scheduler(optimizer, factor)
    rates = []
    for _ in range(15):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.5 * factor(step) for step in range(15)])


@pytest.mark.parametrize(
    ("name", "warmup", "options", "message"),
    [
        ("cosin", 0, {}, "choose one of: constant"),
        ("constant", 0, {"floor": 0.1}, "It takes: none"),
        ("cosine", 100, {}, "below trainer.max_steps=100"),
        ("constant", -1, {}, "at least 0"),
    ],
)
def test_impossible_schedules_are_refused(name: str, warmup: int, options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        learning_rate_factor(name, warmup_steps=warmup, total_steps=100, options=options)


def test_the_running_average_follows_its_formula_and_restores() -> None:
    p = nn.Parameter(torch.ones(3))
    average = RunningAverage({"p": p}, decay=0.9)
    expected = torch.ones(3)
    for update in range(40):
        with torch.no_grad():
            p += 1
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * p.detach()
        average.update()
    torch.testing.assert_close(average.tensors["p"], expected)
    other = RunningAverage({"p": nn.Parameter(torch.zeros(3))}, decay=0.9)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.tensors["p"], average.tensors["p"]) and other.updates == 40
    with pytest.raises(KeyError, match="other layers"):
        RunningAverage({"q": p}, 0.9).load_state_dict(average.state_dict())


def test_weights_swapped_in_for_judging_come_back_to_the_bit() -> None:
    p = nn.Parameter(torch.randn(5))
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), swapped_in({"p": p}, {"p": torch.zeros(5)}):
        assert not p.any()
        raise RuntimeError("inside")
    assert torch.equal(p, before)


def test_schedule_free_weights_are_judged_without_moving_the_live_ones() -> None:
    named = parameters()
    optimizer = build("schedule-free", named)
    assert averaged_by_optimizer(optimizer, [p for _, p in named]) == {}, "before the first step there is no average"
    for _ in range(3):
        optimizer.zero_grad()
        sum((p**2).sum() for _, p in named).backward()  # type: ignore[union-attr]
        optimizer.step()
    live = [p.detach().clone() for _, p in named]
    found = averaged_by_optimizer(optimizer, [p for _, p in named])
    assert all(torch.equal(p, kept) for (_, p), kept in zip(named, live, strict=True))
    optimizer.eval()  # type: ignore[attr-defined]
    for _, p in named:
        torch.testing.assert_close(found[id(p)], p.detach())


@pytest.mark.parametrize("name", HERE)
def test_every_optimizer_resumes_to_the_bit(name: str, trial: Callable[..., Any], helpers: Any) -> None:
    lr = 1.0 if name == "prodigy" else 1e-3
    values = {"optimizer": OptimizerSettings(name, lr=lr), "max_steps": 4}
    whole, part = trial("whole", **values), trial("part", **values)
    whole.run()
    part.stop_after = 2
    part.run()
    part.stop_after = None
    assert part.run(resume=True).steps == 4
    assert helpers.losses_of(part.run_dir) == helpers.losses_of(whole.run_dir)
    expected, found = helpers.adapter_of(whole.run_dir), helpers.adapter_of(part.run_dir)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
