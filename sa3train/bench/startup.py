"""Cold start: `sa3-generate` from command to file, every `--help`, and `import sa3train`.

Each run is a process of its own. The file cache is warm, as for anyone who uses a command twice.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from sa3train.bench.figures import Figure, Options
from sa3train.core.errors import SA3Error

GENERATE_TARGET, HELP_TARGET = 8.0, 1.0
COMMANDS = ("generate", "train", "encode", "data", "adapter", "bench", "quickstart", "studio")


def run(options: Options) -> list[Figure]:
    """Measure commands on the shipped nano, which is what a new user starts.

    Args:
        options: `seconds` of the generated clip (default 5).

    Returns:
        Seconds of each command.
    """
    seconds = options.seconds or 5.0
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--model", "nano", "-p", "a short tone", "--duration", f"{seconds:g}", "--seed", "1"]
        flags += ["--device", "cpu", "-o", str(Path(folder) / "clip.wav")]
        clip_seconds = _time_processes(["-c", _make_program("generate"), *flags], options)
    what = f"sa3-generate --model nano, {seconds:g} s clip, cold start to file"
    figures = [Figure(what, clip_seconds, "s", GENERATE_TARGET)]
    figures.append(Figure("import sa3train", _time_processes(["-c", "import sa3train"], options), "s"))
    for command in COMMANDS:
        help_seconds = _time_processes(["-c", _make_program(command), "--help"], options)
        figures.append(Figure(f"sa3-{command} --help", help_seconds, "s", HELP_TARGET))
    return figures


def _make_program(command: str) -> str:
    return f"import sys; from sa3train.cli.{command} import main; sys.argv[0] = 'sa3-{command}'; sys.exit(main())"


def _time_processes(arguments: Sequence[str], options: Options) -> float:
    """Time a fresh interpreter: one unmeasured run, then the median of `repeats`."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    seconds = []
    for _ in range(1 + options.repeats):
        start = time.perf_counter()
        process = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
        seconds.append(time.perf_counter() - start)
        if process.returncode:
            raise SA3Error(f"the measured command failed: {process.stderr.strip()[-500:]}")
    return statistics.median(seconds[1:])
