"""`sa3-sweep`: search settings with Optuna, one `sa3-train` run for each point; docs/runs.md has an example.

sa3-sweep runs/search data=latents model=nano-base 'adapter.rank=choice(4,8,16)' \\
    'optimizer.lr=tag(log,interval(1e-4,1e-2))' --trials 12
sa3-sweep runs/search                  continues it after a crash; with --trials 20 it goes further

A command of its own and no recipe of `sa3-train`: it starts that as processes, and outlives what kills one of them.
"""

import argparse
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from sa3train.cli.compare import format_best, format_table
from sa3train.cli.hydra_app import run_job
from sa3train.cli.parser import CommandParser
from sa3train.cli.version import add_version
from sa3train.core.errors import ConfigError, SA3Error
from sa3train.core.overrides import format_override
from sa3train.core.processes import find_program, make_environment
from sa3train.core.signals import Interrupted
from sa3train.core.text import format_command
from sa3train.reports import runs
from sa3train.reports.comparison import choose_best, read_changes, read_evaluation
from sa3train.reports.run_files import EVALUATION_FILE

if TYPE_CHECKING:
    import optuna

STUDY_FILE, LOCK_FILE = "sweep.db", "sweep.lock"
TRIALS = 20
"""Runs in all, where nothing is said."""
STARTUP_TRIALS = 4
"""Runs that are not stopped early, as there is too little to compare them with."""
MAX_STARTS = 3
"""How often a run is continued that was killed together with the sweep: it may be what killed it."""
POLL_SECONDS = 1.0
CHANGE = "loss vs. base"
_ENDS = {"COMPLETE": "finished", "PRUNED": "stopped early", "FAIL": "failed"}
_SETTINGS, _FOLDER, _TRIALS = "settings", "working_folder", "trials"
_RUN_DIR, _STARTS, _ERROR = "run_dir", "starts", "error"


def main(argv: list[str] | None = None) -> int:
    """Run the console command.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        The exit code.
    """
    given = sys.argv[1:] if argv is None else argv
    settings = [word for word in given if "=" in word and not word.startswith("-")]  # anywhere, as for sa3-train
    arguments = build_parser().parse_args([word for word in given if word not in settings])
    arguments.settings += settings
    return run_job(lambda: _run(arguments))


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line.

    Returns:
        The parser.
    """
    text = "Search settings with Optuna: one training run for each point, hopeless ones stopped early, best first."
    flags = CommandParser(prog="sa3-sweep", description=text)
    add_version(flags)
    flags.add_argument("folder", type=Path, help="folder of the sweep: its study and its runs")
    text = "settings of sa3-train; those to search as choice(a,b), range(4,17,4), interval(0,1), int(interval(4,64)) or"
    text += " tag(log,interval(1e-5,1e-3)); without any, those of the sweep in the folder"
    flags.add_argument("settings", nargs="*", help=text)
    flags.add_argument("--space", type=Path, metavar="YAML", help="more of them, as key: expression")
    text = f"runs in all, with those already made (default: those of the start of the sweep, else {TRIALS})"
    flags.add_argument("--trials", type=int, help=text)
    flags.add_argument("--seed", type=int, default=0, help="of the choice of points (default: 0)")
    flags.add_argument("--no-pruning", action="store_true", help="let every run finish")
    flags.add_argument("--json", action="store_true", help="print JSON at the end; progress goes to stderr")
    return flags


def _run(arguments: argparse.Namespace) -> int:
    if arguments.trials is not None and arguments.trials < 1:
        raise ConfigError("--trials must be at least 1: it counts all runs, with those already made.")
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError('sa3-sweep needs Optuna. Run: pip install "sa3train[sweep]"')
    import optuna

    from sa3train.cli.search_space import read_space

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder = arguments.folder.absolute()
    settings = [*arguments.settings, *(read_space(arguments.space) if arguments.space else [])]
    if not settings and not (folder / STUDY_FILE).is_file():
        raise ConfigError(f"There is no sweep in {arguments.folder}. Give its settings: see sa3-sweep --help.")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        with lock:
            sweep = Sweep(folder, settings, arguments.seed, prunes=not arguments.no_pruning)
            sweep.search(arguments.trials)
    except Timeout as error:
        raise SA3Error(f"Another sa3-sweep works in {arguments.folder}. Wait until it ends, or stop it.") from error
    except Interrupted:
        _say(f"The sweep is stopped. Continue it with: {format_command(['sa3-sweep', arguments.folder])}")
        raise
    rows, best = sweep.list_trials(), sweep.find_best()
    if arguments.json:
        print(json.dumps({"trials": rows, "best": best}, indent=1))
    else:
        print(*format_table(rows), *format_best(best), sep="\n")
    return 0


class Sweep:
    """A search in a folder: an Optuna study, and a run folder for each of its trials.

    Args:
        folder: The folder.
        settings: Overrides of `sa3-train`. Empty: those that the sweep was started with.
        seed: Seed of the choice of points.
        prunes: Whether to stop runs early that are worse than the median of the others at the same step.

    Raises:
        ConfigError: The settings cannot be used, or differ from those of the sweep in the folder.
    """

    def __init__(self, folder: Path, settings: list[str], seed: int, *, prunes: bool) -> None:
        import optuna

        from sa3train.cli.search_space import parse_space

        if settings:
            parse_space(settings)  # before anything is written
        self.folder = folder
        pruner = optuna.pruners.MedianPruner(STARTUP_TRIALS) if prunes else optuna.pruners.NopPruner()
        self.study = optuna.create_study(
            storage=f"sqlite:///{folder / STUDY_FILE}", study_name="sweep", load_if_exists=True, pruner=pruner
        )
        known = self.study.user_attrs
        if _SETTINGS not in known:
            self.study.set_user_attr(_FOLDER, os.getcwd())  # noqa: PTH109
            self.study.set_user_attr(_SETTINGS, settings)
        elif settings and settings != known[_SETTINGS]:
            raise ConfigError(
                f"{folder} holds a sweep with other settings: {' '.join(known[_SETTINGS])}. Give no settings to "
                "continue it, or another folder."
            )
        os.chdir(self.study.user_attrs[_FOLDER])  # paths in the settings start there
        self.fixed, self.space = parse_space(self.study.user_attrs[_SETTINGS])
        # On resume another seed: the same one would draw the same points again.
        self.rng = random.Random(seed + len(self.study.trials))
        self.study.sampler = optuna.samplers.TPESampler(seed=self.rng.randrange(2**31))

    def search(self, trials: int | None = None) -> None:
        """Train until there are so many runs, or no point is left. Runs that a kill has left are continued first.

        Args:
            trials: Number of runs in all; None is that of the search before, or `TRIALS`.
        """
        import optuna

        trials = trials or self.study.user_attrs.get(_TRIALS, TRIALS)
        self.study.set_user_attr(_TRIALS, trials)
        running = self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
        for left in running:
            self._train(optuna.Trial(self.study, left._trial_id))
        while len(self._list_trained()) < trials:
            trial = self._ask()
            if trial is None:
                _say("Every point of the space has been trained.")
                return
            self._train(trial)

    def list_trials(self) -> list[dict[str, Any]]:
        """List the trials that were trained.

        Returns:
            Run folder, searched settings, change of held-out loss against the base and how each ended; finished ones
            first, and the best of them first.
        """
        rows = []
        for trial in self._list_trained():
            row: dict[str, Any] = {"run": trial.user_attrs[_RUN_DIR]}
            row |= {key: trial.params.get(key) for key in self.space}
            change = trial.value
            row[CHANGE] = change if change is not None and math.isfinite(change) else None
            row["steps"] = trial.last_step
            row["ended"] = _ENDS.get(trial.state.name, "running")
            rows.append(row)

        def rank(row: dict[str, Any]) -> tuple[int, float]:
            order = ("finished", "running", "stopped early", "failed")  # sa3-eval measured the finished ones alone
            return order.index(row["ended"]), math.inf if row[CHANGE] is None else row[CHANGE]

        return sorted(rows, key=rank)

    def find_best(self) -> dict[str, Any]:
        """Find the best run.

        Returns:
            As `choose_best` does.

        Raises:
            SA3Error: No run has got as far as a validation.
        """
        done = [row for row in self.list_trials() if row["ended"] != "failed" and row[CHANGE] is not None]
        if not done:
            errors = [trial.user_attrs.get(_ERROR) for trial in self._list_trained()]
            raise SA3Error(f"No run of the sweep succeeded: {next(filter(None, errors), 'see their process.log')}")
        return choose_best([self.folder / done[0]["run"]])

    def _list_trained(self) -> "list[optuna.trial.FrozenTrial]":
        return [trial for trial in self.study.get_trials(deepcopy=False) if _RUN_DIR in trial.user_attrs]

    def _ask(self) -> "optuna.Trial | None":
        """Ask for a point that was not trained; None when there is none."""
        import optuna

        from sa3train.cli.search_space import iterate_points

        known = {_get_key(trial.params) for trial in self._list_trained()}
        points = iterate_points(self.space)
        left = None if points is None else [point for point in points if _get_key(point) not in known]
        if left == []:
            return None
        while True:
            trial = self.study.ask(self.space)
            if _get_key(trial.params) not in known:
                break
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)  # a point that was trained already
            if left is not None:
                self.study.enqueue_trial(self.rng.choice(left))
        trial.set_user_attr(_RUN_DIR, f"trial-{len(known):03d}")
        return trial

    def _train(self, trial: "optuna.Trial") -> None:
        """Train a trial, or go on with it, and tell the study how it ended."""
        import optuna

        from sa3train.cli.search_space import format_point

        failed = optuna.trial.TrialState.FAIL
        if _RUN_DIR not in trial.user_attrs:  # killed between being asked for and being started
            self.study.tell(trial.number, state=failed)
            return
        run_dir, point = self.folder / trial.user_attrs[_RUN_DIR], format_point(trial.params)
        command = ["sa3-train", *self.fixed, *point, format_override("run_dir", run_dir)]
        _say(f"{run_dir.name}: {' '.join(point)}")
        error = self._start(trial, run_dir, command) or self._watch(trial, run_dir)
        run = runs.load_run(run_dir)
        if error is None and run is not None and run.state == "stopped":
            self.study.tell(trial.number, state=optuna.trial.TrialState.PRUNED)
            _say(f"{run_dir.name}: stopped early at step {run.step}")
            return
        if error is None:
            _evaluate(run_dir)
        evaluation = read_evaluation(run_dir)
        if error is None and evaluation is not None:
            self.study.tell(trial.number, evaluation["change"])
            _say(f"{run_dir.name}: held-out loss {evaluation['change']:+.2%} vs. base at step {evaluation['step']}")
        else:
            error = error or "sa3-eval picked none of its adapters: there is none, or its loss is not finite"
            trial.set_user_attr(_ERROR, error)
            self.study.tell(trial.number, state=failed)
            if len(self._list_trained()) == 1 and run is not None and run.state == "failed":
                runs.dismiss_run(run_dir)
                optuna.delete_study(study_name=self.study.study_name, storage=self.study._storage)
                raise ConfigError(f"The first run failed, as the others would: {error}")
            _say(f"{run_dir.name}: failed: {error}")

    def _start(self, trial: "optuna.Trial", run_dir: Path, command: list[str]) -> str | None:
        """Start a run, or continue what a kill has left of it. Returns why it cannot."""
        run = runs.load_run(run_dir)
        if run is not None and (run.is_alive or run.state == "finished"):
            return None
        was_killed = run is None or run.state != "stopped"
        starts = int(trial.user_attrs.get(_STARTS, 0)) + was_killed
        if starts > MAX_STARTS or (run is not None and run.error):
            return (run.error if run is not None else None) or f"it was killed {MAX_STARTS} times"
        trial.set_user_attr(_STARTS, starts)
        if run is None:
            runs.start_run(run_dir, command)
        else:
            runs.resume_run(run_dir)
        return None

    def _watch(self, trial: "optuna.Trial", run_dir: Path) -> str | None:
        """Report a run's validations to the study until it ends, and stop it when it is hopeless.

        Returns:
            The error with which it ended.
        """
        reported, is_stopping = set(self.study.trials[trial.number].intermediate_values), False
        try:
            while True:
                run = runs.load_run(run_dir)
                for step, change in read_changes(run_dir).items():
                    if step not in reported:
                        trial.report(change, step)
                        reported.add(step)
                        if run is not None and run.is_alive and not is_stopping and trial.should_prune():
                            runs.stop_run(run_dir)
                            is_stopping = True
                if run is None or not run.is_alive:
                    break
                time.sleep(POLL_SECONDS)
        except Interrupted:
            run = runs.load_run(run_dir)
            if run is not None and run.is_alive and run.state != "stopping":
                runs.stop_run(run_dir)
            raise
        if run is not None and run.state in ("crashed", "failed"):
            return run.error or "the process was killed, possibly out of memory"
        return None


def _evaluate(run_dir: Path) -> None:
    """Measure all checkpoints of a run by `sa3-eval`; where it cannot, the sweep waits for what that needs."""
    if (run_dir / EVALUATION_FILE).is_file():
        return
    command = ["sa3-eval", str(run_dir), "--generate", "0", "--json", str(run_dir / EVALUATION_FILE)]
    found = subprocess.run(
        [find_program(command[0]), *command[1:]], capture_output=True, encoding="utf-8", env=make_environment()
    )
    if found.returncode:
        reason = "".join(found.stderr.strip().splitlines()[-1:]).removeprefix("error: ")
        raise SA3Error(f"{run_dir} is trained, but sa3-eval cannot measure it: {reason}")


def _get_key(point: Mapping[str, Any]) -> str:
    from sa3train.cli.search_space import round_value

    return json.dumps({key: round_value(value) for key, value in sorted(point.items())})


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
