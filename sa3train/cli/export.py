"""`sa3-export`: write a model with adapters baked in as files that run without PyTorch.

sa3-export --model nano --to onnx nano-onnx --check
sa3-export --model small-music --lora style.safetensors=0.8 --to onnx style-onnx
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from sa3train.adapters.lora_argument import parse_lora
from sa3train.cli.hydra_app import run_job
from sa3train.cli.parser import CommandParser
from sa3train.cli.version import add_version

FLAGS = {"overwrite": "--overwrite"}


def main(argv: list[str] | None = None) -> int:
    """Run the console command.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        The exit code.
    """
    arguments = build_parser().parse_args(argv)
    return run_job(lambda: _run(arguments), FLAGS)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line.

    Returns:
        The parser.
    """
    parser = CommandParser(prog="sa3-export", description="Write a model as files that run without PyTorch.")
    add_version(parser)
    parser.add_argument("output", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument("--model", required=True, help="registry name or folder")
    text = "adapter to bake in; repeatable"
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[=STRENGTH]", help=text)
    parser.add_argument("--to", choices=("onnx",), default="onnx", help="format (default: onnx)")
    text = "what weights are stored in (int8: the autoencoder in fp16); default: fp32"
    parser.add_argument("--precision", choices=("fp32", "fp16", "int8"), default="fp32", help=text)
    text = "run the result on fixed noise, print its errors, and write nothing where they exceed a limit"
    parser.add_argument("--check", action="store_true", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from sa3train.export.onnx_files import TEXT_DTYPE, export_onnx

    adapters = [parse_lora(text) for text in arguments.lora]
    result = export_onnx(
        arguments.model, arguments.output, adapters, arguments.check, arguments.overwrite, arguments.precision
    )
    if arguments.json:
        print(json.dumps(asdict(result), default=str))
        return 0
    for name, error in result.errors.items():
        print(f"{error:.1e} relative error: {name}" if name != TEXT_DTYPE else f"{error:.1e} difference: {name}")
    print(f"{result.path}: {len(result.sizes)} files, {sum(result.sizes.values()) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
