"""`sa3-export`: write a model with adapters as files that run without PyTorch.

sa3-export --model nano --to onnx nano-onnx --check
sa3-export --model small-music --lora style.safetensors=0.8 --to onnx style-onnx
sa3-export --model nano --to coreml --seconds 10 nano-coreml                        packages for CoreML
sa3-export --model nano --lora-inputs 16 nano-onnx                                  adapters are inputs of its graphs
sa3-export scales --model nano --rank 16 --lora style.safetensors=0.8 style-inputs.safetensors    and a file of these
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sa3train.adapters.lora_argument import parse_lora
from sa3train.cli.hydra_app import run_job
from sa3train.cli.parser import CommandParser
from sa3train.cli.version import add_version
from sa3train.core.errors import ConfigError

FLAGS = {"overwrite": "--overwrite", "lora_inputs": "--lora-inputs", "seconds": "--seconds"}


def main(argv: list[str] | None = None) -> int:
    """Run the console command.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        The exit code.
    """
    arguments = build_parser().parse_args(argv)
    return run_job(lambda: arguments.run(arguments), FLAGS)


class _ExportParser(CommandParser):
    """Leaves what follows "scales" to a parser of its own; a folder of that name is ./scales."""

    def parse_known_args(  # type: ignore[override]  # of two overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        if given[:1] == ["scales"]:
            return _build_scales_parser().parse_known_args(given[1:], namespace)
        return super().parse_known_args(given, namespace)


def _build_scales_parser() -> argparse.ArgumentParser:
    text = "Write adapters as inputs of a model that was exported with --lora-inputs."
    parser = CommandParser(prog="sa3-export scales", description=text)
    parser.add_argument("output", type=Path, metavar="OUT", help="the safetensors file to write")
    _add_common(parser, "adapter to write; repeatable", "replace the file")
    parser.add_argument("--rank", type=int, required=True, help="RANK of --lora-inputs")
    parser.set_defaults(run=_run_scales)
    return parser


def _add_common(parser: argparse.ArgumentParser, of_lora: str, of_overwrite: str) -> None:
    parser.add_argument("--model", required=True, help="registry name or folder")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[=STRENGTH]", help=of_lora)
    parser.add_argument("--overwrite", action="store_true", help=of_overwrite)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line.

    Returns:
        The parser.
    """
    text = "Write a model as files that run without PyTorch."
    epilog = "sa3-export scales writes adapters for --lora-inputs; see sa3-export scales --help."
    parser = _ExportParser(prog="sa3-export", description=text, epilog=epilog)
    parser.set_defaults(run=_run)
    add_version(parser)
    parser.add_argument("output", type=Path, metavar="OUT", help="the folder to write")
    _add_common(parser, "adapter to bake in; repeatable", "replace an earlier export")
    text = "let hosts choose adapters: low-rank factors and scales of this rank as inputs, filled by sa3-export scales"
    parser.add_argument("--lora-inputs", type=int, metavar="RANK", help=text)
    text = "format; coreml: packages for one length, in fp32 (default: onnx)"
    parser.add_argument("--to", choices=("onnx", "coreml"), default="onnx", help=text)
    parser.add_argument("--seconds", type=float, metavar="S", help="length of CoreML packages' clips (default: 30)")
    text = "how weights are stored (int8: autoencoder in fp16; int8-products: also multiplies in int8; default: fp32)"
    parser.add_argument("--precision", choices=("fp32", "fp16", "int8", "int8-products"), default="fp32", help=text)
    text = "run the result on fixed noise, print its errors, and write nothing where they exceed a limit"
    parser.add_argument("--check", action="store_true", help=text)
    return parser


def _run_scales(arguments: argparse.Namespace) -> int:
    from sa3train.export.factors import write_scales

    adapters = [parse_lora(text) for text in arguments.lora]
    result = write_scales(arguments.model, arguments.output, adapters, arguments.rank, arguments.overwrite)
    if arguments.json:
        print(json.dumps(asdict(result), default=str))
        return 0
    strength = "1 alone" if result.fixed else "any"
    print(f"{result.path}: {len(adapters)} adapters, rank {result.used} of {result.rank}, lora_strength: {strength}")
    return 0


def _refuse_for_coreml(arguments: argparse.Namespace) -> None:
    if arguments.check:
        raise ConfigError("--to coreml excludes --check: only macOS runs packages. Remove it.")
    if arguments.lora_inputs is not None:
        raise ConfigError("--to coreml excludes --lora-inputs. Remove it, or bake adapters in with --lora.")
    if arguments.precision != "fp32":
        raise ConfigError(
            "--to coreml writes fp32 alone: coremltools' fp16 also computes in fp16, in which t is too coarse. "
            "Remove --precision."
        )


def _run(arguments: argparse.Namespace) -> int:
    from sa3train.export.check import TEXT_DTYPE

    given = arguments.model, arguments.output, [parse_lora(text) for text in arguments.lora]
    if arguments.to == "coreml":
        from sa3train.export.coreml import export_coreml

        _refuse_for_coreml(arguments)
        seconds = 30.0 if arguments.seconds is None else arguments.seconds
        result = export_coreml(*given, seconds, arguments.overwrite)
    else:
        from sa3train.export.onnx_files import export_onnx

        if arguments.seconds is not None:
            raise ConfigError("--seconds needs --to coreml: ONNX files take any length.")
        result = export_onnx(*given, arguments.check, arguments.overwrite, arguments.precision, arguments.lora_inputs)
    if arguments.json:
        print(json.dumps(asdict(result), default=str))
        return 0
    for name, error in result.errors.items():
        print(f"{error:.1e} relative error: {name}" if name != TEXT_DTYPE else f"{error:.1e} difference: {name}")
    print(f"{result.path}: {len(result.sizes)} files, {sum(result.sizes.values()) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
