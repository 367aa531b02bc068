"""What exports share: the model to export, how it is traced, and the manifest and tokenizer that hosts read."""

import contextlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sa3train.adapters.lora_argument import LoraArgument
from sa3train.core.errors import ConfigError
from sa3train.core.files import write_json
from sa3train.core.log import silence_logger
from sa3train.diffusion.schedule import LOGSNR_AT_DATA, LOGSNR_AT_NOISE
from sa3train.export.factors import describe_inputs
from sa3train.inference.generator import Generator
from sa3train.inference.resolve import resolve_settings
from sa3train.inference.settings import GenerationSettings
from sa3train.models.attention import force_backend
from sa3train.models.autoencoder import CHUNK_SIZE, OVERLAP
from sa3train.models.dit_graph import MAX_FRAMES, MAX_ROWS, MIN_FRAMES

FORMAT, VERSION = "sa3train-onnx", 3
MANIFEST = "manifest.json"
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


@contextlib.contextmanager
def prepare_tracing() -> Iterator[None]:
    """Choose attention by its definition, and silence what torch says of packages that it does without.

    Yields:
        Nothing.
    """
    silence = warnings.catch_warnings(action="ignore")
    with silence, silence_logger("torch.onnx"), torch.no_grad(), force_backend("reference"):
        yield


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
