"""Write a model with its adapters as CoreML packages, which coremltools converts from programs of torch.

CoreML has no sizes like 2 · pairs of frames, so that packages are for one length. They compute in fp32: coremltools has
no fp16 that is of storage alone, and t in fp16 is too coarse (docs/export.md). To run them takes macOS: nothing here
does.
"""

import contextlib
import gc
import importlib.metadata
import io
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sa3train import __version__
from sa3train.adapters.lora_argument import LoraArgument
from sa3train.core.errors import ConfigError, LibraryError, SA3Error
from sa3train.core.files import check_target, hash_file, replace_folder, write_json
from sa3train.core.log import get_logger, silence_logger
from sa3train.core.text import shorten
from sa3train.export.graphs import Graph, build_graphs
from sa3train.export.package import (
    MANIFEST,
    ExportResult,
    describe_export,
    load_exportable,
    prepare_tracing,
    write_tokenizer,
)
from sa3train.inference.resolve import ModelFacts, count_generated_frames
from sa3train.models.checkpoint import describe_checkpoint

_logger = get_logger(__name__)

_TYPES = {torch.float32: "FLOAT32", torch.bool: "FLOAT32", torch.int64: "INT32"}
"""What inputs and outputs of a package are."""


def export_coreml(
    model: str,
    target: Path,
    adapters: Sequence[LoraArgument] = (),
    seconds: float = 30.0,
    overwrite: bool = False,
) -> ExportResult:
    """Write a model with adapters baked in as CoreML packages for one length, whole or not at all.

    Args:
        model: Name or folder.
        target: The folder to write.
        adapters: Adapters with constant strengths, for all noise levels.
        seconds: Length of the longest clip that the packages make.
        overwrite: Whether to replace an earlier export.

    Returns:
        What was written.

    Raises:
        LibraryError: coremltools is missing or broken.
        ConfigError: The length is out of range, or the model or an adapter cannot be exported.
        SA3Error: The folder or a package cannot be written, or a package is not what its graph is.
    """
    name, config = describe_checkpoint(model)
    limits = ModelFacts.from_config(config, name)
    if not 0 < seconds <= limits.longest:
        raise ConfigError(
            f"seconds={seconds:g} is not above 0 and at most {limits.longest:.2f}, the longest of {name}. "
            f"Choose another length."
        )
    with _silence_tools():
        versions = {"sa3train": __version__, "torch": torch.__version__, "coremltools": _find_coremltools()}
    check_target(target, [each.path for each in adapters], overwrite)
    with replace_folder(target, lambda folder: (folder / MANIFEST).is_file()) as folder:
        generator = load_exportable(model, adapters)
        write_tokenizer(generator, folder)
        facts = describe_export(generator, uuid.uuid4().hex, None)
        changes = _describe_length(facts, seconds, count_generated_frames(limits, seconds))
        for name, graph in build_graphs(generator.model, **changes["sizes"]).items():
            _logger.info("writing %s.mlpackage", name)
            _write_package(graph, folder / f"{name}.mlpackage")
            gc.collect()  # a traced program holds its weights in cycles
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        hashes = {name: hash_file(path) for name, path in files.items()}
        write_json(folder / MANIFEST, {**facts, **changes, "versions": versions, "files": hashes})
        return ExportResult(target, {name: path.stat().st_size for name, path in files.items()}, {})


@contextlib.contextmanager
def _silence_tools() -> Iterator[None]:
    """Hide what coremltools says of parts and versions that are missing here, and its progress bars."""
    with silence_logger("coremltools"), contextlib.redirect_stderr(io.StringIO()):
        yield


def _find_coremltools() -> str:
    try:
        import coremltools  # noqa: F401

        return importlib.metadata.version("coremltools")
    except Exception as error:
        raise LibraryError(
            f"coremltools cannot be loaded ({error}). On Linux or macOS, run: pip install 'sa3train[coreml]'"
        ) from error


def _describe_length(facts: dict[str, Any], seconds: float, frames: int) -> dict[str, Any]:
    """Describe what a manifest says otherwise where the sizes are fixed."""
    chunks, has_guidance = facts["chunks"], facts["defaults"]["cfg_scale"] != 1
    sizes = {
        "rows": 2 if has_guidance else 1,
        "frames": frames,
        "chunk_frames": min(frames, chunks["size"]) if chunks["enabled"] else frames,
        "prompt_tokens": facts["max_tokens"],
    }
    return {
        "format": "sa3train-coreml",
        "version": 1,
        "precision": "fp32",
        "sizes": sizes,
        "frames": {**facts["frames"], "min": frames, "max": frames},
        "max_seconds": seconds,
        "max_rows": sizes["rows"],
        "guidance": facts["guidance"] if has_guidance else None,
    }


def _write_package(graph: Graph, path: Path) -> None:
    with prepare_tracing(), _silence_tools():
        import coremltools

        try:
            program = torch.export.export(graph.module.eval(), tuple(graph.inputs.values()))
            program = program.run_decompositions({torch.ops.aten.addcmul.default: _add_product})
            package = coremltools.convert(
                program,
                outputs=[coremltools.TensorType(name=name) for name in graph.outputs],
                convert_to="mlprogram",
                minimum_deployment_target=coremltools.target.iOS18,
                compute_precision=coremltools.precision.FLOAT32,
                skip_model_load=True,
                package_dir=str(path),
            )
        except Exception as error:
            raise SA3Error(
                f"coremltools {coremltools.__version__} cannot write {path.name} of this model with torch "
                f"{torch.__version__} ({type(error).__name__}: {shorten(str(error), 300)}). Free disk space if that "
                f"is what it lacks, install the versions that docs/export.md names, or export with --to onnx."
            ) from error
    described = package.get_spec().description
    found = [
        (each.name, tuple(array.shape), array.ArrayDataType.Name(array.dataType))
        for each in (*described.input, *described.output)
        for array in (each.type.multiArrayType,)
    ]
    outputs = (node.meta["val"] for node in program.graph.output_node().args[0])
    tensors = {**graph.inputs, **dict(zip(graph.outputs, outputs, strict=True))}
    wanted = [(name, tuple(each.shape), _TYPES[each.dtype]) for name, each in tensors.items()]
    if found != wanted:
        raise SA3Error(
            f"{path.name} was not written: coremltools made inputs and outputs {found} of {wanted}. "
            f"Report this as a bug."
        )


def _add_product(first: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, value: float = 1) -> torch.Tensor:
    """Compute addcmul by operators that coremltools knows."""
    return first + value * left * right
