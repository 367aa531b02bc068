"""`sa3-quickstart`: the main job on the sample set, told step by step, through the commands a user would type."""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3train.cli.hydra_app import run_job
from sa3train.core.errors import SA3Error

if TYPE_CHECKING:
    from torch import Tensor

STRENGTHS = (0.0, 0.5, 1.0)
MODES = ("text", "restyled", "inpainted")
DURATION = 6.0
REGION = (2.0, 4.0)
PROMPT = "Japanese traditional music, koto playing melody in A in-sen, mysterious, calm, 80 BPM, in a quiet hall"


@dataclass(frozen=True)
class Step:
    """One command of the demo and why it is there."""

    title: str
    why: str
    command: tuple[str, ...]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="sa3-quickstart",
        description="Audit and encode the sample set, train an adapter on nano, play it in all three modes.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--source", type=Path, help="folder of audio and captions (default: the sample set)")
    parser.add_argument("--steps", type=int, default=80, help="training steps (default: %(default)s)")
    parser.add_argument("--prompt", default=PROMPT, help="what to play (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The console command."""
    arguments = build_parser().parse_args(argv)
    return run_job(lambda: quickstart(arguments.source, arguments.out, arguments.steps, arguments.prompt))


def quickstart(source: Path | None, out: Path, steps: int, prompt: str) -> int:
    """Run every step, each in its own process as a user would, then say what was made. Raises `SA3Error` on failure."""
    if steps < 1:
        raise SA3Error(f"--steps must be at least 1, not {steps}.")
    source = source or sample_set()
    run_dir = new_run_dir(out)
    started = time.monotonic()
    plan = [*prepare_steps(source, out, run_dir, steps), *play_steps(source, run_dir, prompt)]
    for number, step in enumerate(plan, 1):
        run_step(number, len(plan), step)
    summarise(out, run_dir, time.monotonic() - started)
    return 0


def sample_set() -> Path:
    """The sample set of a checkout: beside the package, or below the current folder."""
    for root in (Path(__file__).parents[2], Path.cwd()):
        if (root / "datasets" / "sample").is_dir():
            return root / "datasets" / "sample"
    raise SA3Error(
        "the sample set (datasets/sample of the repository) is not here: run this in a checkout of sa3train, "
        "or give a folder of audio with captions: sa3-quickstart --source FOLDER"
    )


def new_run_dir(out: Path) -> Path:
    """A run folder that does not exist yet: an earlier demo's adapter is kept."""
    number = 1
    while (out / f"run-{number}").exists():
        number += 1
    return out / f"run-{number}"


def prepare_steps(source: Path, out: Path, run_dir: Path, steps: int) -> list[Step]:
    """From audio to adapter."""
    latents = out / "latents"
    return [
        Step(
            "Look at the audio",
            "Faults found now cost nothing. Findings come with a remedy; the files themselves are never changed.",
            ("sa3-data", "audit", str(source), "--out", str(out / "audit")),
        ),
        Step(
            "Encode it",
            "Each clip once, at its own length, into latents of 10.8 frames a second. A second run does nothing twice.",
            ("sa3-encode", f"source={source}", f"out={latents}", "model=nano", "split=0.1"),
        ),
        Step(
            "Train an adapter",
            "The base model stays frozen; a small DoRA learns beside it. Training loss jumps with the noise level it "
            "draws, so look at the loss on fixed clips, noise and levels, before and after.",
            (
                "sa3-train",
                f"data={latents}",
                "model=nano-base",
                f"run_dir={run_dir}",
                f"trainer.max_steps={steps}",
                f"scheduler.warmup_steps={min(10, steps - 1)}",
                "optimizer.lr=1e-3",
                f"callbacks.judge.every={max(1, steps // 2)}",
                f"callbacks.save.every={steps}",
                f"callbacks.demos.every={steps}",
                "callbacks.demos.duration=4",
                "callbacks.demos.steps=16",
                "callbacks.demos.heldout_prompts=1",
            ),
        ),
    ]


def play_steps(source: Path, run_dir: Path, prompt: str) -> list[Step]:
    """The adapter in all three modes at each strength; the same seed, so that only the adapter differs."""
    clips = [path for path in sorted(source.rglob("*")) if path.suffix.lower() in {".wav", ".flac", ".ogg", ".mp3"}]
    if not clips:
        raise SA3Error(f"{source} holds no wav, flac, ogg or mp3 file: give a folder of audio with --source.")
    clip = str(clips[0])
    modes: dict[str, tuple[str, tuple[str, ...]]] = {
        "text": ("Text to audio", ()),
        "restyled": ("Audio to audio", ("--init-audio", clip, "--init-noise-level", "0.7")),
        "inpainted": (
            f"Inpainting from {REGION[0]:g} to {REGION[1]:g} s",
            ("--inpaint-audio", clip, "--inpaint-start", f"{REGION[0]:g}", "--inpaint-end", f"{REGION[1]:g}"),
        ),
    }
    found = []
    for mode, (title, flags) in modes.items():
        for strength in STRENGTHS:
            adapter = f"{run_dir / 'adapter.safetensors'}={strength:g}"
            output = str(wav_of(run_dir, mode, strength))
            basic = ("sa3-generate", "--model", "nano-base", "-p", prompt, "--duration", f"{DURATION:g}", "--seed", "1")
            command = (*basic, "--steps", "25", *flags, "--lora", adapter, "-o", output)
            found.append(Step(f"{title}, adapter at strength {strength:g}", "", command))
    return found


def wav_of(run_dir: Path, mode: str, strength: float) -> Path:
    """Where the demo writes the audio of `mode` at `strength`."""
    return run_dir / "play" / f"{mode}_{strength:g}.wav"


def run_step(number: int, total: int, step: Step) -> None:
    """Show the step, run its command, stop at its first failure."""
    print(
        f"\n\033[1m[{number}/{total}] {step.title}\033[0m"
        if sys.stdout.isatty()
        else f"\n[{number}/{total}] {step.title}"
    )
    if step.why:
        print(step.why)
    print(f"$ {shlex.join(step.command)}", flush=True)
    program = Path(sys.executable).parent / step.command[0]
    done = subprocess.run([str(program), *step.command[1:]])
    if done.returncode != 0:
        raise SA3Error(
            f"step {number} ended with exit code {done.returncode}; its message stands above. "
            f"The command can be run by itself: {shlex.join(step.command)}"
        )


def summarise(out: Path, run_dir: Path, seconds: float) -> None:
    """What was made, and how far the adapter moved the sound."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Change of the sound against strength 0 (same seed), in dB relative to the sound")
    for column in ("mode", *(f"strength {strength:g}" for strength in STRENGTHS)):
        table.add_column(column)
    for mode in MODES:
        table.add_row(mode, *changes([wav_of(run_dir, mode, strength) for strength in STRENGTHS]))
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
            raise SA3Error(f"the demo should have left {path}, and did not.")
        console.print(f"{name:8} {path}", soft_wrap=True)
    console.print(f"Done in {seconds / 60:.1f} minutes. Open {run_dir / 'report.html'} in a browser.", soft_wrap=True)


def changes(wavs: Sequence[Path]) -> list[str]:
    """For each file: "identical" to the first, or the level of the difference relative to the first, in dB."""
    from sa3train.audio.io import read_audio

    bare, _ = read_audio(wavs[0])
    return [difference(read_audio(wav)[0], bare) for wav in wavs]


def difference(audio_CN: "Tensor", bare_CN: "Tensor") -> str:
    """The level of `audio_CN` - `bare_CN` relative to `bare_CN`, in dB, or "identical"."""
    changed: Any = (audio_CN - bare_CN).square().mean()
    if changed == 0:
        return "identical"
    return f"{10 * (changed / bare_CN.square().mean().clamp(min=1e-12)).log10().item():+.1f} dB"


if __name__ == "__main__":
    sys.exit(main())
