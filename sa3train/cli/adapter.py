"""`sa3-adapter`: look into adapter files, compare them, and make others of them.

sa3-adapter inspect style.safetensors --model small-music-base     what it holds, whether it fits, how much it changes
sa3-adapter diff a.safetensors b.safetensors                        where two adapters differ
sa3-adapter convert style.safetensors style_comfy.safetensors --to comfy
sa3-adapter convert old.ckpt style.safetensors                      out of a pickle, by the weights-only reader
sa3-adapter merge a.safetensors=0.8 b.safetensors -o both.safetensors --rank 32
sa3-adapter merge style.safetensors -o merged/ --model small-music  a whole checkpoint with the adapter in it
sa3-adapter extract tuned/ -o style.safetensors --base small-music-base --rank 16
sa3-adapter resize style.safetensors smaller.safetensors --energy 0.95
sa3-adapter scale style.safetensors louder.safetensors 1.3

The commands of `sa3-adapter` that make files: convert, merge, extract, resize, scale.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3train.cli.hydra_app import run_job
from sa3train.core.errors import AdapterError

if TYPE_CHECKING:
    import torch

    from sa3train.adapters.adapter import Adapter
    from sa3train.adapters.tools.edit import Weights
    from sa3train.adapters.tools.low_rank import Cut, Loss
    from sa3train.models.checkpoint import StableAudio3

DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}


def convert(arguments: argparse.Namespace) -> int:
    """Convert an adapter and say what was lost on the way."""
    from sa3train.adapters.tools.convert import convert as convert_file
    from sa3train.adapters.tools.convert import read_any

    to = arguments.to or ("native" if arguments.target.endswith(".safetensors") else "peft")
    weights = base_of([read_any(arguments.source)[0]], arguments.model) if arguments.model else None
    done = convert_file(arguments.source, arguments.target, to, weights, _cut(arguments), _dtype(arguments))
    return _told(arguments, arguments.target, done.adapter, done.notes, done.loss, "measured error of the written file")


def merge(arguments: argparse.Namespace) -> int:
    """Merge adapters into a checkpoint, or into one adapter."""
    from sa3train.adapters.formats.io import load_adapter, save_adapter
    from sa3train.adapters.tools.edit import merged

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
    from sa3train.adapters.tools.merge_checkpoint import Ingredient, merge_into_checkpoint

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
    from sa3train.adapters.formats.io import save_adapter
    from sa3train.adapters.tools.edit import extracted, unextracted

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
    from sa3train.adapters.formats.io import load_adapter, save_adapter
    from sa3train.adapters.tools.edit import resized

    cut, original = _wanted(_cut(arguments)), load_adapter(arguments.file)
    adapter, loss = resized(original, cut, base_of([original], arguments.model))
    save_adapter(arguments.output, adapter, _dtype(arguments))
    notes = [] if adapter.spec.kind == original.spec.kind else [f"{original.spec.kind} became {adapter.spec.kind}"]
    return _told(arguments, arguments.output, adapter, notes, loss, "lost by the cut")


def scale(arguments: argparse.Namespace) -> int:
    """Change an adapter's strength for good: exactly for lora, else as a lora of low rank."""
    from sa3train.adapters.formats.io import load_adapter, save_adapter
    from sa3train.adapters.tools.edit import merged, scaled

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
    from sa3train.cli.adapter_tables import loss_lines, written

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
    from sa3train.adapters.layer_filter import adaptable_layers

    layers: Any = adaptable_layers(model.adaptable())
    return {path: layer.weight for path, layer in layers.items()}


def base_of(adapters: "list[Adapter]", name: str | None) -> "Weights | None":
    """The weights of the model `name`, once every adapter is known to fit it."""
    if name is None:
        return None
    from sa3train.adapters.adapter import architecture_of
    from sa3train.adapters.apply.load_report import match, refuse_unfit
    from sa3train.adapters.layer_filter import adaptable_layers

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
    from sa3train.adapters.tools.low_rank import Cut

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


def main(argv: list[str] | None = None) -> int:
    """The console command: 0 when done, 1 with a line on what was wrong, 2 for misused flags."""
    arguments = build_parser().parse_args(argv)
    return run_job(lambda: int(arguments.run(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="sa3-adapter", description="Look into adapters, and make others of them.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    flags = _command(
        commands, "inspect", "what a file holds; with a model, how it fits and how much it changes", inspect
    )
    flags.add_argument("file", help="a .safetensors file (native or ComfyUI) or a PEFT folder")
    flags.add_argument("--model", help="registry name or folder of the model to hold it against")
    flags.add_argument("--layers", action="store_true", help="list every layer")
    flags.add_argument("--plot", metavar="PNG", help="draw the change of every layer")
    flags = _command(commands, "diff", "where two adapters differ", diff)
    flags.add_argument("first")
    flags.add_argument("second")
    flags.add_argument("--model", help="compare whole changes of this model's weights, whatever the kinds")
    flags.add_argument("--layers", action="store_true", help="list every layer")
    flags = _command(commands, "convert", "from one format to another", convert)
    flags.add_argument("source", help="any adapter file, a PEFT folder, or a pickle (.ckpt, .pt, .bin)")
    flags.add_argument("target", help="a .safetensors file, or a folder for PEFT")
    flags.add_argument("--to", choices=("native", "peft", "comfy"), help="default: native for .safetensors, else peft")
    flags.add_argument("--model", help="its base model: needed for what the format cannot hold as it is")
    _cut_flags(flags, "approximate by a lora of this rank")
    flags = _command(commands, "merge", "adapters into a whole checkpoint, or (with --rank) into one adapter", merge)
    flags.add_argument("adapters", nargs="+", metavar="FILE[=STRENGTH]")
    flags.add_argument("-o", "--output", required=True, help="a folder for a checkpoint; a file for an adapter")
    flags.add_argument("--model", help="the checkpoint; for one adapter of kinds other than lora their base")
    flags.add_argument("--conditioner-strength", type=float, help="strength in the conditioner, for a checkpoint")
    flags.add_argument("--allow-partial", action="store_true", help="merge adapters that fit only in part")
    _cut_flags(flags, "one adapter of this rank instead of a checkpoint")
    flags = _command(commands, "extract", "the adapter of a fine-tuned checkpoint minus its base", extract)
    flags.add_argument("tuned", help="folder or name of the fine-tuned checkpoint")
    flags.add_argument("--base", required=True, help="the checkpoint it was started from")
    flags.add_argument("-o", "--output", required=True)
    _cut_flags(flags, "rank of the adapter")
    flags = _command(commands, "resize", "to another rank, or to the rank that keeps a share of the energy", resize)
    flags.add_argument("file")
    flags.add_argument("output")
    flags.add_argument("--model", help="its base model: needed for kinds other than lora, dora and bora")
    _cut_flags(flags, "the new rank")
    flags = _command(commands, "scale", "so that strength 1 is what strength FACTOR was", scale)
    flags.add_argument("file")
    flags.add_argument("output")
    flags.add_argument("factor", type=float)
    flags.add_argument("--model", help="its base model: needed for kinds with magnitudes")
    _cut_flags(flags, "rank of the lora that kinds with magnitudes become")
    return top


def _command(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    flags: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    flags.add_argument("--json", action="store_true", help="print JSON instead of text")
    flags.set_defaults(run=run)
    return flags


def _cut_flags(flags: argparse.ArgumentParser, text: str) -> None:
    either = flags.add_mutually_exclusive_group()
    either.add_argument("--rank", type=int, help=text)
    either.add_argument("--energy", type=float, metavar="SHARE", help="the smallest rank that keeps this share of Σσ²")
    flags.add_argument("--dtype", choices=tuple(DTYPES), default="f16", help="of written adapters (default f16)")


def inspect(arguments: argparse.Namespace) -> int:
    """Show an adapter; exit code 1 when the model given would refuse it."""
    from sa3train.adapters.formats.io import load_adapter
    from sa3train.adapters.tools.inspect import examined, inspected, plot_layers
    from sa3train.cli.adapter_tables import show_file, show_report

    adapter = load_adapter(arguments.file)
    found, report, refused = inspected(adapter), None, None
    if arguments.model:
        model = load_model(arguments.model)
        examination, refused = examined(adapter, model.adaptable(), model)
        report = examination.to_dict()
        found |= {"load_report": report, "refused": refused}
    if arguments.plot:
        effects = report["layer_effect"] if report else {}
        norms = {path: layer["norm"] for path, layer in found["layers"].items() if layer["norm"] is not None}
        if not effects and not norms:
            raise AdapterError(f"the change of a {found['kind']} adapter depends on its base: give --model to plot it.")
        what = "‖W' − W‖ / ‖W‖" if effects else "norm of the scaled low-rank product"
        plot_layers(effects or norms, what, f"{Path(arguments.file).name}: {found['kind']}", arguments.plot)
    if arguments.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        show_file(found, arguments.layers)
        if report:
            show_report(report, refused, arguments.layers)
        if arguments.plot:
            print(f"plot: {arguments.plot}")
    if refused:
        raise AdapterError(refused)
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """Compare two adapters."""
    from sa3train.adapters.formats.io import load_adapter
    from sa3train.adapters.tools.inspect import compared
    from sa3train.cli.adapter_tables import show_comparison

    first, second = load_adapter(arguments.first), load_adapter(arguments.second)
    weights = base_of([first, second], arguments.model)
    found = compared(first, second, weights)
    if arguments.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        show_comparison(found, (arguments.first, arguments.second), arguments.layers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
