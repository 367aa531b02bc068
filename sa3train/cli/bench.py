"""`sa3-bench NAME`: measure speed and memory on this machine against baselines and targets.

sa3-bench generate                                   the released small architecture, random weights, two threads
sa3-bench load --arch medium --check                 exit code 1 when a target is missed
sa3-bench all --update docs/performance.md           every benchmark in a process of its own; update the tables. A
                                                     benchmark that fails becomes a row with its error message.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sa3train.cli.hydra_app import run_job
from sa3train.cli.parser import CommandParser
from sa3train.cli.version import add_version
from sa3train.core.config import DEVICES
from sa3train.core.errors import ConfigError, SA3Error

if TYPE_CHECKING:
    from sa3train.bench.figures import Options, Record

BENCHMARKS = {
    "generate": "the denoiser against exact fp32 and its roofline, with adapters, and whole generations",
    "decode": "latents to audio: bf16 against fp32 and the roofline",
    "encode": "a set of short clips to latents",
    "precision": "latents of 16-bit generation against fp32's",
    "load": "time and host memory of loading a checkpoint",
    "adapters": "a training step with each adapter type against the frozen-base baseline",
    "train": "the whole training loop against its step",
    "peers": "diffusers, PEFT, OpenVINO and the official implementation against ours, on the same weights",
    "nano": "how well nano follows its prompts and reconstructs audio",
}
UNUSED: dict[str, set[str]] = {
    "generate": {"adapter_types"},
    "decode": {"adapter_types", "steps"},
    "encode": {"adapter_types", "steps"},
    "precision": {"adapter_types", "repeats"},
    "load": {"adapter_types", "seconds", "steps"},
    "adapters": {"steps"},
    "train": {"adapter_types", "steps"},
    "peers": {"adapter_types"},
    "nano": {"adapter_types", "arch", "dtype", "repeats", "seconds", "steps"},
}
"""Options that a benchmark does not use, and refuses."""
TIME_LIMIT = 600
"""Seconds for each benchmark of `all`."""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `sa3-bench`.

    Returns:
        The parser.
    """
    listing = "\n".join(f"  {name:10} {text}" for name, text in {**BENCHMARKS, "all": "all of them"}.items())
    parser = CommandParser(
        prog="sa3-bench",
        description="Measure speed and memory on this machine against baselines and targets.",
        epilog=f"benchmarks:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # so that what is given can be told from a default
    )
    add = parser.add_argument
    add("name", metavar="NAME", choices=[*BENCHMARKS, "all"], help="what to measure (listed below)")
    add("--check", action="store_true", default=False, help="exit with code 1 when a target is missed")
    add("--json", type=Path, default=None, metavar="FILE", help="also write the figures to a JSON file, replacing it")
    add("--update", type=Path, default=None, metavar="FILE", help="update this device's tables in a Markdown file")
    add("--arch", choices=("nano", "small", "medium"), help="default: the one that has targets")
    add("--device", help=f"auto, {DEVICES} (default: cpu)")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16")
    add("--threads", type=int, metavar="N", help="CPU threads (default: 2)")
    add("--repeats", type=int, metavar="N", help="measured rounds (default: 5; for all: 3)")
    add("--seconds", type=float, help="duration of the audio (default: the one that has targets)")
    add("--adapter-types", type=_parse_names, metavar="A,B", help="adapter types (default: all)")
    add("--steps", type=int, help="sampling steps (default: 8)")
    add_version(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sa3-bench`.

    Args:
        argv: Arguments; default: those of the process.

    Returns:
        The exit code.
    """
    arguments = build_parser().parse_args(argv)
    return run_job(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    from sa3train.bench.figures import render_table, update_page
    from sa3train.core.files import write_json

    options = _make_options(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))  # before torch is loaded
    from sa3train.bench.tasks import run_benchmark

    if arguments.name == "all":
        records = [_run_in_subprocess(name, options) for name in BENCHMARKS]
    else:
        records = [run_benchmark(arguments.name, options)]
    for record in records:
        print(f"\n{record.bench} ({record.machine['processor']}, load {record.machine['load']})\n")
        print(render_table(record.figures))
    if arguments.json:
        contents = [record.as_json() for record in records]
        write_json(arguments.json, contents if arguments.name == "all" else contents[0])
    if arguments.update:
        update_page(arguments.update, records)
    missed = [figure.name for record in records for figure in record.missed]
    if missed:
        print(f"\nmissed targets: {'; '.join(missed)}")
    return 1 if missed and arguments.check else 0


def _run_in_subprocess(name: str, options: "Options") -> "Record":
    """Run a benchmark in a process of its own, so that it neither inherits memory from another nor ends the others.

    A benchmark that fails, or takes longer than `TIME_LIMIT`, becomes one figure with its error message.
    """
    from sa3train.bench.figures import Figure, Record, describe_machine
    from sa3train.bench.measure import run_in_subprocess
    from sa3train.bench.tasks import measure_benchmark

    print(f"measuring {name} ...", flush=True)
    start, outcome = time.monotonic(), "done"
    try:
        content = run_in_subprocess(measure_benchmark, name, asdict(options), timeout=TIME_LIMIT)
    except SA3Error as error:
        outcome = str(error).splitlines()[-1]
        failed = asdict(Figure(name, None, "", note=outcome))
        content = {"figures": [failed], "machine": describe_machine(options.device)}
    print(f"{name}: {outcome} ({time.monotonic() - start:.0f} s)", flush=True)
    figures = [Figure(**{key: value for key, value in one.items() if key != "reached"}) for one in content["figures"]]
    command = " ".join(["sa3-bench", name, *_make_flags(name, options)])
    return Record(name, options, figures, {**content["machine"], "command": command})


def _make_options(arguments: argparse.Namespace) -> "Options":
    from sa3train.bench.figures import Options, split_page

    values = {key: value for key, value in vars(arguments).items() if key in Options.__dataclass_fields__}
    if unused := values.keys() & UNUSED.get(arguments.name, set()):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(unused))
        raise ConfigError(f"{flags} has no effect on {arguments.name}. Remove it.")
    values.setdefault("repeats", 3 if arguments.name == "all" else 5)
    if arguments.json and arguments.json.suffix.lower() != ".json":
        raise ConfigError(f"--json {arguments.json} must end in .json: it would replace a file of another kind.")
    for file in filter(None, (arguments.json, arguments.update)):  # before minutes of measuring
        if file.is_dir() or not file.parent.is_dir() or (file == arguments.update and not file.is_file()):
            raise ConfigError(f"{file} cannot be written: there is no such folder, or no file to update.")
    options = Options(**values)
    if arguments.update is not None and options.device != "auto":
        split_page(arguments.update, options.device)
    return options


def _make_flags(name: str, options: "Options") -> list[str]:
    """Make the flags that give a benchmark these options."""
    used = {key: value for key, value in asdict(options).items() if key not in UNUSED.get(name, ())}
    settings = {key.replace("_", "-"): value for key, value in used.items() if value not in (None, ())}
    texts = {key: ",".join(value) if isinstance(value, tuple) else str(value) for key, value in settings.items()}
    return [part for key, text in texts.items() for part in (f"--{key}", text)]


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


if __name__ == "__main__":
    sys.exit(main())
