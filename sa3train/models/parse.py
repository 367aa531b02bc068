"""Reads a published `model_config.json` into the dataclasses of `config.py`, and completes one that is to be written.

Absent keys have the published defaults. A value that asks for another architecture is a `CheckpointError`; an unknown
key is logged, since it may or may not change what the model computes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from sa3train.core.errors import CheckpointError
from sa3train.core.log import get_logger
from sa3train.models.config import (
    FOURIER_FEATURES,
    HEAD_WIDTH,
    AutoencoderConfig,
    ConditionerConfig,
    DiTConfig,
    ModelConfig,
    NumberConfig,
    ShiftConfig,
    StackConfig,
    TextConfig,
)

logger = get_logger(__name__)

Value = TypeVar("Value")


class _Reader:
    """One JSON object, its path in the file for messages, and which keys were read."""

    def __init__(self, raw: Any, where: str, source: str) -> None:
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"{source}: {where or 'the file'} should be a JSON object, not {type(raw).__name__}.")
        self.raw, self.where, self.source, self.known = raw, where, source, set[str]()

    def _get_path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def fail(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.source}: {self._get_path(key)} {problem}. Only Stable Audio 3 and SAME are supported."
        )

    def child(self, key: str) -> "_Reader":
        self.known.add(key)
        if key not in self.raw:
            raise self.fail(key, "is missing")
        return _Reader(self.raw[key], self._get_path(key), self.source)

    def get(self, key: str, kind: type[Value] | tuple[type, ...], default: Value | None = None) -> Value:
        self.known.add(key)
        value = self.raw.get(key, default)
        if value is None:
            raise self.fail(key, "is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.fail(key, f"is {value!r}, of the wrong type")
        return value  # type: ignore[return-value]

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.get(key, int, default)
        if value <= 0:
            raise self.fail(key, f"is {value}, but must be positive")
        return value

    def single(self, key: str, default: int | None = None) -> int:
        """Read a list of one number: these models have one resampling stage."""
        values = self.get(key, list, None if default is None else [default])
        if len(values) != 1 or isinstance(values[0], bool) or not isinstance(values[0], int):
            raise self.fail(key, f"is {values!r}, but one stage is expected")
        return int(values[0])

    def require(self, **accepted: tuple[Any, ...]) -> None:
        """Check keys that, where present, must have one of the given values."""
        for key, values in accepted.items():
            self.known.add(key)
            if key in self.raw and self.raw[key] not in values:
                wanted = " or ".join(repr(value) for value in values)
                raise self.fail(key, f"is {self.raw[key]!r}, where {wanted} is expected")

    def ignore(self, *keys: str) -> None:
        """Ignore keys that do not change what is computed here."""
        self.known.update(keys)

    def finish(self) -> None:
        unknown = sorted(set(self.raw) - self.known)
        if unknown:
            names = ", ".join(unknown)
            logger.warning(f"{self.source}: {self.where or 'top level'} has keys sa3train does not know: {names}")


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a config of a model.

    Args:
        path: `model_config.json`, or a config in the layout of diffusers.

    Returns:
        The JSON object.

    Raises:
        CheckpointError: The file is missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing. Copy, save or download the model's folder whole.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({error}). Delete {path.resolve()} and download it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should be a JSON object, not {type(content).__name__}.")
    return content


def is_autoencoder(raw: Mapping[str, Any]) -> bool:
    """Tell whether a config describes a stand-alone SAME rather than a whole model.

    Args:
        raw: Content of `model_config.json`.

    Returns:
        Whether it does.
    """
    return raw.get("model_type") == "autoencoder"


def parse_model(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """Parse the config of a whole model.

    Args:
        raw: Content of `model_config.json`.
        source: Name of the file, for messages.

    Returns:
        The architecture.

    Raises:
        CheckpointError: A key is missing or asks for another architecture.
    """
    top = _Reader(raw, "", source)
    top.require(model_type=("diffusion_cond_inpaint",))
    if "model_type" not in raw or "model" not in raw:
        raise CheckpointError(f"{source} is not the config of a Stable Audio 3 model: model_type or model is missing.")
    top.ignore("training", "model")
    sample_rate = top.positive("sample_rate")
    channels = top.positive("audio_channels", 2)
    model = top.child("model")
    pretransform = model.child("pretransform")
    pretransform.require(type=("autoencoder",), scale=(1.0,), model_half=(False,))
    pretransform.ignore("iterate_batch", "enable_grad", "config")
    diffusion = model.child("diffusion")
    dit = _parse_dit(diffusion)
    conditioner = _parse_conditioner(model.child("conditioning"))
    autoencoder = _parse_autoencoder(pretransform.child("config"), sample_rate)
    model.require(io_channels=(dit.latent_width,))
    if autoencoder.latent_width != dit.latent_width:
        raise model.fail("io_channels", f"does not match the autoencoder's latent width {autoencoder.latent_width}")
    if conditioner.width != dit.context_width:
        raise model.fail("conditioning.cond_dim", f"does not match the DiT's {dit.context_width}")
    config = ModelConfig(
        sample_rate=sample_rate,
        sample_size=top.positive("sample_size"),
        audio_channels=channels,
        objective=diffusion.get("diffusion_objective", str),
        dit=dit,
        conditioner=conditioner,
        autoencoder=autoencoder,
        chunked=pretransform.get("chunked", bool, False),
        training_shift=_parse_shift(diffusion),
        use_effective_length=diffusion.get("use_effective_length_for_schedule", bool, False),
        mask_padding=diffusion.get("mask_padding_attention", bool, False),
    )
    for reader in (top, model, pretransform, diffusion):
        reader.finish()
    return config


def parse_autoencoder(raw: Mapping[str, Any], source: str) -> AutoencoderConfig:
    """Parse the config of a stand-alone SAME.

    Args:
        raw: Content of `model_config.json`.
        source: Name of the file, for messages.

    Returns:
        The architecture.

    Raises:
        CheckpointError: A key is missing or asks for another architecture.
    """
    top = _Reader(raw, "", source)
    top.require(model_type=("autoencoder",))
    top.ignore("sample_size", "audio_channels", "training")
    config = _parse_autoencoder(top.child("model"), top.positive("sample_rate"))
    top.finish()
    return config


def _parse_dit(diffusion: _Reader) -> DiTConfig:
    diffusion.require(
        type=("dit",),
        diffusion_objective=("rectified_flow", "rf_denoiser"),
        cross_attention_cond_ids=(["prompt", "seconds_total"],),
        global_cond_ids=(["seconds_total"],),
        local_add_cond_ids=(["inpaint_mask", "inpaint_masked_input"],),
    )
    reader = diffusion.child("config")
    reader.require(
        patch_size=(1,),
        transformer_type=("continuous_transformer",),
        global_cond_type=("adaLN",),
        timestep_features_type=("expo",),
        timestep_features_logsnr=(False,),
        norm_type=("rms_norm",),
        project_cond_tokens=(True,),
        project_global_cond=(True,),
    )
    attention = reader.child("attn_kwargs")
    attention.require(qk_norm=("rms",))
    feed_forward = _Reader(reader.raw.get("ff_kwargs", {}), "ff_kwargs", reader.source)
    norm = _Reader(reader.raw.get("norm_kwargs", {}), "norm_kwargs", reader.source)
    norm.require(force_fp32=(True,))
    reader.ignore("ff_kwargs", "norm_kwargs")
    config = DiTConfig(
        latent_width=reader.positive("io_channels"),
        width=reader.positive("embed_dim"),
        depth=reader.positive("depth"),
        heads=reader.positive("num_heads"),
        context_width=reader.positive("cond_token_dim"),
        global_width=reader.positive("global_cond_dim"),
        local_width=reader.positive("local_add_cond_dim"),
        differential=attention.get("differential", bool, False),
        ff_mult=float(feed_forward.get("mult", (int, float), 4.0)),
        memory_tokens=reader.get("num_memory_tokens", int, 0),
        features=reader.positive("timestep_features_dim", FOURIER_FEATURES),
    )
    if config.width != config.heads * HEAD_WIDTH:
        raise reader.fail("num_heads", f"is {config.heads}, but heads of {HEAD_WIDTH} make up the width {config.width}")
    if config.local_width != config.latent_width + 1:
        raise reader.fail("local_add_cond_dim", f"is {config.local_width}, where io_channels + 1 is expected")
    for each in (reader, attention, feed_forward, norm):
        each.finish()
    return config


def _parse_shift(diffusion: _Reader) -> ShiftConfig:
    diffusion.ignore("distribution_shift_options")
    reader = _Reader(
        diffusion.raw.get("distribution_shift_options", {}), "distribution_shift_options", diffusion.source
    )
    reader.require(type=("full", "full.sine", "flux", "logsnr", "none"))
    config = ShiftConfig(
        kind=reader.get("type", str, "full"),
        min_length=reader.positive("min_length", 256),
        max_length=reader.positive("max_length", 4096),
    )
    reader.finish()
    return config


def _parse_conditioner(reader: _Reader) -> ConditionerConfig:
    readers = {}
    for index, entry in enumerate(reader.get("configs", list)):
        child = _Reader(entry, f"{reader.where}.configs[{index}]", reader.source)
        readers[child.get("id", str)] = child
    if set(readers) != {"prompt", "seconds_total"}:
        raise reader.fail("configs", f"names {sorted(readers)}, where prompt and seconds_total are expected")
    readers["prompt"].require(type=("t5gemma",))
    readers["seconds_total"].require(type=("number",))
    text, number = readers["prompt"].child("config"), readers["seconds_total"].child("config")
    text.require(padding_mode=("learned",))
    text.ignore("model_path", "repo_id", "subfolder", "model_name")
    number.require(fourier_features_type=("expo",))
    config = ConditionerConfig(
        width=reader.positive("cond_dim"),
        text=TextConfig(
            max_length=text.positive("max_length", 256),
            model_path=text.raw.get("model_path"),
            repo_id=text.raw.get("repo_id"),
            subfolder=text.raw.get("subfolder"),
        ),
        seconds=NumberConfig(
            min_value=float(number.get("min_val", (int, float), 0)),
            max_value=float(number.get("max_val", (int, float), 384)),
        ),
    )
    if config.text.model_path is None and config.text.repo_id is None:
        raise text.fail("model_path", "or repo_id must name the text encoder")
    for each in (reader, text, number):
        each.finish()
    return config


def _parse_autoencoder(reader: _Reader, sample_rate: int) -> AutoencoderConfig:
    patches = reader.child("pretransform")
    patches.require(type=("patched",))
    patch = patches.child("config")
    channels, patch_size = patch.positive("channels", 2), patch.positive("patch_size", 256)
    bottleneck = reader.child("bottleneck")
    bottleneck.require(type=("softnorm",))
    bottleneck.ignore("requires_grad")
    patches.ignore("enable_grad", "requires_grad")
    soft_norm = bottleneck.child("config")
    latent_width = reader.positive("latent_dim")
    soft_norm.require(noise_augment_dim=(0,), dim=(latent_width,))
    soft_norm.ignore("auto_scale", "freeze")
    encoder = _parse_stack(reader.child("encoder"), "in_channels", channels * patch_size)
    decoder = _parse_stack(reader.child("decoder"), "out_channels", channels * patch_size)
    config = AutoencoderConfig(
        encoder=encoder,
        decoder=decoder,
        latent_width=latent_width,
        audio_channels=channels,
        patch_size=patch_size,
        sample_rate=sample_rate,
        noise_regularize=soft_norm.get("noise_regularize", bool, False),
    )
    reader.require(downsampling_ratio=(config.downsampling_ratio,), io_channels=(channels,))
    if {encoder.latent_width, decoder.latent_width} != {latent_width} or encoder.stride != decoder.stride:
        raise reader.fail("latent_dim", "or strides differ between encoder, decoder and bottleneck")
    for each in (reader, patches, patch, bottleneck, soft_norm):
        each.finish()
    return config


def _parse_stack(outer: _Reader, channels_key: str, channels: int) -> StackConfig:
    outer.require(type=("same", "taae_v2"))
    outer.ignore("requires_grad")
    reader = outer.child("config")
    reader.require(
        **{channels_key: (channels,)},
        differential=(True,),
        dyt=(True,),
        dim_heads=(HEAD_WIDTH,),
        conformer=(False,),
        layer_scale=(False,),
        use_snake=(False,),
        use_dilated_conv=(False,),
        mapping_style=("none",),
    )
    reader.ignore("checkpointing", "use_flash", "variable_stride", "enable_inner_layer_dropout", "chunk_size")
    reader.ignore("freeze_backbone", "conv_bias")
    window = reader.get("sliding_window", list, []) or None
    if window is not None and (len(window) != 2 or window[0] != window[1] or not isinstance(window[0], int)):
        raise reader.fail("sliding_window", f"is {window!r}, where two equal numbers are expected")
    if window is None:
        reader.require(chunk_midpoint_shift=(True,))
    reader.ignore("chunk_midpoint_shift")
    config = StackConfig(
        width=reader.positive("channels", 128) * reader.single("c_mults"),
        depth=reader.single("transformer_depths"),
        latent_width=reader.positive("latent_dim"),
        stride=reader.single("strides"),
        chunk_size=reader.positive("chunk_size", 32) if window is None else None,
        window=None if window is None else window[0],
        mask_noise=float(reader.get("mask_noise", (int, float), 0.0)),
        sinusoidal_blocks=reader.single("sinusoidal_blocks", 0),
        conv_mapping=reader.get("conv_mapping", bool, False),
    )
    if config.width % HEAD_WIDTH or config.depth < 2 or (config.chunk_size or config.stride) % config.stride:
        raise reader.fail("channels", f"and the keys beside it do not describe a SAME: {config}")
    outer.finish()
    reader.finish()
    return config


def complete_config(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Add to a config the keys that it leaves out, and for which the released code assumes something else.

    Without them the released code builds another architecture: learned Fourier features, layer norms, no adaLN.

    Args:
        raw: Content of `model_config.json`, of a whole model or a stand-alone SAME.
        source: Name of the file, for messages.

    Returns:
        The same config with every key; nothing that is there is changed.

    Raises:
        CheckpointError: As `parse_model` and `parse_autoencoder`.
    """
    if is_autoencoder(raw):
        autoencoder = parse_autoencoder(raw, source)
        whole = {"audio_channels": autoencoder.audio_channels, "model": _describe_autoencoder(autoencoder)}
        return _fill(raw, whole)
    config = parse_model(raw, source)
    described = {
        "audio_channels": config.audio_channels,
        "model": {
            "io_channels": config.dit.latent_width,
            "pretransform": {
                "type": "autoencoder",
                "chunked": config.chunked,
                "config": _describe_autoencoder(config.autoencoder),
            },
            "diffusion": _describe_diffusion(config),
        },
    }
    completed = _fill(raw, described)
    conditioners = {
        "prompt": {"max_length": config.conditioner.text.max_length, "padding_mode": "learned"},
        "seconds_total": {
            "min_val": config.conditioner.seconds.min_value,
            "max_val": config.conditioner.seconds.max_value,
            "fourier_features_type": "expo",
        },
    }
    listed = completed["model"]["conditioning"]["configs"]
    configs = [_fill(entry, {"config": conditioners[entry["id"]]}) for entry in listed]
    completed["model"]["conditioning"] = {**completed["model"]["conditioning"], "configs": configs}
    return completed


def _describe_diffusion(config: ModelConfig) -> dict[str, Any]:
    shift = config.training_shift
    return {
        "type": "dit",
        "cross_attention_cond_ids": ["prompt", "seconds_total"],
        "global_cond_ids": ["seconds_total"],
        "local_add_cond_ids": ["inpaint_mask", "inpaint_masked_input"],
        "use_effective_length_for_schedule": config.use_effective_length,
        "mask_padding_attention": config.mask_padding,
        "distribution_shift_options": {
            "type": shift.kind,
            "min_length": shift.min_length,
            "max_length": shift.max_length,
        },
        "config": {
            "patch_size": 1,
            "transformer_type": "continuous_transformer",
            "global_cond_type": "adaLN",
            "timestep_features_type": "expo",
            "timestep_features_dim": config.dit.features,
            "timestep_features_logsnr": False,
            "norm_type": "rms_norm",
            "norm_kwargs": {"force_fp32": True},
            "project_cond_tokens": True,
            "project_global_cond": True,
            "attn_kwargs": {"qk_norm": "rms", "differential": config.dit.differential},
            "ff_kwargs": {"mult": config.dit.ff_mult},
            "num_memory_tokens": config.dit.memory_tokens,
        },
    }


def _describe_autoencoder(config: AutoencoderConfig) -> dict[str, Any]:
    both = {"differential": True, "dyt": True, "dim_heads": HEAD_WIDTH, "variable_stride": True}
    inner = config.audio_channels * config.patch_size
    soft_norm = {"dim": config.latent_width, "noise_augment_dim": 0, "noise_regularize": config.noise_regularize}
    return {
        "latent_dim": config.latent_width,
        "downsampling_ratio": config.downsampling_ratio,
        "io_channels": config.audio_channels,
        "pretransform": {
            "type": "patched",
            "config": {"channels": config.audio_channels, "patch_size": config.patch_size},
        },
        "encoder": {"config": {"in_channels": inner, **both, **_describe_stack(config.encoder)}},
        "decoder": {
            "config": {
                "out_channels": inner,
                "sinusoidal_blocks": [config.decoder.sinusoidal_blocks],
                **both,
                **_describe_stack(config.decoder),
            }
        },
        "bottleneck": {"type": "softnorm", "config": {**soft_norm, "auto_scale": True, "freeze": True}},
    }


def _describe_stack(config: StackConfig) -> dict[str, Any]:
    kind: dict[str, Any] = {"chunk_size": config.chunk_size, "chunk_midpoint_shift": True}
    if config.window is not None:
        kind = {"sliding_window": [config.window, config.window]}
    return {**kind, "mask_noise": config.mask_noise, "conv_mapping": config.conv_mapping}


def _fill(raw: Mapping[str, Any], described: Mapping[str, Any]) -> dict[str, Any]:
    """What is in `raw`, and what of `described` is missing in it, at any depth."""
    filled = {**raw}
    for key, value in described.items():
        if isinstance(value, Mapping):
            filled[key] = _fill(raw.get(key, {}), value)
        else:
            filled.setdefault(key, value)
    return filled
