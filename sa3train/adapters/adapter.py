"""An adapter in memory: its spec, its tensors by layer, and where it came from."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from sa3train.adapters.layer_filter import find_adaptable_layers
from sa3train.adapters.spec import AdapterSpec
from sa3train.core.safetensors_file import hash_tensors


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        spec: Its settings.
        tensors: Its tensors by module path and tensor name. Module paths are those of the released files: `model.…`
            for the DiT, `conditioners.…` for the conditioner.
        metadata: Metadata of its file, such as `base_model` and `base_hash`.
        source: The file it came from, for messages.
    """

    spec: AdapterSpec
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over type, scales, names, shapes and bytes: equal adapters have equal fingerprints."""
        parts: list[str | torch.Tensor] = [self.spec.adapter_type]
        for path in sorted(self.tensors):
            parts.append(f"{path}:{self.spec.get_scale(path)!r}")
            for name, tensor in sorted(self.tensors[path].items()):
                parts += [f"{name}:{tensor.dtype}:{tuple(tensor.shape)}", tensor]
        return hash_tensors(parts)


def hash_architecture(layers: Mapping[str, nn.Module] | nn.Module) -> str:
    """Hash the paths and weight shapes of a model's adaptable layers to a short name of its architecture.

    Args:
        layers: The model, or its adaptable layers by module path.

    Returns:
        16 hexadecimal digits, stored in adapter files as `base_architecture`.
    """
    if isinstance(layers, nn.Module):
        layers = find_adaptable_layers(layers)
    listing = "\n".join(f"{path} {tuple(layers[path].weight.shape)}" for path in sorted(layers))  # type: ignore[arg-type]
    return hashlib.sha256(listing.encode()).hexdigest()[:16]
