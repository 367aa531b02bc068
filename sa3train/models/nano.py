"""nano: a trained Stable Audio 3 of about ten million parameters that needs no download, no token and no GPU.

Its weights ship in `sa3train/assets/nano/`: `version.txt`, `nano.safetensors` and `nano-base.safetensors` (DiT and
conditioner), `autoencoder.safetensors` (shared by both), all in fp16 under released names, and the folder `t5gemma`.
Both models are written once to `cache_dir()/nano/<version>/` in the released layout and loaded from there like any
other checkpoint. How they were trained: `recipes/nano/`.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sa3train.core.errors import SA3Error
from sa3train.core.files import beside, cache_dir
from sa3train.core.log import get_logger
from sa3train.models.weight_files import write_checkpoint

logger = get_logger(__name__)

ASSETS = Path(__file__).parents[1] / "assets" / "nano"
OBJECTIVES = {"nano": "rf_denoiser", "nano-base": "rectified_flow"}
TEXT_FOLDER = "t5gemma"
WIDTH = 128  # of latents
CONDITION_WIDTH = 128
MAX_TOKENS = 64  # of a prompt
PIECES = 1024  # of its tokenizer, at most
MASK_NOISE = 0.003  # of the decoder's new tokens: what hiss is made of
SAMPLE_SIZE = 5_292_032  # 120 s, as small


def nano_config(objective: str) -> dict[str, Any]:
    """The `model_config.json` of nano: "rectified_flow" (base) or "rf_denoiser" (post-trained)."""
    text = {"model_path": TEXT_FOLDER, "max_length": MAX_TOKENS}
    return {
        "model_type": "diffusion_cond_inpaint",
        "sample_size": SAMPLE_SIZE,
        "sample_rate": 44100,
        "audio_channels": 2,
        "model": {
            "pretransform": {"type": "autoencoder", "chunked": True, "config": nano_autoencoder_config()},
            "conditioning": {
                "cond_dim": CONDITION_WIDTH,
                "configs": [
                    {"id": "prompt", "type": "t5gemma", "config": text},
                    {"id": "seconds_total", "type": "number", "config": {"min_val": 0, "max_val": 384}},
                ],
            },
            "diffusion": {
                "type": "dit",
                "diffusion_objective": objective,
                "cross_attention_cond_ids": ["prompt", "seconds_total"],
                "global_cond_ids": ["seconds_total"],
                "local_add_cond_ids": ["inpaint_mask", "inpaint_masked_input"],
                "use_effective_length_for_schedule": True,
                "mask_padding_attention": True,
                "distribution_shift_options": {"type": "full", "min_length": 256, "max_length": 4096},
                "config": {
                    "io_channels": WIDTH,
                    "embed_dim": 256,
                    "depth": 3,
                    "num_heads": 4,
                    "cond_token_dim": CONDITION_WIDTH,
                    "global_cond_dim": CONDITION_WIDTH,
                    "local_add_cond_dim": WIDTH + 1,
                    "attn_kwargs": {"qk_norm": "rms", "differential": False},
                    "ff_kwargs": {"mult": 2.0},
                    "num_memory_tokens": 16,
                },
            },
            "io_channels": WIDTH,
        },
    }


def nano_autoencoder_config() -> dict[str, Any]:
    """The part of `nano_config` that describes its chunked SAME."""
    shared = {
        "channels": 128,
        "c_mults": [2],
        "strides": [16],
        "latent_dim": WIDTH,
        "differential": True,
        "dyt": True,
        "dim_heads": 64,
        "chunk_size": 32,
        "chunk_midpoint_shift": True,
    }
    encoder = {"in_channels": 512, "transformer_depths": [2], "mask_noise": 0.0, **shared}
    decoder = {
        "out_channels": 512,
        "transformer_depths": [3],
        "sinusoidal_blocks": [2],
        "conv_mapping": True,
        "mask_noise": MASK_NOISE,
        **shared,
    }
    return {
        "pretransform": {"type": "patched", "config": {"patch_size": 256, "channels": 2}},
        "encoder": {"type": "same", "config": encoder},
        "decoder": {"type": "same", "config": decoder},
        "bottleneck": {"type": "softnorm", "config": {"dim": WIDTH, "noise_regularize": True}},
        "latent_dim": WIDTH,
        "downsampling_ratio": 4096,
        "io_channels": 2,
    }


def nano_text_config() -> dict[str, Any]:
    """Keyword arguments of nano's T5Gemma encoder."""
    return {
        "vocab_size": PIECES,
        "hidden_size": CONDITION_WIDTH,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "max_position_embeddings": 512,
        "sliding_window": 512,
        "layer_types": ["sliding_attention", "full_attention"],
    }


def nano_folder(name: str) -> Path:
    """The folder of "nano" or "nano-base" in the released layout, made on first use.

    Any number of processes may ask at once. Raises `SA3Error` when the cache cannot be written.
    """
    version = _version()
    final = cache_dir() / "nano" / version
    if not final.is_dir():
        logger.info(f"writing nano to {final}")
        _write_once(final)
    return final / name


def _version() -> str:
    """The shipped version. Raises `SA3Error` when the installation lacks nano's weights."""
    try:
        return (ASSETS / "version.txt").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise SA3Error(f"{ASSETS} holds no weights of nano. Install sa3train again.") from None


def _write_once(final: Path) -> None:
    """Write both models aside and rename them into place; whoever comes second keeps the first one's."""
    try:
        with beside(final) as workplace:
            aside = workplace / final.name
            shared = load_file(ASSETS / "autoencoder.safetensors")
            for name, objective in OBJECTIVES.items():
                state = load_file(ASSETS / f"{name}.safetensors") | shared
                write_checkpoint(aside / name, nano_config(objective), state, torch.float16)
                shutil.copytree(ASSETS / TEXT_FOLDER, aside / name / TEXT_FOLDER)
            if not final.is_dir():
                _rename(aside, final)
    except OSError as error:
        raise SA3Error(
            f"cannot write nano to {final} ({error.strerror or error}). Free some space, or set SA3TRAIN_CACHE "
            f"to a folder you may write to."
        ) from error


def _rename(aside: Path, final: Path) -> None:
    try:
        aside.rename(final)
    except OSError:
        if not final.is_dir():
            raise
