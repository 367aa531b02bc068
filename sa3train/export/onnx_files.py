"""Write a model with its adapters as ONNX files, a tokenizer and a manifest, and compare them with the exact path."""

import contextlib
import importlib.metadata
import logging
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa3train import __version__
from sa3train.adapters.lora_argument import LoraArgument
from sa3train.core.errors import ConfigError, LibraryError, SA3Error
from sa3train.core.files import check_target, hash_file, replace_folder, write_json
from sa3train.diffusion.samplers import SAMPLERS
from sa3train.diffusion.schedule import LOGSNR_AT_DATA, LOGSNR_AT_NOISE, build_schedule
from sa3train.export.graphs import Graph, build_graphs
from sa3train.export.precision import STORED_PRECISIONS
from sa3train.inference.generator import Generator
from sa3train.inference.resolve import resolve_settings
from sa3train.inference.settings import GenerationSettings
from sa3train.models.attention import force_backend
from sa3train.models.autoencoder import CHUNK_SIZE, OVERLAP
from sa3train.models.checkpoint import StableAudio3
from sa3train.models.conditioners import TextEmbedding
from sa3train.models.dit_graph import MAX_FRAMES, MAX_ROWS, MIN_FRAMES

FORMAT, VERSION = "sa3train-onnx", 1
MANIFEST = "manifest.json"
OPSET = 23
EXTERNAL_BYTES = 1_500_000_000
"""Weights beyond this go to a file beside the graph: a protobuf ends at 2 GB."""
TEXT_DTYPE = "text encoder as sa3-generate runs it"
"""A figure of the check that is no error: what the text encoder's own dtype changes in the latents."""
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
) -> ExportResult:
    """Write a model with adapters baked in as ONNX files, whole or not at all.

    Args:
        model: Name or folder.
        target: The folder to write.
        adapters: Adapters with constant strengths, for all noise levels.
        check: Whether to run what was written on fixed noise and refuse it where it is off.
        overwrite: Whether to replace an earlier export.
        precision: Key of `STORED_PRECISIONS`: what weights are stored in.

    Returns:
        What was written.

    Raises:
        LibraryError: A package of the extra "export" is missing.
        ConfigError: The precision is unknown, or the model or an adapter cannot be exported.
        SA3Error: The folder cannot be written, or the check failed.
    """
    if precision not in STORED_PRECISIONS:
        raise ConfigError(f"unknown precision={precision!r}. Choose {', '.join(STORED_PRECISIONS)}.")
    versions = _find_libraries()
    check_target(target, [each.path for each in adapters], overwrite)
    for each in adapters:
        each.require_strength()
        if each.interval is not None:
            raise ConfigError(f"{each.path}: noise levels cannot be baked into a graph. Remove @MIN-MAX.")
    generator = Generator.from_pretrained(model, "cpu", "fp32")
    if generator.model.config.autoencoder.decoder.window is not None:
        raise ConfigError(f"{model} has a SAME-L autoencoder, which is not exported yet. Export a small model or nano.")
    for each in adapters:
        generator.load_adapter(**each.to_settings())
    generator.stack.apply(None)
    generator.model.autoencoder.encode(torch.zeros(1, 2, MIN_FRAMES * generator.model.downsampling_ratio))  # loads it
    graphs = build_graphs(generator.model)
    with replace_folder(target, lambda folder: (folder / MANIFEST).is_file()) as folder:
        identity = uuid.uuid4().hex
        for name, graph in graphs.items():
            _write_graph(graph, folder / f"{name}.onnx", identity)
            _convert_file(folder / f"{name}.onnx", precision)
        shutil.copyfile(
            generator.model.conditioner.text_encoder.source.tokenizer_folder() / "tokenizer.json",
            folder / "tokenizer.json",
        )
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        write_json(folder / MANIFEST, _describe(generator, folder, identity, precision, versions))
        errors = compare_graphs(generator.model, graphs, folder) if check else {}
        limit = STORED_PRECISIONS[precision].limit
        if off := {name: error for name, error in errors.items() if name != TEXT_DTYPE and not error <= limit}:
            advice = "Report this as a bug." if precision == "fp32" else "Export it in fp32."
            raise SA3Error(f"{target} was not written: {off} exceed the limit of {limit} for {precision}. {advice}")
    return ExportResult(target, sizes, errors)


def _find_libraries() -> dict[str, str]:
    try:
        versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    except importlib.metadata.PackageNotFoundError as error:
        raise LibraryError(f"{error.name} is not installed. Run: pip install 'sa3train[export]'") from None
    return {"sa3train": __version__, "torch": torch.__version__, **versions}


@contextlib.contextmanager
def _prepare_tracing() -> Iterator[None]:
    """Choose attention by its definition, and silence what torch says of packages that it does without."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), force_backend("reference"), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def _write_graph(graph: Graph, path: Path, identity: str) -> None:
    with _prepare_tracing():
        program = torch.onnx.export(
            graph.module.eval(),
            tuple(graph.inputs.values()),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=tuple(graph.dynamic[name] for name in graph.inputs),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props["sa3train.export"] = identity
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


def _describe(
    generator: Generator, folder: Path, identity: str, precision: str, versions: Mapping[str, str]
) -> dict[str, Any]:
    """Describe everything that a host needs to know."""
    model, facts = generator.model, generator.facts
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
        "precision": precision,
        "adapters": generator.adapters,
        "sample_rate": model.sample_rate,
        "samples_per_frame": model.downsampling_ratio,
        "latent_channels": model.latent_channels,
        "frames": {"multiple_of": 2, "min": MIN_FRAMES, "max": min(model.max_frames, MAX_FRAMES)},
        "max_rows": MAX_ROWS,
        "max_tokens": model.conditioner.max_length,
        "tail_seconds": defaults.tail,
        "chunks": {"enabled": model.autoencoder.chunked, "size": CHUNK_SIZE, "overlap": OVERLAP},
        "schedule": {"kind": "logsnr", "at_data": LOGSNR_AT_DATA, "at_noise": LOGSNR_AT_NOISE},
        "defaults": {"steps": defaults.steps, "sampler": defaults.sampler_type, "cfg_scale": defaults.cfg_scale},
        "guidance": "Rows 2B: conditions, then zeros for cross_attn_cond; APG 1 (docs/model.md, section 5).",
        "noise": {"order": NOISE, "latent_noise": same.noise_regularize, **noise},
        "versions": dict(versions),
        "files": {path.name: hash_file(path) for path in sorted(folder.iterdir())},
    }


def compare_graphs(model: StableAudio3, graphs: Mapping[str, Graph], folder: Path) -> dict[str, float]:
    """Run exported graphs on fixed noise and compare them with the modules that they were made of.

    Args:
        model: The model with its adapters applied.
        graphs: Its graphs.
        folder: Where they were written.

    Returns:
        Largest relative error of each graph, of the denoised latents at each step, and of all steps together; and how
        far the exact latents are from those of a text encoder in its file's dtype.
    """
    import onnxruntime

    sessions = {name: onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in graphs}

    def run(name: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        found = sessions[name].run(None, {key: tensor.contiguous().numpy() for key, tensor in inputs.items()})
        return [torch.from_numpy(each) for each in found]

    errors = dict[str, float]()
    with torch.no_grad(), force_backend("reference"):
        for name, graph in graphs.items():
            exact = graph.module(*graph.inputs.values())
            exact = (exact,) if isinstance(exact, Tensor) else exact
            errors[name] = max(map(_measure_error, run(name, graph.inputs), exact))
        return errors | _compare_steps(model, graphs, run)


def _compare_steps(model: StableAudio3, graphs: Mapping[str, Graph], run: Any) -> dict[str, float]:
    """Walk eight levels of noise with each, at another length than the one that was traced."""
    rng, frames, steps = torch.Generator().manual_seed(1), 42, 8
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "token_mask": torch.ones(1, 3, dtype=torch.bool)}
    prompt["seconds"] = torch.tensor([3.0])
    start_1CT = torch.randn(1, model.latent_channels, frames, generator=rng)
    mask_1T = torch.arange(frames)[None] < frames - 5
    local_1CT = torch.zeros(1, model.config.dit.local_width, frames)

    def walk(call: Any) -> tuple[Tensor, list[Tensor]]:
        prepared = call("prepare", (*call("conditions", prompt.values()), local_1CT))
        seen: list[Tensor] = []
        latents_1CT = SAMPLERS["euler"].sample(
            lambda x, t: call("step", (x, t[None], mask_1T, *prepared))[0],
            start_1CT,
            build_schedule(steps),
            callback=lambda step, total, sigma, denoised: seen.append(denoised),
        )
        return latents_1CT, seen

    def call_exact(name: str, inputs: Any) -> Sequence[Tensor]:
        found = graphs[name].module(*inputs)
        return (found,) if isinstance(found, Tensor) else found

    def call_as_generated(name: str, inputs: Any) -> Sequence[Tensor]:
        if name != "conditions":
            return call_exact(name, inputs)
        ids, mask, seconds = inputs
        encoder = model.conditioner.text_encoder.model(torch.device("cpu"))
        found = model.conditioner.condition(TextEmbedding(encoder(ids, mask), mask), seconds)
        return found.cross_attn_cond_BLD, found.global_cond_BD

    exact, seen = walk(call_exact)
    found = walk(lambda name, inputs: run(name, dict(zip(graphs[name].inputs, inputs, strict=True))))
    errors = {f"step {at + 1}": _measure_error(*pair) for at, pair in enumerate(zip(found[1], seen, strict=True))}
    errors["latents"] = _measure_error(found[0], exact)
    return errors | {TEXT_DTYPE: _measure_error(walk(call_as_generated)[0], exact)}


def _measure_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm().clamp(min=1e-12))
