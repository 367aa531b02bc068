"""PyTorch's private functions still say what the adapted layers need."""

import torch
from torch.autograd.graph import saved_tensors_hooks

from sa3train.adapters.layers.autograd_internals import is_in_backward, packs_saved_tensors


def test_a_backward_pass_is_detected() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: seen.append(is_in_backward()))
    y.sum().backward()
    assert seen == [True], "torch._C._current_graph_task_id changed: see autograd_internals.is_in_backward"
    assert not is_in_backward()


def test_hooks_that_pack_saved_tensors_are_detected() -> None:
    assert not packs_saved_tensors()
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert packs_saved_tensors(), "torch._C._autograd changed: see autograd_internals.packs_saved_tensors"
