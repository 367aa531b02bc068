"""Checkpoints of the released architectures with random weights, made on first use and stored in the cache.

Names, shapes and scales are those of real weights: right for time and memory, not for how anything sounds.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa3train.bench.figures import ARCHES, Options
from sa3train.core.dtypes import get_dtype
from sa3train.core.errors import ConfigError, SA3Error
from sa3train.core.files import create_staging_dir, get_cache_dir, replace_path, write_json
from sa3train.core.log import get_logger
from sa3train.core.safetensors_file import write_tensor_stream
from sa3train.models.blocks import compute_rotary_frequencies
from sa3train.models.checkpoint import StableAudio3, build_modules, collect_state_dict, load_checkpoint
from sa3train.models.mlx_layout import T5GEMMA_SETTINGS
from sa3train.models.nano import (
    ASSETS,
    CONDITION_WIDTH,
    TEXT_FOLDER,
    build_checkpoint_config,
    build_dit_config,
    build_nano_config,
    build_same_config,
)
from sa3train.models.parse import parse_model
from sa3train.models.t5gemma import load_encoder
from sa3train.models.text_source import TextEncoderSource

logger = get_logger(__name__)

_TEXT_WIDTH = T5GEMMA_SETTINGS["hidden_size"]
_T5GEMMA = {name: value for name, value in T5GEMMA_SETTINGS.items() if name != "vocab_size"}
_SIZES = {CONDITION_WIDTH: _TEXT_WIDTH, 384: _T5GEMMA["intermediate_size"]}
"""Sizes of that encoder for nano's."""
_RELEASED: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "small": (
        5_292_032,
        {"width": 1024, "depth": 20, "differential": False},
        {"channels": 128, "transformer_depths": [6], "chunk_size": 32, "chunk_midpoint_shift": True},
        {"mask_noise": 0.0},
        {"mask_noise": 0.01, "conv_mapping": True},
    ),
    "medium": (
        16_777_216,
        {"width": 1536, "depth": 24, "differential": True},
        {"channels": 256, "transformer_depths": [12], "sliding_window": [1, 1]},
        {"mask_noise": 0.001},
        {"mask_noise": 0.1, "sinusoidal_blocks": [8]},
    ),
}
"""Sample size, settings of the DiT, and settings of the autoencoder: of both stacks, the encoder's, the decoder's."""
_SCALES = {"gamma": 1.0, "weight_g": 1.0, "scaling_factor": 1.0, "running_std": 1.0, "alpha": 1.0}


def build_model_config(arch: str, objective: str = "rf_denoiser") -> dict[str, Any]:
    """Build the `model_config.json` of an architecture.

    Args:
        arch: One of `ARCHES`.
        objective: "rf_denoiser" (post-trained) or "rectified_flow" (base).

    Returns:
        The configuration.

    Raises:
        ConfigError: The architecture is unknown.
    """
    if arch == "nano":
        return build_nano_config(objective)
    if arch not in _RELEASED:
        raise ConfigError(f"unknown architecture {arch!r}. Use one of: {', '.join(ARCHES)}.")
    sample_size, dit, shared, encoder, decoder = _RELEASED[arch]
    transformer = build_dit_config(latent_width=256, condition_width=_TEXT_WIDTH, memory_tokens=64, **dit)
    same = build_same_config(256, 6, shared | encoder, shared | decoder)
    return build_checkpoint_config(objective, sample_size, transformer, same, _TEXT_WIDTH, 256)


def make_random_checkpoint(arch: str, dtype: torch.dtype = torch.float32) -> Path:
    """Make a checkpoint with random weights, or find it in the cache.

    It takes little memory whatever the size; medium in fp32 takes 9.2 GB of disk.

    Args:
        arch: One of `ARCHES`.
        dtype: Of the weights.

    Returns:
        Folder of the checkpoint.

    Raises:
        SA3Error: It cannot be written.
    """
    config = build_model_config(arch)
    name = str(dtype).removeprefix("torch.")
    digest = hashlib.sha256(json.dumps([config, name, 2], sort_keys=True).encode()).hexdigest()[:12]
    final = get_cache_dir() / "bench" / f"{arch}-{name}-{digest}"
    if final.is_dir():
        return final
    logger.info(f"making a random {arch} checkpoint in {final}")
    try:
        with create_staging_dir(final) as work:
            part = work / final.name
            part.mkdir()
            modules = build_modules(parse_model(config, arch), TextEncoderSource((), ()))
            _write_random_weights(part / "model.safetensors", collect_state_dict(modules), dtype)
            write_json(part / "model_config.json", config)
            _write_text_encoder(part / TEXT_FOLDER, arch)
            replace_path(part, final)
    except OSError as error:
        if not final.is_dir():
            raise SA3Error(
                f"cannot write {final} ({error.strerror or error}). Free disk space or set SA3TRAIN_CACHE."
            ) from error
    return final


def load_random_model(arch: str, options: Options, *parts: str, dtype: str | None = None) -> StableAudio3:
    """Load parts of a checkpoint with random weights.

    Args:
        arch: One of `ARCHES`.
        options: `device` and `dtype`.
        *parts: "dit", "conditioner" and "autoencoder".
        dtype: Another dtype.

    Returns:
        The model.
    """
    return load_checkpoint(make_random_checkpoint(arch), options.device, get_dtype(dtype or options.dtype), parts=parts)


def _write_random_weights(path: Path, shapes: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write a safetensors file with the names and shapes of `shapes`, one tensor in memory at a time."""
    generator = torch.Generator().manual_seed(0)
    drawn = ((name, _draw_weight(name, tuple(tensor.shape), generator)) for name, tensor in shapes.items())
    weights = (values if name.endswith("inv_freq") else values.to(dtype) for name, values in drawn)
    write_tensor_stream(path, shapes, weights, {})


def _draw_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw values of a scale that keeps activations near one; norms and biases are as at the start of training."""
    last = name.rpartition(".")[2]
    if last == "inv_freq":
        return compute_rotary_frequencies()
    if last in _SCALES:
        return torch.full(shape, _SCALES[last])
    if last in ("bias", "beta", "to_scale_shift_gate") or name.endswith("norm.weight"):
        return torch.zeros(shape)
    fan_in = math.prod(shape[1:]) if len(shape) > 1 and last.startswith("weight") else 1
    return torch.randn(shape, generator=generator).mul_(fan_in**-0.5)


def _write_text_encoder(folder: Path, arch: str) -> None:
    """Write a T5Gemma encoder in bf16 with nano's tokenizer of 925 words instead of 256 000: 0.4 GB less to load."""
    shutil.copytree(ASSETS / TEXT_FOLDER, folder)
    if arch == "nano":
        return
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["encoder"]["layer_types"]
    config["encoder"] |= _T5GEMMA
    write_json(folder / "config.json", config)
    shapes = {}
    for name, tensor in load_encoder(ASSETS / TEXT_FOLDER).weights.items():
        shape = [_SIZES.get(size, size) for size in tensor.shape]
        for layer in range(_T5GEMMA["num_hidden_layers"]) if name.startswith("layers.0.") else (0,):
            shapes[f"encoder.{name.replace('layers.0.', f'layers.{layer}.')}"] = torch.empty(shape, device="meta")
    _write_random_weights(folder / "model.safetensors", shapes, torch.bfloat16)
