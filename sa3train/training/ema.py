"""Exponential moving average of the adapter, and swapping it in for validation and export.

Training always continues from the live weights, restored bit for bit.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def get_warmed_up_decay(updates: int) -> float:
    """Get the decay that an average may have at most.

    Args:
        updates: How often it has been updated.

    Returns:
        (1 + n) / (10 + n).
    """
    return (1 + updates) / (10 + updates)


class EMA:
    """Exponential moving average of named parameters, in float32: ema ← decay·ema + (1 − decay)·live.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that early averages are not the
    initialization.

    Args:
        parameters: The live parameters by name.
        decay: Between 0 and 1.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._live = dict(parameters)
        self.tensors = {name: p.detach().float().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the live weights; call once per optimizer step."""
        decay = min(self.decay, get_warmed_up_decay(self.updates))
        self.updates += 1
        for name, parameter in self._live.items():  # the live weights may have moved to a GPU
            if self.tensors[name].device != parameter.device:
                self.tensors[name] = self.tensors[name].to(parameter.device)
        live = [parameter.detach().float() for parameter in self._live.values()]
        torch._foreach_lerp_(list(self.tensors.values()), live, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Collect the state.

        Returns:
            The number of updates and the averaged tensors.
        """
        return {"updates": self.updates, "tensors": dict(self.tensors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state.

        Args:
            state: What `state_dict` returned.

        Raises:
            KeyError: The state belongs to other parameters.
        """
        if set(state["tensors"]) != set(self.tensors):
            raise KeyError("the saved EMA belongs to an adapter with other layers")
        self.updates = int(state["updates"])
        for name, tensor in state["tensors"].items():
            self.tensors[name].copy_(tensor)


@contextlib.contextmanager
def swap_parameters(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Swap values into parameters for the duration of a context; afterwards they hold exactly what they held before.

    Args:
        parameters: Parameters by name.
        tensors: Values by name, for all of them or some.

    Yields:
        Nothing.
    """
    with torch.no_grad():
        saved = {name: parameters[name].detach().clone() for name in tensors}
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in saved.items():
                parameters[name].copy_(tensor)
