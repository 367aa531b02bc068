"""`sa3-adapter`: inspect adapter files, compare them, convert, merge, extract, resize and scale them.

sa3-adapter inspect style.safetensors --model small-music-base     what it holds, whether it fits, how much it changes
sa3-adapter diff a.safetensors b.safetensors                        where two adapters differ
sa3-adapter convert style.safetensors style_comfy.safetensors --to comfy
sa3-adapter convert style.safetensors lora-style-f32.gguf           for sa3.cpp
sa3-adapter card runs/style --license cc-by-4.0                     a folder for the Hugging Face hub
sa3-adapter convert old.ckpt style.safetensors                      from a pickle, by the weights-only reader
sa3-adapter merge a.safetensors=0.8 b.safetensors -o both.safetensors --rank 32
sa3-adapter merge style.safetensors -o merged/ --model small-music  a checkpoint with the adapter in its weights
sa3-adapter merge style.safetensors -o pipeline/ --model medium --to diffusers
sa3-adapter extract tuned/ -o style.safetensors --base small-music-base --rank 16
sa3-adapter resize style.safetensors smaller.safetensors --explained-variance 0.95
sa3-adapter scale style.safetensors louder.safetensors 1.3
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from sa3train.adapters.formats.run_dir import locate_adapter
from sa3train.cli.card import add_card_flags, write_card
from sa3train.cli.hydra_app import run_job
from sa3train.cli.parser import CommandParser, name_flags
from sa3train.cli.version import add_version
from sa3train.core.dtypes import DTYPES
from sa3train.core.errors import AdapterError
from sa3train.core.files import check_target
from sa3train.core.text import format_number, format_share, list_few

if TYPE_CHECKING:
    from sa3train.adapters.apply.load_report import LoadReport
    from sa3train.adapters.tools.inspect import Comparison, Inspection

SHOWN_LAYERS = 12
RANK_FLAGS = ("rank", "explained_variance")
_NAMED = "rank explained_variance model base to dtype dense conditioner_strength allow_partial allow_loss overwrite"
FLAGS = {name: f"--{name.replace('_', '-')}" for name in _NAMED.split()}
"""Flags by the names of parameters that messages name."""
LOSS = "accept what one adapter cannot hold of types with magnitudes; the loss is reported"


def main(argv: list[str] | None = None) -> int:
    """Run the console command.

    Args:
        argv: Arguments without the program's name; None reads `sys.argv`.

    Returns:
        Exit code: 0 for success, 1 after an error message, 2 for misused flags.
    """
    given = sys.argv[1:] if argv is None else argv
    arguments = build_parser(any(word.startswith(("-o", "--output")) for word in given)).parse_args(given)
    return run_job(lambda: _run(arguments), FLAGS)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.json and getattr(arguments, "layers", False):
        raise AdapterError("--layers has no effect with --json, which lists every layer. Remove it.")
    paths = [path for name, path in vars(arguments).items() if name in ("file", "first", "second", "source")]
    for path in (*paths, *(_parse_source(text)[0] for text in getattr(arguments, "sources", ()))):
        locate_adapter(path)  # before anything heavy is imported
    return int(arguments.run(arguments))


def build_parser(has_output: bool = False) -> argparse.ArgumentParser:
    """Build the parser of the command line.

    Args:
        has_output: Whether the output is given with `-o`, where it may also be an argument.

    Returns:
        The parser; `run` of the parsed arguments is the command to run.
    """
    top = CommandParser(
        prog="sa3-adapter", description="Inspect, share, compare, convert, merge, extract, resize and scale adapters."
    )
    add_version(top)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_readers(commands)
    flags = _add_tool(commands, "convert", "convert to another format", "approximate by a lora of this rank")
    flags.add_argument("source", help="any adapter file, a PEFT folder, or a pickle (.ckpt, .pt, .bin)")
    output: dict[str, Any] = {"dest": "target", "required": True} if has_output else {}
    names = ("-o", "--output") if has_output else ("target",)
    flags.add_argument(*names, **output, help="a .safetensors or .gguf file, or a folder for PEFT and diffusers")
    text = "default: native for .safetensors, gguf (sa3.cpp) for .gguf, else peft; sa3cpp: .safetensors and .json"
    flags.add_argument("--to", choices=("native", "peft", "diffusers", "comfy", "sa3cpp", "gguf"), help=text)
    flags.add_argument(
        "--model",
        help="base model: measures the error, and is needed for some adapter types (default "
        "then: the one that the adapter names, if it is at hand)",
    )
    flags.add_argument("--dense", action="store_true", help="full weight deltas, for any version of ComfyUI")
    flags.add_argument("--svd-bases", metavar="PT", help="svd_bases.pt that an -xs adapter was trained with")
    text = "merge adapters into a checkpoint (a folder) or into one adapter (a .safetensors file, or --rank)"
    flags = _add_tool(commands, "merge", text, "rank of the one adapter; in a file the ranks add up without it")
    flags.add_argument("sources", nargs="*", metavar="FILE[=STRENGTH]", help="adapters and their strengths")
    flags.add_argument("-o", "--output", dest="target", required=True, help="folder of a checkpoint, or adapter file")
    flags.add_argument("--model", help="the checkpoint, or the base model of one adapter (not needed for lora)")
    text = "layout of a checkpoint (default: that of --model; mlx: a DiT pack), also to write --model without adapters"
    flags.add_argument("--to", choices=("released", "diffusers", "mlx"), help=text)
    flags.add_argument("--conditioner-strength", type=float, help="strength in the conditioner, for a checkpoint")
    flags.add_argument("--allow-loss", action="store_true", help=LOSS)
    flags.add_argument("--allow-partial", action="store_true", help="merge adapters of which only some layers fit")
    text = "extract the adapter between a fine-tuned checkpoint and its base"
    flags = _add_tool(commands, "extract", text, "rank of the adapter; this or --explained-variance is needed")
    flags.add_argument("tuned", help="fine-tuned checkpoint: registry name or folder")
    flags.add_argument("--base", required=True, help="its base model: registry name or folder")
    flags.add_argument("-o", "--output", dest="target", required=True, help="the file or folder to write")
    flags = _add_tool(commands, "resize", "change the rank", "the new rank; this or --explained-variance is needed")
    flags.add_argument("source", metavar="file", help="an adapter file or PEFT folder")
    flags.add_argument(*names, **output, metavar="output", help="the file or folder to write")
    flags.add_argument("--model", help="base model, needed for types other than lora, dora and bora")
    text = "scale so that strength 1 is what strength FACTOR was"
    flags = _add_tool(commands, "scale", text, "rank of the lora that approximates types with magnitudes")
    flags.add_argument("source", metavar="file", help="an adapter file or PEFT folder")
    flags.add_argument(*names, **output, metavar="output", help="the file or folder to write")
    flags.add_argument("factor", type=float, help="the factor, such as 1.3")
    flags.add_argument("--allow-loss", action="store_true", help=LOSS)
    flags.add_argument("--model", help="base model, needed for types with magnitudes")
    return top


def _add_readers(commands: Any) -> None:
    flags = _add_command(commands, "inspect", "show what a file holds and, with a model, whether it fits", _inspect)
    flags.add_argument("file", help="an adapter file of any tool, a PEFT folder or a run folder")
    flags.add_argument("--model", help="model to check against: registry name or folder")
    flags.add_argument("--layers", action="store_true", help="list every layer")
    flags.add_argument("--plot", metavar="PNG", help="plot the change of every layer; replaces an existing PNG")
    flags = _add_command(commands, "diff", "show where two adapters differ", _diff)
    flags.add_argument("first", help="an adapter file or PEFT folder")
    flags.add_argument("second", help="another one")
    flags.add_argument("--model", help="compare the changes of this model's weights, whatever the adapter types")
    flags.add_argument("--layers", action="store_true", help="list every layer")
    text = "write a model card and a folder for the Hugging Face hub, with audio examples"
    add_card_flags(_add_command(commands, "card", text, write_card))


def _add_command(commands: Any, name: str, text: str, run: Callable[..., int]) -> argparse.ArgumentParser:
    flags: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    flags.add_argument("--json", action="store_true", help="print JSON instead of text")
    flags.set_defaults(run=run)
    return flags


def _add_tool(commands: Any, name: str, text: str, rank: str) -> argparse.ArgumentParser:
    flags = _add_command(commands, name, text, _write)
    flags.set_defaults(tool=f"{name}_adapter{'s' if name == 'merge' else ''}")
    either = flags.add_mutually_exclusive_group()
    either.add_argument("--rank", type=int, help=rank)
    variance = "the smallest rank per layer that keeps this share"
    either.add_argument("--explained-variance", type=float, metavar="SHARE", help=variance)
    dtypes = (*DTYPES, "q8_0") if name == "convert" else tuple(DTYPES)
    flags.add_argument("--dtype", choices=dtypes, help="of the written adapter (default fp16; of a .gguf file fp32)")
    flags.add_argument("--overwrite", action="store_true", help="replace what exists there, but never an input")
    return flags


def _inspect(arguments: argparse.Namespace) -> int:
    from sa3train.adapters.tools import inspect_adapter, plot_layers
    from sa3train.adapters.tools.service import load_base

    inspection = inspect_adapter(arguments.file, load_base(arguments.model))
    if arguments.plot:
        check_target(arguments.plot, [arguments.file], overwrite=True)
        plot_layers(inspection, arguments.plot)
    if arguments.json:
        _print_json(inspection.to_dict())
    else:
        _show_inspection(inspection, arguments.layers)
        if arguments.plot:
            print(f"plot: {arguments.plot}")
    report = inspection.load_report
    if report and report.refusal:
        raise AdapterError(report.refusal)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from sa3train.adapters.tools import compare_adapters
    from sa3train.adapters.tools.service import load_base

    comparison = compare_adapters(arguments.first, arguments.second, load_base(arguments.model))
    _warn(comparison.warnings)
    if arguments.json:
        _print_json(comparison.to_dict())
    else:
        _show_comparison(comparison, (arguments.first, arguments.second), arguments.layers)
    return 0


def _write(arguments: argparse.Namespace) -> int:
    """Run a tool that writes something: the flags have the names of the tool's parameters."""
    from sa3train.adapters import tools
    from sa3train.adapters.formats.io import is_file_name
    from sa3train.adapters.tools.service import load_base, require_rank, run_with_named_base

    flags = vars(arguments)
    settings = {name: value for name, value in flags.items() if name not in ("run", "tool", "json", *RANK_FLAGS)}
    if arguments.dtype is None:
        del settings["dtype"]
    given = [flags[name] for name in RANK_FLAGS]
    settings["truncation"] = None if given == [None, None] else tools.Truncation(*given)
    if arguments.tool in ("extract_adapter", "resize_adapter"):
        require_rank(settings["truncation"])  # before models are loaded
    if "sources" in settings:
        settings["sources"] = [_parse_source(text) for text in arguments.sources]
    into_checkpoint = arguments.tool == "merge_adapters" and settings["truncation"] is None
    in_memory = arguments.tool == "extract_adapter" or (
        into_checkpoint and (arguments.to == "mlx" or not is_file_name(arguments.target))
    )
    for name in ("model", "tuned", "base"):
        if name in settings:
            settings[name] = load_base(settings[name], in_memory)
    result = run_with_named_base(getattr(tools, arguments.tool), settings)
    _warn(result.warnings)
    if arguments.json:
        _print_json(result.to_dict())
        return 0
    print(f"Wrote {result.target}")
    for line in (*(f"{name}: {value}" for name, value in result.facts.items()), *result.notes):
        print(f"  {name_flags(line, FLAGS)}")
    return 0


def _parse_source(text: str) -> tuple[str, float]:
    """Parse `FILE[=STRENGTH]`."""
    from sa3train.adapters.lora_argument import parse_lora

    lora = parse_lora(text)
    if lora.interval is not None:
        raise AdapterError(f"{text}: a merged adapter has no noise levels. Remove the part after @.")
    return lora.path, lora.require_strength()


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        print(f"warning: {name_flags(warning, FLAGS)}", file=sys.stderr)


def _print_json(values: dict[str, Any]) -> None:
    print(json.dumps(values, indent=2))


def _show_inspection(inspection: "Inspection", every_layer: bool) -> None:
    _print_line(inspection.source)
    facts = (
        inspection.settings | {"problems": ", ".join(inspection.problems)} | inspection.list_provenance(_choose_limit())
    )
    _print_table([], [[name, value] for name, value in facts.items() if value])
    groups = [[name, str(group.layers), format_number(group.norm)] for name, group in inspection.groups.items()]
    _print_table(["group", "layers", "norm of the change"], groups)
    if every_layer:
        layers = [[path, str(layer.rank), format_number(layer.norm)] for path, layer in inspection.layers.items()]
        _print_table(["layer", "rank", "norm of the change"], layers)
    if inspection.load_report:
        _show_report(inspection.load_report, every_layer)


def _show_report(report: "LoadReport", every_layer: bool) -> None:
    from sa3train.adapters.tools.inspect import RELATIVE_CHANGE

    loaded = report.base_loaded
    _print_line(f"\non {loaded.get('name', 'the model')}")
    counts = {name: list(getattr(report, name)) for name in ("matched", "missing", "unexpected", "mismatched")}
    rows = [[name, str(len(paths)), "" if name == "matched" else list_few(paths)] for name, paths in counts.items()]
    _print_table(["layers", "count", "such as"], rows)
    bases = [
        [name, report.base.get(name, "not recorded")[:24], loaded.get(name, "-")[:24]]
        for name in ("name", "architecture", "hash")
    ]
    _print_table(["base model", "trained on", "loaded"], bases)
    if report.effect:
        _print_table(["group", RELATIVE_CHANGE], [[name, format_share(value)] for name, value in report.effect.items()])
    if every_layer and report.layer_effect:
        layers = [[path, format_share(value)] for path, value in report.layer_effect.items()]
        _print_table(["layer", RELATIVE_CHANGE], layers)
    for warning in report.warnings:
        _print_line(f"warning: {warning}")
    if report.refusal is None:
        _print_line("it can be loaded")


def _show_comparison(comparison: "Comparison", names: tuple[str, str], every_layer: bool) -> None:
    if comparison.identical:
        _print_line("The two adapters have the same type, scales and tensors, bit for bit.")
    if changes := comparison.list_changes(_choose_limit()):
        _print_table(["differs", *names], changes)
    for name, paths in zip(names, (comparison.only_in_first, comparison.only_in_second), strict=True):
        if paths:
            _print_line(f"only in {name}: {len(paths)} layers, such as {list_few(paths)}")
    shown = comparison.list_differences(None if every_layer else SHOWN_LAYERS)
    if shown:
        title = f"{comparison.compared}, {len(shown)} of {len(comparison.layers)} shared layers"
        _print_table(["layer", "relative difference", "cosine"], shown, title)


def _choose_limit() -> int:
    """Most characters of a value: a pipe or file gets all of it."""
    from sa3train.adapters.tools.inspect import SHOWN_CHARACTERS

    return SHOWN_CHARACTERS if sys.stdout.isatty() else sys.maxsize


def _print_line(text: str) -> None:
    from rich.console import Console

    Console(soft_wrap=True).print(text, markup=False, highlight=False)


def _print_table(heads: list[str], rows: list[list[str]], title: str | None = None) -> None:
    """Print a table; without heads, as plain columns. A pipe or file has no width to fit into."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=bool(heads), box=box.HEAVY_HEAD if heads else None)
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 1 << 16)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


if __name__ == "__main__":
    raise SystemExit(main())
