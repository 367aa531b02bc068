"""From the command to the first file: `sa3-generate` cold, and what `--help` and `import sa3train` take.

Each run is a process of its own; the file cache is warm, as it is for whoever uses a command twice.
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

CLIP_BAR, HELP_BAR = 8.0, 1.0
COMMANDS = ("generate", "train", "encode", "data", "adapter", "bench", "quickstart", "studio")


def run(options: Options) -> list[Figure]:
    """Figures of `arch` nano: the shipped checkpoint, not a random one, is what a newcomer starts."""
    seconds = options.seconds or 5.0
    with tempfile.TemporaryDirectory() as folder:
        clip = _median(_clip(options, seconds, Path(folder)), options)
    figures = [
        Figure(f"sa3-generate --model nano, {seconds:g} s clip, cold start to file", clip, "s", CLIP_BAR),
        Figure("import sa3train", _median(["-c", "import sa3train"], options), "s"),
    ]
    for command in COMMANDS:
        if not (Path(__file__).parents[1] / "cli" / f"{command}.py").is_file():
            continue
        arguments = ["-c", _main(command), "--help"]
        figures.append(Figure(f"sa3-{command} --help", _median(arguments, options), "s", HELP_BAR))
    return figures


def _main(command: str) -> str:
    return f"import sys; from sa3train.cli.{command} import main; sys.argv[0] = 'sa3-{command}'; sys.exit(main())"


def _clip(options: Options, seconds: float, folder: Path) -> list[str]:
    wanted = ["--model", "nano", "-p", "a short tone", "--duration", f"{seconds:g}", "--seed", "1", "--device", "cpu"]
    return ["-c", _main("generate"), *wanted, "-o", str(folder / "clip.wav")]


def _median(arguments: Sequence[str], options: Options) -> float:
    """Seconds of a fresh interpreter: one unmeasured run, then the median."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    taken = []
    for _ in range(1 + options.repeats):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False
        )
        taken.append(time.perf_counter() - start)
        if done.returncode:
            raise SA3Error(f"the command under measurement failed: {done.stderr.strip()[-500:]}")
    return statistics.median(taken[1:])
