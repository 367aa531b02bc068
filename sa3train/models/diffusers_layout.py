"""The layout of diffusers 0.42.1: `model_index.json` and a folder for each component of a `StableAudio3Pipeline`.

Against the released layout, modules have other names, the embedding of padding lies with the transformer, and the rows
of a differential self-attention's product come as (q, q', k, k', v) instead of (q, k, v, q', k'). Not stored are what
its code leaves out or fixes: the autoencoder's noise and chunks, the longest duration, and settings of training.
`model_config.json`, which sa3train writes beside them, keeps these; without it they are those of the released medium.
"""

import math
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa3train.core.errors import CheckpointError
from sa3train.core.files import write_json
from sa3train.core.safetensors_file import write_tensors
from sa3train.models.blocks import compute_rotary_frequencies
from sa3train.models.config import HEAD_WIDTH, ModelConfig
from sa3train.models.config_reader import ConfigReader, read_config_file
from sa3train.models.nano import build_checkpoint_config, build_same_config
from sa3train.models.weight_files import StoredTensor, WeightFiles, read_tensor_shapes, reorder_rows

INDEX_FILE = "model_index.json"
TRANSFORMER, DURATION, AUTOENCODER = "transformer", "duration_embedder", "vae"
COMPONENTS = (TRANSFORMER, DURATION, AUTOENCODER)
TEXT_FOLDER, TOKENIZER_FOLDER = "text_encoder", "tokenizer"
WEIGHTS = "diffusion_pytorch_model.safetensors"
VERSION = "0.42.1"
PIPELINES = ("StableAudio3Pipeline", "StableAudio3AudioToAudioPipeline", "StableAudio3InpaintPipeline")
CLASSES = {
    TRANSFORMER: "StableAudio3DiTModel",
    DURATION: "StableAudio3DurationEmbedder",
    AUTOENCODER: "AutoencoderSAME",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
}

PART_ORDER = (0, 3, 1, 4, 2)
"""Which released part of a differential self-attention's rows comes first, second, … in diffusers."""

RELEASED_ORDER = (0, 2, 4, 1, 3)
"""The inverse of `PART_ORDER`."""

_DIT, _SAME = "model.model.", "pretransform.model."
_BLOCKS = ("transformer.layers.", "transformer_blocks.")
_TOP = ("to_timestep_embed.", "to_cond_embed.", "to_global_embed.", "preprocess_conv.", "postprocess_conv.")
_PREFIXES = (
    *((f"{_DIT}{old}", TRANSFORMER, new) for old, new in (_BLOCKS, *((name, name) for name in _TOP))),
    (f"{_DIT}transformer.project_in.", TRANSFORMER, "proj_in."),
    (f"{_DIT}transformer.project_out.", TRANSFORMER, "proj_out."),
    (f"{_DIT}transformer.memory_tokens", TRANSFORMER, "memory_tokens"),
    (f"{_DIT}transformer.rotary_pos_emb.", TRANSFORMER, "rotary_pos_emb."),
    (f"{_DIT}transformer.global_cond_embedder.", TRANSFORMER, "global_cond_embedder."),
    ("conditioner.conditioners.prompt.padding_embedding", TRANSFORMER, "prompt_padding_embedding"),
    ("conditioner.conditioners.seconds_total.embedder.embedding.1.", DURATION, "linear."),
    (f"{_SAME}encoder.layers.0.", AUTOENCODER, "encoder.blocks.0."),
    (f"{_SAME}encoder.layers.2.", AUTOENCODER, "encoder.proj."),
    (f"{_SAME}decoder.layers.1.", AUTOENCODER, "decoder.proj."),
    (f"{_SAME}decoder.layers.3.", AUTOENCODER, "decoder.blocks.0."),
    (f"{_SAME}bottleneck.scaling_factor", AUTOENCODER, "bottleneck.scale"),
    (f"{_SAME}bottleneck.", AUTOENCODER, "bottleneck."),
)
"""Beginnings of released names, and component and beginning of the name in diffusers. The first that fits counts."""

_FEED_FORWARD = ((".ff.ff.0.proj.", ".ff.proj_in."), (".ff.ff.2.", ".ff.proj_out."))
_SAME_LAYER = ((".pre_norm.", ".norm_attn."), (".self_attn.", ".attn."), (".ff_norm.", ".norm_ff."))
_INNER = {TRANSFORMER: _FEED_FORWARD, DURATION: (), AUTOENCODER: (*_FEED_FORWARD, *_SAME_LAYER)}
_CONSTANTS = (".rope.inv_freq", ".noise_scaling_factor")
"""Ends of released names that diffusers does not store: rotary frequencies, and an empty tensor."""

_FIXED: dict[str, dict[str, Any]] = {
    TRANSFORMER: {"patch_size": 1},
    DURATION: {"fourier_dim": 256, "min_freq": 0.5, "max_freq": 10000.0},
    AUTOENCODER: {
        "audio_channels": 2, "patch_size": 256, "encoder_strides": [16], "dim_heads": HEAD_WIDTH, "ff_mult": 3,
        "use_differential_attention": True, "sampling_rate": 44100,
    },
}  # fmt: skip
_SHARED_SETTINGS = (
    "io_channels", "embed_dim", "depth", "num_heads", "cond_token_dim", "global_cond_dim", "local_add_cond_dim",
    "timestep_features_dim", "num_memory_tokens",
)  # fmt: skip
"""Settings of the transformer that have the same names in a `model_config.json`."""

_UNUSED = ("encoder_chunk_size",)
"""Settings that diffusers' conversion script writes and no code reads."""
MEDIUM_SAMPLES = 16_777_216
MEDIUM_NOISE = {"encoder": 0.001, "decoder": 0.1}
"""What the layout does not store, as in the released medium: the longest generation, and the new tokens' noise."""


def convert_name(name: str) -> tuple[str, str] | None:
    """Convert the released name of a tensor, or of a module with a dot at the end.

    Args:
        name: Such as `model.model.transformer.project_in.weight`.

    Returns:
        Component and name in diffusers; None for a name that Stable Audio 3 does not have.
    """
    old, component, new = next((each for each in _PREFIXES if name.startswith(each[0])), ("", "", ""))
    if not component:
        return None
    converted = f"{new}{name.removeprefix(old)}"
    for released, inner in _INNER[component]:
        converted = converted.replace(released, inner)
    return component, converted


def revert_name(component: str, name: str) -> str | None:
    """Revert `convert_name`.

    Args:
        component: Component that holds the tensor or module.
        name: Its name there.

    Returns:
        The released name; None for a name that Stable Audio 3 does not have.
    """
    for old, holder, new in _PREFIXES:
        if holder == component and name.startswith(new):
            reverted = name.removeprefix(new)
            for released, inner in _INNER[component]:
                reverted = f".{reverted}".replace(inner, released)[1:]
            return f"{old}{reverted}"
    return None


def is_reordered(name: str, shape: tuple[int, ...]) -> bool:
    """Check whether rows come in another order in diffusers: those of a differential self-attention's product.

    Args:
        name: Name of the tensor in either layout.
        shape: Shape of the weight.

    Returns:
        Whether they do.
    """
    return ".to_qkv." in name and len(shape) == 2 and shape[0] == len(PART_ORDER) * shape[1]


def open_pipeline(folder: Path) -> WeightFiles:
    """Open the weights of a pipeline's folder.

    Args:
        folder: Folder with `model_index.json`.

    Returns:
        Its tensors by released names; one that has none keeps its own behind its component's.

    Raises:
        CheckpointError: A component is missing, truncated or no safetensors file.
    """
    tensors: dict[str, StoredTensor] = {}
    for component in COMPONENTS:
        for file in _find_weights(folder, component):
            for key, shape in read_tensor_shapes(file).items():
                name = revert_name(component, key) or f"{component}/{key}"
                if (component, key) == (DURATION, "freqs"):
                    _check_frequencies(file)
                    continue
                convert = partial(reorder_rows, order=RELEASED_ORDER) if is_reordered(name, shape) else None
                tensors[name] = StoredTensor(shape, file, key, convert)
    return WeightFiles(folder, tensors | dict(list_constants(tensors)))


def list_constants(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, StoredTensor]]:
    """List the autoencoder's tensors that only the released layout stores: rotary frequencies, and an empty tensor.

    Args:
        tensors: The stored tensors by released names.

    Yields:
        Released name and value.
    """
    for name, stored in tensors.items():
        if name.endswith(".pre_norm.alpha"):
            rotary = compute_rotary_frequencies("cpu")
            constant = StoredTensor(tuple(rotary.shape), stored.file, constant=rotary)
            yield name.removesuffix(".pre_norm.alpha") + ".rope.inv_freq", constant
        elif name.endswith(".scaling_factor"):
            empty = StoredTensor((1, 0, 1), stored.file, constant=torch.ones(1, 0, 1))
            yield name.removesuffix(".scaling_factor") + ".noise_scaling_factor", empty


def _find_weights(folder: Path, component: str) -> list[Path]:
    """Find the files of a component: one, one of a variant such as fp16, or several with an index."""
    home = folder / component
    index = home / f"{WEIGHTS}.index.json"
    variants = sorted(home.glob(f"{Path(WEIGHTS).stem}.*.safetensors"))
    if (home / WEIGHTS).is_file():
        return [home / WEIGHTS]
    if index.is_file():
        listed = read_config_file(index).get("weight_map")
        return [home / name for name in sorted(set(map(str, listed.values())))] if isinstance(listed, dict) else []
    if len(variants) == 1:
        return variants
    raise CheckpointError(
        f"{home} has no {WEIGHTS}{' but several variants' if variants else ''}. Save the pipeline with "
        f"save_pretrained(FOLDER, safe_serialization=True)."
    )


def _check_frequencies(file: Path) -> None:
    stored = next(iter(WeightFiles(file, {"freqs": StoredTensor((), file, "freqs")}).iterate(["freqs"])))[1]
    expected = compute_frequencies(stored.numel())
    if not torch.allclose(stored.float(), expected, rtol=1e-2):
        raise CheckpointError(f"{file}: freqs are other frequencies than Stable Audio 3 has. Use the released model.")


def compute_frequencies(count: int) -> Tensor:
    """Compute the frequencies of the duration's Fourier features (docs/model.md, section 3), as diffusers stores them.

    Args:
        count: How many.

    Returns:
        (count,) tensor.
    """
    fixed = _FIXED[DURATION]
    low, high = math.log(fixed["min_freq"]), math.log(fixed["max_freq"])
    return torch.exp(torch.linspace(0.0, 1.0, count) * (high - low) + low)


def read_pipeline_config(folder: Path) -> dict[str, Any]:
    """Read the configs of a pipeline's components as the `model_config.json` of the released layout.

    Args:
        folder: Folder with `model_index.json`.

    Returns:
        The content of the `model_config.json` in the folder, or one that is built from the components' configs.

    Raises:
        CheckpointError: It is a pipeline of another model, or a config is missing or asks for another architecture.
    """
    index = read_config_file(folder / INDEX_FILE)
    if index.get("_class_name") not in PIPELINES:
        raise CheckpointError(
            f"{folder} holds a {str(index.get('_class_name'))[:60]} of diffusers. Only Stable Audio 3 is supported: "
            f"{', '.join(PIPELINES)}."
        )
    if not (folder / AUTOENCODER).is_dir():
        raise CheckpointError(
            f"{folder} has no {AUTOENCODER}: diffusers has no autoencoder of SAME-S's kind, which small and nano have. "
            f"Load the model that the folder was written from."
        )
    if (folder / "model_config.json").is_file():
        return read_config_file(folder / "model_config.json")
    return _build_config(folder)


def _build_config(folder: Path) -> dict[str, Any]:
    transformer, duration, same = (_read_component(folder, name) for name in COMPONENTS)
    dit: dict[str, Any] = {name: transformer.get(name, int) for name in _SHARED_SETTINGS}
    dit["attn_kwargs"] = {"differential": transformer.get("use_differential_attention", bool)}
    dit["ff_kwargs"] = {"mult": transformer.get("ff_mult", (int, float))}
    window = same.get("sliding_window", int)
    both: dict[str, Any] = {"channels": same.get("encoder_channels", int), "sliding_window": [window, window]}
    both["transformer_depths"] = same.get("encoder_transformer_depths", list)
    parts = [
        {**both, "mask_noise": noise, "sinusoidal_blocks": same.get(f"{name}_sinusoidal_blocks", list)}
        for name, noise in MEDIUM_NOISE.items()
    ]
    autoencoder = build_same_config(same.get("latent_dim", int), same.single("encoder_c_mults"), *parts)
    stochastic = read_config_file(folder / "scheduler" / "scheduler_config.json").get("stochastic_sampling")
    objective = "rf_denoiser" if stochastic else "rectified_flow"
    tokens = read_config_file(folder / TOKENIZER_FOLDER / "tokenizer_config.json").get("model_max_length")
    max_tokens = int(min(tokens, 256)) if isinstance(tokens, int | float) else 256  # as the pipelines do
    width = dit["cond_token_dim"]
    config = build_checkpoint_config(objective, MEDIUM_SAMPLES, dit, autoencoder, width, max_tokens)
    seconds = config["model"]["conditioning"]["configs"][1]["config"]
    seconds |= {name: duration.get(name, (int, float)) for name in ("min_val", "max_val")}
    duration.demand(output_dim=width)
    for component in (transformer, duration, same):
        component.finish()
    return config


def _read_component(folder: Path, component: str) -> ConfigReader:
    file = folder / component / "config.json"
    reader = ConfigReader(read_config_file(file), "", str(file), "Save the pipeline again with diffusers.")
    reader.demand(_class_name=CLASSES[component], **_FIXED[component])
    reader.ignore(*_UNUSED, *(key for key in reader.raw if key.startswith("_")))
    return reader


def explain_missing_autoencoder(config: ModelConfig) -> str | None:
    """Explain why diffusers' `AutoencoderSAME` cannot hold an autoencoder.

    Args:
        config: The model.

    Returns:
        The reason; None where it can.
    """
    encoder, decoder = config.autoencoder.encoder, config.autoencoder.decoder
    if encoder.window is None or decoder.window is None or encoder.conv_mapping or decoder.conv_mapping:
        return "it is of SAME-S's kind, which attends in chunks, and diffusers has SAME-L's alone"
    if (encoder.width, encoder.depth, encoder.window) != (decoder.width, decoder.depth, decoder.window):
        return "its encoder and decoder differ in size, and diffusers has one size for both"
    return None


def write_pipeline(
    folder: Path,
    weights: WeightFiles,
    changed: Mapping[str, Tensor],
    config: ModelConfig,
    raw: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> None:
    """Write the components that hold a model's own weights, the scheduler, `model_index.json` and `model_config.json`.

    Args:
        folder: Empty folder to fill. Text encoder and tokenizer are added by `write_text_encoder`.
        weights: The model's tensors; they keep their dtypes.
        changed: Tensors by released names that take the place of those.
        config: The model.
        raw: Its `model_config.json`.
        metadata: Texts for the weight files.
    """
    components = [name for name in COMPONENTS if name != AUTOENCODER or explain_missing_autoencoder(config) is None]
    files: dict[str, dict[str, Tensor]] = {component: {} for component in components}
    for name in weights.tensors:
        tensor = changed[name] if name in changed else next(iter(weights.iterate([name])))[1]
        add_tensor(files, name, tensor)
    files[DURATION]["freqs"] = compute_frequencies(files[DURATION]["linear.weight"].shape[1] // 2)
    settings = build_component_configs(config)
    for component in components:
        write_json(folder / component / "config.json", settings[component])
        write_tensors(folder / component / WEIGHTS, files.pop(component), {**metadata, "format": "pt"})
    write_json(folder / "scheduler" / "scheduler_config.json", settings["scheduler"])
    index: dict[str, Any] = {"_class_name": PIPELINES[0], "_diffusers_version": VERSION}
    index |= {name: ["diffusers", CLASSES[name]] for name in CLASSES}
    if AUTOENCODER not in components:
        index[AUTOENCODER] = [None, None]
    write_json(folder / INDEX_FILE, index)
    write_json(folder / "model_config.json", dict(raw))


def add_tensor(components: Mapping[str, dict[str, Tensor]], name: str, tensor: Tensor) -> None:
    """Add a tensor to the component that holds it in diffusers, if it is one of those given.

    Args:
        components: Tensors by component and name; changed.
        name: Released name.
        tensor: Its values.
    """
    component, key = convert_name(name) or ("", "")
    if component in components and not name.endswith(_CONSTANTS):
        ordered = reorder_rows(tensor, PART_ORDER) if is_reordered(name, tuple(tensor.shape)) else tensor
        components[component][key] = ordered.contiguous()


def build_component_configs(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """Build the `config.json` of each component that holds the model's own weights, and of the scheduler.

    Args:
        config: The model.

    Returns:
        Settings by component.
    """
    dit, same, seconds = config.dit, config.autoencoder, config.conditioner.seconds
    own: dict[str, dict[str, Any]] = {
        TRANSFORMER: {
            "io_channels": dit.latent_width,
            "embed_dim": dit.width,
            "depth": dit.depth,
            "num_heads": dit.heads,
            "cond_token_dim": dit.context_width,
            "global_cond_dim": dit.global_width,
            "local_add_cond_dim": dit.local_width,
            "timestep_features_dim": dit.features,
            "ff_mult": dit.ff_mult,
            "num_memory_tokens": dit.memory_tokens,
            "use_differential_attention": dit.differential,
        },
        DURATION: {
            "output_dim": config.conditioner.width,
            "min_val": seconds.min_value,
            "max_val": seconds.max_value,
        },
        AUTOENCODER: {
            "encoder_channels": same.encoder.width,
            "encoder_c_mults": [1],
            "encoder_transformer_depths": [same.encoder.depth],
            "latent_dim": same.latent_width,
            "sliding_window": same.encoder.window,
            "encoder_sinusoidal_blocks": [same.encoder.sinusoidal_blocks],
            "decoder_sinusoidal_blocks": [same.decoder.sinusoidal_blocks],
        },
        "scheduler": {
            "num_train_timesteps": 1,
            "shift": 1.0,
            "use_dynamic_shifting": False,
            "stochastic_sampling": config.objective == "rf_denoiser",
        },
    }
    return {
        name: {"_class_name": CLASSES[name], "_diffusers_version": VERSION, **_FIXED.get(name, {}), **settings}
        for name, settings in own.items()
    }


def write_text_encoder(folder: Path, encoder: Path, tokenizer: Path, max_length: int) -> None:
    """Write the text encoder and tokenizer of a pipeline, and name their classes in its `model_index.json`.

    The weights keep their dtype. The config asks for fp32, in which diffusers loads the other components by default.

    Args:
        folder: The pipeline's folder.
        encoder: Folder with the encoder's config and weights.
        tokenizer: Folder with the tokenizer.
        max_length: Tokens of a prompt that are read.
    """
    for source, target in ((encoder, folder / TEXT_FOLDER), (tokenizer, folder / TOKENIZER_FOLDER)):
        target.mkdir()
        is_encoder = target.name == TEXT_FOLDER
        for file in source.iterdir():
            is_of_tokenizer = "token" in file.name
            if file.is_file() and is_of_tokenizer != is_encoder and file.suffix in (".json", ".safetensors", ".model"):
                shutil.copyfile(file, target / file.name)
    encoder_config = read_config_file(folder / TEXT_FOLDER / "config.json")
    only_encoder = {"architectures": ["T5GemmaEncoderModel"], "is_encoder_decoder": False, "dtype": "float32"}
    write_json(folder / TEXT_FOLDER / "config.json", encoder_config | only_encoder)
    settings_file = folder / TOKENIZER_FOLDER / "tokenizer_config.json"
    settings = (read_config_file(settings_file) if settings_file.is_file() else {}) | {"model_max_length": max_length}
    write_json(settings_file, settings)
    index = read_config_file(folder / INDEX_FILE)
    index[TEXT_FOLDER] = ["transformers", "T5GemmaEncoderModel"]
    index[TOKENIZER_FOLDER] = ["transformers", settings.get("tokenizer_class") or "GemmaTokenizerFast"]
    write_json(folder / INDEX_FILE, index)
