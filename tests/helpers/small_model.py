"""A model small enough for hundreds of adapter cases, with the released module paths, and a few steps of training."""

from pathlib import Path

import torch
from torch import Tensor, nn

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.layers.inject import InjectedAdapter, inject
from sa3train.adapters.spec import AdapterSpec

WIDTH, HIDDEN = 12, 20
LAYERS = (0, 1, 10, 11)
PEFT_OPTIONS = {"fourierft": {"n_frequency": 50}, "waveft": {"n_frequency": 50}, "c3a": {"block_size": 4}}
"""Options of PEFT's methods whose defaults want larger layers than those of the small model."""


class Small(nn.ModuleDict):
    """Blocks 0, 1, 10 and 11 of a "DiT" and a "conditioner", all of Linear or all of Conv1d layers."""

    sibling = None

    def __init__(self, layer: str = "linear", dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = layer == "conv1d"
        blocks = nn.ModuleDict({str(index): self._block() for index in LAYERS})
        self["model"] = nn.ModuleDict({"transformer": nn.ModuleDict({"layers": blocks})})
        embedding = nn.Sequential(nn.Identity(), self._layer(WIDTH, WIDTH))
        embedder = nn.ModuleDict({"embedder": nn.ModuleDict({"embedding": embedding})})
        self["conditioners"] = nn.ModuleDict({"seconds_total": embedder})
        self.to(dtype).requires_grad_(False)

    def _layer(self, width_in: int, width_out: int) -> nn.Module:
        return nn.Conv1d(width_in, width_out, 3, padding=1) if self.conv else nn.Linear(width_in, width_out)

    def _block(self) -> nn.ModuleDict:
        ff = nn.ModuleDict({"up": self._layer(WIDTH, HIDDEN), "down": self._layer(HIDDEN, WIDTH)})
        return nn.ModuleDict({"ff": ff})

    def forward(self, x: Tensor | None = None) -> Tensor:
        """Of (2, tokens, 12), or (2, 12, frames) where the layers are convolutions."""
        x = self.example() if x is None else x
        x = x + self["conditioners"]["seconds_total"]["embedder"]["embedding"](x)
        for block in self["model"]["transformer"]["layers"].values():
            x = x + block["ff"]["down"](torch.tanh(block["ff"]["up"](x)))
        return x

    name, path = "small", Path("small")

    def fingerprint(self) -> str:
        return "0" * 64

    def get_adapter_root(self, part: str = "dit") -> nn.Module:
        return self

    def example(self, seed: int = 1) -> Tensor:
        shape = (2, WIDTH, 9) if self.conv else (2, 7, WIDTH)
        dtype = next(self.parameters()).dtype
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def weights(self) -> dict[str, Tensor]:
        """Copies of the base's tensors, by their names in a model without adapters."""
        return {
            name.replace(".base_layer.", "."): tensor.detach().clone()
            for name, tensor in self.named_parameters()
            if not any(
                part.startswith(("lora_", "M_xs", "magnitude", "oft_", "lokr_", "hada_")) for part in name.split(".")
            )
        }


def train(model: Small, injected: InjectedAdapter, steps: int = 3, lr: float = 2e-2) -> list[float]:
    """A few steps towards a fixed target; the losses."""
    optimizer = torch.optim.Adam(injected.parameters(), lr=lr)
    target = torch.randn(model.example().shape, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model().float() - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_adapter(spec: AdapterSpec, model: Small, seed: int = 0) -> Adapter:
    """An adapter of `spec` after a few steps on `model`, which is left as it was."""
    torch.manual_seed(seed)
    injected = inject(model, spec)
    train(model, injected)
    adapter = injected.export({"base_model": "small"})
    injected.remove()
    return adapter
