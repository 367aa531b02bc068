"""The recorded training step of the released implementation: velocity, both losses, and every gradient."""

import pytest
import torch

from helpers.golden import DEVICE, GOLDEN, GoldenSet
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.data.loading.clip_batch import ClipBatch
from sa3train.models.checkpoint import load_checkpoint
from sa3train.training.module import LoraModule
from sa3train.training.settings import TrainingSettings
from sa3train.training.step import StepDraw


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


@pytest.mark.parametrize("folder", ["plain", "diff"])
@pytest.mark.parametrize("case", GoldenSet("plain/cases").names("train."))
def test_training_step_equals_the_recorded_one(folder: str, case: str) -> None:
    golden = GoldenSet(f"{folder}/cases")
    settings, tensors = golden.settings(case), golden.tensors(case, DEVICE)
    model = load_checkpoint(GOLDEN / folder, DEVICE, parts=("dit", "conditioner"))
    spec = AdapterSpec(settings["adapter_type"], rank=settings["rank"], alpha=settings["alpha"])
    injected = inject(model.get_adapter_root(), spec)
    given: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("param:"):
            path, _, name = key.removeprefix("param:").partition(".parametrizations.weight.0.")
            given.setdefault(path, {})[name] = tensor.float()
    injected.load_tensors(given)
    module = LoraModule(model, injected, model.conditioner.encode_prompts, TrainingSettings())
    count = len(settings["prompts"])
    attention_mask = tensors["padding_mask"].bool()
    clips = ClipBatch(
        tensors["latents"].float(),
        attention_mask,
        torch.tensor(settings["seconds_total"], device=DEVICE),
        torch.ones(count, dtype=torch.bool, device=DEVICE),
        list(settings["prompts"]),
        [str(number) for number in range(count)],
    )
    draw = StepDraw(
        tensors["noise"].float(),
        tensors["t"].float(),
        attention_mask,
        tensors["inpaint_mask"].float(),
        torch.zeros(count, dtype=torch.bool, device=DEVICE),
    )
    velocity = module(clips, draw)
    real = attention_mask[:, None, :]  # outputs at padded positions mean nothing
    assert relative(velocity.detach() * real, tensors["velocity"] * real) < 1e-3
    losses = module.compute_losses(clips, draw)
    assert relative(losses.loss.detach(), tensors["loss"]) < 1e-3
    assert relative(losses.context_loss.detach(), tensors["context_loss"]) < 1e-3
    losses.total.backward()
    named = injected.named_parameters()
    gradients = {key.removeprefix("grad:"): tensor for key, tensor in tensors.items() if key.startswith("grad:")}
    assert len(gradients) == len(named)
    for key, expected in gradients.items():
        path, _, name = key.partition(".parametrizations.weight.0.")
        found = named[f"{path}.{name}"].grad
        assert found is not None
        assert relative(found, expected) < 1e-3, key
