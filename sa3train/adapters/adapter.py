"""An adapter in memory: what it is, its tensors by layer, and where it came from."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn

from sa3train.adapters.layer_filter import adaptable_layers
from sa3train.adapters.spec import AdapterSpec


@dataclass(frozen=True)
class Adapter:
    """An adapter's spec, its tensors by module path and parameter name, its metadata, and the file it came from.

    Module paths are those of the released files: `model.…` for the DiT, `conditioners.…` for the conditioner.
    """

    spec: AdapterSpec
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over kind, scales, names, shapes and bytes: equal adapters have equal fingerprints."""
        digest = hashlib.sha256(self.spec.kind.encode())
        for path in sorted(self.tensors):
            digest.update(f"{path}:{self.spec.scale_of(path)!r}".encode())
            for name in sorted(self.tensors[path]):
                tensor = self.tensors[path][name].detach().cpu().contiguous()
                digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def with_tensors(self, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> "Adapter":
        """The same adapter with other tensors."""
        return replace(self, tensors=tensors)


def architecture_of(root: nn.Module) -> str:
    """A short name for the architecture under `root`: a hash of its adaptable layers' paths and weight shapes."""
    layers = adaptable_layers(root)
    listing = "\n".join(f"{path} {tuple(layers[path].weight.shape)}" for path in sorted(layers))  # type: ignore[arg-type]
    return hashlib.sha256(listing.encode()).hexdigest()[:16]
