"""`sa3-quickstart`: the main workflow on the sample set, step by step, with the commands a user would type."""

import argparse
import itertools
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sa3train.cli.hydra_app import run_job
from sa3train.cli.parser import CommandParser
from sa3train.cli.version import add_version
from sa3train.core.config import MAX_COUNT
from sa3train.core.errors import SA3Error
from sa3train.core.overrides import format_override
from sa3train.core.text import format_command

STRENGTHS = (0.0, 0.5, 1.0)
MODES = ("text", "restyled", "inpainted")
DURATION = 6.0
LONGEST = 12.0
"""Seconds of text to audio, and at most of what starts from a clip, which is as long as the clip."""
PROMPT = "Japanese traditional music, koto playing melody in A in-sen, mysterious, calm, 80 BPM, in a quiet hall"


@dataclass(frozen=True)
class DemoStep:
    """One command of the demo, with a title and an explanation."""

    title: str
    explanation: str
    command: tuple[str, ...]


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `sa3-quickstart`.

    Returns:
        The parser.
    """
    parser = CommandParser(
        prog="sa3-quickstart",
        description="Audit and encode the sample set, train an adapter on nano, play it in all three modes.",
    )
    parser.add_argument(
        "--out", type=_parse_folder, default=Path("demo_out"), help="folder to write to (default: %(default)s)"
    )
    parser.add_argument("--source", type=_parse_folder, help="folder of audio and captions (default: the sample set)")
    parser.add_argument("--steps", type=int, default=80, help="training steps (default: %(default)s)")
    parser.add_argument("--prompt", default=PROMPT, help="prompt to generate (default: %(default)s)")
    add_version(parser)
    return parser


def _parse_folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("a folder must have a name")
    return Path(text)


def main(argv: list[str] | None = None) -> int:
    """Run `sa3-quickstart`.

    Args:
        argv: Arguments; default: those of the process.

    Returns:
        The exit code.
    """
    arguments = build_parser().parse_args(argv)
    return run_job(lambda: run_quickstart(arguments.source, arguments.out, arguments.steps, arguments.prompt))


def run_quickstart(source: Path | None, out: Path, steps: int, prompt: str) -> int:
    """Run each step in its own process, as a user would, and print what was made.

    Args:
        source: Folder of audio and captions; None for the sample set.
        out: Folder to write to.
        steps: Training steps.
        prompt: Prompt to generate.

    Returns:
        Exit code 0.

    Raises:
        SA3Error: `steps` is out of range, or a step failed.
    """
    if not 1 <= steps <= MAX_COUNT:
        raise SA3Error(f"--steps is {steps}, but must be from 1 to {MAX_COUNT}.")
    source = source or _find_sample_set()
    run_dir = _choose_run_dir(out)
    started = time.monotonic()
    plan = [*_plan_training(source, out, run_dir, steps), *_plan_playback(source, run_dir, prompt)]
    for number, step in enumerate(plan, 1):
        _run_step(number, len(plan), step)
    _print_summary(out, run_dir, time.monotonic() - started)
    return 0


def _find_sample_set() -> Path:
    """Find the sample set of a checkout: beside the package, or below the current folder."""
    for root in (Path(__file__).parents[2], Path.cwd()):
        if (root / "datasets" / "sample").is_dir():
            return root / "datasets" / "sample"
    raise SA3Error(
        "the sample set (datasets/sample of the repository) was not found. Run sa3-quickstart in a checkout of "
        "sa3train, or give a folder of audio with captions: --source FOLDER."
    )


def _choose_run_dir(out: Path) -> Path:
    """Choose a run folder that does not exist yet, so that the adapter of an earlier demo is kept."""
    runs = (out / f"run-{number}" for number in itertools.count(1))
    return next(run_dir for run_dir in runs if not run_dir.exists())


def _plan_training(source: Path, out: Path, run_dir: Path, steps: int) -> list[DemoStep]:
    """Plan the steps from audio to adapter."""
    latents = out / "latents"
    return [
        DemoStep(
            "Audit the audio",
            "Finds problems before they cost training time. Each finding has a fix; your files are never changed.",
            ("sa3-data", "audit", str(source), "--model", "nano", "--out", str(out / "audit")),
        ),
        DemoStep(
            "Encode the audio",
            "Each clip is encoded once, at its own length, to latents of 10.8 frames a second. A second run skips "
            "clips that are encoded already.",
            (
                "sa3-encode",
                format_override("source", source),
                format_override("out", latents),
                "model=nano",
                "split=0.1",
            ),
        ),
        DemoStep(
            "Train an adapter",
            "The base model stays frozen and a small DoRA adapter is trained. Training loss varies with the noise "
            "level of each step, so watch val/loss: the loss on fixed clips, noise and noise levels.",
            (
                "sa3-train",
                format_override("data", latents),
                "model=nano-base",
                format_override("run_dir", run_dir),
                f"trainer.max_steps={steps}",
                f"callbacks.validation.every={max(1, steps // 2)}",
                f"callbacks.checkpoint.every={steps}",
                f"callbacks.demos.every={steps}",
                "callbacks.demos.duration=4",
                "callbacks.demos.steps=16",
                "callbacks.demos.heldout_prompts=1",
            ),
        ),
    ]


def _plan_playback(source: Path, run_dir: Path, prompt: str) -> list[DemoStep]:
    """Plan generations in all three modes at each strength, with one seed so that only the adapter differs."""
    from sa3train.audio.io import read_audio_info
    from sa3train.data.sources.listing import list_source

    clips = [clip.audio.path for clip in list_source(str(source)).clips if clip.audio.local_path()]
    if not clips:
        raise SA3Error(f"{source} has no audio file. Give a folder of audio with --source.")
    clip = clips[0]
    info = read_audio_info(clip)
    length = min(LONGEST, math.ceil(100 * info.samples / info.sample_rate) / 100)
    start, end = f"{length / 3:.2f}", f"{2 * length / 3:.2f}"
    duration = ("--duration", f"{length:g}")
    modes: dict[str, tuple[str, tuple[str, ...]]] = {
        "text": ("Text to audio", ("--duration", f"{DURATION:g}")),
        "restyled": ("Audio to audio", ("--init-audio", clip, "--init-noise-level", "0.7", *duration)),
        "inpainted": (
            f"Inpainting from {start} to {end} s",
            ("--inpaint-audio", clip, "--inpaint-start", start, "--inpaint-end", end, *duration),
        ),
    }
    found = []
    for mode, (title, flags) in modes.items():
        for strength in STRENGTHS:
            adapter = f"{run_dir / 'adapter.safetensors'}={strength:g}"
            output = str(_get_wav_path(run_dir, mode, strength))
            basic = ("sa3-generate", "--model", "nano-base", "-p", prompt, "--seed", "1")
            command = (*basic, "--steps", "25", *flags, "--lora", adapter, "-o", output, "--overwrite")
            found.append(DemoStep(f"{title}, adapter at strength {strength:g}", "", command))
    return found


def _get_wav_path(run_dir: Path, mode: str, strength: float) -> Path:
    return run_dir / "play" / f"{mode}_{strength:g}.wav"


def _run_step(number: int, total: int, step: DemoStep) -> None:
    """Print the step and run its command."""
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}[{number}/{total}] {step.title}{plain}")
    if step.explanation:
        print(step.explanation)
    print(f"$ {format_command(step.command)}", flush=True)
    program = shutil.which(step.command[0], path=str(Path(sys.executable).parent)) or step.command[0]
    done = subprocess.run([program, *step.command[1:]])
    if done.returncode != 0:
        raise SA3Error(
            f"step {number} failed with exit code {done.returncode}; its message is above. "
            f"To repeat it, run: {format_command(step.command)}"
        )


def _print_summary(out: Path, run_dir: Path, seconds: float) -> None:
    """Print what was made, and how much the adapter changed the audio."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Difference from strength 0 (same seed), in dB relative to the audio")
    for column in ("mode", *(f"strength {strength:g}" for strength in STRENGTHS)):
        table.add_column(column)
    for mode in MODES:
        table.add_row(mode, *_compare_to_first([_get_wav_path(run_dir, mode, strength) for strength in STRENGTHS]))
    console = Console()
    console.print()
    console.print(table)
    made = [
        ("audit", out / "audit"),
        ("latents", out / "latents"),
        ("adapter", run_dir / "adapter.safetensors"),
        ("audio", run_dir / "play"),
        ("report", run_dir / "report.html"),
    ]
    for name, path in made:
        if not path.exists():
            raise SA3Error(f"the demo did not write {path}. Look for the reason in the output above.")
        console.print(f"{name:8} {path}", soft_wrap=True)
    console.print(f"Done in {seconds / 60:.1f} minutes. Open {run_dir / 'report.html'} in a browser.", soft_wrap=True)


def _compare_to_first(wavs: Sequence[Path]) -> list[str]:
    """Compare each file to the first: "identical", or the level of the difference in dB."""
    from sa3train.audio.io import read_audio

    audios = [read_audio(wav)[0] for wav in wavs]
    power = audios[0].square().mean().clamp(min=1e-12)
    levels = [float(10 * ((audio_CN - audios[0]).square().mean() / power).log10()) for audio_CN in audios]
    return ["identical" if level == -math.inf else f"{level:+.1f} dB" for level in levels]


if __name__ == "__main__":
    sys.exit(main())
