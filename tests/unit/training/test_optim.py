"""Optimizers and schedules by name: what they are, what they refuse, and that all of them resume to the bit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from helpers.training import Trial, assert_same_results, run_in_two_parts
from sa3train.core.errors import ConfigError
from sa3train.training.ema import EMA, swap_parameters
from sa3train.training.optim import (
    OPTIMIZERS,
    compute_schedule_free_average,
    get_group_settings,
    make_optimizer,
    restore_group_settings,
)
from sa3train.training.schedules import make_lr_lambda
from sa3train.training.settings import OptimizerSettings, SchedulerSettings

HERE = [name for name in OPTIMIZERS if name != "adamw-8bit"]


def parameters() -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.lora_A": (4, 6), "a.lora_B": (6, 4), "a.magnitude": (6,)}
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]


def build(name: str, named: list[tuple[str, nn.Parameter]], **values: Any) -> torch.optim.Optimizer:
    return make_optimizer(OptimizerSettings(name, **({"lr": 1e-2} | values)), named)


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


@pytest.mark.parametrize("name", HERE)
def test_settings_of_now_win_over_those_of_a_checkpoint_and_its_state_stays(name: str) -> None:
    def start(**values: Any) -> tuple[LambdaLR, list[dict[str, Any]]]:
        optimizer = build(name, parameters(), **values)
        return LambdaLR(optimizer, lambda step: 1 / (1 + step)), get_group_settings(optimizer)

    before, _ = start(betas=[0.9, 0.99], weight_decay=0.1)
    for parameter in (p for group in before.optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.ones_like(parameter)
    before.optimizer.step()
    before.step()
    (now, settings), (fresh, _) = (start(lr=1e-3, betas=[0.8, 0.95], weight_decay=0.2) for _ in range(2))
    now.optimizer.load_state_dict(before.optimizer.state_dict())
    now.load_state_dict(before.state_dict())
    restore_group_settings(now, settings)
    groups = zip(now.optimizer.param_groups, fresh.optimizer.param_groups, strict=True)
    for group, own in groups:
        assert {k: group[k] for k in ("betas", "weight_decay") if k in own} == {
            k: own[k] for k in ("betas", "weight_decay") if k in own
        }
        assert group["lr"] == own["lr"] / 2, "by the schedule, one step after its start"
        assert group["initial_lr"] == own["initial_lr"]
    assert now.base_lrs == fresh.base_lrs
    kept, saved = now.optimizer.state_dict()["state"], before.optimizer.state_dict()["state"]
    assert saved and all(
        torch.equal(torch.as_tensor(kept[n][k]), torch.as_tensor(v)) for n in saved for k, v in saved[n].items()
    )


def test_adamw_is_torchs_with_the_public_trainers_values() -> None:
    optimizer = make_optimizer(OptimizerSettings(), parameters())
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
    with pytest.raises(ConfigError, match="optimizer.lora_plus"):
        build("prodigy", named, lora_plus=2.0)


def test_muon_orthogonalises_matrices_and_leaves_vectors_to_adamw() -> None:
    named = parameters()
    groups = build("muon", named, options={"adamw_lr": 1e-3}).param_groups
    kinds = {id(p): (group["use_muon"], group["lr"]) for group in groups for p in group["params"]}
    assert [kinds[id(p)] for _, p in named] == [(True, 1e-2), (True, 1e-2), (False, 1e-3)]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("adam", {}, "optimizer.name=adam is unknown"),
        ("adamw", {"options": {"amsgard": True}}, "Did you mean amsgrad"),
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
    factor = make_lr_lambda(SchedulerSettings(name, 10, options), total_steps=100)
    assert [factor(step) for step in range(10)] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert [factor(step) for step in range(10, 101)] == pytest.approx([formula(n) for n in range(91)])
    optimizer = build("adamw", parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    rates = []
    for _ in range(15):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.5 * factor(step) for step in range(15)])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosin", {}, "Did you mean cosine"),
        ("constant", {"floor": 0.1}, "scheduler.options.floor"),
        ("cosine", {"floor": 2.0}, "scheduler.options"),
        ("inverse", {"gamma": 0.0}, "scheduler.options"),
        ("inverse", {"power": math.nan}, "scheduler.options"),
    ],
)
def test_impossible_schedules_are_refused(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_lr_lambda(SchedulerSettings(name, 0, options), total_steps=100)


def test_the_running_average_follows_its_formula_and_restores() -> None:
    p = nn.Parameter(torch.ones(3))
    average = EMA({"p": p}, decay=0.9)
    expected = torch.ones(3)
    for update in range(40):
        with torch.no_grad():
            p += 1
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * p.detach()
        average.update()
    torch.testing.assert_close(average.tensors["p"], expected)
    other = EMA({"p": nn.Parameter(torch.zeros(3))}, decay=0.9)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.tensors["p"], average.tensors["p"]) and other.updates == 40
    with pytest.raises(KeyError, match="other layers"):
        EMA({"q": p}, 0.9).load_state_dict(average.state_dict())


def test_weights_swapped_in_for_judging_come_back_to_the_bit() -> None:
    p = nn.Parameter(torch.randn(5))
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), swap_parameters({"p": p}, {"p": torch.zeros(5)}):
        assert not p.any()
        raise RuntimeError("inside")
    assert torch.equal(p, before)


def test_schedule_free_weights_are_judged_without_moving_the_live_ones() -> None:
    named = parameters()
    optimizer = build("schedule-free", named)
    assert compute_schedule_free_average(optimizer) == {}, "before the first step there is no average"
    for _ in range(3):
        optimizer.zero_grad()
        sum((p**2).sum() for _, p in named).backward()  # type: ignore[union-attr]
        optimizer.step()
    live = [p.detach().clone() for _, p in named]
    found = compute_schedule_free_average(optimizer)
    assert all(torch.equal(p, kept) for (_, p), kept in zip(named, live, strict=True))
    optimizer.eval()  # type: ignore[attr-defined]
    for _, p in named:
        torch.testing.assert_close(found[id(p)], p.detach())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name != "adamw" else name for name in HERE]
)
def test_every_optimizer_resumes_to_the_bit(shards: Path, tmp_path: Path, name: str) -> None:
    lr = 1.0 if name == "prodigy" else 1e-3
    values = {"optimizer": OptimizerSettings(name, lr=lr), "max_steps": 4}
    whole, part = Trial(shards, tmp_path / "whole", **values), Trial(shards, tmp_path / "part", **values)
    whole.run()
    assert run_in_two_parts(part, stop_after=2).steps == 4
    assert_same_results(part, whole)
