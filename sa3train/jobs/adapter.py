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
"""

import argparse
import json
from pathlib import Path
from typing import Any

from sa3train.errors import AdapterError
from sa3train.jobs.adapter_make import DTYPES, base_of, convert, extract, load_model, merge, resize, scale
from sa3train.jobs.runtime import run_job


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
    from sa3train.adapters.formats import load_adapter
    from sa3train.adapters.inspection import examined, inspected, plot_layers
    from sa3train.jobs.adapter_tables import show_file, show_report

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
    from sa3train.adapters.formats import load_adapter
    from sa3train.adapters.inspection import compared
    from sa3train.jobs.adapter_tables import show_comparison

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
