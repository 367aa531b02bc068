"""Measure how far a written adapter is from what it was made of."""

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.layer_weight import get_layer_adapter
from sa3train.adapters.formats.io import load_adapter
from sa3train.adapters.tools.base_weights import Weights, get_weight
from sa3train.adapters.tools.low_rank import ErrorByLayer

_LAYERS = 2  # whose tensors may stay in memory while a file is read again
_ROWS = 1024  # of a weight whose difference is computed at once


@torch.no_grad()
def measure_difference(before: Adapter, after: Adapter, weights: Weights) -> ErrorByLayer:
    """Measure how far the weights of one adapter are from those of another, relative to the first one's change.

    Args:
        before: The original adapter.
        after: What was made of it.
        weights: The base model's weights.

    Returns:
        The error; a layer that only one of them has counts with its whole change.
    """
    paths = dict.fromkeys((*before.tensors, *after.tensors))
    return ErrorByLayer({path: _measure_layer(before, after, weights, path) for path in paths})


def _measure_layer(before: Adapter, after: Adapter, weights: Weights, path: str) -> tuple[float, float]:
    W = get_weight(before if path in before.tensors else after, weights, path).float()
    one = get_layer_adapter(before, path, W).weight(W) if path in before.tensors else W
    change = _measure_distance(one, W)
    other = get_layer_adapter(after, path, W).weight(W) if path in after.tensors else W
    return _measure_distance(one, other), change


def _measure_distance(one: Tensor, other: Tensor) -> float:
    """‖one − other‖², a few rows at a time: a weight of medium has 75 MB."""
    parts = zip(one.split(_ROWS), other.split(_ROWS), strict=True)
    return sum(float(torch.linalg.vector_norm(some - others)) ** 2 for some, others in parts)


def measure_tensors(written: Adapter, read: Adapter) -> ErrorByLayer:
    """Measure how far the tensors of a file are from those that were written, without the base model.

    Args:
        written: The adapter that was written.
        read: The file, read again.

    Returns:
        The error by layer over all tensors of a layer; the factor alpha / rank counts with them.
    """
    error = ErrorByLayer()
    for path in dict.fromkeys((*written.tensors, *read.tensors)):
        pair = [
            {name: x.double().reshape(-1) * each.spec.get_scale(path) for name, x in each.tensors.get(path, {}).items()}
            for each in (written, read)
        ]
        apart = total = 0.0
        for name in pair[0] | pair[1]:
            one, other = (tensors.get(name, torch.zeros(1)) for tensors in pair)
            apart += float((one - other).square().sum())
            total += float(one.square().sum())
        error.layers[path] = (apart, total)
    return error


def measure_written(
    before: Adapter, written: Adapter, file: str | os.PathLike[str], weights: Weights | None
) -> dict[str, Any]:
    """Measure the error of what was written, by reading it again, a few layers at a time.

    Args:
        before: What it was made of.
        written: The adapter that was written.
        file: The file or folder.
        weights: The base model's weights; without them the stored tensors are compared with those of `written`.

    Returns:
        `written` and `measured` of an `EditResult`.
    """
    if weights is None:
        return {"written": measure_tensors(written, load_adapter(file)), "measured": "tensors"}
    error = ErrorByLayer()
    paths = list(dict.fromkeys((*before.tensors, *load_adapter(file).tensors)))
    for start in range(0, len(paths), _LAYERS):
        some = [_select_layers(each, paths[start : start + _LAYERS]) for each in (before, load_adapter(file))]
        error.layers |= measure_difference(some[0], some[1], weights).layers
    return {"written": error, "measured": "file"}


def _select_layers(adapter: Adapter, paths: list[str]) -> Adapter:
    return replace(adapter, tensors={path: adapter.tensors[path] for path in paths if path in adapter.tensors})
