"""Adapters as inputs of exported graphs: `sa3-export --lora-inputs`, and files of `sa3-export scales` that fill them.

A layer computes (1 + s·rows) ⊙ W((1 + s·columns) ⊙ x) + s·B(A x) + bias. All zeros are the bare model. Several adapters
are W + Σ sᵢ (Wᵢ' − W), as everywhere (see `AdapterStack`), with Wᵢ' = gain_O ⊙ W ⊙ gain_I + Bᵢ·Aᵢ: factors follow one
another along the rank, and gains − 1 add up, as long as only rows or only columns have gains. Then s scales all of it
exactly. An adapter with both (bora) holds at strength 1, beside adapters without gains.
Shape suffixes: T tokens, O rows (out), I columns (in), R rank.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3train.adapters.apply.effective_weight import FactoredWeight
from sa3train.adapters.apply.layer_weight import LayerAdapter
from sa3train.adapters.apply.load_report import check_fit
from sa3train.adapters.formats.io import load_adapter
from sa3train.adapters.layer_filter import find_adaptable_layers
from sa3train.adapters.lora_argument import LoraArgument
from sa3train.adapters.spec import BIAS_CHANGE, KINDS, MAX_RANK
from sa3train.core.errors import AdapterError, ConfigError
from sa3train.core.files import check_target
from sa3train.core.safetensors_file import write_tensors
from sa3train.export.graphs import Graph
from sa3train.inference.sidecar import describe_adapter
from sa3train.models.checkpoint import StableAudio3, load_checkpoint

FORMAT, VERSION = "sa3train-onnx-lora", "1"
STRENGTH = "lora_strength"
"""Input of each graph that scales all adapters."""
HOW = (
    "Refuse a file of sa3-export scales whose metadata differ from these. It holds every input but lora_strength: any "
    "number, 0 for the bare model, where fixed is false, else 0 or 1."
)


@dataclass(frozen=True)
class ScalesResult:
    """A file of factors and scales.

    Attributes:
        path: The file.
        rank: Rank of the inputs.
        used: Rank of the adapters together.
        fixed: Whether it holds at `lora_strength` 1 alone (and 0).
    """

    path: Path
    rank: int
    used: int
    fixed: bool


def list_shapes(model: StableAudio3, rank: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """List the inputs of every layer.

    Args:
        model: The model.
        rank: Rank of the factors.

    Returns:
        Shapes by input, in order, by module path of the layer.

    Raises:
        ConfigError: The rank is out of range.
    """
    if not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"the rank of inputs for adapters must be from 1 to {MAX_RANK}, not {rank}.")
    shapes = dict[str, dict[str, tuple[int, ...]]]()
    for path, layer in find_adaptable_layers(model.get_adapter_root()).items():
        rows, cols = layer.weight.flatten(1).shape  # type: ignore[operator]
        parts = {"lora_A": (rank, cols), "lora_B": (rows, rank), "rows": (rows,), "columns": (cols,)}
        shapes[path] = {f"{path}.{name}": shape for name, shape in parts.items()}
    return shapes


def describe_inputs(model: StableAudio3, rank: int | None) -> dict[str, Any]:
    """Describe the inputs for the manifest.

    Args:
        model: The model.
        rank: Rank of the factors; None for a model without these inputs.

    Returns:
        What a host needs to know.
    """
    layers = () if rank is None else list_shapes(model, rank).values()
    shapes = {name: shape for layer in layers for name, shape in layer.items()}
    return {
        "how": HOW,
        "metadata": _describe_file(model, rank or "none"),
        "shapes": shapes | ({} if rank is None else {STRENGTH: ()}),
    }


def _describe_file(model: StableAudio3, rank: int | str) -> dict[str, str]:
    return {"format": FORMAT, "version": VERSION, "fingerprint": model.fingerprint(), "rank": str(rank)}


class _AdaptedForward:
    """Stands in for `forward` of a layer.

    Attributes:
        inputs: Strength, A, B, rows and columns; None for the bare layer.
        was_called: Whether it ran since this was last set to False.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.inputs: Sequence[Tensor] | None = None
        self.was_called = False

    def __call__(self, x: Tensor) -> Tensor:
        self.was_called = True
        layer: Any = self.layer
        if self.inputs is None:
            return type(layer).forward(layer, x)
        strength, A_RI, B_OR, rows_O, columns_I = self.inputs
        is_conv = isinstance(layer, nn.Conv1d)
        x_TI = x.mT if is_conv else x
        W_OI = layer.weight.flatten(1)
        y_TO = F.linear(x_TI * (1 + strength * columns_I), W_OI) * (1 + strength * rows_O)
        y_TO = y_TO + F.linear(F.linear(x_TI, A_RI), strength * B_OR)
        y_TO = y_TO if layer.bias is None else y_TO + layer.bias
        return y_TO.mT if is_conv else y_TO


def add_lora_inputs(model: StableAudio3, graphs: Mapping[str, Graph], rank: int) -> dict[str, Graph]:
    """Make the layers of graphs take their adapters from inputs.

    Args:
        model: The model of the graphs, without adapters. Its layers are changed in place, and compute the same outside
            the graphs.
        graphs: The graphs.
        rank: Rank of the factors.

    Returns:
        The graphs with `STRENGTH` and the four inputs of each adaptable layer that they run.

    Raises:
        ConfigError: The rank is out of range, or a layer is a convolution over time.
    """
    shapes, adapted = list_shapes(model, rank), dict[str, _AdaptedForward]()
    for path, layer in find_adaptable_layers(model.get_adapter_root()).items():
        if isinstance(layer, nn.Conv1d) and layer.kernel_size != (1,):
            raise ConfigError(f"{path} is a convolution over time, whose adapter cannot be an input. Bake it in.")
        adapted[path] = layer.forward = _AdaptedForward(layer)
    found, rng, idle = dict[str, Graph](), torch.Generator().manual_seed(2), set(adapted)
    for name, graph in graphs.items():
        for each in adapted.values():
            each.was_called = False
        with torch.no_grad():
            graph.module(*graph.inputs.values())
        layers = {path: layer for path, layer in adapted.items() if layer.was_called}
        idle -= layers.keys()
        inputs = {each: shape for path in layers for each, shape in shapes[path].items()}
        examples = {each: torch.randn(shape, generator=rng) * 0.05 for each, shape in inputs.items()}
        if layers:
            examples = {STRENGTH: torch.tensor(0.8), **examples}
            module = _WithFactors(graph.module, len(graph.inputs), list(layers.values()))
            sizes = {**graph.dynamic, **{each: {} for each in examples}}
            graph = Graph(module, {**graph.inputs, **examples}, graph.outputs, sizes)
        found[name] = graph
    assert not idle, f"no graph runs {', '.join(sorted(idle))}"
    return found


class _WithFactors(nn.Module):
    """A graph with the strength, and four inputs of each of its layers."""

    def __init__(self, module: nn.Module, count: int, layers: Sequence[_AdaptedForward]) -> None:
        super().__init__()
        self.module, self.count, self.layers = module, count, layers

    def forward(self, *inputs: Tensor) -> Any:
        strength, *parts = inputs[self.count :]
        for index, layer in enumerate(self.layers):
            layer.inputs = (strength, *parts[4 * index : 4 * index + 4])
        try:
            return self.module(*inputs[: self.count])
        finally:
            for layer in self.layers:
                layer.inputs = None


def write_scales(
    model: str, target: Path, adapters: Sequence[LoraArgument], rank: int, overwrite: bool = False
) -> ScalesResult:
    """Write the inputs that give a model exported with `--lora-inputs` its adapters.

    Args:
        model: Name or folder of the exported model.
        target: The safetensors file to write.
        adapters: Adapters with constant strengths, for all noise levels.
        rank: Rank of the inputs.
        overwrite: Whether to replace the file.

    Returns:
        What was written.

    Raises:
        AdapterError: An adapter does not fit the model, or inputs cannot express it.
        ConfigError: Together they exceed the rank, or have gains of rows and of columns.
        SA3Error: The file cannot be written.
    """
    check_target(target, [each.path for each in adapters], overwrite)
    base = load_checkpoint(model, parts=("dit", "conditioner"))
    layers, shapes = find_adaptable_layers(base.get_adapter_root()), list_shapes(base, rank)
    changes: dict[str, list[tuple[float, FactoredWeight]]] = {path: [] for path in layers}
    records = list[dict[str, Any]]()
    for each in adapters:
        if each.interval is not None:
            raise ConfigError(f"{each.path}: noise levels cannot be inputs of a graph. Remove @MIN-MAX.")
        adapter, strength = load_adapter(each.path), each.require_strength()
        if adapter.part == "decoder":
            raise AdapterError(f"{each.path} is on the autoencoder's decoder, which has no inputs. Bake it in.")
        for path, part in check_fit(adapter, layers, base)[1].items():
            changes[path].append((strength, _factor(part, layers[path].weight, each.path)))  # type: ignore[arg-type]
        kind = adapter.spec.adapter_type
        records.append(describe_adapter(each.path, adapter) | {"kind": kind, "strength": strength})
    fixed = _check_gains(records)
    used = max((sum(len(part.A_RI) for _, part in each) for each in changes.values()), default=0)
    if used > rank:
        raise ConfigError(
            f"the adapters have rank {used} together, the inputs {rank}. Export with --lora-inputs {used}, or make "
            f"them smaller with sa3-adapter resize."
        )
    tensors = dict[str, Tensor]()
    for path, parts in shapes.items():
        tensors |= zip(parts, _join(changes[path], *parts.values()), strict=True)
    metadata = {"fixed": json.dumps(fixed), "adapters": json.dumps(records)}
    write_tensors(target, tensors, _describe_file(base, rank) | metadata)
    return ScalesResult(target, rank, used, fixed)


def _factor(part: LayerAdapter, W: Tensor, source: str) -> FactoredWeight:
    factored = part.factor(W.detach())
    if factored is None or BIAS_CHANGE in part.params:
        kind = part.adapter.spec.adapter_type
        what = "the bias" if BIAS_CHANGE in part.params else f"it by more than factors and gains ({kind})"
        raise AdapterError(f"{source}: {part.path} changes {what}, which inputs cannot hold. Bake it in with --lora.")
    return factored


def _check_gains(records: Sequence[Mapping[str, Any]]) -> bool:
    """Check that gains can be combined, and tell whether they hold at one strength alone."""
    gains = [(each, KINDS[each["kind"]]) for each in records if each["strength"] and each["kind"] in KINDS]
    gains = [(each, kind) for each, kind in gains if kind.scales_rows or kind.scales_columns]
    if not (any(kind.scales_rows for _, kind in gains) and any(kind.scales_columns for _, kind in gains)):
        return False
    if len(gains) > 1 or gains[0][0]["strength"] != 1:
        kinds = ", ".join(f"{each['kind']} at {each['strength']:g}" for each, _ in gains)
        raise ConfigError(
            f"gains of rows and of columns ({kinds}) are exact as inputs for one adapter at strength 1 alone. Bake the "
            f"adapters in with --lora instead."
        )
    return True


def _join(parts: Sequence[tuple[float, FactoredWeight]], *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Join adapters to the four inputs of a layer, padded with zeros."""
    A_RI, B_OR, rows_O, columns_I = map(torch.zeros, shapes)
    first = 0
    for strength, part in parts:
        last = first + len(part.A_RI)
        A_RI[first:last], B_OR[:, first:last] = part.A_RI, strength * part.B_OR
        rows_O += strength * (part.gain_O - 1)
        columns_I += strength * (part.gain_I - 1)
        first = last
    return A_RI, B_OR, rows_O, columns_I
