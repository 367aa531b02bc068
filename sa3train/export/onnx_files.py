"""Write a model with its adapters as ONNX files, a tokenizer and a manifest, and compare them with the exact path."""

import contextlib
import gc
import importlib.metadata
import json
import uuid
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sa3train import __version__
from sa3train.adapters.lora_argument import LoraArgument
from sa3train.core.errors import ConfigError, LibraryError, SA3Error
from sa3train.core.files import check_target, hash_file, replace_folder, write_json
from sa3train.core.log import get_logger, silence_logger
from sa3train.diffusion.schedule import LOGSNR_AT_DATA, LOGSNR_AT_NOISE
from sa3train.export.check import TEXT_DTYPE, GraphCheck
from sa3train.export.factors import add_lora_inputs, describe_inputs
from sa3train.export.graphs import Graph, build_graphs
from sa3train.export.precision import SCOPES, STORED_PRECISIONS
from sa3train.inference.generator import Generator
from sa3train.inference.resolve import resolve_settings
from sa3train.inference.settings import GenerationSettings
from sa3train.models.attention import force_backend
from sa3train.models.autoencoder import CHUNK_SIZE, OVERLAP
from sa3train.models.dit_graph import MAX_FRAMES, MAX_ROWS, MIN_FRAMES

_logger = get_logger(__name__)

FORMAT, VERSION = "sa3train-onnx", 3
MANIFEST = "manifest.json"
OPSET = 23
EXTERNAL_BYTES = 200_000_000
"""Weights beyond this go to a file beside the graph: a protobuf ends at 2 GB, and is in memory twice when written."""
LIBRARIES = ("onnx", "onnxruntime", "onnxscript")
NOISE = (
    "Draw N(0, 1) in this order: start (1, C, T); per chunk of input audio, encoder tokens where encoder.token_noise; "
    "pingpong, one (1, C, T) per step; per chunk of latents, latent_noise (1, C, T of the chunk), then decoder tokens."
)


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        path: The folder.
        sizes: Bytes by file.
        errors: Largest relative error of each part against the exact path, and `TEXT_DTYPE`; empty where it was not
            checked.
    """

    path: Path
    sizes: dict[str, int]
    errors: dict[str, float]


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


def load_exportable(model: str, adapters: Sequence[LoraArgument]) -> Generator:
    """Load a model in fp32 with adapters baked in.

    Args:
        model: Name or folder.
        adapters: Adapters with constant strengths, for all noise levels.

    Returns:
        The model, with all parts in memory.

    Raises:
        ConfigError: The model or an adapter cannot be exported.
        SA3Error: They cannot be loaded.
    """
    for each in adapters:
        each.require_strength()
        if each.interval is not None:
            raise ConfigError(f"{each.path}: noise levels cannot be baked into a graph. Remove @MIN-MAX.")
    generator = Generator.from_pretrained(model, "cpu", "fp32")
    if generator.model.config.autoencoder.decoder.window is not None:
        raise ConfigError(f"{model} has a SAME-L autoencoder, which is not exported yet. Export a small model or nano.")
    for each in adapters:
        generator.load_adapter(**each.to_settings())
    generator.stack.apply(None, final=True)
    generator.model.autoencoder.encode(torch.zeros(1, 2, MIN_FRAMES * generator.model.downsampling_ratio))  # loads it
    return generator


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


@contextlib.contextmanager
def prepare_tracing() -> Iterator[None]:
    """Choose attention by its definition, and silence what torch says of packages that it does without.

    Yields:
        Nothing.
    """
    silence = warnings.catch_warnings(action="ignore")
    with silence, silence_logger("torch.onnx"), torch.no_grad(), force_backend("reference"):
        yield


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


def write_tokenizer(generator: Generator, folder: Path) -> None:
    """Write `tokenizer.json`, which neither cuts prompts nor pads them.

    Args:
        generator: The model.
        folder: Where to write.
    """
    tokenizer = generator.model.conditioner.text_encoder.source.tokenizer_folder() / "tokenizer.json"
    rules = {"truncation": None, "padding": None}
    write_json(folder / "tokenizer.json", json.loads(tokenizer.read_text(encoding="utf-8")) | rules)


def describe_export(generator: Generator, identity: str, lora_inputs: int | None) -> dict[str, Any]:
    """Describe everything that a host needs to know.

    Args:
        generator: The model with its adapters.
        identity: Of this export.
        lora_inputs: Rank of inputs for adapters.

    Returns:
        What a manifest says.
    """
    model, facts = generator.model, generator.facts
    frames = min(model.max_frames, MAX_FRAMES)
    defaults = resolve_settings(GenerationSettings(prompt="", seed=0), facts)
    same = model.config.autoencoder
    sides = {"decoder": model.autoencoder.decoder.resampler, "encoder": model.autoencoder.encoder.resampler}
    noise = {
        name: {"token_noise": bool(side.config.mask_noise), "token_shape": list(side.get_noise_shape(1)[1:])}
        for name, side in sides.items()
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "export": identity,
        "model": {"name": model.name, "objective": model.objective, "fingerprint": model.fingerprint()},
        "adapters": generator.adapters,
        "lora_inputs": describe_inputs(model, lora_inputs),
        "sample_rate": model.sample_rate,
        "samples_per_frame": model.downsampling_ratio,
        "latent_channels": model.latent_channels,
        "frames": {"multiple_of": 2, "min": MIN_FRAMES, "max": frames},
        "max_seconds": frames * model.downsampling_ratio / model.sample_rate,
        "max_rows": MAX_ROWS,
        "max_tokens": model.conditioner.max_length,
        "tail_seconds": defaults.tail,
        "chunks": {"enabled": model.autoencoder.chunked, "size": CHUNK_SIZE, "overlap": OVERLAP},
        "schedule": {"kind": "logsnr from data to noise", "ends": [LOGSNR_AT_DATA, LOGSNR_AT_NOISE]},
        "defaults": {"steps": defaults.steps, "sampler": defaults.sampler_type, "cfg_scale": defaults.cfg_scale},
        "guidance": "Rows 2B: conditions, then zeros for cross_attn_cond; APG 1 (docs/model.md, section 5).",
        "noise": {"order": NOISE, "latent_noise": same.noise_regularize, **noise},
    }
