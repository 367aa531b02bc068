"""Adapters for nano, made without training."""

from pathlib import Path

import torch

from sa3train.adapters.adapter import Adapter, hash_architecture
from sa3train.adapters.formats.io import save_adapter
from sa3train.adapters.layer_filter import find_adaptable_layers
from sa3train.adapters.spec import AdapterSpec
from sa3train.models.checkpoint import load_checkpoint


def write_lora_adapters(folder: Path, names: tuple[str, ...] = ("one", "two")) -> None:
    """Write a small random LoRA of every layer for each name, the same in every call."""
    model = load_checkpoint("nano-base", parts=("dit", "conditioner"))
    root = model.get_adapter_root()
    rng = torch.Generator().manual_seed(0)
    for name in names:
        tensors = {}
        for path, layer in find_adaptable_layers(root).items():
            rows, cols = layer.weight.flatten(1).shape
            tensors[path] = {
                "lora_A": torch.randn(2, cols, generator=rng) / cols**0.5,
                "lora_B": torch.randn(rows, 2, generator=rng) * 0.02,
            }
        facts = {"base_model": model.name, "base_architecture": hash_architecture(root), "name": name}
        save_adapter(folder / f"{name}.safetensors", Adapter(AdapterSpec("lora", rank=2), tensors, facts, name))
