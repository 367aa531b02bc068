"""Weights in fewer bits, by operators of plain ONNX, and products in int8.

fp16 and int8 store weights alone: hosts multiply in fp32, unless they choose otherwise (onnxruntime's fp16 on a CPU
has errors of 2% to 80% on these graphs). int8-products also multiplies in int8, by operators of onnxruntime.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sa3train.core.errors import SA3Error

AUTOENCODER = ("decoder", "encoder")
OUTPUT_AXES = {"MatMul": -1, "Gemm": 0, "Gather": 0, "Conv": 0}
"""Axis of a weight's output channels, or of the rows of a table, by the operator that reads it."""
SCOPES = "pkg.torch.onnx.name_scopes"
"""Key of a node's metadata that names the module it comes from."""
SENSITIVE = (".ff.ff.2'", ".project_in'", ".project_out'")
"""Products of the denoiser whose inputs int8 would change by more than the rest together."""
PRODUCTS = ("MatMul", "Gemm")
MIN_VALUES = 4096
"""Smaller weights stay fp32."""


@dataclass(frozen=True)
class Precision:
    """A precision of exported files.

    Attributes:
        convert: Changes a graph (`onnx.ModelProto`) in fp32, given its name; None leaves it.
        limit: Largest relative error of a part, a step and the latents that a check accepts.
    """

    convert: Callable[[Any, str], None] | None
    limit: float


def _store_as_fp16(model: Any, _: str) -> None:
    from onnx import TensorProto, helper

    for tensor, weight in _list_weights(model):
        node = helper.make_node("Cast", [f"{tensor.name}.fp16"], [tensor.name], to=TensorProto.FLOAT)
        _replace(model, tensor, node, {"fp16": weight.astype(np.float16)})


def _store_as_int8(model: Any, name: str) -> None:
    """Store weights of products as int8 with a scale per output channel.

    The autoencoder gets fp16: int8 changes its sound by more than half.
    """
    from onnx import helper

    if name in AUTOENCODER:
        return _store_as_fp16(model, name)
    readers = defaultdict(set)
    for node in model.graph.node:
        for each in node.input:
            readers[each].add(node.op_type)
    for tensor, weight in _list_weights(model):
        kinds = readers[tensor.name]
        if len(kinds) == 1 and kinds <= OUTPUT_AXES.keys():
            axis = OUTPUT_AXES[kinds.pop()] % weight.ndim
            others = tuple(each for each in range(weight.ndim) if each != axis)
            largest = np.abs(weight).max(axis=others, keepdims=True)
            scales = (np.maximum(largest, 1e-30) / 127).astype(np.float32)
            parts = {"int8": np.round(weight / scales).astype(np.int8), "scales": scales.reshape(-1)}
            names = [f"{tensor.name}.{part}" for part in parts]
            _replace(model, tensor, helper.make_node("DequantizeLinear", names, [tensor.name], axis=axis), parts)
    return None


def _quantize_products(model: Any, name: str) -> None:
    """Let a step multiply in int8, activations by a scale per tensor, except where that is off by more than 1%."""
    if name != "step":
        return _store_as_int8(model, name)
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    scopes = {
        node.name: {each.key: each.value for each in node.metadata_props}.get(SCOPES, "")
        for node in model.graph.node
        if node.op_type in PRODUCTS
    }
    if missing := [word for word in SENSITIVE if not any(word in scope for scope in scopes.values())]:
        raise SA3Error(
            f"int8-products must leave out the products of {', '.join(missing)}, which are not in the graph that this "
            f"torch wrote. Export with --precision int8, and report this."
        )
    with tempfile.TemporaryDirectory() as folder:
        quantize_dynamic(
            model,
            Path(folder, "step.onnx"),
            op_types_to_quantize=PRODUCTS,
            per_channel=True,
            weight_type=QuantType.QUInt8,  # x86 without VNNI sums products of QInt8 in 16 bits, which saturate
            nodes_to_exclude=[node for node, scope in scopes.items() if any(word in scope for word in SENSITIVE)],
            use_external_data_format=True,
        )
        model.CopyFrom(onnx.load(Path(folder, "step.onnx")))
    return _store_as_fp16(model, name)


def _list_weights(model: Any) -> list[tuple[Any, np.ndarray]]:
    """List the tensors in fp32 that are worth fewer bits."""
    from onnx import TensorProto, numpy_helper

    tensors = [each for each in model.graph.initializer if each.data_type == TensorProto.FLOAT and len(each.dims) > 1]
    return [(each, numpy_helper.to_array(each)) for each in tensors if np.prod(each.dims) >= MIN_VALUES]


def _replace(model: Any, tensor: Any, node: Any, parts: dict[str, np.ndarray]) -> None:
    """Replace a tensor by parts that a node makes it of."""
    from onnx import numpy_helper

    graph, name = model.graph, tensor.name
    graph.initializer.remove(tensor)
    graph.initializer.extend(numpy_helper.from_array(values, f"{name}.{part}") for part, values in parts.items())
    graph.node.insert(0, node)


STORED_PRECISIONS = {
    "fp32": Precision(None, 1e-3),
    "fp16": Precision(_store_as_fp16, 5e-3),
    "int8": Precision(_store_as_int8, 5e-2),
    "int8-products": Precision(_quantize_products, 5e-2),
}
