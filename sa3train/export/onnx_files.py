"""Write a model with its adapters as ONNX files, a tokenizer and a manifest, and compare them with the exact path."""

import gc
import importlib.metadata
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sa3train import __version__
from sa3train.adapters.lora_argument import LoraArgument
from sa3train.core.errors import ConfigError, LibraryError, SA3Error
from sa3train.core.files import check_target, hash_file, replace_folder, write_json
from sa3train.core.log import get_logger
from sa3train.export.check import TEXT_DTYPE, GraphCheck
from sa3train.export.factors import add_lora_inputs
from sa3train.export.graphs import Graph, build_graphs
from sa3train.export.package import (
    MANIFEST,
    ExportResult,
    describe_export,
    load_exportable,
    prepare_tracing,
    write_tokenizer,
)
from sa3train.export.precision import SCOPES, STORED_PRECISIONS
from sa3train.inference.generator import Generator

_logger = get_logger(__name__)

OPSET = 23
EXTERNAL_BYTES = 200_000_000
"""Weights beyond this go to a file beside the graph: a protobuf ends at 2 GB, and is in memory twice when written."""
LIBRARIES = ("onnx", "onnxruntime", "onnxscript")


def export_onnx(
    model: str,
    target: Path,
    adapters: Sequence[LoraArgument] = (),
    check: bool = False,
    overwrite: bool = False,
    precision: str = "fp32",
    lora_inputs: int | None = None,
) -> ExportResult:
    """Write a model with adapters baked in as ONNX files, whole or not at all.

    Args:
        model: Name or folder.
        target: The folder to write.
        adapters: Adapters with constant strengths, for all noise levels.
        check: Whether to run what was written on fixed noise and refuse it where it is off.
        overwrite: Whether to replace an earlier export.
        precision: Key of `STORED_PRECISIONS`: what weights are stored in.
        lora_inputs: Rank of inputs for adapters that a host chooses (see `factors`), in place of `adapters`.

    Returns:
        What was written.

    Raises:
        LibraryError: A package of the extra "export" is missing.
        ConfigError: The precision is unknown, or the model or an adapter cannot be exported.
        SA3Error: The folder cannot be written, or the check failed.
    """
    if precision not in STORED_PRECISIONS:
        raise ConfigError(f"unknown precision={precision!r}. Choose {', '.join(STORED_PRECISIONS)}.")
    if adapters and lora_inputs:
        raise ConfigError("lora_inputs excludes adapters that are baked in. Write them with sa3-export scales.")
    versions = _find_libraries()
    check_target(target, [each.path for each in adapters], overwrite)
    with replace_folder(target, lambda folder: (folder / MANIFEST).is_file()) as folder:
        facts, exact = _write_graphs(load_exportable(model, adapters), folder, check, lora_inputs)
        gc.collect()  # the model, before its files are loaded
        for path in folder.glob("*.onnx"):
            _convert_file(path, precision)
        files = sorted(folder.iterdir())
        hashes = {path.name: hash_file(path) for path in files}
        write_json(folder / MANIFEST, {**facts, "precision": precision, "versions": versions, "files": hashes})
        sizes = {path.name: path.stat().st_size for path in files}
        if exact:
            _logger.info("running what was written, to compare")
        errors = exact.compare(folder) if exact else {}
        limit = STORED_PRECISIONS[precision].limit
        if off := {name: error for name, error in errors.items() if name != TEXT_DTYPE and not error <= limit}:
            advice = "Report this as a bug." if precision == "fp32" else "Export it in fp32."
            raise SA3Error(f"{target} was not written: {off} exceed the limit of {limit} for {precision}. {advice}")
    return ExportResult(target, sizes, errors)


def _write_graphs(
    generator: Generator, folder: Path, check: bool, lora_inputs: int | None
) -> tuple[dict[str, Any], GraphCheck | None]:
    """Write graphs in fp32 and tokenizer, and return what a manifest says and what a check compares them with."""
    graphs, identity = build_graphs(generator.model), uuid.uuid4().hex
    if lora_inputs is not None:
        graphs = add_lora_inputs(generator.model, graphs, lora_inputs)
    for name, graph in graphs.items():
        _logger.info("writing %s.onnx", name)
        _write_graph(graph, folder / f"{name}.onnx", identity)
        gc.collect()  # a traced program holds its weights in cycles
    write_tokenizer(generator, folder)
    facts = describe_export(generator, identity, lora_inputs)
    return facts, GraphCheck(generator.model, graphs) if check else None


def _find_libraries() -> dict[str, str]:
    try:
        versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    except importlib.metadata.PackageNotFoundError as error:
        raise LibraryError(f"{error.name} is not installed. Run: pip install 'sa3train[export]'") from None
    return {"sa3train": __version__, "torch": torch.__version__, **versions}


def _write_graph(graph: Graph, path: Path, identity: str) -> None:
    with prepare_tracing():
        program = torch.onnx.export(
            graph.module.eval(),
            tuple(graph.inputs.values()),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=graph.dynamic_shapes,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props["sa3train.export"] = identity
        for node in program.model.graph.all_nodes():  # stack traces hold paths of this machine
            kept = {key: text for key, text in node.metadata_props.items() if key == SCOPES}
            node.metadata_props.clear()
            node.metadata_props.update(kept)
        weights = [each.const_value for each in program.model.graph.initializers.values()]
        size = sum(each.nbytes for each in weights if each is not None)
        program.save(path, external_data=size > EXTERNAL_BYTES)


def _convert_file(path: Path, precision: str) -> None:
    """Convert a graph that was written in fp32."""
    convert = STORED_PRECISIONS[precision].convert
    if convert is not None:
        import onnx

        model = onnx.load(path)
        convert(model, path.stem)
        data = path.with_name(f"{path.name}.data")
        is_large = data.exists()
        data.unlink(missing_ok=True)
        onnx.save(model, path, save_as_external_data=is_large, location=data.name)
