"""`sa3-bench NAME`: measure speed and memory on this machine against their floors and bars.

sa3-bench generate                                   the released small architecture, random weights, two threads
sa3-bench load --arch medium --check                 exit code 1 when a bar is not reached
sa3-bench all --write docs/performance.md            every bench, each in a process of its own, into the table;
                                                     one that fails is a row with its message
"""

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sa3train.core.errors import ConfigError

if TYPE_CHECKING:
    from sa3train.bench.figures import Options, Record

BENCHES = {
    "generate": "denoiser against exact fp32 and its floor, with adapters, and whole requests",
    "decode": "latents to audio: bf16 against fp32 and the floor",
    "encode": "a set of short clips to latents, in one process and in two",
    "precision": "latents of 16-bit generation against fp32's",
    "load": "a checkpoint's seconds and host memory",
    "startup": "cold start of sa3-generate and of every --help",
    "adapters": "a training step of each adapter kind against the frozen floor",
    "train": "the whole training loop against its step",
    "quantized": "training on a base in 8 and 4 bits against the whole base: step, weights, loss",
    "tracking": "training steps with W&B whose server is of no use, against untracked ones",
    "nano": "how well nano follows its prompts and reconstructs audio",
    "studio": "first paint of the studio's page (needs the extra dev)",
}
PACKAGE = "sa3train.bench"
LIMIT_S = 600  # for each bench of `all`


def available() -> dict[str, str]:
    """The benches of this installation and what each measures."""
    return {name: text for name, text in BENCHES.items() if importlib.util.find_spec(f"{PACKAGE}.{name}") is not None}


def build_parser() -> argparse.ArgumentParser:
    """The command line of `sa3-bench`."""
    names = available()
    listing = "\n".join(f"  {name:10} {text}" for name, text in {**names, "all": "every one of them"}.items())
    parser = argparse.ArgumentParser(
        prog="sa3-bench",
        description="Measure speed and memory on this machine against their floors and bars.",
        epilog=f"benches:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", choices=[*names, "all"], help="what to measure (listed below)")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is not reached")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--write", type=Path, metavar="FILE", help="renew the table of this device in a Markdown file")
    parser.add_argument("--arch", choices=("nano", "small", "medium"), help="default: the one the bars are for")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:0 …")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="default: bf16")
    parser.add_argument("--threads", type=_positive, default=2, metavar="N", help="CPU threads (default: 2)")
    parser.add_argument("--repeats", type=_positive, metavar="N", help="measured rounds (default: 5; of all: 3)")
    parser.add_argument("--seconds", type=float, help="length of the audio (default: the one the bars are for)")
    parser.add_argument("--kinds", type=_names, default=(), metavar="A,B", help="adapter kinds (default: all)")
    parser.add_argument("--steps", type=_positive, default=8, help="sampling steps (default: 8)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sa3-bench`."""
    from sa3train.cli.hydra_app import run_job

    arguments = build_parser().parse_args(argv)
    return run_job(lambda: _bench(arguments))


def _bench(arguments: argparse.Namespace) -> int:
    from sa3train.bench.figures import renew, table
    from sa3train.core.files import write_json

    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))  # before torch is loaded
    options = _options(arguments)
    names = list(available()) if arguments.name == "all" else [arguments.name]
    records = [_apart(name, options) if len(names) > 1 else measure(name, options) for name in names]
    for record in records:
        print(f"\n{record.bench} ({record.machine['processor']}, load {record.machine['load']})\n")
        print(table(record.figures))
    if arguments.json:
        found = [record.as_json() for record in records]
        write_json(arguments.json, found if arguments.name == "all" else found[0])
    if arguments.write:
        renew(arguments.write, records)
    missed = [figure.name for record in records for figure in record.missed]
    if missed:
        print(f"\nnot reached: {'; '.join(missed)}")
    return 1 if missed and arguments.check else 0


def measure(name: str, options: "Options") -> "Record":
    """Run one bench in this process. Raises `ConfigError` for a device that is not there."""
    import torch

    from sa3train.bench.figures import Record, machine

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {options.device} was asked for, and no CUDA device is here: leave it out.")
    bench = importlib.import_module(f"{PACKAGE}.{name}")
    return Record(name, options, bench.run(options), machine(options.device))


def _apart(name: str, options: "Options") -> "Record":
    """Run one bench in a process of its own, so that none inherits another's memory or ends the others when it fails.

    A bench that fails, or is not done in `LIMIT_S`, becomes one figure that says so.
    """
    from sa3train.bench.figures import Figure, Record, machine

    flags = _flags(options)
    command = " ".join(["sa3-bench", name, *flags])
    program = "import sys; from sa3train.cli.bench import main; sys.exit(main())"
    print(f"measuring {name} ...", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "record.json"
        arguments = [sys.executable, "-c", program, name, *flags, "--json", str(result)]
        try:
            done = subprocess.run(
                arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=LIMIT_S, check=False
            )
            failure = done.stderr.strip().splitlines()[-1:] or ["no message"] if done.returncode else []
        except subprocess.TimeoutExpired:
            failure = [f"not done in {LIMIT_S} s"]
        print(f"{name}: {failure[0] if failure else 'done'} ({time.monotonic() - start:.0f} s)", flush=True)
        if failure or not result.is_file():
            failed = Figure(name, None, "", note=failure[0] if failure else "it left no record")
            return Record(name, options, [failed], {**machine(options.device), "command": command})
        found = json.loads(result.read_text(encoding="utf-8"))
    figures = [Figure(**{key: value for key, value in one.items() if key != "reached"}) for one in found["figures"]]
    return Record(name, options, figures, {**found["machine"], "command": command})


def _options(arguments: argparse.Namespace) -> "Options":
    from sa3train.bench.figures import Options

    fields = Options.__dataclass_fields__
    given = {key: value for key, value in vars(arguments).items() if key in fields}
    repeats = arguments.repeats or (3 if arguments.name == "all" else 5)
    return Options(**{**given, "repeats": repeats})


def _flags(options: "Options") -> list[str]:
    """The command line that gives these options."""
    settings = {key: value for key, value in asdict(options).items() if value not in (None, ())}
    texts = {key: ",".join(value) if isinstance(value, tuple) else str(value) for key, value in settings.items()}
    return [part for key, text in texts.items() for part in (f"--{key}", text)]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
