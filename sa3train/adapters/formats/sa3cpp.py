"""Adapters of sa3.cpp: its GGUF files, and the .safetensors with a .json that its `sa3-lora-convert` reads.

Names and metadata are those of docs/lora_checkpoint_contract.md and src/lora_convert.h in
github.com/betweentwomidnights/sa3.cpp. It knows one type, one rank and one scale for a file, and layers of the DiT or,
in later versions (69fbe4a), of the autoencoder's decoder or encoder, as its `target` says.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sa3train.adapters.adapter import DECODER, Adapter
from sa3train.adapters.formats.naming import collect_layers
from sa3train.adapters.formats.native import (
    build_adapter,
    build_native_metadata,
    build_native_tensors,
    unify_ranks,
)
from sa3train.adapters.formats.saving import convert_for_saving
from sa3train.adapters.spec import KINDS, is_finite_number
from sa3train.core.dtypes import DTYPES, get_dtype
from sa3train.core.errors import AdapterError, ConfigError
from sa3train.core.files import format_json, replace_file
from sa3train.core.safetensors_file import parse_json, write_tensors
from sa3train.core.text import shorten
from sa3train.core.user_files import read_file

if TYPE_CHECKING:
    from gguf import GGUFReader

MAGIC, ARCHITECTURE = b"GGUF", "sa3-lora"
METADATA = "sa3train.metadata"
"""Key of our own metadata, as JSON."""

GGUF_DTYPES = {**{name: code for name, (_, code) in DTYPES.items()}, "q8_0": "Q8_0"}
"""Dtypes that a GGUF file is written in, and ggml's names for them."""

QUANT_BLOCK = 32
"""Values that share a scale in Q8_0: it needs rows of a multiple of them."""

MAX_FIELDS = 500_000
"""Values that the header of an adapter may have: sa3.cpp's own have some thousands."""

PARTS = ("lora_A", "lora_B", "magnitude", "magnitude_r", "magnitude_c", "U", "V", "M_xs")
_BLOCK, _DECODER_BLOCK = "model.transformer.layers.{}.", f"{DECODER}layers.3.transformers.{{}}."
STEMS = {
    "model.preprocess_conv": "dit.pre_conv",
    "model.postprocess_conv": "dit.post_conv",
    "model.to_cond_embed.{}": "dit.cond_embed.{}",
    "model.to_global_embed.{}": "dit.global_embed.{}",
    "model.to_timestep_embed.{}": "dit.time_embed.{}",
    "model.transformer.global_cond_embedder.{}": "dit.gce.{}",
    "model.transformer.project_in": "dit.proj_in",
    "model.transformer.project_out": "dit.proj_out",
    f"{_BLOCK}self_attn.to_qkv": "dit.{}.self.qkv",
    f"{_BLOCK}self_attn.to_out": "dit.{}.self.out",
    f"{_BLOCK}cross_attn.to_q": "dit.{}.cross.q",
    f"{_BLOCK}cross_attn.to_kv": "dit.{}.cross.kv",
    f"{_BLOCK}cross_attn.to_out": "dit.{}.cross.out",
    f"{_BLOCK}ff.ff.0.proj": "dit.{}.ff.proj",
    f"{_BLOCK}ff.ff.2": "dit.{}.ff.out",
    f"{_BLOCK}to_local_embed.{{}}": "dit.{}.local.{}",
    f"{DECODER}layers.1": "ae.in_proj",
    f"{_DECODER_BLOCK}self_attn.to_qkv": "ae.dec.{}.self_attn.to_qkv",
    f"{_DECODER_BLOCK}self_attn.to_out": "ae.dec.{}.self_attn.to_out",
    f"{_DECODER_BLOCK}ff.ff.0.proj": "ae.dec.{}.ff.proj",
    f"{_DECODER_BLOCK}ff.ff.2": "ae.dec.{}.ff.out",
}
"""Module paths of layers and their names in sa3.cpp; {} is the number of a block, or of a place in a sequence."""
_PATHS = {stem: path for path, stem in STEMS.items()}


def get_stem(path: str) -> str | None:
    """Get sa3.cpp's name of a layer.

    Args:
        path: Module path.

    Returns:
        The name without its `.weight`; None for a layer that sa3.cpp cannot adapt.
    """
    return _translate(path, STEMS)


def _translate(name: str, names: Mapping[str, str]) -> str | None:
    for pattern, other in names.items():
        if found := re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)"), name):
            return other.format(*found.groups())
    return None


def is_gguf(file: Path) -> bool:
    """Check whether a file is in GGUF, by its first bytes.

    Args:
        file: Any file.

    Returns:
        Whether it is; False for one that cannot be read.
    """
    try:
        return read_file(file, size=len(MAGIC)) == MAGIC
    except OSError:
        return False


def is_gguf_name(path: str | os.PathLike[str]) -> bool:
    """Check whether an adapter is written to a path as a GGUF file.

    Args:
        path: The target.

    Returns:
        Whether its name ends in .gguf.
    """
    return Path(path).suffix.lower() == ".gguf"


def read_gguf(file: Path) -> Adapter:
    """Read an adapter of sa3.cpp, converted or trained there; quantized tensors become F32.

    Args:
        file: The GGUF file.

    Returns:
        The adapter.

    Raises:
        AdapterError: If the file is damaged, or holds something else than an adapter of sa3.cpp.
        ConfigError: If the package gguf is not installed.
    """
    import_gguf()
    from gguf.quants import dequantize

    try:
        reader = _open(file)
        fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        _check_architecture(file, fields)
        named = []
        for tensor in reader.tensors:
            stem, _, part = tensor.name.rpartition(".")
            path = _translate(stem, _PATHS)
            if path is None or part not in PARTS:
                raise AdapterError(f"{file} has a tensor {tensor.name[:80]!r}, which no adapter of sa3.cpp has.")
            values = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
            named.append((path, part, torch.from_numpy(values)))
    except AdapterError:
        raise
    except NotImplementedError as error:
        raise AdapterError(f"{file} is quantized in a way that cannot be read ({error}). Get it in F32.") from error
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError) as error:
        raise AdapterError(f"{file} is no whole GGUF file ({error}). Download it again.") from error
    layers = collect_layers(str(file), named)
    return build_adapter(str(file), layers, _parse_metadata(file, fields, layers))


def fit_to_sa3cpp(adapter: Adapter) -> tuple[Adapter, list[str]]:
    """Fit an adapter to what sa3.cpp plays: layers of the DiT or the decoder, with one rank and one scale.

    Args:
        adapter: A lora, dora or bora adapter.

    Returns:
        The adapter, and the layers that sa3.cpp cannot adapt.

    Raises:
        AdapterError: If no layer is left.
    """
    tensors = {path: params for path, params in adapter.tensors.items() if get_stem(path)}
    if not tensors:
        raise AdapterError(
            f"{adapter.source} changes no layer that sa3.cpp can adapt, which are those of the DiT and the decoder."
        )
    return unify_ranks(replace(adapter, tensors=tensors)), sorted(adapter.tensors.keys() - tensors.keys())


def write_gguf(path: str | Path, adapter: Adapter, dtype: str = "fp32") -> None:
    """Write an adapter as a GGUF file of sa3.cpp, whole or not at all.

    Args:
        path: The file.
        adapter: What `fit_to_sa3cpp` returned.
        dtype: One of `GGUF_DTYPES`. Magnitudes are F32, and tensors whose rows do not fill the blocks of Q8_0 are F16.

    Raises:
        AdapterError: If a tensor contains NaN or infinity.
        ConfigError: If the package gguf is not installed.
    """
    import_gguf()
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    tensors = {
        f"{get_stem(layer)}.{name}": (tensor, _choose_dtype(name, tensor, dtype))
        for layer, params in sorted(adapter.tensors.items())
        for name, tensor in params.items()
    }
    with replace_file(path) as temporary:
        writer = GGUFWriter(str(temporary), ARCHITECTURE)
        try:
            writer.add_type("adapter")
            writer.add_name(f"sa3 {adapter.spec.adapter_type} {'decoder ' * (adapter.part == 'decoder')}adapter")
            writer.add_string("lora.adapter_type", adapter.spec.adapter_type)
            writer.add_string("lora.target", adapter.part)
            writer.add_uint32("lora.rank", adapter.spec.rank)
            writer.add_float32("lora.alpha", adapter.spec.get_alpha(""))
            writer.add_uint32("lora.n_targets", len(adapter.tensors))
            writer.add_string(METADATA, json.dumps(build_native_metadata(adapter)))
            for name, (tensor, kind) in tensors.items():
                torch_dtype = get_dtype(kind) if kind in DTYPES else None
                values = convert_for_saving({name: tensor.float()}, torch_dtype)[name]
                code = "F32" if values.dtype == torch.float32 and kind in DTYPES else GGUF_DTYPES[kind]  # too large
                quantization = GGMLQuantizationType[code]
                writer.add_tensor(name, quantize(values.float().numpy(), quantization), raw_dtype=quantization)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def write_pair(path: str | Path, adapter: Adapter, dtype: str = "fp16") -> None:
    """Write the .safetensors and the .json beside it that `sa3-lora-convert --in` reads, both or neither.

    The .json is also a pool of prompts for sa3.cpp's server, where the adapter carries prompts.

    Args:
        path: The .safetensors file.
        adapter: What `fit_to_sa3cpp` returned.
        dtype: "fp16" or "fp32".

    Raises:
        AdapterError: If a tensor contains NaN or infinity.
    """
    stored = convert_for_saving(build_native_tensors(adapter), get_dtype(dtype))
    metadata = build_native_metadata(adapter)
    settings = json.loads(metadata["lora_config"])
    if adapter.prompts:
        settings |= {"version": 1, "dice": {"generic": adapter.prompts}}
    with replace_file(Path(path).with_suffix(".json")) as temporary:
        temporary.write_bytes(format_json(settings))
        write_tensors(path, stored, metadata)


def import_gguf() -> None:
    """Check that the package gguf is installed.

    Raises:
        ConfigError: If not.
    """
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError('GGUF files need the package gguf: pip install "sa3train[gguf]".') from error


def _open(file: Path) -> "GGUFReader":
    from gguf import GGUFReader

    class BoundedReader(GGUFReader):
        """Ends where the package's reader would go on: behind the end of the file, and in endless arrays."""

        fields_read = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            found = super()._get(offset, dtype, count, override_order)
            self.fields_read += 1
            if len(found) < int(count):
                raise ValueError("it ends too early")
            if self.fields_read > MAX_FIELDS:
                raise ValueError(f"its header has more than {MAX_FIELDS} values")
            return found

    return BoundedReader(file)


def _check_architecture(file: Path, fields: Mapping[str, Any]) -> None:
    found = fields.get("general.architecture")
    if found == ARCHITECTURE and fields.get("lora.target") == "encoder":
        raise AdapterError(
            f"{file} is an adapter on the autoencoder's encoder, which would change what latents mean. Only those on "
            f"its decoder and on the DiT can be used."
        )
    if found == ARCHITECTURE:
        return
    way_on = {
        "sa3-dit": "It is a whole model of sa3.cpp. Give the released model instead.",
        "sa3-trainer-state": "It is the training state of sa3.cpp. Give the adapter-step-N.gguf beside it.",
    }.get(str(found), "It seems to be made for another model.")
    raise AdapterError(
        f"{file} is a GGUF file of architecture {str(found)[:40]!r}; adapters of sa3.cpp are {ARCHITECTURE!r}. {way_on}"
    )


def _parse_metadata(
    file: Path, fields: Mapping[str, Any], layers: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, str]:
    """Parse our own metadata, if there is some; type, rank and alpha are those that sa3.cpp reads."""
    stored = parse_json(str(fields.get(METADATA, "{}")), f"the metadata of {file}", 2**24)
    metadata = {key: text for key, text in stored.items() if isinstance(text, str)} if isinstance(stored, dict) else {}
    earlier = parse_json(metadata.pop("lora_config", "{}"), f"the lora_config of {file}")
    adapter_type, rank, alpha = (fields.get(f"lora.{name}", 0) for name in ("adapter_type", "rank", "alpha"))
    if not (adapter_type in (0, *KINDS) and isinstance(rank, int) and rank > 0 and is_finite_number(alpha)):
        raise AdapterError(
            f"{file} says lora.adapter_type {shorten(repr(adapter_type))}, lora.rank {rank}, lora.alpha {alpha}, which "
            f"sa3.cpp cannot play. Convert the adapter again, from its .safetensors file."
        )
    config = {"adapter_type": adapter_type or "lora", "rank": rank, "alpha": alpha}
    sizes = {
        path: params[name].shape[0]
        for path, params in layers.items()
        for name in ("lora_A", "M_xs")
        if name in params and params[name].ndim == 2 and params[name].shape[0] != rank
    }
    if sizes:  # sa3.cpp scales all layers by alpha / rank, whatever rank they have
        config |= {"rank_pattern": sizes, "alpha_pattern": {path: alpha * size / rank for path, size in sizes.items()}}
    return metadata | {"lora_config": json.dumps((earlier if isinstance(earlier, dict) else {}) | config)}


def _choose_dtype(name: str, tensor: Tensor, dtype: str) -> str:
    if name.startswith("magnitude"):
        return "fp32"
    return "fp16" if dtype == "q8_0" and tensor.shape[-1] % QUANT_BLOCK else dtype
