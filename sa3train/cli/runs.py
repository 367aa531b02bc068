"""`sa3-runs`: list training runs, watch, stop and compare them, and name the best; docs/runs.md has the run folder.

sa3-runs list                          every run below the current folder
sa3-runs show runs/style               state, losses, adapters, and what they say
sa3-runs watch runs/style              a line whenever it has moved on, until it ends
sa3-runs stop runs/style               it saves its state first; --now kills it
sa3-runs compare runs/a runs/b         settings that differ and losses, best first
sa3-runs best runs --json              the adapter of the lowest held-out loss
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sa3train.cli.compare import format_best, format_table
from sa3train.cli.hydra_app import run_job
from sa3train.cli.parser import CommandParser
from sa3train.cli.version import add_version
from sa3train.core.errors import DataError
from sa3train.core.text import format_columns, format_command
from sa3train.reports.comparison import choose_best, compare_runs
from sa3train.reports.html import format_duration
from sa3train.reports.runs import STATES, Run, describe_run, find_runs, load_run, stop_run


def main(argv: list[str] | None = None) -> int:
    """Run the console command.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        The exit code; of `watch` 1 for a run that did not finish.
    """
    arguments = build_parser().parse_args(argv)
    return run_job(lambda: int(arguments.run(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line.

    Returns:
        The parser; `run` of its result is the function of the subcommand.
    """
    top = CommandParser(prog="sa3-runs", description="List training runs, watch, stop and compare them.")
    add_version(top)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_command(commands, "list", "list the runs of some folders, running ones first", _list, folders=["."])
    _add_command(commands, "show", "show the state, losses and adapters of a run", _show)
    flags = _add_command(commands, "watch", "print a line whenever a run has moved on, until it ends", _watch)
    flags.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="how often to look (default: 2)")
    flags = _add_command(commands, "stop", "stop a run; sa3-train resume=RUN continues it", _stop)
    flags.add_argument("--now", action="store_true", help="kill it: steps since the last checkpoint are lost")
    _add_command(commands, "compare", "compare runs by held-out loss, best first", _compare, folders=[])
    _add_command(commands, "best", "name the run with the lowest held-out loss, and its adapter", _best, folders=[])
    return top


def _add_command(
    commands: Any, name: str, text: str, run: Callable[..., int], folders: list[str] | None = None
) -> argparse.ArgumentParser:
    flags: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    if folders is None:
        flags.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    else:
        default = f" (default: {folders[0]})" if folders else ""
        text = f"run folders, or folders that hold runs{default}"
        flags.add_argument("folders", type=Path, nargs="*" if folders else "+", default=folders, help=text)
    flags.add_argument("--json", action="store_true", help="print JSON instead of text")
    flags.set_defaults(run=run)
    return flags


def _list(arguments: argparse.Namespace) -> int:
    runs = find_runs([Path(folder) for folder in arguments.folders])
    rows = [(str(run.path), STATES[run.state], _format_progress(run)) for run in runs]
    _print(arguments, [asdict(run) for run in runs], lambda: format_columns(rows) if rows else ["There are no runs."])
    return 0


def _show(arguments: argparse.Namespace) -> int:
    found = describe_run(arguments.folder)

    def format_lines() -> list[str]:
        run = load_run(arguments.folder)
        lines = [f"{found['path']}: {found['means']}, {_format_progress(run)}" if run else ""]
        names = {"error": "error", "best_step": "best step", "adapter": "adapter", "best_adapter": "best adapter"}
        lines += [f"{label}: {found[name]}" for name, label in names.items() if found[name]]
        if not found["best_step"]:
            lines.append("not validated" if found["best_step"] is None else "no step is better than its start")
        return [*lines, *found["summary"]]

    _print(arguments, found, format_lines)
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    before: Run | None = None
    while True:
        run = load_run(arguments.folder)
        if run is None:
            raise DataError(f"{arguments.folder} contains no run. Choose another folder: sa3-runs list shows them.")
        if run != before:
            line = [f"{run.path}: {STATES[run.state]}, {_format_progress(run)}", *([run.error] if run.error else [])]
            print(json.dumps(asdict(run), default=str) if arguments.json else "\n  ".join(line), flush=True)
        if not run.is_alive:
            return 0 if run.state == "finished" else 1
        before = run
        time.sleep(arguments.interval)


def _stop(arguments: argparse.Namespace) -> int:
    stop_run(arguments.folder, at_once=arguments.now)
    done = "was killed" if arguments.now else "saves its state, then it ends"
    resume = format_command(["sa3-train", f"resume={arguments.folder}"])
    found = {"run": str(arguments.folder), "killed": arguments.now, "resume": resume}
    _print(arguments, found, lambda: [f"{arguments.folder} {done}. Continue it with: {resume}"])
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    rows = compare_runs(arguments.folders)
    _print(arguments, rows, lambda: format_table(rows))
    return 0


def _best(arguments: argparse.Namespace) -> int:
    best = choose_best(arguments.folders)
    _print(arguments, best, lambda: format_best(best))
    return 0


def _print(arguments: argparse.Namespace, content: Any, format_lines: Callable[[], list[str]]) -> None:
    print(json.dumps(content, indent=1, default=str) if arguments.json else "\n".join(format_lines()))


def _format_progress(run: Run) -> str:
    steps = f"{run.step:,} of {run.total:,} steps" if run.total else f"{run.step:,} steps"
    loss = f", loss {run.loss:.4f}" if run.loss is not None else ""
    left = f", {format_duration(run.seconds_left)} left" if run.seconds_left is not None else ""
    return f"{steps}{loss}{left}"


if __name__ == "__main__":
    sys.exit(main())
