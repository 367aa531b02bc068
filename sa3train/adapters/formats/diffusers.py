"""PEFT folders for the models of diffusers: the layers of `StableAudio3DiTModel`, and in a folder of its own inside the
one of `StableAudio3DurationEmbedder`, which is another model there.

    transformer = PeftModel.from_pretrained(pipe.transformer, FOLDER)
    duration_embedder = PeftModel.from_pretrained(pipe.duration_embedder, FOLDER, subfolder="duration_embedder")

Names and the order of rows are those of `sa3train.models.diffusers_layout`.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter, get_checkpoint_name
from sa3train.adapters.formats.naming import reorder_product
from sa3train.adapters.formats.peft import (
    CONFIG,
    WEIGHTS,
    read_peft_folder,
    write_peft_files,
)
from sa3train.adapters.spec import CARRIED_BY
from sa3train.core.errors import AdapterError
from sa3train.core.files import replace_folder
from sa3train.models.diffusers_layout import DURATION, PART_ORDER, TRANSFORMER, convert_name

TYPES = tuple(name for name, formats in CARRIED_BY.items() if "diffusers" in formats)
SHARED = ("adapter_type", "rslora", "options")
"""Settings that the two folders of one adapter have in common."""


def is_diffusers_folder(folder: Path) -> bool:
    """Check whether a folder has an adapter on the duration embedder in a folder of its own.

    Args:
        folder: The folder.

    Returns:
        Whether it has.
    """
    return _has_files(folder / DURATION)


def _has_files(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (CONFIG, WEIGHTS))


def read_diffusers_folder(folder: Path, base: Mapping[str, Tensor] | None = None) -> Adapter:
    """Read an adapter from a folder with that of the duration embedder in it.

    Args:
        folder: The folder. It may lack the files of the transformer.
        base: The base model's weights by module path, see `load_adapter`.

    Returns:
        The adapter.

    Raises:
        AdapterError: If a file is missing or damaged, or the two differ in what they have in common.
    """
    parts = [read_peft_folder(part, base=base) for part in (folder, folder / DURATION) if _has_files(part)]
    first, last = parts[0], parts[-1]
    for name in SHARED:
        one, other = (getattr(part.spec, name) for part in (first, last))
        if one != other:
            raise AdapterError(
                f"{folder} and {folder / DURATION} have another {name}: {one} and {other}. Move one of them away and "
                f"load each by itself."
            )
    ranks = {path: last.spec.get_rank(path) for path in last.tensors}
    ranks = {path: rank for path, rank in ranks.items() if rank != first.spec.get_rank(path)}
    alphas = {path: last.spec.get_alpha(path) for path in last.tensors}
    alphas = {path: alpha for path, alpha in alphas.items() if alpha != first.spec.get_alpha(path)}
    spec = replace(
        first.spec,
        rank_pattern={**ranks, **first.spec.rank_pattern},
        alpha_pattern={**alphas, **first.spec.alpha_pattern},
    )
    metadata, tensors = {**last.metadata, **first.metadata}, {**first.tensors, **last.tensors}
    return Adapter(spec, tensors, metadata, str(folder))


def write_diffusers_folder(
    path: str | os.PathLike[str], adapter: Adapter, dtype: torch.dtype | None = torch.float16
) -> None:
    """Write an adapter for the models of diffusers, whole or not at all.

    Args:
        path: The folder. It gets the files of the transformer and, where the adapter changes it, a folder for the
            duration embedder.
        adapter: A lora or dora-rows adapter.
        dtype: Dtype to write fp32 tensors in; None keeps fp32.

    Raises:
        AdapterError: If it is of another type, or has layers that these models do not have.
    """
    if adapter.spec.adapter_type not in TYPES:
        raise AdapterError(
            f"{adapter.source} is {adapter.spec.adapter_type}, and for diffusers {' and '.join(TYPES)} are written. "
            f"Approximate it: sa3-adapter convert FILE FOLDER --to diffusers --model NAME --rank R"
        )
    names: dict[str, dict[str, str]] = {TRANSFORMER: {}, DURATION: {}}
    tensors: dict[str, Mapping[str, Tensor]] = {}
    for layer, params in adapter.tensors.items():
        component, name = convert_name(f"{get_checkpoint_name(layer)}.") or ("", "")
        if component not in names:
            raise AdapterError(
                f"{adapter.source}: {layer} is no layer of diffusers' transformer or duration embedder. Write it with "
                f"--to native."
            )
        names[component][layer] = name.removesuffix(".")
        is_product = layer.endswith(".self_attn.to_qkv") and {"lora_A", "lora_B"} <= params.keys()
        tensors[layer] = reorder_product(params, PART_ORDER) if is_product else params
    ordered = replace(adapter, tensors=tensors)
    with replace_folder(path, _is_ours) as staging:
        for component, folder in ((TRANSFORMER, staging), (DURATION, staging / DURATION)):
            if names[component]:
                write_peft_files(folder, ordered, names[component], dtype, exact=True)


def _is_ours(folder: Path) -> bool:
    return {item.name for item in folder.iterdir()} <= {CONFIG, WEIGHTS, DURATION}
