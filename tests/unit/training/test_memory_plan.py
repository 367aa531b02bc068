"""The memory plan: measured parts that add up, and the decision to recompute blocks."""

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.training import make_module
from sa3train.adapters.layers import peft_layers
from sa3train.adapters.spec import AdapterSpec
from sa3train.data.loading.settings import DataSettings
from sa3train.training.callbacks import memory_plan
from sa3train.training.callbacks.memory_plan import (
    MemoryPlanCallback,
    compile_for_training,
    count_frozen_bytes,
    make_memory_plan,
    measure_saved_activations,
    suggest_training_fixes,
)
from sa3train.training.module import LoraModule
from sa3train.training.settings import TrainerSettings, TrainingSettings


def build(ema_decay: float | None = None) -> LoraModule:
    return make_module(AdapterSpec("lora", rank=4), TrainingSettings(trainer=TrainerSettings(ema_decay=ema_decay)))


def plan(module: LoraModule, **values: Any) -> memory_plan.MemoryPlan:
    given: dict[str, Any] = {"frames": 40, "rows": 3, "prompt": "x", "optimizer": "adamw", "mode": "none"}
    return make_memory_plan(module, **(given | values))


def test_what_autograd_keeps_is_counted_once_and_without_weights() -> None:
    block = nn.Sequential(nn.Linear(10, 20), nn.Tanh())
    root = nn.Sequential(block, nn.Linear(20, 5))
    x = torch.randn(7, 10)
    total, inside = measure_saved_activations(root, lambda: root(x).sum(), nn.ModuleList([block]))
    # The input for the first weight's gradient, tanh's output (which is the second Linear's input as well).
    assert inside == 4 * (7 * 10 + 7 * 20) and total == inside


def test_counting_lets_go_of_what_was_kept() -> None:
    """exp keeps its output: held as it is, that output would hold the graph that holds it, for ever."""
    made: list[weakref.ref[Tensor]] = []
    root = nn.Linear(3, 3)

    def run() -> Tensor:
        out = root(torch.randn(2, 3)).exp()
        made.append(weakref.ref(out))
        return out.sum()

    measure_saved_activations(root, run, nn.ModuleList())
    assert made[0]() is None


def test_what_layers_work_out_together_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = plan(build())
    monkeypatch.setattr(peft_layers, "is_launch_bound", lambda x: True)
    module = build()
    together = plan(module)
    factors = sum(4 * parameter.numel() for name, parameter in module.trainable.items())
    assert together.adapter == plain.adapter + factors, "A and s·B of lora, in the base's dtype, which is fp32 here"


def test_short_trials_tell_what_a_long_clip_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build()
    found = plan(module, frames=300)
    monkeypatch.setattr(memory_plan, "TRIAL_FRAMES", 150)
    exact = plan(module, frames=300)
    assert found.activations == pytest.approx(exact.activations, rel=0.01)


def test_the_parts_are_the_tensors_there_are() -> None:
    module = build(ema_decay=0.9)
    found = plan(module)
    values = sum(parameter.numel() for parameter in module.trainable.values())
    assert found.adapter == found.gradients == found.ema == 4 * values and found.optimizer == 8 * values
    frozen = [p for p in module.root.parameters() if not p.requires_grad] + list(module.root.buffers())
    assert found.weights == count_frozen_bytes(module.root) == sum(p.numel() * p.element_size() for p in frozen)
    assert found.total == found.weights + found.activations + 4 * values * 3 + 8 * values
    assert plan(module, rows=6).activations == 2 * found.activations
    assert plan(module, optimizer="lion").optimizer == 4 * values
    assert plan(module, quantized_bytes=1000).weights == found.weights + 1000
    assert "activations" in "\n".join(found.format_lines()) and "GiB" in found.format_lines()[0]


def test_the_plan_meets_what_a_step_keeps() -> None:
    """Counted again on a real micro-batch of three clips."""
    module = build()
    planned = plan(module).activations
    clips, draw = memory_plan._make_trial_batch(module, 40, "x")
    three = type(clips)(
        clips.data_SCF.repeat(3, 1, 1), clips.attention_mask_SF.repeat(3, 1), clips.seconds_S.repeat(3),
        clips.at_end_S.repeat(3), clips.prompts * 3, ["a", "b", "c"],
    )  # fmt: skip
    drawn = type(draw)(*(getattr(draw, name).repeat_interleave(3, dim=0) for name in draw.__dataclass_fields__))
    total, _ = measure_saved_activations(
        module.root, lambda: module.compute_losses(three, drawn).total, module.model.dit.transformer.layers
    )
    assert planned == pytest.approx(total, rel=0.1)


def test_recomputing_keeps_less_and_changes_no_gradient() -> None:
    gradients: list[list[Tensor]] = []
    sizes = []
    for mode in ("none", "blocks"):
        module = build()
        found = plan(module, mode=mode)
        assert found.checkpointing == (mode == "blocks") == module.model.dit.transformer.checkpointing
        sizes.append(found.activations)
        clips, draw = memory_plan._make_trial_batch(module, 12, "x")
        module.compute_losses(clips, draw).total.backward()
        gradients.append([p.grad for p in module.trainable.values() if p.grad is not None])
    assert sizes[1] < sizes[0]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_auto_recomputes_when_the_plan_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build()
    monkeypatch.setattr(memory_plan, "measure_free_memory", lambda device: 2**40)
    roomy = plan(module, mode="auto")
    assert not roomy.checkpointing
    monkeypatch.setattr(memory_plan, "measure_free_memory", lambda device: roomy.activations)
    assert plan(module, mode="auto").checkpointing


def test_planning_leaves_no_gradient_and_no_random_trace() -> None:
    module = build()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    plan(module)
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in module.trainable.values())


@pytest.mark.slow
def test_compiled_blocks_train_the_same() -> None:
    """With the backend that traces but generates no code: what is ours to test is that blocks can be traced."""
    module, plain = build(), build()
    compile_for_training(module, backend="eager")
    clips, draw = memory_plan._make_trial_batch(module, 12, "x")
    losses = [one.compute_losses(clips, draw).total for one in (module, plain)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    pairs = zip(module.trainable.values(), plain.trainable.values(), strict=True)
    compared = [(one.grad, two.grad) for one, two in pairs if two.grad is not None]
    assert compared
    for gradient, expected in compared:
        torch.testing.assert_close(gradient, expected)


def test_a_plan_that_does_not_fit_is_said_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def begin() -> None:
        caplog.clear()
        MemoryPlanCallback(TrainerSettings(), "adamw", 40, 3, "x", lambda is_recomputing: ["less"]).on_fit_start(
            None, build()
        )  # type: ignore[arg-type]

    begin()
    assert "exceeds" not in caplog.text
    monkeypatch.setattr(memory_plan, "measure_free_memory", lambda device: 1000)
    begin()
    assert "exceeds" in caplog.text and "less" in caplog.text


@pytest.mark.parametrize(
    ("rows", "fewer"), [(8, "data.batch_size=4 trainer.accumulate=6"), (3, "data.batch_size=1 trainer.accumulate=9")]
)
def test_what_helps_is_what_is_not_done_yet(rows: int, fewer: str) -> None:
    def data(**values: Any) -> Any:
        return SimpleNamespace(settings=DataSettings("latents", **{"batch_size": rows, **values}), longest_crop=216)

    seconds, frames = data(), data(crop_frames=9999)
    assert suggest_training_fixes(seconds, TrainerSettings(accumulate=3), is_recomputing=False) == [
        "trainer.activation_checkpointing=blocks", fewer, "data.crop_seconds=10.0", "trainer.quantize=int8 or nf4",
    ]  # fmt: skip
    assert "data.crop_frames=108" in suggest_training_fixes(frames, TrainerSettings(), is_recomputing=True)
    frames.longest_crop = 2582
    assert "data.crop_frames=1291" in suggest_training_fixes(frames, TrainerSettings(), is_recomputing=True)
    packed = data(pack_frames=400, batch_size=1, silence_tail_seconds=0)
    done = TrainerSettings(quantize="nf4")
    assert suggest_training_fixes(packed, done, is_recomputing=True) == [
        "data.pack_frames=216",
        "data.crop_seconds=10.0",
    ]
