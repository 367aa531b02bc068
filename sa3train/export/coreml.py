"""Write a model with its adapters as CoreML packages, which coremltools converts from programs of torch.

CoreML has no sizes like 2 · pairs of frames, so that packages are for one length. To run them takes macOS: nothing
here does.
"""

import importlib.metadata
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch._decomp import get_decompositions

from sa3train import __version__
from sa3train.adapters.lora_argument import LoraArgument
from sa3train.core.errors import ConfigError, LibraryError, SA3Error
from sa3train.core.files import check_target, hash_file, replace_folder, write_json
from sa3train.core.log import get_logger
from sa3train.export.graphs import Graph, build_graphs
from sa3train.export.onnx_files import (
    MANIFEST,
    ExportResult,
    load_exportable,
    prepare_tracing,
    write_tokenizer_and_describe,
)

_logger = get_logger(__name__)

PRECISIONS = {"fp32": "FLOAT32", "fp16": "FLOAT16"}
"""What packages compute in, by coremltools' names."""


def export_coreml(
    model: str,
    target: Path,
    adapters: Sequence[LoraArgument] = (),
    seconds: float = 30.0,
    overwrite: bool = False,
    precision: str = "fp32",
) -> ExportResult:
    """Write a model with adapters baked in as CoreML packages for one length, whole or not at all.

    Args:
        model: Name or folder.
        target: The folder to write.
        adapters: Adapters with constant strengths, for all noise levels.
        seconds: Length of a clip.
        overwrite: Whether to replace an earlier export.
        precision: "fp32" or "fp16".

    Returns:
        What was written.

    Raises:
        LibraryError: coremltools is missing.
        ConfigError: The precision or length is out of range, or the model or an adapter cannot be exported.
        SA3Error: The folder cannot be written, or a package has other inputs or outputs than its graph.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"CoreML packages are not written in {precision}. Choose {' or '.join(PRECISIONS)}.")
    try:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "coremltools")}
    except importlib.metadata.PackageNotFoundError:
        raise LibraryError("coremltools is not installed. Run: pip install 'sa3train[coreml]'") from None
    check_target(target, [each.path for each in adapters], overwrite)
    with replace_folder(target, lambda folder: (folder / MANIFEST).is_file()) as folder:
        generator, identity = load_exportable(model, adapters), uuid.uuid4().hex
        facts = write_tokenizer_and_describe(generator, folder, identity, None)
        sizes = _choose_sizes(facts, seconds)
        for name, graph in build_graphs(generator.model, **sizes).items():
            _logger.info("writing %s.mlpackage", name)
            _write_package(graph, folder / f"{name}.mlpackage", identity, precision)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        hashes = {name: hash_file(path) for name, path in files.items()}
        changes = {"format": "sa3train-coreml", "version": 1, "sizes": sizes, "precision": precision}
        versions = {"sa3train": __version__, **versions}
        write_json(folder / MANIFEST, {**facts, **changes, "versions": versions, "files": hashes})
        return ExportResult(target, {name: path.stat().st_size for name, path in files.items()}, {})


def _choose_sizes(facts: dict[str, Any], seconds: float) -> dict[str, int]:
    """Choose the sizes of the graphs for a length."""
    ratio, chunks, limits = facts["samples_per_frame"], facts["chunks"], facts["frames"]
    pairs = -(-int((seconds + facts["tail_seconds"]) * facts["sample_rate"]) // (2 * ratio))
    if not limits["min"] <= 2 * pairs <= limits["max"]:
        raise ConfigError(
            f"seconds={seconds} with {facts['tail_seconds']} s of room is not from {limits['min']} to {limits['max']} "
            f"frames of {ratio} samples. Choose another length."
        )
    return {
        "rows": 1 if facts["defaults"]["cfg_scale"] == 1 else 2,
        "frames": 2 * pairs,
        "count": min(2 * pairs, chunks["size"]) if chunks["enabled"] else 2 * pairs,
        "prompt_tokens": facts["max_tokens"],
    }


def _write_package(graph: Graph, path: Path, identity: str, precision: str) -> None:
    import coremltools

    with prepare_tracing():
        program = torch.export.export(graph.module.eval(), tuple(graph.inputs.values()))
        program = program.run_decompositions(get_decompositions([torch.ops.aten.addcmul]))
        package = coremltools.convert(
            program,
            outputs=[coremltools.TensorType(name=name) for name in graph.outputs],
            convert_to="mlprogram",
            minimum_deployment_target=coremltools.target.iOS18,
            compute_precision=getattr(coremltools.precision, PRECISIONS[precision]),
            skip_model_load=True,
        )
    described = package.get_spec().description
    found = {each.name: tuple(each.type.multiArrayType.shape) for each in described.input}
    wanted = {name: tuple(each.shape) for name, each in graph.inputs.items()}
    outputs = tuple(each.name for each in described.output)
    if (found, outputs) != (wanted, graph.outputs):
        raise SA3Error(
            f"{path.name} was not written: coremltools made inputs {found} and outputs {outputs} of {wanted} and "
            f"{graph.outputs}. Report this as a bug."
        )
    package.user_defined_metadata["sa3train.export"] = identity
    package.save(str(path))
