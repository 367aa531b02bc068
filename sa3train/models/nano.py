"""nano: a trained Stable Audio 3 of about ten million parameters that needs no download, no token and no GPU.

Its weights ship in `sa3train/assets/nano/`: `version.txt`, `nano-base.safetensors` (DiT and conditioner),
`nano.safetensors` (the post-trained model's difference to it, `read_post_trained`), `autoencoder.safetensors` (shared
by both), in fp16 under released names, and the folder `t5gemma`.
Both models are written once to `get_cache_dir()/nano/<version>-<hash>/`, in the released layout, and loaded like any
other checkpoint. How they were trained: `recipes/nano/`.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sa3train.core.errors import SA3Error
from sa3train.core.files import create_staging_dir, get_cache_dir, replace_path
from sa3train.core.log import get_logger
from sa3train.models.blocks import compute_rotary_frequencies
from sa3train.models.config import HEAD_WIDTH
from sa3train.models.parse import complete_config
from sa3train.models.weight_files import write_checkpoint

logger = get_logger(__name__)

ASSETS = Path(__file__).parents[1] / "assets" / "nano"
OBJECTIVES = {"nano": "rf_denoiser", "nano-base": "rectified_flow"}
TEXT_FOLDER = "t5gemma"
STEP = ".step"  # of what each row of a matrix counts in, in `nano.safetensors`
LATENT_WIDTH = 128
CONDITION_WIDTH = 128
MAX_TOKENS = 64
MASK_NOISE = 0.003  # of the decoder's new tokens; noisy sounds are made from it
SAMPLE_SIZE = 5_292_032  # 120 s, as the small models


def build_checkpoint_config(
    objective: str,
    sample_size: int,
    dit: Mapping[str, Any],
    autoencoder: Mapping[str, Any],
    condition_width: int,
    max_tokens: int,
) -> dict[str, Any]:
    """Build a `model_config.json` whose text encoder is in the folder `t5gemma` beside it.

    Like the other configs built here, it leaves out what every Stable Audio 3 has: `parse.complete_config` adds that.

    Args:
        objective: "rectified_flow" (base) or "rf_denoiser" (post-trained).
        sample_size: Samples of the longest generation.
        dit: Config of the diffusion transformer.
        autoencoder: Config of the autoencoder.
        condition_width: Width of the condition tokens.
        max_tokens: Tokens of a prompt.

    Returns:
        The config.
    """
    text = {"model_path": TEXT_FOLDER, "max_length": max_tokens}
    return {
        "model_type": "diffusion_cond_inpaint",
        "sample_size": sample_size,
        "sample_rate": 44100,
        "model": {
            "pretransform": {"chunked": True, "config": autoencoder},
            "conditioning": {
                "cond_dim": condition_width,
                "configs": [
                    {"id": "prompt", "type": "t5gemma", "config": text},
                    {"id": "seconds_total", "type": "number", "config": {"min_val": 0, "max_val": 384}},
                ],
            },
            "diffusion": {
                "diffusion_objective": objective,
                "use_effective_length_for_schedule": True,
                "mask_padding_attention": True,
                "config": dit,
            },
        },
    }


def build_dit_config(
    *,
    latent_width: int,
    width: int,
    depth: int,
    condition_width: int,
    memory_tokens: int,
    differential: bool = False,
    ff_mult: float = 4.0,
) -> dict[str, Any]:
    """Build the part of a `model_config.json` that describes the diffusion transformer.

    Args:
        latent_width: Channels of a latent frame.
        width: Channels inside, in heads of 64.
        depth: Blocks.
        condition_width: Width of the condition tokens.
        memory_tokens: Learned tokens in front of the frames.
        differential: Whether attention is differential.
        ff_mult: Inner width of the feed-forward, times the width.

    Returns:
        The config.
    """
    return {
        "io_channels": latent_width,
        "embed_dim": width,
        "depth": depth,
        "num_heads": width // HEAD_WIDTH,
        "cond_token_dim": condition_width,
        "global_cond_dim": condition_width,
        "local_add_cond_dim": latent_width + 1,
        "attn_kwargs": {"differential": differential},
        "ff_kwargs": {"mult": ff_mult},
        "num_memory_tokens": memory_tokens,
    }


def build_same_config(
    latent_width: int, width_mult: int, encoder: Mapping[str, Any], decoder: Mapping[str, Any]
) -> dict[str, Any]:
    """Build the part of a `model_config.json` that describes the autoencoder.

    Args:
        latent_width: Channels of a latent frame.
        width_mult: Channels inside, times `channels`.
        encoder: What the encoder has of its own.
        decoder: What the decoder has of its own.

    Returns:
        The config.
    """
    both = {"c_mults": [width_mult], "strides": [16], "latent_dim": latent_width}
    return {
        "pretransform": {"config": {}},
        "encoder": {"type": "same", "config": {**both, **encoder}},
        "decoder": {"type": "same", "config": {**both, **decoder}},
        "bottleneck": {"config": {"noise_regularize": True}},
        "latent_dim": latent_width,
    }


def build_nano_config(objective: str) -> dict[str, Any]:
    """Build the `model_config.json` of nano.

    Args:
        objective: "rectified_flow" (base) or "rf_denoiser" (post-trained).

    Returns:
        The config.
    """
    dit = build_dit_config(
        latent_width=LATENT_WIDTH, width=256, depth=3, condition_width=CONDITION_WIDTH, memory_tokens=16, ff_mult=2.0
    )
    autoencoder = build_nano_autoencoder_config()
    return build_checkpoint_config(objective, SAMPLE_SIZE, dit, autoencoder, CONDITION_WIDTH, MAX_TOKENS)


def build_nano_autoencoder_config() -> dict[str, Any]:
    """Build the part of nano's config that describes its autoencoder, a chunked SAME.

    Returns:
        The config.
    """
    shared = {"channels": 128, "chunk_size": 32, "chunk_midpoint_shift": True}
    encoder = {**shared, "transformer_depths": [3], "mask_noise": 0.0}
    decoder = {**shared, "transformer_depths": [3], "sinusoidal_blocks": [2], "conv_mapping": True}
    return build_same_config(LATENT_WIDTH, 2, encoder, {**decoder, "mask_noise": MASK_NOISE})


def ensure_nano_folder(name: str) -> Path:
    """Ensure that nano's models are in the cache. Any number of processes may call this at once.

    Args:
        name: "nano" or "nano-base".

    Returns:
        The model's folder in the released layout.

    Raises:
        SA3Error: The cache cannot be written, or the installation lacks nano's weights.
    """
    final = get_cache_dir() / "nano" / f"{_read_version()}-{_hash_configs()}"
    if not final.is_dir():
        logger.info(f"writing nano to {final}")
        _write_once(final)
    return final / name


def _read_version() -> str:
    """Read the shipped version."""
    try:
        return (ASSETS / "version.txt").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise SA3Error(f"{ASSETS} contains no weights of nano. Reinstall sa3train.") from None


def read_post_trained(base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the post-trained weights. Matrices ship as differences to the base's, in steps of a size for each row.

    Args:
        base: Weights of the base by name.

    Returns:
        Weights in fp16.
    """
    shipped = load_file(ASSETS / "nano.safetensors")
    steps = {name.removesuffix(STEP): shipped.pop(name) for name in list(shipped) if name.endswith(STEP)}
    return shipped | {
        name: (base[name].float() + step.float() * shipped[name].float()).half() for name, step in steps.items()
    }


def _hash_configs() -> str:
    """Hash what is written to both `model_config.json`, so that a change of it is not hidden by an earlier cache."""
    configs = [complete_config(build_nano_config(objective), name) for name, objective in OBJECTIVES.items()]
    return hashlib.sha256(json.dumps(configs, sort_keys=True).encode()).hexdigest()[:8]


def _write_once(final: Path) -> None:
    """Write both models to a staging folder and rename it. Of several processes the first one's folder stays."""
    try:
        with create_staging_dir(final) as folder:
            staged = folder / final.name
            shared, base = (load_file(ASSETS / f"{name}.safetensors") for name in ("autoencoder", "nano-base"))
            exact = compute_rotary_frequencies(torch.device("cpu"))
            for name, objective in OBJECTIVES.items():
                state = shared | (base if name == "nano-base" else read_post_trained(base))
                state |= {key: exact for key in state if key.endswith("inv_freq")}  # the released code reads them
                write_checkpoint(staged / name, build_nano_config(objective), state, torch.float16)
                shutil.copytree(ASSETS / TEXT_FOLDER, staged / name / TEXT_FOLDER)
            if not final.is_dir():
                _rename(staged, final)
    except OSError as error:
        raise SA3Error(
            f"cannot write nano to {final} ({error.strerror or error}). Free some space, or set SA3TRAIN_CACHE "
            f"to a folder you may write to."
        ) from error


def _rename(staged: Path, final: Path) -> None:
    try:
        replace_path(staged, final)
    except OSError:
        if not final.is_dir():
            raise
