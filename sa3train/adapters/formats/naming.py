"""Whose names the tensors of an adapter file have, and the module paths that they stand for.

Module paths are those of the released files: `model.…` in the DiT, `conditioners.…` in the conditioner,
`pretransform.model.decoder.…` in the autoencoder's decoder. Other tools put a prefix before them, leave out the
`model.`, write underscores for dots, or name a decoder's layers from the decoder on. diffusers has names of its own and
another order of the rows of differential self-attention (see `sa3train.models.diffusers_layout`).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from sa3train.adapters.adapter import DECODER
from sa3train.core.errors import AdapterError
from sa3train.models.diffusers_layout import DURATION, RELEASED_ORDER, TRANSFORMER, revert_name
from sa3train.models.weight_files import reorder_rows

DIT = "model."
NATIVE, PEFT, COMFY = "native", "PEFT", "ComfyUI"
NATIVE_KEY = re.compile(r"^(.*?)\.parametrizations\.weight\.(\d+)\.(.*)$")
PEFT_PREFIX = "base_model.model."
DURATION_EMBEDDER = "seconds_total_embedder."
"""Where ComfyUI keeps the layers that the released files have at `conditioners.seconds_total.`."""

FLAT_PREFIXES = {"lora_unet_": "kohya", "lycoris_": "LyCORIS", "lora_transformer_": "OneTrainer"}
"""Prefixes of names with underscores for dots, and the tool whose they are."""

MODULES = (
    "transformer", "layers", "self_attn", "cross_attn", "to_qkv", "to_kv", "to_q", "to_out", "ff", "proj",
    "to_local_embed", "to_cond_embed", "to_global_embed", "to_timestep_embed", "global_cond_embedder",
    "preprocess_conv", "postprocess_conv", "project_in", "project_out", "conditioners", "seconds_total", "embedder",
    "embedding", "model", "conditioner",
)  # fmt: skip
"""Names of modules above the adaptable layers, to read paths whose dots were replaced by underscores."""
_FLAT_MODULE = re.compile(rf"({'|'.join(sorted(MODULES, key=len, reverse=True))}|[0-9]+)(?:_|$)")

_LAYER_TENSOR = re.compile(
    r"\.(?:lora_(?:up|down|mid)\.weight|lora_[AB](?:\.\w+)?(?:\.weight)?|lora\.(?:up|down)\.weight|dora_scale"
    r"|lora_linear_layer\.(?:up|down)\.weight|diff|diff_b|w_norm|b_norm|reshape_weight|(?:hada|lokr|oft)_\w+)$"
)
_ADAPTER_NAME = re.compile(r"\.(lora_[AB])\.(\w+)\.weight$")
_TEXT_ENCODER = re.compile(r"^lora_te\d*[._]|(?:^|[._])text_(?:encoder|model)|(?:^|\.)conditioners\.prompt\.|^te\d?\.")
_OTHER_AUTOENCODER_PART = re.compile(
    r"(?:^|[._])(?:pretransform|autoencoder|first_stage_model|vae)[._](?:model[._])?(?!model[._]|decoder\.)"
    r"|^(?:(?:base_model|model|diffusion_model)\.)*(?:encoder|bottleneck|layers\.0\.transformers)\."
)
_IN_DECODER = re.compile(r"(?:^|\.)decoder\.(.+)$|^(?:(?:base_model|model)\.)*(layers\.(?:1|3\.transformers\..+))$")
"""Names of layers in the decoder. From the decoder on, they are no others': a block of the DiT, `layers.1`, is no layer
itself, and has no `transformers`."""
_BLOCK_LAYER = r"(?:self_attn\.to_(?:qkv|out)|cross_attn\.to_(?:q|kv|out)|ff\.proj_(?:in|out)|to_local_embed\.\d+)"
_DIFFUSERS = re.compile(
    rf"^(?:base_model\.model\.)?(?:(?:transformer\.)?(transformer_blocks\.\d+\.{_BLOCK_LAYER}|proj_(?:in|out)"
    r"|(?:to_(?:timestep|cond|global)_embed|global_cond_embedder)\.\d+|(?:pre|post)process_conv)"
    r"|(?:duration_embedder\.)?(linear))$"
)
"""Names of layers in diffusers: of the transformer, and of the duration embedder."""
_OTHER_DIFFUSERS = re.compile(
    rf"(?:^|\.)transformer_blocks\.(?!\d+\.{_BLOCK_LAYER}\.)|_transformer_blocks_|(?:^|\.)unet\.|projection_model\."
)


def identify_format(source: str, keys: Iterable[str]) -> str:
    """Identify the format of an adapter file by the names of its tensors.

    Args:
        source: The file's name, for messages.
        keys: Names of its tensors.

    Returns:
        `NATIVE`, `PEFT` or `COMFY`, which stands for every tool that stores a layer's factors below its path.

    Raises:
        AdapterError: If the file holds no adapter, several, or one that cannot be used.
    """
    names = list(keys)
    found: dict[str, list[str]] = {}
    for key in names:
        form = NATIVE if NATIVE_KEY.match(key) else PEFT if key.startswith(PEFT_PREFIX) else COMFY
        if form != COMFY or _LAYER_TENSOR.search(key):
            found.setdefault(form, []).append(key)
    if not found:
        raise AdapterError(_describe_stranger(source, names))
    _refuse_other_parts(source, [key for some in found.values() for key in some])
    if len(found) > 1:
        raise AdapterError(
            f"{source} holds {len(found)} adapters, named as {' and '.join(found)} files are (such as "
            f"{' and '.join(some[0] for some in found.values())}). Save each as a file of its own."
        )
    numbers = {match[2] for key in names if (match := NATIVE_KEY.match(key))}
    adapters = {match[2] for key in names if (match := _ADAPTER_NAME.search(key))}
    for several in (numbers, adapters):
        if len(several) > 1:
            raise AdapterError(
                f"{source} holds {len(several)} adapters on the same layers ({', '.join(sorted(several)[:4])}). Save "
                f"each as a file of its own with the tool that wrote it, and load them one after the other."
            )
    return next(iter(found))


def split_names(
    source: str, tensors: Mapping[str, Tensor], endings: Mapping[str, str], explain: Callable[[str], str]
) -> list[tuple[str, str, Tensor]]:
    """Split the names of a file's tensors by their endings, without the name that PEFT gives an adapter in memory.

    Args:
        source: The file's name, for messages.
        tensors: Its tensors by key, such as `….lora_A.default.weight`.
        endings: Names of tensors in this package by how keys end.
        explain: What is wrong with a key of another ending.

    Returns:
        What `collect_layers` takes.

    Raises:
        AdapterError: If a key has none of the endings.
    """
    named = []
    for key, tensor in tensors.items():
        bare = _ADAPTER_NAME.sub(r".\1.weight", key)
        ending = next((ending for ending in endings if bare.endswith("." + ending)), None)
        if ending is None:
            raise AdapterError(f"{source}: {explain(bare)}")
        named.append((bare.removesuffix("." + ending), endings[ending], tensor))
    return named


def collect_layers(source: str, tensors: Iterable[tuple[str, str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Collect the tensors of a file by layer.

    Args:
        source: The file's name, for messages.
        tensors: Name of the layer in the file, name of the tensor in this package, and the tensor.

    Returns:
        Tensors by module path and name.

    Raises:
        AdapterError: If two tensors of the file are the same one of a layer, or it changes DiT and decoder.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    reordered: set[str] = set()
    for layer, name, tensor in tensors:
        path = get_module_path(source, layer)
        if layer.endswith(".self_attn.to_qkv") and _DIFFUSERS.match(layer):
            reordered.add(path)
        params = layers.setdefault(path, {})
        if name in params:
            raise AdapterError(
                f"{source} holds two adapters on the same layer: {layer} has a second {name}. Save each as a file of "
                f"its own."
            )
        params[name] = tensor
    for path in reordered:
        layers[path] = _restore_rows(source, path, layers[path])
    in_decoder = [path for path in layers if path.startswith(DECODER)]
    if 0 < len(in_decoder) < len(layers):
        raise AdapterError(
            f"{source} holds adapters on two parts of the model: {len(in_decoder)} of its {len(layers)} layers are in "
            f"the autoencoder's decoder, such as {in_decoder[0]}. Save each part as a file of its own, and load both."
        )
    return layers


def _restore_rows(source: str, path: str, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the rows of a self-attention's product, which are in diffusers' order where it is differential, in ours."""
    if not {"lora_A", "lora_B"} <= params.keys():
        raise AdapterError(
            f"{source}: {path} has {', '.join(sorted(params))} under diffusers' name, and only the rows of a LoRA or "
            f"DoRA can be brought into the order of the released model. Merge it with the tool that made it."
        )
    return reorder_product(params, RELEASED_ORDER)


def reorder_product(params: Mapping[str, Tensor], order: Sequence[int]) -> dict[str, Tensor]:
    """Put the rows of a LoRA or DoRA on a self-attention's product in another order where it is differential.

    Args:
        params: Tensors of the layer, with both factors, whose shapes tell whether it is.
        order: Which fifth of the rows comes first, second, ….

    Returns:
        The tensors; those with a value for each row are copies.
    """
    rows, columns = params["lora_B"].shape[0], params["lora_A"].flatten(1).shape[1]
    is_differential = rows == len(order) * columns
    return {
        name: reorder_rows(tensor, order) if is_differential and tensor.shape[:1] == (rows,) else tensor
        for name, tensor in params.items()
    }


def get_module_path(source: str, name: str) -> str:
    """Get the module path that a layer's name in a file stands for.

    Args:
        source: The file's name, for messages.
        name: The name of the layer, such as `diffusion_model.transformer.project_in` or `lora_unet_transformer_…`.

    Returns:
        The path.

    Raises:
        AdapterError: If underscores stand for dots and the name is not one of Stable Audio 3's.
    """
    flat = next((prefix for prefix in FLAT_PREFIXES if name.startswith(prefix)), None)
    if flat is not None:
        name = ".".join(_split_flat_name(source, name, flat))
    name = re.sub(r"^module\.|_orig_mod\.", "", name)  # of DistributedDataParallel and torch.compile
    if found := _DIFFUSERS.match(name):
        released = revert_name(TRANSFORMER if found[1] else DURATION, f"{found[1] or found[2]}.")
        return "" if released is None else released.partition(".")[2].removesuffix(".")
    if in_decoder := _IN_DECODER.search(name):
        return f"{DECODER}{in_decoder[1] or in_decoder[2]}"
    if conditioner := re.search(r"(?:^|\.)conditioners\.(.*)$", name):
        return f"conditioners.{conditioner[1]}"
    if name.startswith(DURATION_EMBEDDER):
        return f"conditioners.seconds_total.{name.removeprefix(DURATION_EMBEDDER)}"
    bare = re.sub(r"^(?:.*?\.)?(?:(?:diffusion_)?model\.)+", "", name, count=1)
    return f"{DIT}{'transformer.' if bare.startswith('layers.') else ''}{bare}"


def _split_flat_name(source: str, name: str, prefix: str) -> list[str]:
    """Split `lora_unet_transformer_layers_0_self_attn_to_qkv` into its modules, longest known name first."""
    found, position = [], len(prefix)
    while position < len(name):
        module = _FLAT_MODULE.match(name, position)
        if module is None:
            raise AdapterError(
                f"{source}: {name} is named as {FLAT_PREFIXES[prefix]} names layers, but is not a layer of Stable "
                f"Audio 3. The adapter seems to be made for another model."
            )
        found.append(module[1])
        position = module.end()
    return found


def _refuse_other_parts(source: str, keys: list[str]) -> None:
    """Refuse adapters on parts of the model, or with names, that cannot be used here."""
    for pattern, what, advice in (
        (_TEXT_ENCODER, "changes the text encoder, which adapters here leave as it is", "Save its other layers alone"),
        (
            _OTHER_AUTOENCODER_PART,
            "is an adapter on the autoencoder's encoder or bottleneck, which would change what latents mean, and only "
            "those on its decoder can be used",
            "Merge it into the autoencoder's weights with the tool that made it, and load that model",
        ),
        (
            _OTHER_DIFFUSERS,
            "is named as diffusers names the layers of other models than Stable Audio 3",
            "Use it with the model it was trained on",
        ),
    ):
        found = [key for key in keys if pattern.search(key)]
        if found:
            raise AdapterError(f"{source} {what} ({len(found)} of {len(keys)} tensors, such as {found[0]}). {advice}.")


def _describe_stranger(source: str, keys: list[str]) -> str:
    """Say what a file without an adapter's names seems to be."""
    hint = ""
    if any(key.endswith((".lora_a", ".lora_b")) for key in keys):
        hint = "It is named as mlx-lm names adapters, which is not supported. Save it in the released format."
    elif any(key.startswith(("model.model.", "pretransform.")) for key in keys):
        hint = "It looks like a whole checkpoint. Load it as the model, or extract an adapter: sa3-adapter extract"
    return (
        f"{source} is no adapter: none of its {len(keys)} tensors has an adapter's name "
        f"(first: {', '.join(keys[:3]) or 'none'}). {hint}".rstrip()
    )
