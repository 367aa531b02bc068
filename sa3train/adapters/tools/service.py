"""The tools from file to file: what `sa3-adapter` and the studio's adapters page call.

Each function reads, checks, writes and reports; every one raises `AdapterError` for a file that holds no adapter, an
adapter that does not fit the model, and a setting that is missing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sa3train.adapters.adapter import BASE_SAMPLE, Adapter, hash_architecture
from sa3train.adapters.formats.io import is_file_name, load_adapter, save_adapter
from sa3train.adapters.tools.base_weights import LoadedModel, Weights, get_base_weights, get_weights
from sa3train.adapters.tools.combine import combine, find_axis
from sa3train.adapters.tools.edit import (
    check_factor,
    drop_bias_changes,
    extract,
    list_not_extracted,
    merge,
    resize,
    scale,
)
from sa3train.adapters.tools.low_rank import ErrorByLayer, Truncation
from sa3train.adapters.tools.measure import measure_written
from sa3train.adapters.tools.merge_checkpoint import WeightedAdapter, merge_into_checkpoint
from sa3train.adapters.tools.results import CheckpointResult, EditResult
from sa3train.core.dtypes import get_dtype
from sa3train.core.errors import AdapterError, MissingBaseError
from sa3train.core.files import check_target
from sa3train.core.text import format_share
from sa3train.models.checkpoint import StableAudio3, load_checkpoint
from sa3train.models.hub import list_cached_names

AnyPath = str | Path

EXACT = 1e-3
"""Largest error of a merge of adapters with magnitudes, relative to their change, that is no loss to be accepted."""


def load_base(name: str | None, in_memory: bool = False) -> StableAudio3 | None:
    """Load the parts of a model that adapters change.

    Args:
        name: Its name or folder; None for no model.
        in_memory: Whether to read all weights at once, rather than as they are needed.

    Returns:
        The model, or None.
    """
    if name is None:
        return None
    return load_checkpoint(name, "cpu" if in_memory else "meta", parts=("dit", "conditioner"))


def run_with_named_base(
    tool: Callable[..., EditResult | CheckpointResult], settings: Mapping[str, Any]
) -> EditResult | CheckpointResult:
    """Run a tool that writes; where it lacks a base model, on the one that the adapter names, if that is at hand.

    Args:
        tool: The tool.
        settings: Its arguments by name.

    Returns:
        The result, with a note that names a base model found so. `MissingBaseError` is raised where the adapter names
        none, or it would have to be downloaded.
    """
    try:
        return tool(**settings)
    except MissingBaseError:
        source = settings["source"] if "source" in settings else settings["sources"][0][0]
        name = load_adapter(source).metadata.get("base_model")
        if name not in list_cached_names():
            raise
        result = tool(**{**settings, "model": load_base(name)})
    note = f"base model: {name}, which the adapter names"
    return replace(result, notes=[note, *result.notes]) if isinstance(result, EditResult) else result


def merge_adapters(
    sources: Sequence[tuple[AnyPath, float]],
    target: AnyPath,
    model: LoadedModel | None = None,
    truncation: Truncation | None = None,
    dtype: str | None = None,
    conditioner_strength: float | None = None,
    allow_partial: bool = False,
    to: str | None = None,
    overwrite: bool = False,
    allow_loss: bool = False,
) -> EditResult | CheckpointResult:
    """Merge adapters into one adapter, which keeps magnitudes where it can, or into a checkpoint.

    Args:
        sources: Files or PEFT folders with their strengths.
        target: A file or folder for one adapter, a folder for a checkpoint.
        model: The model to merge into, or the base model of adapters whose change depends on it.
        truncation: The rank of the one adapter; None adds the ranks up for a file, and merges into a checkpoint for a
            folder.
        dtype: Dtype of the adapter file; None means fp16. A checkpoint keeps its own.
        conditioner_strength: Strength in the conditioner, for a checkpoint; None means each adapter's strength.
        allow_partial: Accept adapters of which only some layers fit, for a checkpoint.
        to: Layout of a checkpoint, "released", "diffusers" or "mlx" (a .npz file), also without adapters; None means
            that of the model.
        overwrite: Replace what exists at the target, but never a source.
        allow_loss: Accept that one adapter cannot hold the change of adapters with magnitudes.

    Returns:
        What was written.

    Raises:
        AdapterError: If a setting is missing or has no effect, or the loss is not accepted.
    """
    read, strengths = [path for path, _ in sources], [strength for _, strength in sources]
    check_target(target, read if model is None else [*read, model.path], overwrite)
    if 0 in strengths and not conditioner_strength:
        raise AdapterError(f"{read[strengths.index(0)]} has no effect at strength 0. Leave it out of the merge.")
    into_checkpoint = truncation is None and (to == "mlx" or not is_file_name(target))
    if into_checkpoint and (dtype is not None or allow_loss):
        raise AdapterError(
            "A checkpoint keeps the dtypes of its model, and loses nothing. Leave out dtype=DTYPE and allow_loss=True, "
            "or set rank=R for an adapter."
        )
    if not sources and (to is None or not into_checkpoint):
        raise AdapterError("There is nothing to merge. Name adapters, or set to=LAYOUT to write the model so.")
    adapters = [load_adapter(path) for path in read]
    if into_checkpoint:
        if model is None:
            raise AdapterError(
                "Set model=NAME to merge into a checkpoint, or rank=R (or explained_variance=SHARE) to merge "
                "into one adapter, or name a .safetensors file to merge exactly into one."
            )
        weighted = [WeightedAdapter(*pair, conditioner_strength) for pair in zip(adapters, strengths, strict=True)]
        return merge_into_checkpoint(model, target, weighted, allow_partial, to)
    if conditioner_strength is not None or allow_partial or to is not None:
        raise AdapterError("conditioner_strength, allow_partial and to= are for checkpoints, not for one adapter.")
    weights, warnings = get_base_weights(adapters, model)
    adapter, error = _merge(adapters, strengths, truncation, weights, "merge", allow_loss)
    return _save(target, adapter, dtype or "fp16", error, weights, warnings, _say_where_exact(adapter, model))


def _merge(
    adapters: Sequence[Adapter],
    strengths: Sequence[float],
    truncation: Truncation | None,
    weights: Weights | None,
    tool: str,
    allow_loss: bool,
) -> tuple[Adapter, ErrorByLayer]:
    """Merge adapters with their magnitudes, or into a lora; refuse to lose some of them unless that is accepted."""
    merged = combine(adapters, strengths, weights, truncation, tool)
    if merged is None:
        if truncation is None and find_axis(adapters) != "":
            names = ", ".join(sorted({adapter.spec.adapter_type for adapter in adapters}))
            raise AdapterError(
                f"No adapter holds the change of {names} at these strengths exactly. Set rank=R and allow_loss=True "
                f"for a lora approximation, or merge into a checkpoint, which is exact."
            )
        merged = merge(adapters, strengths, truncation or Truncation(explained_variance=1.0), weights, tool)
    error = merged[1]
    if error.relative > EXACT and find_axis(adapters) != "" and not allow_loss:
        lost = format_share(error.relative)
        raise AdapterError(
            f"To {tool} this way would lose {lost} of the change. Set allow_loss=True to accept that, "
            f"leave rank out to add the ranks up, or merge into a checkpoint, which is exact."
        )
    return merged


def extract_adapter(
    tuned: LoadedModel,
    base: LoadedModel,
    target: AnyPath,
    truncation: Truncation | None,
    dtype: str = "fp16",
    overwrite: bool = False,
) -> EditResult:
    """Extract the difference of two checkpoints as a lora adapter.

    Args:
        tuned: The fine-tuned model.
        base: Its base model.
        target: The file or folder to write.
        truncation: The rank of the adapter.
        dtype: Dtype of the adapter file.
        overwrite: Replace what exists at the target.

    Returns:
        What was written.
    """
    _check_target(target, [tuned.path, base.path], overwrite)
    provenance = {
        "base_model": base.name,
        "base_hash": base.fingerprint(),
        BASE_SAMPLE: base.sample_weights("dit"),
        "base_architecture": hash_architecture(base.get_adapter_root()),
        "extracted_from": tuned.name,
    }
    source = f"{tuned.name} − {base.name}"
    weights = get_weights(base)
    adapter, error = extract(get_weights(tuned), weights, require_rank(truncation), provenance, source)
    error.not_carried += list_not_extracted(tuned.get_adapter_root(), base.get_adapter_root())
    return _save(target, adapter, dtype, error, weights)


def resize_adapter(
    source: AnyPath,
    target: AnyPath,
    truncation: Truncation | None,
    model: LoadedModel | None = None,
    dtype: str = "fp16",
    overwrite: bool = False,
) -> EditResult:
    """Resize an adapter to another rank.

    Args:
        source: File or PEFT folder.
        target: The file or folder to write.
        truncation: The new rank.
        model: The base model, for types whose change depends on it.
        dtype: Dtype of the adapter file.
        overwrite: Replace what exists at the target, but never a source.

    Returns:
        What was written.
    """
    _check_target(target, [source], overwrite)
    truncation, original = require_rank(truncation), load_adapter(source)
    weights, warnings = get_base_weights([original], model)
    adapter, error = resize(original, truncation, weights)
    before, after = original.spec.adapter_type, adapter.spec.adapter_type
    return _save(
        target, adapter, dtype, error, weights, warnings, [] if before == after else [f"{before} became {after}"]
    )


def scale_adapter(
    source: AnyPath,
    target: AnyPath,
    factor: float,
    truncation: Truncation | None = None,
    model: LoadedModel | None = None,
    dtype: str = "fp16",
    overwrite: bool = False,
    allow_loss: bool = False,
) -> EditResult:
    """Scale an adapter: exactly where its magnitudes are by row or by column, or it has none, else as a lora.

    Args:
        source: File or PEFT folder.
        target: The file or folder to write.
        factor: Strength 1 of the result is this strength of the original.
        truncation: The rank of the lora approximation; None scales exactly.
        model: The base model, for types whose change depends on it.
        dtype: Dtype of the adapter file.
        overwrite: Replace what exists at the target, but never a source.
        allow_loss: Accept what a lora approximation loses of an adapter with magnitudes.

    Returns:
        What was written.
    """
    _check_target(target, [source], overwrite)
    original = load_adapter(source)
    weights, warnings = get_base_weights([original], model)
    error = None
    if truncation is None and not find_axis([original]):
        adapter = scale(original, factor)
    else:
        check_factor(factor)
        adapter, error = _merge([original], [factor], truncation, weights, "scale", allow_loss)
    return _save(target, adapter, dtype, error, weights, warnings, _say_where_exact(adapter, model))


def _say_where_exact(adapter: Adapter, model: LoadedModel | None) -> list[str]:
    """Say for which weights the magnitudes of a sum hold."""
    if not any(name.startswith("magnitude") for params in adapter.tensors.values() for name in params):
        return []
    known = model.name if model is not None else adapter.metadata.get("base_model") or "the model it was trained on"
    return [f"exact on {known}, whose norms its magnitudes hold; for another model, its sibling too, give --model NAME"]


def require_rank(truncation: Truncation | None) -> Truncation:
    """Require a rank to truncate to.

    Args:
        truncation: The rank, if one was given.

    Returns:
        The rank.

    Raises:
        AdapterError: If none was given.
    """
    if truncation is None:
        raise AdapterError("Set rank=R, or explained_variance=SHARE (0.95 keeps 95% of Σσ²).")
    return truncation


def _save(
    target: AnyPath,
    adapter: Adapter,
    dtype: str,
    error: ErrorByLayer | None,
    weights: Weights | None,
    warnings: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> EditResult:
    if error is not None and not is_file_name(target):
        adapter, dropped = drop_bias_changes(adapter)
        error.not_carried += dropped
    save_adapter(target, adapter, get_dtype(dtype))
    found = measure_written(adapter, adapter, target, weights)
    advice, lost = ([], []) if error is None else (error.advice, error.warnings)
    return EditResult(target, adapter, [*notes, *advice], [*warnings, *lost], error, **found)


def _check_target(target: AnyPath, inputs: Sequence[AnyPath], overwrite: bool) -> None:
    """Check, before the work, that an adapter can be written to a path."""
    is_file_name(target)  # raises for names of other kinds of files
    check_target(target, inputs, overwrite)
