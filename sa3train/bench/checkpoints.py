"""Checkpoints of the released architectures with random weights, made on the spot and kept in the cache.

Only names, shapes and scales are those of real weights: good for times and memory, never for how anything sounds.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa3train.bench.figures import ARCHES
from sa3train.core.errors import ConfigError, SA3Error
from sa3train.core.files import beside, cache_dir, write_json
from sa3train.core.log import get_logger
from sa3train.models.blocks import inverse_frequencies
from sa3train.models.checkpoint import build, released_state
from sa3train.models.conditioners import quiet_transformers
from sa3train.models.hub import TextEncoderSource
from sa3train.models.nano import nano_config, nano_text_config
from sa3train.models.parse import parse_model

logger = get_logger(__name__)

TEXT_FOLDER = "t5gemma"
_TEXT_WIDTH = 768
_T5GEMMA = {  # b-b-ul2's encoder
    "hidden_size": _TEXT_WIDTH,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
}
_SCALES = {"gamma": 1.0, "weight_g": 1.0, "scaling_factor": 1.0, "running_std": 1.0, "alpha": 1.0}


def arch_config(arch: str, objective: str = "rf_denoiser") -> dict[str, Any]:
    """The `model_config.json` of an architecture. Raises `ConfigError` for an unknown one."""
    if arch == "nano":
        return nano_config(objective)
    if arch == "small":
        return _released(objective, 5_292_032, _dit(1024, 20, 16, differential=False), _same_s())
    if arch == "medium":
        return _released(objective, 16_777_216, _dit(1536, 24, 24, differential=True), _same_l())
    raise ConfigError(f"unknown architecture {arch!r}: there are {', '.join(ARCHES)}.")


def random_checkpoint(arch: str, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of a checkpoint of `arch` with random weights in `dtype`; written to the cache on first use.

    Takes little memory whatever the size; medium in fp32 takes 9.2 GB of disk. Raises `SA3Error` when the disk is full.
    """
    config = arch_config(arch)
    name = str(dtype).removeprefix("torch.")
    digest = hashlib.sha256(json.dumps([config, name, 1], sort_keys=True).encode()).hexdigest()[:12]
    final = cache_dir() / "bench" / f"{arch}-{name}-{digest}"
    if final.is_dir():
        return final
    logger.info(f"making a random {arch} checkpoint in {final}")
    try:
        with beside(final) as workplace:
            aside = workplace / final.name
            aside.mkdir()
            _write(aside, arch, config, dtype)
            aside.rename(final)
    except OSError as error:
        if not final.is_dir():
            raise SA3Error(
                f"cannot write {final} ({error.strerror or error}). Free some space, or set SA3TRAIN_CACHE."
            ) from error
    return final


def _write(folder: Path, arch: str, config: dict[str, Any], dtype: torch.dtype) -> None:
    modules = build(parse_model(config, arch), TextEncoderSource((), ()))
    write_random(folder / "model.safetensors", released_state(modules), dtype)
    write_json(folder / "model_config.json", config)
    _write_text_encoder(folder / TEXT_FOLDER, nano_text_config() if arch == "nano" else _T5GEMMA)


def write_random(path: Path, shapes: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """A safetensors file of the names and shapes of `shapes`, one tensor in memory at a time."""
    itemsize, offset = torch.empty(0, dtype=dtype).element_size(), 0
    code = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    header: dict[str, Any] = {}
    for name, tensor in shapes.items():
        exact = name.endswith("inv_freq")
        size = tensor.numel() * (4 if exact else itemsize)
        header[name] = {
            "dtype": "F32" if exact else code,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in shapes.items():
            values = _random(name, tuple(tensor.shape), generator)
            values = values if name.endswith("inv_freq") else values.to(dtype)
            if values.numel():
                file.write(values.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values of a scale that keeps activations near one; norms and biases as they start in training."""
    last = name.rpartition(".")[2]
    if last == "inv_freq":
        return inverse_frequencies()
    if last in _SCALES:
        return torch.full(shape, _SCALES[last])
    if last in ("bias", "beta", "to_scale_shift_gate"):
        return torch.zeros(shape)
    fan_in = math.prod(shape[1:]) if len(shape) > 1 and last.startswith("weight") else 1
    return torch.randn(shape, generator=generator).mul_(fan_in**-0.5)


def _write_text_encoder(folder: Path, settings: dict[str, Any]) -> None:
    """A T5Gemma encoder in bf16 whose vocabulary is 260 bytes, not 256 000 words (0.4 GB less to load)."""
    from transformers import T5GemmaConfig, T5GemmaEncoderModel

    tokenizer = _byte_tokenizer()
    text = {**settings, "vocab_size": len(tokenizer)}
    config = T5GemmaConfig(encoder=text, decoder=dict(text), is_encoder_decoder=False, vocab_size=len(tokenizer))
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = T5GemmaEncoderModel(config)
    with quiet_transformers():
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _byte_tokenizer() -> Any:
    """One token per UTF-8 byte, after the four special ones; no BOS, no EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocabulary = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _dit(width: int, depth: int, heads: int, *, differential: bool) -> dict[str, Any]:
    return {
        "io_channels": 256,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "cond_token_dim": _TEXT_WIDTH,
        "global_cond_dim": _TEXT_WIDTH,
        "local_add_cond_dim": 257,
        "attn_kwargs": {"qk_norm": "rms", "differential": differential},
        "ff_kwargs": {"mult": 4.0},
        "num_memory_tokens": 64,
    }


def _same_s() -> dict[str, Any]:
    shared = {"channels": 128, "transformer_depths": [6], "chunk_size": 32, "chunk_midpoint_shift": True}
    return _same({**shared, "mask_noise": 0.0}, {**shared, "mask_noise": 0.01, "conv_mapping": True})


def _same_l() -> dict[str, Any]:
    shared = {"channels": 256, "transformer_depths": [12], "sliding_window": [1, 1]}
    return _same({**shared, "mask_noise": 0.001}, {**shared, "mask_noise": 0.1, "sinusoidal_blocks": [8]})


def _same(encoder: dict[str, Any], decoder: dict[str, Any]) -> dict[str, Any]:
    both = {"c_mults": [6], "strides": [16], "latent_dim": 256, "differential": True, "dyt": True, "dim_heads": 64}
    return {
        "pretransform": {"type": "patched", "config": {"patch_size": 256, "channels": 2}},
        "encoder": {"type": "taae_v2", "config": {"in_channels": 512, **both, **encoder}},
        "decoder": {"type": "taae_v2", "config": {"out_channels": 512, **both, **decoder}},
        "bottleneck": {"type": "softnorm", "config": {"dim": 256, "noise_regularize": True}},
        "latent_dim": 256,
        "downsampling_ratio": 4096,
        "io_channels": 2,
    }


def _released(objective: str, sample_size: int, dit: dict[str, Any], same: dict[str, Any]) -> dict[str, Any]:
    text = {"model_path": TEXT_FOLDER, "max_length": 256}
    return {
        "model_type": "diffusion_cond_inpaint",
        "sample_size": sample_size,
        "sample_rate": 44100,
        "audio_channels": 2,
        "model": {
            "pretransform": {"type": "autoencoder", "chunked": True, "config": same},
            "conditioning": {
                "cond_dim": _TEXT_WIDTH,
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
                "config": dit,
            },
            "io_channels": 256,
        },
    }
