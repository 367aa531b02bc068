"""Reads a published `model_config.json` into the dataclasses of `config.py`, and completes one that is to be written.

Absent keys have the published defaults. A value that asks for another architecture is a `CheckpointError`.
"""

from collections.abc import Mapping
from typing import Any

from sa3train.core.errors import CheckpointError
from sa3train.models.config import (
    FOURIER_FEATURES,
    HEAD_WIDTH,
    AutoencoderConfig,
    ConditionerConfig,
    DiTConfig,
    ModelConfig,
    NumberConfig,
    StackConfig,
    TextConfig,
)
from sa3train.models.config_reader import ConfigReader


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
    return _parse_model(ConfigReader(raw, "", source))


def _parse_model(top: ConfigReader) -> ModelConfig:
    top.accept(model_type=("diffusion_cond_inpaint",))
    raw, source = top.raw, top.source
    if "model_type" not in raw or "model" not in raw:
        raise CheckpointError(f"{source} is not the config of a Stable Audio 3 model: model_type or model is missing.")
    top.ignore("training")
    sample_rate = top.positive("sample_rate")
    channels = top.positive("audio_channels", 2)
    model = top.child("model")
    pretransform = model.child("pretransform")
    pretransform.require(type="autoencoder")
    pretransform.accept(scale=(1.0,), model_half=(False,))
    pretransform.ignore("iterate_batch", "enable_grad")
    diffusion = model.child("diffusion")
    dit = _parse_dit(diffusion)
    _check_training(diffusion)
    conditioner = _parse_conditioner(model.child("conditioning"))
    autoencoder = _parse_autoencoder(pretransform.child("config"), sample_rate)
    model.require(io_channels=dit.latent_width)
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
    )
    top.finish()
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
    return _parse_sole_autoencoder(ConfigReader(raw, "", source))


def _parse_sole_autoencoder(top: ConfigReader) -> AutoencoderConfig:
    top.accept(model_type=("autoencoder",))
    config = _parse_autoencoder(top.child("model"), top.positive("sample_rate"))
    top.ignore("sample_size", "training", audio_channels=config.audio_channels)
    top.finish()
    return config


def _parse_dit(diffusion: ConfigReader) -> DiTConfig:
    diffusion.accept(diffusion_objective=("rectified_flow", "rf_denoiser"))
    diffusion.require(
        type="dit",
        cross_attention_cond_ids=["prompt", "seconds_total"],
        global_cond_ids=["seconds_total"],
        local_add_cond_ids=["inpaint_mask", "inpaint_masked_input"],
    )
    reader = diffusion.child("config")
    reader.require(
        patch_size=1,
        transformer_type="continuous_transformer",
        global_cond_type="adaLN",
        timestep_features_type="expo",
        timestep_features_logsnr=False,
        norm_type="rms_norm",
        project_cond_tokens=True,
        project_global_cond=True,
    )
    attention = reader.child("attn_kwargs")
    attention.require(qk_norm="rms")
    feed_forward = reader.child("ff_kwargs", {})
    reader.child("norm_kwargs", {}).require(force_fp32=True)
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
    return config


def _check_training(diffusion: ConfigReader) -> None:
    """Check the settings that the released trainer takes from the config; here the run has its own."""
    for key in ("use_effective_length_for_schedule", "mask_padding_attention"):
        diffusion.get(key, bool, False)
    shift = diffusion.child("distribution_shift_options", {})
    shift.accept(type=("full", "full.sine", "flux", "logsnr", "none"))
    shift.get("type", str, "full")
    shift.positive("min_length", 256)
    shift.positive("max_length", 4096)


def _parse_conditioner(reader: ConfigReader) -> ConditionerConfig:
    readers = {child.get("id", str): child for child in reader.list_children("configs")}
    if set(readers) != {"prompt", "seconds_total"}:
        raise reader.fail("configs", f"names {sorted(readers)}, where prompt and seconds_total are expected")
    readers["prompt"].accept(type=("t5gemma",))
    readers["seconds_total"].accept(type=("number",))
    text, number = readers["prompt"].child("config"), readers["seconds_total"].child("config")
    text.require(padding_mode="learned")
    text.ignore("model_path", "repo_id", "subfolder", "model_name")
    number.require(fourier_features_type="expo")
    config = ConditionerConfig(
        width=reader.positive("cond_dim"),
        text=TextConfig(
            max_length=text.positive("max_length", 256),
            model_path=text.raw.get("model_path"),
            repo_id=text.raw.get("repo_id"),
            subfolder=text.raw.get("subfolder"),
        ),
        seconds=NumberConfig(
            min_value=float(number.get("min_val", (int, float), 0.0)),
            max_value=float(number.get("max_val", (int, float), 384.0)),
        ),
    )
    if config.text.model_path is None and config.text.repo_id is None:
        raise text.fail("model_path", "or repo_id must name the text encoder")
    return config


def _parse_autoencoder(reader: ConfigReader, sample_rate: int) -> AutoencoderConfig:
    patches = reader.child("pretransform")
    patches.require(type="patched")
    patch = patches.child("config")
    channels, patch_size = patch.positive("channels", 2), patch.positive("patch_size", 256)
    bottleneck = reader.child("bottleneck")
    bottleneck.require(type="softnorm")
    bottleneck.ignore("requires_grad")
    patches.ignore("enable_grad", "requires_grad")
    soft_norm = bottleneck.child("config")
    latent_width = reader.positive("latent_dim")
    soft_norm.require(noise_augment_dim=0, dim=latent_width)
    soft_norm.ignore(auto_scale=True, freeze=True)
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
    reader.require(downsampling_ratio=config.downsampling_ratio, io_channels=channels)
    if {encoder.latent_width, decoder.latent_width} != {latent_width} or encoder.stride != decoder.stride:
        raise reader.fail("latent_dim", "or strides differ between encoder, decoder and bottleneck")
    return config


def _parse_stack(outer: ConfigReader, channels_key: str, channels: int) -> StackConfig:
    outer.accept(type=("same", "taae_v2"))
    outer.ignore("requires_grad")
    reader = outer.child("config")
    reader.require(**{channels_key: channels}, differential=True, dyt=True, dim_heads=HEAD_WIDTH)
    reader.accept(
        conformer=(False,),
        layer_scale=(False,),
        use_snake=(False,),
        use_dilated_conv=(False,),
        mapping_style=("none",),
    )
    reader.ignore("checkpointing", "use_flash", "enable_inner_layer_dropout", "freeze_backbone", "conv_bias")
    reader.ignore("chunk_size", "chunk_midpoint_shift", variable_stride=True)
    window = reader.get("sliding_window", list, []) or None if "sliding_window" in reader.raw else None
    if window is not None and (len(window) != 2 or window[0] != window[1] or not isinstance(window[0], int)):
        raise reader.fail("sliding_window", f"is {window!r}, where two equal numbers are expected")
    if window is None:
        reader.require(chunk_midpoint_shift=True)
    has_sinusoidal = channels_key == "out_channels" or "sinusoidal_blocks" in reader.raw  # only decoders know of them
    config = StackConfig(
        width=reader.positive("channels", 128) * reader.single("c_mults"),
        depth=reader.single("transformer_depths"),
        latent_width=reader.positive("latent_dim"),
        stride=reader.single("strides"),
        chunk_size=reader.positive("chunk_size", 32) if window is None else None,
        window=None if window is None else window[0],
        mask_noise=float(reader.get("mask_noise", (int, float), 0.0)),
        sinusoidal_blocks=reader.single("sinusoidal_blocks", 0) if has_sinusoidal else 0,
        conv_mapping=reader.get("conv_mapping", bool, False),
    )
    if config.width % HEAD_WIDTH or config.depth < 2 or (config.chunk_size or config.stride) % config.stride:
        raise reader.fail("channels", f"and the keys beside it do not describe a SAME: {config}")
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
    top = ConfigReader(raw, "", source)
    if is_autoencoder(raw):
        _parse_sole_autoencoder(top)
    else:
        _parse_model(top)
    return top.complete()
