"""The base model of the tools: its weights, once every adapter is known to fit it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.load_report import BaseModel, check_fit
from sa3train.adapters.layer_filter import find_adaptable_layers
from sa3train.core.errors import AdapterError

Weights = Mapping[str, Tensor]
"""The base model's weights by module path."""


class LoadedModel(BaseModel, Protocol):
    """A loaded checkpoint, as `sa3train.models.checkpoint.load_checkpoint` returns it."""

    @property
    def path(self) -> Path:
        """Its folder."""

    def get_adapter_root(self) -> nn.Module:
        """Return the module that holds every adaptable layer.

        Returns:
            The root of the adapters' module paths.
        """


def get_weights(model: LoadedModel) -> dict[str, Tensor]:
    """Get the weights of a model's adaptable layers.

    Args:
        model: The model.

    Returns:
        The weights by module path, without copying.
    """
    layers: dict[str, Any] = find_adaptable_layers(model.get_adapter_root())
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
    layers = find_adaptable_layers(model.get_adapter_root())
    reports = [check_fit(adapter, layers, model, measure=False)[0] for adapter in adapters]
    return get_weights(model), [f"{report.source}: {text}" for report in reports for text in report.warnings]


def require_weights(adapter: Adapter, weights: Weights | None, operation: str) -> Weights:
    """Require the base model's weights for an operation.

    Args:
        adapter: The adapter that needs them.
        weights: The weights, if there are any.
        operation: What needs them, such as "Resizing", for the message.

    Returns:
        The weights.

    Raises:
        AdapterError: If there are none.
    """
    if weights is None:
        raise AdapterError(
            f"{operation} a {adapter.spec.adapter_type} adapter needs the weights it was trained on. Set --model NAME "
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
