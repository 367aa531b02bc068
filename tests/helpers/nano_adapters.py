"""Adapters made without training."""

from pathlib import Path

import torch

from sa3train.adapters.adapter import Adapter, hash_architecture
from sa3train.adapters.apply.effective_weight import init_parameters
from sa3train.adapters.formats.io import save_adapter
from sa3train.adapters.layer_filter import find_adaptable_layers
from sa3train.adapters.spec import KINDS, AdapterSpec
from sa3train.models.checkpoint import load_checkpoint

SPREADS = {"lora_B": 0.02, "M_xs": 0.1}


def write_lora_adapters(folder: Path, names: tuple[str, ...] = ("one", "two"), model: str = "nano-base") -> None:
    """Write a small random LoRA of every layer for each name, the same in every call."""
    write_adapters(folder, dict.fromkeys(names, "lora"), model)


def write_adapters(folder: Path, kinds: dict[str, str], model_name: str = "nano-base") -> None:
    """Write a small random adapter of every layer for each name, of the given kind, the same in every call."""
    model = load_checkpoint(model_name, parts=("dit", "conditioner"))
    root = model.get_adapter_root()
    rng = torch.Generator().manual_seed(0)

    def draw(name: str, tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=rng)
        if name == "lora_A":
            return noise / tensor.shape[1] ** 0.5
        return tensor * (1 + noise * 0.05) if name.startswith("magnitude") else noise * SPREADS[name]

    for name, kind in kinds.items():
        tensors = {
            path: {key: draw(key, each) for key, each in init_parameters(KINDS[kind], layer.weight, 2).items()}
            for path, layer in find_adaptable_layers(root).items()
        }
        facts = {"base_model": model.name, "base_architecture": hash_architecture(root), "name": name}
        save_adapter(folder / f"{name}.safetensors", Adapter(AdapterSpec(kind, rank=2), tensors, facts, name))
