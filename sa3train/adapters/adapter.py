"""An adapter in memory: its spec, its tensors by layer, and where it came from."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import nn

from sa3train.adapters.layer_filter import find_adaptable_layers
from sa3train.adapters.spec import AdapterSpec
from sa3train.core.errors import AdapterError
from sa3train.core.safetensors_file import hash_tensors, parse_json
from sa3train.core.text import shorten

TRAINING_CONFIG = "training_config"
"""Key in the metadata of the settings of a training as JSON, with paths of its machine: it is not shared."""

PROMPTS = "prompts"
"""Key in the metadata of a JSON list of prompts to try."""

BASE_SAMPLE = "base_sample"
"""Key in the metadata of values of the base model's weights, by which its copies in other precisions are known."""

MAX_PROMPTS, MAX_PROMPT = 64, 500
"""Prompts that a file may carry, and characters of each; the rest is ignored."""

DECODER = "pretransform.model.decoder."
"""Module path of the autoencoder's decoder in the released files."""

Part = Literal["dit", "decoder"]
"""What an adapter changes: the DiT with the conditioner, or the autoencoder's decoder."""


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        spec: Its settings.
        tensors: Its tensors by module path and tensor name. Module paths are those of the released files: `model.…`
            for the DiT, `conditioners.…` for the conditioner, `pretransform.model.decoder.…` for the autoencoder's
            decoder.
        metadata: Metadata of its file, such as `base_model` and `base_hash`.
        source: The file it came from, for messages.
    """

    spec: AdapterSpec
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    @property
    def part(self) -> Part:
        """The part of the model that it changes; no adapter changes both."""
        return "decoder" if any(path.startswith(DECODER) for path in self.tensors) else "dit"

    @property
    def prompts(self) -> list[str]:
        """Prompts to try: a sample of the captions that it was trained with, if its file carries them."""
        try:
            found = parse_json(self.metadata.get(PROMPTS, "[]"), PROMPTS)
        except AdapterError:
            return []
        texts = [" ".join(text.split()) for text in found if isinstance(text, str)] if isinstance(found, list) else []
        return [shorten("".join(filter(str.isprintable, text)), MAX_PROMPT) for text in texts if text][:MAX_PROMPTS]

    def __repr__(self) -> str:
        return f"Adapter({self.spec.adapter_type}, rank={self.spec.rank}, {len(self.tensors)} layers, {self.source!r})"

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


def get_checkpoint_name(path: str) -> str:
    """Get the name of a module in the released checkpoints.

    Args:
        path: Its module path in adapters.

    Returns:
        The name, such as `model.model.transformer.project_in`.
    """
    root = {"model": "model.", "conditioners": "conditioner."}.get(path.partition(".")[0], "")
    return f"{root}{path}"
