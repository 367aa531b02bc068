"""Which weights of the adapter are judged and exported: the live ones, their running average, or the optimizer's.

Training always goes on from the live weights, restored to the bit.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class RunningAverage:
    """Exponential moving average of named parameters, in float32: average ← decay·average + (1 − decay)·live.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that early averages are not the init.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._live = dict(parameters)
        self.tensors = {name: p.detach().float().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the live weights into the average; once per optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        self._follow_device()
        live = [parameter.detach().float() for parameter in self._live.values()]
        torch._foreach_lerp_(list(self.tensors.values()), live, 1 - decay)

    def _follow_device(self) -> None:
        """The live weights may have been moved to a GPU since the average began."""
        for name, parameter in self._live.items():
            if self.tensors[name].device != parameter.device:
                self.tensors[name] = self.tensors[name].to(parameter.device)

    def state_dict(self) -> dict[str, object]:
        """Updates so far and the averaged tensors."""
        return {"updates": self.updates, "tensors": dict(self.tensors)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave. Raises `KeyError` when it belongs to other parameters."""
        tensors = state["tensors"]
        assert isinstance(tensors, dict)
        if set(tensors) != set(self.tensors):
            raise KeyError("the saved average belongs to an adapter of other layers")
        self.updates = int(state["updates"])  # type: ignore[call-overload]
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)


@contextlib.contextmanager
def swapped_in(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context the named parameters hold `tensors`; afterwards exactly what they held before."""
    with torch.no_grad():
        kept = {name: parameters[name].detach().clone() for name in tensors}
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in kept.items():
                parameters[name].copy_(tensor)
