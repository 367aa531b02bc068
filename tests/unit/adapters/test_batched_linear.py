"""All layers worked out at once: the same outputs and gradients as layer by layer, in every pass of a training."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helpers.small_model import Small, train
from sa3train.adapters.layers import peft_layers
from sa3train.adapters.layers.batched_linear import BatchedAdapter
from sa3train.adapters.layers.inject import InjectedAdapter, inject
from sa3train.adapters.spec import AdapterSpec

TESTS = Path(__file__).parents[2]
KINDS = [f"{name}{end}" for end in ("", "-xs") for name in ("lora", "dora-rows", "dora-cols", "bora")]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Layers are worked out together, as on a GPU, until switched off."""

    def switch(together: bool) -> None:
        monkeypatch.setattr(peft_layers, "is_launch_bound", lambda x: together)

    switch(True)
    return switch


def moved(model: nn.Module, spec: AdapterSpec) -> InjectedAdapter:
    """An adapter away from its start."""
    injected = inject(model, spec)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in injected.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return injected


def gradients(model: nn.Module, injected: InjectedAdapter, run: Callable[[], Tensor] | None = None) -> list[Tensor]:
    loss = (run or model)().float().square().sum()
    return list(torch.autograd.grad(loss, injected.parameters()))


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("layer", ["linear", "conv1d"])
@pytest.mark.parametrize("settings", [{}, {"alpha": 5.0, "rank_pattern": {"layers.1": 2}}, {"dropout": 0.5}])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_layer_by_layer(
    kind: str, settings: dict[str, object], layer: str, as_on_a_gpu: Callable[[bool], None]
) -> None:
    found = []
    for together in (True, False):
        as_on_a_gpu(together)
        model = Small(layer)
        injected = moved(model, AdapterSpec(kind, rank=3, **settings))  # type: ignore[arg-type]
        torch.manual_seed(5)
        found.append(gradients(model, injected))
    assert_close(*found, 5e-5)  # dividing by small gains, where layer by layer keeps what was before them


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_bf16_base_they_are_as_near_to_exact_as_layer_by_layer(
    kind: str, as_on_a_gpu: Callable[[bool], None]
) -> None:
    exact_model = Small()
    exact_model.load_state_dict({name: value.bfloat16().float() for name, value in Small().state_dict().items()})
    exact = torch.cat([each.flatten() for each in gradients(exact_model, moved(exact_model, AdapterSpec(kind, 3)))])
    errors = []
    for together in (True, False):
        as_on_a_gpu(together)
        model = Small(dtype=torch.bfloat16)
        found = torch.cat([each.flatten() for each in gradients(model, moved(model, AdapterSpec(kind, 3)))])
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[0] < 1.3 * errors[1] + 1e-4, errors
    assert errors[0] < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_takes_the_same_course(kind: str, as_on_a_gpu: Callable[[bool], None]) -> None:
    losses = []
    for together in (True, False):
        as_on_a_gpu(together)
        torch.manual_seed(6)
        model = Small()
        losses.append(train(model, inject(model, AdapterSpec(kind, rank=2)), steps=6))
    torch.testing.assert_close(*map(torch.tensor, losses), atol=1e-5, rtol=0)
    assert losses[0][-1] < losses[0][0]


def test_every_pass_is_worked_out_once_and_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    worked, prepare_all = [], BatchedAdapter._prepare_all
    monkeypatch.setattr(BatchedAdapter, "_prepare_all", lambda self: (worked.append(1), prepare_all(self))[1])
    model = Small()
    injected = moved(model, AdapterSpec("dora-rows", rank=2))
    first, second = gradients(model, injected), gradients(model, injected)
    assert_close(first, second, 0.0)
    assert len(worked) == 2
    with torch.no_grad():
        before = model()
        injected.parameters()[0].data.add_(1.0)  # behind the back of torch's version counters, as some optimizers do
        after = model()
    assert not torch.equal(before, after)
    assert len(worked) == 4


def test_what_was_worked_out_without_gradients_is_not_trained_on() -> None:
    model = Small()
    injected = moved(model, AdapterSpec("dora-rows", rank=2))
    expected = gradients(model, injected)
    embedding = model.get_submodule("conditioners.seconds_total.embedder.embedding")
    with torch.no_grad():
        embedding(model.example())  # one layer alone: the others have not asked in this pass
    assert_close(gradients(model, injected), expected)


def test_several_losses_are_added_up() -> None:
    model = Small()
    injected = moved(model, AdapterSpec("dora-rows", rank=2))
    expected = gradients(model, injected)
    sum(model().float().square().sum() for _ in range(2)).backward()
    assert_close([parameter.grad for parameter in injected.parameters()], [2 * each for each in expected])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpointed_block_may_be_the_first_to_ask(kind: str) -> None:
    model = Small()
    injected = moved(model, AdapterSpec(kind, rank=2))
    expected = gradients(model, injected)

    def checkpointed() -> Tensor:
        return checkpoint(model, model.example(), use_reentrant=False)

    assert_close(gradients(model, injected, checkpointed), expected)


def test_where_a_weight_is_not_at_hand_layers_work_alone() -> None:
    """In few bits or sharded, a weight is made whole by hooks around its layer's forward and backward pass."""
    model = Small()
    injected = moved(model, AdapterSpec("dora-rows", rank=2))
    expected = gradients(model, injected)
    for module in [module for module in model.modules() if isinstance(module, nn.Linear)][::2]:
        weight, values = module.weight, module.weight.detach().clone()
        weight.data = torch.empty(0)
        owner = next(layer for layer in injected.layers.values() if layer.base_layer is module)

        def fill(*_: object, weight: nn.Parameter = weight, values: Tensor = values) -> None:
            weight.data = values

        owner.register_forward_pre_hook(fill)  # type: ignore[attr-defined]
    for _ in range(2):
        assert_close(gradients(model, injected), expected)


SHARDED = """
import sys, torch
from helpers.small_model import Small
from sa3train.adapters.layers import peft_layers
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.training import distributed

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
peft_layers.is_launch_bound, distributed.MIN_SIZE = lambda x: True, 1

def made(kind):
    model = Small()
    injected = inject(model, AdapterSpec(kind, rank=2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in injected.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, lambda: torch.autograd.grad(model().square().sum(), injected.parameters())

for kind in sys.argv[2:]:
    _, gradients = made(kind)
    expected = gradients()
    model, gradients = made(kind)
    distributed.shard_base(model)
    for _ in range(2):
        for mine, theirs in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
        with torch.no_grad():
            model()
        model()  # and a pass with gradients that no backward pass follows, as the memory plan makes it
        whole = [name for name, weight in model.named_parameters() if type(weight.data) is torch.Tensor
                 and "base" in name and weight.ndim > 1]
        assert not whole, f"{kind}: gathered, and left so: {whole}"
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_sharded_base_is_whole_only_while_its_layers_run(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        SHARDED,
        str(tmp_path / "store"),
        "lora",
        "dora-rows",
        "dora-cols",
        "bora",
        "bora-xs",
    ]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_change_in_place_before_the_backward_pass_is_refused() -> None:
    model = Small()
    injected = moved(model, AdapterSpec("dora-rows", rank=2))
    loss = model().square().sum()
    with torch.no_grad():
        injected.parameters()[0].add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_a_model_that_has_been_run_can_be_copied() -> None:
    model = Small()
    injected = moved(model, AdapterSpec("dora-rows", rank=2))
    expected = gradients(model, injected)
    twin = copy.deepcopy(model)
    parameters = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(twin().float().square().sum(), parameters)
    mine = dict(zip([name for name, p in model.named_parameters() if p.requires_grad], found, strict=True))
    for path, gradient in zip(injected.named_parameters(), expected, strict=True):
        name = next(key for key in mine if key.replace(".default", "") == path)
        torch.testing.assert_close(mine[name], gradient)
