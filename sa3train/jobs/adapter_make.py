"""The commands of `sa3-adapter` that make files: convert, merge, extract, resize, scale."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3train.errors import AdapterError

if TYPE_CHECKING:
    import torch

    from sa3train.adapters.adapter import Adapter
    from sa3train.adapters.lowrank import Cut, Loss
    from sa3train.adapters.tools import Weights
    from sa3train.models.checkpoint import StableAudio3

DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}


def convert(arguments: argparse.Namespace) -> int:
    """Convert an adapter and say what was lost on the way."""
    from sa3train.adapters.convert import convert as convert_file
    from sa3train.adapters.convert import read_any

    to = arguments.to or ("native" if arguments.target.endswith(".safetensors") else "peft")
    weights = base_of([read_any(arguments.source)[0]], arguments.model) if arguments.model else None
    done = convert_file(arguments.source, arguments.target, to, weights, _cut(arguments), _dtype(arguments))
    return _told(arguments, arguments.target, done.adapter, done.notes, done.loss, "measured error of the written file")


def merge(arguments: argparse.Namespace) -> int:
    """Merge adapters into a checkpoint, or into one adapter."""
    from sa3train.adapters.formats import load_adapter, save_adapter
    from sa3train.adapters.tools import merged

    pairs = [_with_strength(text) for text in arguments.adapters]
    adapters, strengths = [load_adapter(path) for path, _ in pairs], [strength for _, strength in pairs]
    cut = _cut(arguments)
    if cut is None:
        return _merge_into_checkpoint(arguments, adapters, strengths)
    if arguments.conditioner_strength is not None or arguments.allow_partial:
        raise AdapterError(
            "--conditioner-strength and --allow-partial are for checkpoints; leave them out with --rank."
        )
    adapter, loss = merged(adapters, strengths, cut, base_of(adapters, arguments.model))
    save_adapter(arguments.output, adapter, _dtype(arguments))
    return _told(arguments, arguments.output, adapter, [], loss, "lost by the cut")


def _merge_into_checkpoint(arguments: argparse.Namespace, adapters: "list[Adapter]", strengths: list[float]) -> int:
    from sa3train.adapters.merge_checkpoint import Ingredient, merge_into_checkpoint

    if arguments.model is None:
        raise AdapterError(
            "say what to merge into: --model NAME for a whole checkpoint, or --rank R (--energy SHARE) for one adapter."
        )
    model = load_model(arguments.model)
    ingredients = [
        Ingredient(adapter, strength, arguments.conditioner_strength)
        for adapter, strength in zip(adapters, strengths, strict=True)
    ]
    reports = merge_into_checkpoint(
        model.path, arguments.output, model.adaptable(), ingredients, model, arguments.allow_partial
    )
    if arguments.json:
        written = {"written": arguments.output, "reports": [report.to_dict() for report in reports]}
        print(json.dumps(written, indent=2, ensure_ascii=False))
        return 0
    for report in reports:
        print(f"{report.source}: {report.summary()}")
    print(f"{arguments.output}: {model.name} with {len(reports)} adapter(s) in its weights")
    return 0


def extract(arguments: argparse.Namespace) -> int:
    """Take the difference of two checkpoints out as an adapter."""
    from sa3train.adapters.adapter import architecture_of
    from sa3train.adapters.formats import save_adapter
    from sa3train.adapters.tools import extracted, unextracted

    cut = _wanted(_cut(arguments))
    tuned, base = load_model(arguments.tuned), load_model(arguments.base)
    provenance = {
        "base_model": base.name,
        "base_hash": base.fingerprint(),
        "base_architecture": architecture_of(base.adaptable()),
        "extracted_from": tuned.name,
    }
    name = f"{tuned.name} − {base.name}"
    adapter, loss = extracted(_weights(tuned), _weights(base), cut, provenance, name)
    loss.left_out += unextracted(tuned.adaptable(), base.adaptable())
    save_adapter(arguments.output, adapter, _dtype(arguments))
    return _told(arguments, arguments.output, adapter, [], loss, "lost by the cut")


def resize(arguments: argparse.Namespace) -> int:
    """Change an adapter's rank."""
    from sa3train.adapters.formats import load_adapter, save_adapter
    from sa3train.adapters.tools import resized

    cut, original = _wanted(_cut(arguments)), load_adapter(arguments.file)
    adapter, loss = resized(original, cut, base_of([original], arguments.model))
    save_adapter(arguments.output, adapter, _dtype(arguments))
    notes = [] if adapter.spec.kind == original.spec.kind else [f"{original.spec.kind} became {adapter.spec.kind}"]
    return _told(arguments, arguments.output, adapter, notes, loss, "lost by the cut")


def scale(arguments: argparse.Namespace) -> int:
    """Change an adapter's strength for good: exactly for lora, else as a lora of low rank."""
    from sa3train.adapters.formats import load_adapter, save_adapter
    from sa3train.adapters.tools import merged, scaled

    cut, original = _cut(arguments), load_adapter(arguments.file)
    weights = base_of([original], arguments.model)
    if cut is None:
        adapter, loss = scaled(original, arguments.factor), None
    else:
        adapter, loss = merged([original], [arguments.factor], cut, weights, tool="scale")
    save_adapter(arguments.output, adapter, _dtype(arguments))
    return _told(arguments, arguments.output, adapter, [], loss, "lost by the cut")


def _told(
    arguments: argparse.Namespace, target: str, adapter: "Adapter", notes: list[str], loss: "Loss | None", what: str
) -> int:
    from sa3train.jobs.adapter_tables import loss_lines, written

    if arguments.json:
        print(json.dumps(written(target, adapter, notes, loss), indent=2, ensure_ascii=False))
        return 0
    summary = written(target, adapter, notes, loss)
    print(f"{target}: {summary['kind']}, rank {summary['rank']}, {summary['layers']} layers")
    for line in (*notes, *loss_lines(loss, what)):
        print(f"  {line}")
    return 0


def load_model(name: str) -> "StableAudio3":
    """The parts of a model that adapters change."""
    from sa3train.models.checkpoint import load_checkpoint

    return load_checkpoint(name, parts=("dit", "conditioner"))


def _weights(model: "StableAudio3") -> "Weights":
    from sa3train.adapters.targets import adaptable_layers

    layers: Any = adaptable_layers(model.adaptable())
    return {path: layer.weight for path, layer in layers.items()}


def base_of(adapters: "list[Adapter]", name: str | None) -> "Weights | None":
    """The weights of the model `name`, once every adapter is known to fit it."""
    if name is None:
        return None
    from sa3train.adapters.adapter import architecture_of
    from sa3train.adapters.report import match, refuse_unfit
    from sa3train.adapters.targets import adaptable_layers

    model = load_model(name)
    root = model.adaptable()
    layers, architecture = adaptable_layers(root), architecture_of(root)
    for adapter in adapters:
        report = match(adapter, layers, architecture, model)
        refuse_unfit(report, allow_partial=False)
        for warning in report.warnings:
            print(f"warning: {adapter.source}: {warning}", file=sys.stderr)
    return _weights(model)


def _cut(arguments: argparse.Namespace) -> "Cut | None":
    from sa3train.adapters.lowrank import Cut

    if arguments.rank is None and arguments.energy is None:
        return None
    return Cut(arguments.rank, arguments.energy)


def _wanted(cut: "Cut | None") -> "Cut":
    if cut is None:
        raise AdapterError("say how far to cut: --rank R, or --energy SHARE (0.95 keeps 95 % of Σσ²).")
    return cut


def _dtype(arguments: argparse.Namespace) -> "torch.dtype":
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[arguments.dtype])
    return dtype


def _with_strength(text: str) -> tuple[str, float]:
    """`FILE[=STRENGTH]`; a path that exists is taken as it is."""
    path, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        return path, float(number)
    except ValueError as error:
        raise AdapterError(f"{number!r} in {text!r} is no strength; write FILE=0.8.") from error
