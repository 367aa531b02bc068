"""The layout of the MLX builds: .npz packs of the DiT with its conditioner, SAME's encoder, its decoder, T5Gemma.

Against the released layout, the gains of norms are `weight`, convolutions are (out, kernel, in), the local embedders'
layers are below `seq`, the conditioner's tensors begin with `cond.`, and weight norm is multiplied out. No config lies
beside the published packs: one is built from shapes and from what the released models have in common.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sa3train.core.errors import CheckpointError
from sa3train.core.files import create_staging_dir, get_cache_dir, write_json
from sa3train.core.log import get_logger
from sa3train.core.safetensors_file import write_tensors
from sa3train.core.text import list_few
from sa3train.models.blocks import compute_rotary_frequencies
from sa3train.models.diffusers_layout import MEDIUM_NOISE, MEDIUM_SAMPLES, list_constants
from sa3train.models.nano import TEXT_FOLDER, build_checkpoint_config, build_dit_config, build_same_config
from sa3train.models.npz_file import iterate_npz, read_npz_blob, read_npz_shapes, write_npz
from sa3train.models.sentencepiece_file import convert_tokenizer
from sa3train.models.t5gemma import list_names, read_encoder_config
from sa3train.models.weight_files import StoredTensor, WeightFiles

logger = get_logger(__name__)

Side = Literal["encoder", "decoder"]
_DIT, _CONDITIONER, _SAME = "model.model.", "conditioner.conditioners.", "pretransform.model."
_ROTARY = f"{_DIT}transformer.rotary_pos_emb.inv_freq"
_CONVOLUTIONS = (f"{_DIT}preprocess_conv.weight", f"{_DIT}postprocess_conv.weight")
_CONDITION = {
    "cond.padding_embedding": f"{_CONDITIONER}prompt.padding_embedding",
    "cond.seconds_total_weight": f"{_CONDITIONER}seconds_total.embedder.embedding.1.weight",
    "cond.seconds_total_bias": f"{_CONDITIONER}seconds_total.embedder.embedding.1.bias",
}
_DIT_PARTS = (("norm.weight", "norm.gamma"), (".to_local_embed.seq.", ".to_local_embed."))
_LAYER_PARTS = ((".attn.", ".self_attn."), (".ff.glu_proj.", ".ff.ff.0.proj."), (".ff.proj_out.", ".ff.ff.2."))
_STACKS: dict[Side, tuple[str, str, str]] = {
    "encoder": ("encoder.layers.0.", "project_out.", "encoder.layers.2."),
    "decoder": ("decoder.layers.3.", "project_in.", "decoder.layers.1."),
}
"""Of each side: where its resampler is in the released layout, and both names of the linear layer beside it."""

_BOTTLENECK = {"scaling_factor": (1, -1, 1), "bias": (1, -1, 1), "running_std": (1,)}
_TINY_KERNEL = 3
_SMALL = {"chunk_size": 32, "chunk_midpoint_shift": True}
_SMALL_SAMPLES = {"rf_denoiser": 5_292_032, "rectified_flow": 5_324_800}
_SMALL_NOISE = {"encoder": 0.0, "decoder": 0.01}
_MEDIUM_SINES = 8
_MAX_TOKENS = 256
_TEXT_CONFIG, _TEXT_TOKENIZER, _TEXT_ROTARY = "META", "TOKENIZER_MODEL", "rope_inv_freq"
T5GEMMA_SETTINGS: dict[str, Any] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64,
    "intermediate_size": 2048, "vocab_size": 256_000, "rope_theta": 10_000.0, "rms_norm_eps": 1e-6,
    "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 64, "sliding_window": 4096,
}  # fmt: skip
"""What the released code reads of `META`, and takes where that lacks it; no prompt is as long as the window."""


def _find_codec(pack: Path, kind: str, side: Side) -> Path:
    return pack.parent / f"same_{kind}_{side}_f32.npz"


def convert_dit_name(name: str) -> str | None:
    """Convert the released name of a tensor of the DiT or the conditioner.

    Args:
        name: Such as `model.model.transformer.layers.0.pre_norm.gamma`.

    Returns:
        Its key in a pack; None for another tensor.
    """
    if name.startswith(_DIT):
        key = name.removeprefix(_DIT)
        for packed, released in _DIT_PARTS:
            key = key.replace(released, packed)
        return key
    return next((key for key, released in _CONDITION.items() if released == name), None)


def _revert_dit_name(key: str) -> str:
    if key in _CONDITION:
        return _CONDITION[key]
    for packed, released in _DIT_PARTS:
        key = key.replace(packed, released)
    return f"{_DIT}{key}"


def _swap(tensor: Tensor) -> Tensor:
    """(out, kernel, in) to (out, in, kernel), or back."""
    return tensor.transpose(1, 2).contiguous()


def _measure_gain(tensor: Tensor) -> Tensor:
    """The g of a weight norm whose v is the whole weight."""
    return tensor.float().flatten(1).norm(dim=1).view(-1, 1, 1).to(tensor.dtype)


def _list_dit(pack: Path) -> Iterator[tuple[str, StoredTensor]]:
    for key, shape in read_npz_shapes(pack).items():
        name = _revert_dit_name(key)
        if name in _CONVOLUTIONS and len(shape) == 3:
            yield name, StoredTensor((shape[0], shape[2], shape[1]), pack, key, _swap)
        else:
            yield name, StoredTensor(shape, pack, key)


def _list_side(file: Path, side: Side) -> Iterator[tuple[str, StoredTensor]]:
    stack, linear, released_linear = _STACKS[side]
    unknown = []
    for key, shape in read_npz_shapes(file).items():
        if key in _BOTTLENECK:
            new = _BOTTLENECK[key]
            shape = tuple(max(shape, default=1) if length < 0 else length for length in new)
            yield f"{_SAME}bottleneck.{key}", StoredTensor(shape, file, key, partial(torch.reshape, shape=new))
        elif key == "mapping.weight":
            yield from _list_mapping(file, f"{_SAME}{stack}", shape)
        elif key.startswith(linear):
            yield f"{_SAME}{released_linear}{key.removeprefix(linear)}", StoredTensor(shape, file, key)
        elif key in ("new_tokens", "mapping.bias") or key.startswith("blocks."):
            name = key.replace("blocks.", "transformers.", 1)
            for packed, released in _LAYER_PARTS:
                name = name.replace(packed, released)
            yield f"{_SAME}{stack}{name}", StoredTensor(shape, file, key)
        else:
            unknown.append(key)
    if unknown:
        logger.warning("%s: %d arrays are not of a SAME and are not used: %s", file, len(unknown), list_few(unknown))


def _list_mapping(file: Path, stack: str, shape: tuple[int, ...]) -> Iterator[tuple[str, StoredTensor]]:
    """List v and g of the weight norm whose product is stored, as (out, kernel, in), (out, in, kernel) or (out, in)."""
    released: Callable[[Tensor], Tensor] = torch.Tensor.contiguous
    if len(shape) == 2:
        shape, released = (*shape, 1), lambda tensor: tensor.unsqueeze(-1)
    elif len(shape) == 3 and shape[1] <= _TINY_KERNEL < shape[2]:
        shape, released = (shape[0], shape[2], shape[1]), _swap
    yield f"{stack}mapping.weight_v", StoredTensor(shape, file, "mapping.weight", released)
    yield f"{stack}mapping.weight_g", StoredTensor((shape[0], 1, 1), file, "mapping.weight", _measure_gain)


def find_codec_kind(config: Mapping[str, Any]) -> str:
    """Find which SAME a model has.

    Args:
        config: Content of its `model_config.json`.

    Returns:
        "s" or "l", as the packs' file names have it.
    """
    return "l" if config["model"]["pretransform"]["config"]["encoder"]["config"].get("sliding_window") else "s"


def open_packs(pack: Path, kind: str) -> WeightFiles:
    """Open the packs of a model.

    Args:
        pack: Pack of the DiT; the others lie beside it.
        kind: "s" or "l".

    Returns:
        Its tensors by released names.

    Raises:
        CheckpointError: A pack is missing, damaged or of another model.
    """
    tensors = dict(_list_dit(pack))
    rotary = compute_rotary_frequencies("cpu")
    tensors.setdefault(_ROTARY, StoredTensor(tuple(rotary.shape), pack, constant=rotary))
    sides = {side: dict(_list_side(_find_codec(pack, kind, side), side)) for side in _STACKS}
    scales = [
        float(next(WeightFiles(pack, side).iterate([name]))[1])
        for side in sides.values()
        for name in side
        if name.endswith("running_std")
    ]
    if len(set(scales)) > 1:
        files = " and ".join(str(_find_codec(pack, kind, side)) for side in _STACKS)
        raise CheckpointError(f"{files} are not of one SAME: their running_std differ. Take both from one place.")
    tensors |= sides["decoder"] | sides["encoder"]
    return WeightFiles(pack, tensors | dict(list_constants(tensors)))


def build_config(pack: Path) -> dict[str, Any]:
    """Build the `model_config.json` of packs, which have none, from their shapes and names.

    Args:
        pack: Pack of the DiT; "base" in its name means a base model.

    Returns:
        The config.

    Raises:
        CheckpointError: A pack is missing, damaged or of another model.
    """
    shapes = {name: stored.shape for name, stored in _list_dit(pack)}
    try:
        width, latent_width = shapes[f"{_DIT}transformer.project_in.weight"]
        condition_width = shapes[_CONDITION["cond.padding_embedding"]][0]
        rows = shapes[f"{_DIT}transformer.layers.0.self_attn.to_qkv.weight"][0]
        inner = shapes[f"{_DIT}transformer.layers.0.ff.ff.2.weight"][1]
        memory_tokens = shapes[f"{_DIT}transformer.memory_tokens"][0]
        differential = rows == 5 * width
        kind = "l" if differential else "s"
        sides = {side: _build_side(_find_codec(pack, kind, side), side, kind) for side in _STACKS}
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{pack} or the packs beside it are no Stable Audio 3 ({error!r} is missing).") from error
    dit = build_dit_config(
        latent_width=latent_width,
        width=width,
        depth=sum(name.endswith("self_attn.to_qkv.weight") for name in shapes),
        condition_width=condition_width,
        memory_tokens=memory_tokens,
        differential=differential,
        ff_mult=inner / width,
    )
    objective = "rectified_flow" if "base" in pack.stem else "rf_denoiser"
    samples = MEDIUM_SAMPLES if kind == "l" else _SMALL_SAMPLES[objective]
    autoencoder = build_same_config(latent_width, 1, sides["encoder"], sides["decoder"])
    return build_checkpoint_config(objective, samples, dit, autoencoder, condition_width, _MAX_TOKENS)


def _build_side(file: Path, side: Side, kind: str) -> dict[str, Any]:
    shapes = read_npz_shapes(file)
    depth = sum(name.endswith("attn.to_qkv.weight") for name in shapes)
    both = {"channels": shapes["new_tokens"][-1], "transformer_depths": [depth]}
    decodes = side == "decoder"
    if kind == "l":
        sines = {"sinusoidal_blocks": [_MEDIUM_SINES]} if decodes else {}
        return both | sines | {"sliding_window": [1, 1], "mask_noise": MEDIUM_NOISE[side]}
    return both | _SMALL | {"mask_noise": _SMALL_NOISE[side], "conv_mapping": decodes}


def write_dit_pack(path: Path, weights: WeightFiles, changed: Mapping[str, Tensor], comment: str) -> None:
    """Write the DiT and the conditioner of a model as a pack in fp16, one tensor at a time.

    Args:
        path: The file.
        weights: The model's tensors.
        changed: Tensors by released names that take the place of those.
        comment: Text for the archive.

    Raises:
        CheckpointError: A weight is beyond what fp16 holds.
    """

    def convert() -> Iterator[tuple[str, Tensor]]:
        for name in weights.tensors:
            if (key := convert_dit_name(name)) is None:
                continue
            tensor = changed[name] if name in changed else next(weights.iterate([name]))[1]
            half = tensor.detach().to("cpu", torch.float16)
            if not torch.isfinite(half).all():
                raise CheckpointError(f"{name} would not be finite in fp16, which packs are in. Lower the strength.")
            yield key, _swap(half) if name in _CONVOLUTIONS else half

    write_npz(path, convert(), comment)


def unpack_text_encoder(pack: Path) -> Path:
    """Write the text encoder of a pack as a folder of the released layout, once, in the cache.

    Args:
        pack: `t5gemma_f16.npz`.

    Returns:
        The folder.

    Raises:
        CheckpointError: The pack is missing, damaged or of another encoder.
    """
    shapes = read_npz_shapes(pack, (_TEXT_CONFIG, _TEXT_TOKENIZER))
    state = pack.stat()
    final = get_cache_dir() / "mlx" / f"{TEXT_FOLDER}-{state.st_size:x}-{state.st_mtime_ns:x}"
    if final.is_dir():
        return final
    logger.info("writing the text encoder of %s to %s", pack, final)
    try:
        stated = json.loads(read_npz_blob(pack, _TEXT_CONFIG).rstrip(b"\0"))
        config = T5GEMMA_SETTINGS | {key: stated[key] for key in T5GEMMA_SETTINGS.keys() & stated.keys()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{pack}: {_TEXT_CONFIG} is no config of T5Gemma ({error}). Download it again."
        ) from error
    layers = sum(key.endswith("self_attn.q_proj.weight") for key in shapes)
    config |= {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
    tensors = {f"encoder.{key}": tensor for key, tensor in iterate_npz(pack, shapes) if key != _TEXT_ROTARY}
    with create_staging_dir(final) as staging:
        folder = staging / TEXT_FOLDER
        folder.mkdir()
        kind = {"architectures": ["T5GemmaEncoderModel"], "model_type": "t5gemma", "is_encoder_decoder": False}
        write_json(folder / "config.json", {**kind, "encoder": config})
        expected = {f"encoder.{name}" for name in list_names(read_encoder_config(folder))}
        if unknown := sorted(tensors.keys() - expected):
            logger.warning(
                "%s: %d arrays are not of a T5Gemma and are not used: %s", pack, len(unknown), list_few(unknown)
            )
        convert_tokenizer(read_npz_blob(pack, _TEXT_TOKENIZER), folder / "tokenizer.json", str(pack))
        write_tensors(folder / "model.safetensors", tensors)
        if not final.is_dir():
            folder.rename(final)
    return final
