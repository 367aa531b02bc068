"""`sa3-eval`: measure adapters against the base on held-out clips, and pick checkpoint and strength.

sa3-eval a.safetensors b.safetensors --data LATENTS --model nano-base --strengths 0.5,1 --json OUT --pick
sa3-eval runs/style --pick                   every checkpoint of a run, on its own held-out clips
sa3-eval runs/style@300 runs/other --html compare.html

The JSON of `--json` (`sa3train.evaluation.results`, version 2; docs/evaluation.md has all keys):

    format, version     "sa3train-evaluation", 2
    model, data, settings, levels, clips, prompts, seconds
    real                held-out clips decoded: audio, agreement
    base                loss, loss_by_level, loss_by_clip, frechet, nearest, memorization, audio, agreement
    candidates          a list, each adapter at each strength: adapter, step, strength, the keys of base, and
                        against_base: the difference of each measure with its 95 % interval
                        (loss: change, margin, clips, is_significant)
    pick                adapter, step and strength to use, null for the base; is_base, candidate (index of the lowest
                        loss), p_value, probability, loss, equals (indices), text; null if every adapter copies or has
                        no finite loss
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sa3train.cli.hydra_app import run_job
from sa3train.cli.parser import CommandParser
from sa3train.cli.version import add_version
from sa3train.core.errors import ConfigError
from sa3train.core.files import check_target, write_json
from sa3train.core.log import write_json_line, write_json_progress

if TYPE_CHECKING:
    from sa3train.data.loading.settings import DataSettings
    from sa3train.evaluation import Candidate, Evaluation

CHANGE_STYLES = {True: "green", False: "red"}


def main(argv: list[str] | None = None) -> int:
    """Run the console command.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        The exit code.
    """
    arguments = build_parser().parse_args(argv)
    return run_job(lambda: _run(arguments), {"data": "--data"})


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line.

    Returns:
        The parser.
    """
    text = "Measure adapters against the base on held-out clips, and pick checkpoint and strength."
    flags = CommandParser(prog="sa3-eval", description=text)
    add_version(flags)
    flags.add_argument(
        "adapters", nargs="+", metavar="ADAPTER",
        help="file of any tool, PEFT folder, RUN@STEP, or a run folder for all its checkpoints",
    )  # fmt: skip
    text = "folder or URL of latent shards with held-out clips (default: those of the first run)"
    flags.add_argument("--data", metavar="LATENTS", help=text)
    flags.add_argument("--model", help="model name or folder (default: that of the first run)")
    flags.add_argument(
        "--strengths", type=_parse_strengths, default=(1.0,), metavar="LIST", help="such as 0.5,1 (default: 1)"
    )
    flags.add_argument("--clips", type=int, default=32, help="held-out clips for the loss, at most (default: 32)")
    text = "clips to generate from held-out captions; 0 measures the loss alone (default: 8)"
    flags.add_argument("--generate", type=int, default=8, metavar="COUNT", help=text)
    flags.add_argument("--seconds", type=float, default=10.0, help="longest generated clip (default: 10)")
    flags.add_argument("--steps", type=int, help="sampler steps (default: the model's)")
    flags.add_argument("--cfg-scale", type=float, help="guidance scale (default: the model's)")
    flags.add_argument("--seed", type=int, default=0, help="of the noise, the same for all (default: 0)")
    flags.add_argument("--batch-size", type=int, default=20, help="clips and noise levels at a time (default: 20)")
    flags.add_argument("--all-clips", action="store_true", help="evaluate on all clips: none of them was trained on")
    flags.add_argument("--clap", metavar="MODEL", help="CLAP model of transformers, to measure agreement with prompts")
    flags.add_argument("--device", help="cuda, xpu, mps or cpu (default: the best that works)")
    flags.add_argument("--json", metavar="FILE", help="write everything that was measured, as JSON")
    flags.add_argument("--html", metavar="FILE", help="write a page to listen and compare")
    flags.add_argument("--pick", action="store_true", help="name the adapter and strength to use, and how sure that is")
    flags.add_argument("--progress-json", action="store_true", help="JSON lines on stdout; the last has the result")
    return flags


def _parse_strengths(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers: write 0.5,1") from None


def _run(arguments: argparse.Namespace) -> int:
    from sa3train.evaluation import EvaluationSettings, PageWriter, evaluate_adapters, load_generator
    from sa3train.reports.run_files import EVALUATION_FILE, REPORT_FILE
    from sa3train.reports.run_report import write_report

    for target in filter(None, (arguments.json, arguments.html)):
        check_target(target, arguments.adapters, overwrite=True)
    data, model = find_inputs(arguments)
    settings = EvaluationSettings(
        arguments.strengths, arguments.clips, arguments.generate, arguments.seconds, arguments.seed, arguments.steps,
        arguments.cfg_scale, arguments.batch_size, arguments.all_clips, arguments.clap,
    )  # fmt: skip
    page = PageWriter(arguments.html) if arguments.html else None
    with write_json_progress(arguments.progress_json):
        generator = load_generator(model, arguments.device)
        found = evaluate_adapters(arguments.adapters, data, generator, settings, keep_audio=page.keep if page else None)
    if arguments.json:
        write_json(arguments.json, found.to_dict())
        target = Path(arguments.json)
        if target.name == EVALUATION_FILE and (target.parent / REPORT_FILE).is_file():
            write_report(target.parent)
    if page is not None:
        page.write(found)
    if arguments.progress_json:
        write_json_line(result=found.to_dict())
        return 0
    _print_table(found)
    for kind, path in (("JSON", arguments.json), ("page", arguments.html)):
        if path:
            print(f"{kind}: {path}")
    if arguments.pick:
        print(f"pick: {found.describe_pick()}")
    return 0


def find_inputs(arguments: argparse.Namespace) -> "tuple[DataSettings | str, str]":
    """Find data and model: those of the flags, or of the first run among the adapters.

    Args:
        arguments: Parsed flags.

    Returns:
        Data settings or a folder of shards, and the model.

    Raises:
        ConfigError: If one is not known, or the run trains the autoencoder's decoder.
    """
    from sa3train.cli.train_config import TrainConfig
    from sa3train.cli.train_setup import locate_inputs
    from sa3train.core.config import build
    from sa3train.reports.run_files import CONFIG_FILE, holds_run, load_settings

    data, model = arguments.data, arguments.model
    if data and model:
        return data, model
    paths = [Path(each if Path(each).exists() else each.rpartition("@")[0] or each) for each in arguments.adapters]
    run = next((folder for path in paths for folder in (path, path.parent) if holds_run(folder)), None)
    if run is None:
        missing = " and ".join(flag for flag, value in (("--data", data), ("--model", model)) if not value)
        absent = next((each for each, path in zip(arguments.adapters, paths, strict=True) if not path.exists()), None)
        if absent:
            raise ConfigError(f"There is nothing at {absent}. Give adapters, or the folder of a run.")
        raise ConfigError(f"{missing} must be given: no adapter is in the folder of a run that says it.")
    settings = load_settings(run / CONFIG_FILE)
    if "source" in settings:
        raise ConfigError(f"{run} trains the autoencoder's decoder: see the round trips in its report.")
    if data:
        settings["data"] = {**settings["data"], "dir": data, "more": [], "weight": None}
    config = locate_inputs(build(TrainConfig, settings), run)
    return data or dataclasses.replace(config.data, num_workers=0), model or config.model.source


def _print_table(found: "Evaluation") -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from sa3train.evaluation.page import format_frechet, format_memorization

    rulers = list(found.settings["rulers"])
    head = ["adapter", "strength", "loss", "change", "Fréchet", "nearest", "memorization", *rulers, "LUFS", "width"]
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in head:
        table.add_column(name, justify="left" if name == "adapter" else "right", overflow="fold")
    measures = ("nearest", *rulers, "loudness_lufs", "stereo_width")
    real = {name: _format(found.real.average(name), name) for name in measures}
    if found.prompts:
        table.add_row("held-out clips", "", "", "", "", "", "", *(real[name] for name in measures[1:]))
    for each in (None, *found.candidates):
        measured = found.base if each is None else each.measurement
        cells = [
            "base" if each is None else escape(found.names[each.adapter]),
            "" if each is None else f"{each.strength:g}",
            f"{sum(measured.loss_by_clip) / len(measured.loss_by_clip):.4f}",
            "" if each is None else _format_change(each),
            format_frechet(measured, found.base),
            _format(measured.average("nearest"), "nearest"),
            format_memorization(measured, found.base),
            *(_format(measured.average(name), name) for name in measures[1:]),
        ]
        table.add_row(*cells, style="bold" if each is not None and each is found.picked else None)
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    console.print(table)
    clips, generated = found.settings["clips"], found.settings["generated"]
    console.print(
        f"{clips} held-out clips, {generated} generated with each; {found.seconds:.0f} s. Green and red: beyond noise. "
        "Fréchet and nearest: distance to held-out clips, lower is nearer."
    )


def _format_change(candidate: "Candidate") -> str:
    change = candidate.loss_change
    text = change.format() + (f" ±{change.margin:.1%}" if change.margin is not None else "")
    return f"[{CHANGE_STYLES[change.change < 0]}]{text}[/]" if change.is_significant else text


def _format(value: float | None, name: str) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if name == "loudness_lufs" else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
