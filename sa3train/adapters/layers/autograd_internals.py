"""PyTorch's private autograd functions that the adapted layers need, in one place."""

import torch


def is_in_backward() -> bool:
    """Check whether a backward pass is running, as it is when activation checkpointing runs a layer again.

    Returns:
        Whether autograd is executing a graph on this thread.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def packs_saved_tensors() -> bool:
    """Check whether hooks pack saved tensors at the moment (activation checkpointing, offloading).

    Returns:
        Whether `torch.autograd.graph.saved_tensors_hooks` are active.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
