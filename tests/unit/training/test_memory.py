"""The memory plan: measured parts that add up, and the decision to recompute blocks."""

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.golden import GOLDEN
from sa3train.adapters.layers import peft_layers
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.models.checkpoint import load_checkpoint
from sa3train.training.callbacks import memory_plan
from sa3train.training.callbacks.memory_plan import Prepare, compile_blocks, kept_for_backward, make_plan, weight_bytes
from sa3train.training.checks import what_helps
from sa3train.training.module import LoraModule
from sa3train.training.prompt_embeddings import PromptBank
from sa3train.training.run import make_module
from sa3train.training.settings import LoopSettings, Objective, OptimizerSettings, ScheduleSettings


def build(average: float | None = None) -> LoraModule:
    model = load_checkpoint(GOLDEN / "plain", parts=("dit", "conditioner"))
    torch.manual_seed(0)
    injected = inject(model.adaptable(), AdapterSpec("lora", rank=4))
    return make_module(
        model, injected, PromptBank(model.conditioner), objective=Objective(), optimizer=OptimizerSettings(),
        schedule=ScheduleSettings(), loop=LoopSettings(average=average), seed=0,
    )  # fmt: skip


def plan(module: LoraModule, **values: Any) -> memory_plan.MemoryPlan:
    given: dict[str, Any] = {"frames": 40, "rows": 3, "prompt": "x", "optimizer": "adamw", "mode": "none"}
    return make_plan(module, **(given | values))


def test_what_autograd_keeps_is_counted_once_and_without_weights() -> None:
    block = nn.Sequential(nn.Linear(10, 20), nn.Tanh())
    root = nn.Sequential(block, nn.Linear(20, 5))
    x = torch.randn(7, 10)
    total, inside = kept_for_backward(root, lambda: root(x).sum(), nn.ModuleList([block]))
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

    kept_for_backward(root, run, nn.ModuleList())
    assert made[0]() is None


def test_what_layers_work_out_together_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = plan(build())
    monkeypatch.setattr(peft_layers, "few_launches", lambda x: True)
    module = build()
    together = plan(module)
    factors = sum(4 * parameter.numel() for name, parameter in module.trained.items())
    assert together.adapter == plain.adapter + factors, "A and s·B of lora, in the base's dtype, which is fp32 here"


def test_short_trials_tell_what_a_long_clip_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build()
    found = plan(module, frames=300)
    monkeypatch.setattr(memory_plan, "SHORT", 150)
    exact = plan(module, frames=300)
    assert found.activations == pytest.approx(exact.activations, rel=0.01)


def test_the_parts_are_the_tensors_there_are() -> None:
    module = build(average=0.9)
    found = plan(module)
    values = sum(parameter.numel() for parameter in module.trained.values())
    assert found.adapter == found.gradients == found.average == 4 * values and found.optimizer == 8 * values
    frozen = [p for p in module.root.parameters() if not p.requires_grad] + list(module.root.buffers())
    assert found.weights == weight_bytes(module.root) == sum(p.numel() * p.element_size() for p in frozen)
    assert found.total == found.weights + found.activations + 4 * values * 3 + 8 * values
    assert plan(module, rows=6).activations == 2 * found.activations
    assert plan(module, optimizer="lion").optimizer == 4 * values
    assert plan(module, coded_bytes=1000).weights == found.weights + 1000
    assert "activations" in "\n".join(found.lines()) and "GiB" in found.lines()[0]


def test_the_plan_meets_what_a_step_keeps() -> None:
    """Counted again on a real micro-batch of three clips."""
    module = build()
    planned = plan(module).activations
    clips, draw = memory_plan.trial_clip(module, 40, "x")
    three = type(clips)(
        clips.data_SCF.repeat(3, 1, 1), clips.padding_mask_SF.repeat(3, 1), clips.seconds_S.repeat(3),
        clips.at_end_S.repeat(3), clips.prompts * 3, ["a", "b", "c"],
    )  # fmt: skip
    drawn = type(draw)(*(getattr(draw, name).repeat_interleave(3, dim=0) for name in draw.__dataclass_fields__))
    total, _ = kept_for_backward(
        module.root, lambda: module.losses(three, drawn).total, module.model.dit.transformer.layers
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
        clips, draw = memory_plan.trial_clip(module, 12, "x")
        module.losses(clips, draw).total.backward()
        gradients.append([p.grad for p in module.trained.values() if p.grad is not None])
    assert sizes[1] < sizes[0]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_auto_recomputes_when_the_plan_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build()
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: 2**40)
    roomy = plan(module, mode="auto")
    assert not roomy.checkpointing
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: roomy.activations)
    assert plan(module, mode="auto").checkpointing


def test_planning_leaves_no_gradient_and_no_random_trace() -> None:
    module = build()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    plan(module)
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in module.trained.values())


def test_compiled_blocks_train_the_same() -> None:
    """With the backend that traces but generates no code: what is ours to test is that blocks can be traced."""
    module, plain = build(), build()
    compile_blocks(module, backend="eager")
    clips, draw = memory_plan.trial_clip(module, 12, "x")
    losses = [one.losses(clips, draw).total for one in (module, plain)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    pairs = zip(module.trained.values(), plain.trained.values(), strict=True)
    compared = [(one.grad, two.grad) for one, two in pairs if two.grad is not None]
    assert compared
    for gradient, expected in compared:
        torch.testing.assert_close(gradient, expected)


def test_a_plan_that_does_not_fit_is_said_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def begin() -> None:
        caplog.clear()
        Prepare(LoopSettings(), "adamw", 40, 3, "x", lambda recomputing: ["less"]).on_fit_start(None, build())  # type: ignore[arg-type]

    begin()
    assert "more than" not in caplog.text
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: 1000)
    begin()
    assert "more than the 0.0 GiB that are free. What helps: less." in caplog.text


@pytest.mark.parametrize(
    ("rows", "fewer"), [(8, "data.batch_size=4 trainer.accumulate=6"), (3, "data.batch_size=1 trainer.accumulate=9")]
)
def test_what_helps_is_what_is_not_done_yet(rows: int, fewer: str) -> None:
    def data(**values: Any) -> Any:
        return SimpleNamespace(**{"batch_size": rows, "longest_crop": 216, "pack_frames": None, **values})

    seconds, frames = data(cut_by="crop_seconds"), data(cut_by="crop_frames")
    assert what_helps(seconds, LoopSettings(accumulate=3), recomputing=False) == [
        "trainer.activation_checkpointing=blocks", fewer, "data.crop_seconds=10.0", "trainer.quantize=int8 or nf4",
    ]  # fmt: skip
    assert "data.crop_frames=108" in what_helps(frames, LoopSettings(), recomputing=True)
    frames.longest_crop = 2582
    assert "data.crop_frames=1291" in what_helps(frames, LoopSettings(), recomputing=True)
    packed = data(cut_by="crop_seconds", pack_frames=400, batch_size=1)
    done = LoopSettings(quantize="nf4")
    assert what_helps(packed, done, recomputing=True) == ["data.pack_frames=216", "data.crop_seconds=10.0"]
