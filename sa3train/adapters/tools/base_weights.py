"""The base model of the tools: its weights, once every adapter is known to fit it."""

import contextlib
import ctypes
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from sa3train.adapters.adapter import Adapter, Part, get_checkpoint_name
from sa3train.adapters.apply.load_report import BaseModel, check_fit
from sa3train.adapters.layer_filter import find_adaptable_layers
from sa3train.adapters.spec import PEFT_METHODS
from sa3train.core.errors import AdapterError, MissingBaseError
from sa3train.models.conditioners import Conditioner
from sa3train.models.config import ModelConfig
from sa3train.models.weight_files import WeightFiles

Weights = Mapping[str, Tensor]
"""The base model's weights by module path."""


class LoadedModel(BaseModel, Protocol):
    """A loaded checkpoint, as `sa3train.models.checkpoint.load_checkpoint` returns it, on the meta device or not."""

    @property
    def path(self) -> Path:
        """Its folder."""

    @property
    def weights(self) -> Any:
        """Its tensors in its files, `WeightFiles`; asked for on the meta device and where a checkpoint is written."""

    @property
    def config(self) -> ModelConfig:
        """Its architecture; only asked for where a checkpoint is written."""

    @property
    def conditioner(self) -> Conditioner:
        """Its conditioner; only asked for where a checkpoint is written."""

    def get_adapter_root(self, part: Part = "dit") -> nn.Module:
        """Return the module that holds every adaptable layer of a part.

        Args:
            part: DiT and conditioner, or the autoencoder's decoder.

        Returns:
            The root of the adapters' module paths.
        """


def find_layers(model: LoadedModel, part: Part) -> dict[str, nn.Module]:
    """Find the layers of a model that adapters on one part can change.

    Args:
        model: The model.
        part: `Adapter.part` of the adapters.

    Returns:
        The layers by module path.
    """
    return find_adaptable_layers(model.get_adapter_root(part))


class LazyTensors(Mapping[str, Tensor]):
    """Tensors that are made, or read, each time they are asked for, so that only one is in memory.

    Args:
        makers: Makes each tensor, by name.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Tensor:
        with torch.no_grad():
            return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _release_freed_memory() -> None:
    """Give freed memory back to the system: glibc keeps what small tensors that stay lie above."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def _read_weight(files: WeightFiles, path: str) -> Tensor:
    """Read a weight of a checkpoint in fp32."""
    _release_freed_memory()
    return next(files.iterate([f"{get_checkpoint_name(path)}.weight"], "cpu", torch.float32))[1]


def get_weights(model: LoadedModel, part: Part = "dit") -> Weights:
    """Get the weights of a model's adaptable layers.

    Args:
        model: The model.
        part: DiT and conditioner, or the autoencoder's decoder.

    Returns:
        The weights by module path: those of the model, or of its file where it is on the meta device.
    """
    layers: dict[str, Any] = find_layers(model, part)
    if any(layer.weight.is_meta for layer in layers.values()):
        return LazyTensors({path: partial(_read_weight, model.weights, path) for path in layers})
    return {path: layer.weight.detach() for path, layer in layers.items()}


def get_base_weights(adapters: Sequence[Adapter], model: LoadedModel | None) -> tuple[Weights | None, list[str]]:
    """Get the weights of the adapters' base model. Raises `AdapterError` for an adapter that does not fit it.

    Args:
        adapters: Adapters that must fit the model.
        model: The base model, if there is one.

    Returns:
        The weights (None without a model), and warnings about the adapters' provenance.
    """
    if model is None:
        return None, []
    found: dict[str, Weights] = {part: get_weights(model, part) for part in {adapter.part for adapter in adapters}}
    reports = [
        check_fit(
            each,
            find_layers(model, each.part),
            model,
            weights=found[each.part] if each.spec.adapter_type in PEFT_METHODS else None,
            measure=False,
        )[0]
        for each in adapters
    ]
    weights: Weights = ChainMap(*(cast(dict[str, Tensor], each) for each in found.values()))
    return weights, [f"{report.source}: {text}" for report in reports for text in report.warnings]


def require_weights(adapter: Adapter, weights: Weights | None, operation: str) -> Weights:
    """Require the base model's weights for an operation.

    Args:
        adapter: The adapter that needs them.
        weights: The weights, if there are any.
        operation: What needs them, such as "Resizing", for the message.

    Returns:
        The weights.

    Raises:
        MissingBaseError: If there are none.
    """
    if weights is None:
        raise MissingBaseError(
            f"{operation} a {adapter.spec.adapter_type} adapter needs the weights it was trained on. Set model=NAME "
            f"({adapter.metadata.get('base_model', 'its base model')})."
        )
    return weights


def get_weight(adapter: Adapter, weights: Weights, path: str) -> Tensor:
    """Get the base model's weight at one layer of an adapter.

    Args:
        adapter: The adapter, for the message.
        weights: The base model's weights.
        path: Module path of the layer.

    Returns:
        The weight.

    Raises:
        AdapterError: If the model has no such layer.
    """
    if path not in weights:
        raise AdapterError(f"{adapter.source}: the model has no layer {path}. Load the model it was trained on.")
    return weights[path].detach()
