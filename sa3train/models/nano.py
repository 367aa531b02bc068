"""nano: a Stable Audio 3 of about ten million parameters that needs no download, no token and no GPU.

The trained weights ship in `sa3train/assets/nano/`: `version.txt`, `nano.safetensors` and `nano-base.safetensors`
(DiT and conditioner), `autoencoder.safetensors` (shared by both), all under released names, and the folder
`t5gemma`. Where they are absent, the same architecture is made from a fixed seed and says that it is untrained; its
autoencoder is then the linear code of `code.safetensors`, which encodes and decodes audio from the start.
Either way both models are written once to `cache_dir()/nano/<version>/` in the released layout and loaded from
there like any other checkpoint.
"""

import functools
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sa3train.errors import SA3Error
from sa3train.files import cache_dir
from sa3train.log import get_logger
from sa3train.models.conditioners import quiet_transformers
from sa3train.models.linear_code import load_linear_code
from sa3train.models.parse import parse_model
from sa3train.models.weights import write_checkpoint

logger = get_logger(__name__)

ASSETS = Path(__file__).parents[1] / "assets" / "nano"
CODE = ASSETS / "code.safetensors"  # the autoencoder's linear code, with or without trained weights beside it
OBJECTIVES = {"nano": "rf_denoiser", "nano-base": "rectified_flow"}
TEXT_FOLDER = "t5gemma"
WIDTH = 256  # of latents
CONDITION_WIDTH = 128
SAMPLE_SIZE = 5_292_032  # 120 s, as small
_SEED = 20_260_101


def nano_config(objective: str) -> dict[str, Any]:
    """The `model_config.json` of nano: "rectified_flow" (base) or "rf_denoiser" (post-trained)."""
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
                    {"id": "prompt", "type": "t5gemma", "config": {"model_path": TEXT_FOLDER, "max_length": 128}},
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
        "sinusoidal_blocks": [0],
        "conv_mapping": True,
        "mask_noise": 0.01,
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
    """Keyword arguments of nano's T5Gemma encoder, one token per byte of the prompt."""
    return {
        "vocab_size": 260,
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


def is_trained() -> bool:
    """Whether trained weights ship with this installation."""
    return (ASSETS / "version.txt").is_file()


@functools.cache
def warn_if_untrained() -> None:
    """Log, once per process, that nano is untrained."""
    if not is_trained():
        logger.warning("nano is untrained: it shows that everything runs, not how it sounds.")


def _version() -> str:
    """The shipped version, or one that follows from the architecture, so that another one never meets old weights."""
    if is_trained():
        return (ASSETS / "version.txt").read_text(encoding="utf-8").strip()
    architecture = json.dumps([nano_config("rectified_flow"), nano_text_config(), _SEED])
    return f"untrained-{hashlib.sha256(architecture.encode() + CODE.read_bytes()).hexdigest()[:12]}"


def _write_once(final: Path) -> None:
    """Write both models aside and rename them into place; whoever comes second keeps the first one's."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        try:
            states, text = _trained() if is_trained() else _untrained()
            for name, objective in OBJECTIVES.items():
                write_checkpoint(aside / name, nano_config(objective), states[name], torch.float16)
                text(aside / name / TEXT_FOLDER)
            aside.chmod(0o755)
            if not final.is_dir():
                _rename(aside, final)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
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


States = dict[str, dict[str, Tensor]]


def _trained() -> tuple[States, Any]:
    from safetensors.torch import load_file

    shared = load_file(ASSETS / "autoencoder.safetensors")
    states = {name: {**load_file(ASSETS / f"{name}.safetensors"), **shared} for name in OBJECTIVES}
    return states, functools.partial(shutil.copytree, ASSETS / TEXT_FOLDER)


def _untrained() -> tuple[States, Any]:
    """One set of random weights for both models, the same on every call."""
    from sa3train.models.checkpoint import build, released_state
    from sa3train.models.sources import TextEncoderSource

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        modules = build(parse_model(nano_config("rectified_flow"), "nano"), TextEncoderSource((), ()), device="cpu")
        load_linear_code(modules["autoencoder"].state_dict(), CODE)
        encoder = new_text_encoder()
    return dict.fromkeys(OBJECTIVES, released_state(modules)), functools.partial(write_text_encoder, encoder=encoder)


def write_text_encoder(folder: Path, encoder: nn.Module | None = None) -> None:
    """Write nano's tokenizer and text encoder (a fresh one if none is given) in bf16, the way transformers does."""
    model: Any = encoder if encoder is not None else new_text_encoder()
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        model.to(torch.bfloat16).save_pretrained(folder)
        new_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def new_text_encoder() -> nn.Module:
    """nano's T5Gemma encoder with fresh weights."""
    from transformers import T5GemmaConfig, T5GemmaEncoderModel

    text = nano_text_config()
    config = T5GemmaConfig(encoder=text, decoder=dict(text), is_encoder_decoder=False, vocab_size=text["vocab_size"])
    return T5GemmaEncoderModel(config)


def new_tokenizer() -> Any:
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
