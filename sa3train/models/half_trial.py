"""A layer of a model in fp32 and in fp16: its weights there and back, what it meets, and the verdict."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sa3train.transfer import widest

ERROR = 0.01
"""The most that a layer's output in fp16 may differ, as a share of its length in fp32; bf16 differs by about 0.004."""
LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Verdict:
    """How one layer does in fp16: the error of its output, and the largest number in and around it in fp32."""

    layer: str
    error: float
    largest: float = 0.0

    @property
    def kept_wide(self) -> bool:
        """Whether fp16 is not good enough for it; an error that is not a number is no good either."""
        return not self.error <= ERROR or not self.largest < LARGEST

    def __str__(self) -> str:
        why = f"{self.error:.2%} off" if self.largest < LARGEST else f"numbers up to {self.largest:.3g}"
        return f"{self.layer} ({why})"


class Weights:
    """A layer's weights, which may be cast there and back: what was loaded (mapped, if the file is fp32) stays."""

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self.tensors, self.device = [*layer.parameters(), *layer.buffers()], device
        self.loaded = [tensor.data for tensor in self.tensors]

    def cast(self, dtype: torch.dtype) -> None:
        """To the device and `dtype`, from what was loaded."""
        for tensor, loaded in zip(self.tensors, self.loaded, strict=True):
            tensor.data = loaded.to(self.device).to(dtype)


class Watched:
    """A layer under observation: the inputs of its last call, its output, and the largest number in and around it."""

    def __init__(self, layer: nn.Module, inputs: bool = True) -> None:
        self.layer, self.largest = layer, 0.0
        self.inputs: tuple[Any, ...] = ()
        self.output = torch.empty(0)
        self._hooks = [module.register_forward_hook(self._see) for module in layer.modules()]
        if inputs:
            self._hooks.append(layer.register_forward_hook(self._keep))

    def stop(self) -> None:
        """Observe no longer."""
        for hook in self._hooks:
            hook.remove()

    def let_go(self) -> None:
        """Keep nothing any longer."""
        self.inputs, self.output = (), torch.empty(0)

    def _see(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for tensor in (*inputs, output):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                largest = tensor.abs().max().item()
                self.largest = largest if largest != largest else max(self.largest, largest)

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.inputs, self.output = inputs, output


def error_of(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖; not a number when `found` has one that is none."""
    wide = widest(exact.device)
    return ((found.to(wide) - exact.to(wide)).norm() / exact.to(wide).norm().clamp(min=1e-12)).item()
