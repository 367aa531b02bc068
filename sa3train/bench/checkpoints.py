"""Checkpoints of the released architectures with random weights, made on first use and stored in the cache.

Names, shapes and scales are those of real weights: right for time and memory, not for how anything sounds.
"""

import contextlib
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa3train.bench.figures import ARCHES
from sa3train.core.dtypes import DTYPES, name_dtype
from sa3train.core.errors import ConfigError, SA3Error
from sa3train.core.files import create_staging_dir, get_cache_dir, write_json
from sa3train.core.log import get_logger
from sa3train.models.blocks import compute_rotary_frequencies
from sa3train.models.checkpoint import build_modules, collect_state_dict
from sa3train.models.hub import TextEncoderSource
from sa3train.models.nano import (
    build_checkpoint_config,
    build_dit_config,
    build_nano_config,
    build_nano_text_config,
    build_same_config,
)
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
    digest = hashlib.sha256(json.dumps([config, name, 1], sort_keys=True).encode()).hexdigest()[:12]
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
            _write_text_encoder(part / TEXT_FOLDER, build_nano_text_config() if arch == "nano" else _T5GEMMA)
            part.rename(final)
    except OSError as error:
        if not final.is_dir():
            raise SA3Error(
                f"cannot write {final} ({error.strerror or error}). Free disk space or set SA3TRAIN_CACHE."
            ) from error
    return final


def _write_random_weights(path: Path, shapes: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write a safetensors file with the names and shapes of `shapes`, one tensor in memory at a time."""
    itemsize, offset = torch.empty(0, dtype=dtype).element_size(), 0
    code = DTYPES[name_dtype(dtype)][1]
    header: dict[str, Any] = {}
    for name, tensor in shapes.items():
        exact = name.endswith("inv_freq")
        size = tensor.numel() * (4 if exact else itemsize)
        span = [offset, offset + size]
        header[name] = {"dtype": "F32" if exact else code, "shape": list(tensor.shape), "data_offsets": span}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in shapes.items():
            values = _draw_weight(name, tuple(tensor.shape), generator)
            values = values if name.endswith("inv_freq") else values.to(dtype)
            if values.numel():
                file.write(values.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _draw_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw values of a scale that keeps activations near one; norms and biases are as at the start of training."""
    last = name.rpartition(".")[2]
    if last == "inv_freq":
        return compute_rotary_frequencies()
    if last in _SCALES:
        return torch.full(shape, _SCALES[last])
    if last in ("bias", "beta", "to_scale_shift_gate"):
        return torch.zeros(shape)
    fan_in = math.prod(shape[1:]) if len(shape) > 1 and last.startswith("weight") else 1
    return torch.randn(shape, generator=generator).mul_(fan_in**-0.5)


def _write_text_encoder(folder: Path, settings: dict[str, Any]) -> None:
    """Write a T5Gemma encoder in bf16 whose vocabulary is 260 bytes instead of 256 000 words: 0.4 GB less to load."""
    from transformers import T5GemmaConfig, T5GemmaEncoderModel

    tokenizer = _build_byte_tokenizer()
    text = {**settings, "vocab_size": len(tokenizer)}
    config = T5GemmaConfig(encoder=text, decoder=dict(text), is_encoder_decoder=False, vocab_size=len(tokenizer))
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = T5GemmaEncoderModel(config)
    with _silence_transformers():
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _build_byte_tokenizer() -> Any:
    """Build a tokenizer with one token for each UTF-8 byte after four special ones; it adds neither BOS nor EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocabulary = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@contextlib.contextmanager
def _silence_transformers() -> Iterator[None]:
    """Silence transformers: no progress bars and no warnings about unused decoder weights inside the block."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
