"""Runs side by side, best first: the table of `sa3-runs compare`, with which a multirun ends."""

from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from sa3train.core.errors import DataError
from sa3train.core.text import format_columns, shorten
from sa3train.reports.comparison import compare_runs

MAX_WIDTH = 160
"""Longest line of a table of runs; with more settings that differ they are listed below it."""
LEGEND = """\
base, best, last: held-out loss (on training clips where none are held out) of the base model, and of the lowest and the
last validation. Differences below the ± that each run printed and its report shows are noise."""


class SweepCallback(Callback):
    """Says which settings each job of a sweep has, and compares the runs at its end (`hydra.callbacks`)."""

    def __init__(self) -> None:
        self.varied: list[str] = []

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Find which settings vary."""
        overrides = OverridesParser.create().parse_overrides(_list_overrides(config))
        self.varied = [*(config.hydra.sweeper.get("params") or {})]
        self.varied += [override.get_key_element() for override in overrides if override.is_sweep_override()]

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Print the job's own settings."""
        own = [text for text in _list_overrides(config) if text.lstrip("+").partition("=")[0] in self.varied]
        if own:
            print(f"job {config.hydra.job.num:03d}: {' '.join(own)}", flush=True)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print the table."""
        try:
            rows = compare_runs([Path(config.run_dir)])
            print(f"{config.run_dir}, best first:", *format_table(rows), LEGEND, sep="\n")
        except DataError as error:
            print(f"nothing to compare: {error}")


def _list_overrides(config: DictConfig) -> list[str]:
    return cast("list[str]", OmegaConf.to_container(config.hydra.overrides.task))  # `${…}` in them stays as it is


def format_table(rows: list[dict[str, Any]]) -> list[str]:
    """Format rows as aligned columns.

    Args:
        rows: Values by column.

    Returns:
        Lines, the names of the columns first. Where they would be too long, a second table has the settings, one in
        each line.
    """
    head = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    cells = [head, *([_format_value(row[key]) for key in head] for row in rows)]
    lines = format_columns(cells, range(len(head)))
    if len(max(lines, key=len)) <= MAX_WIDTH:
        return lines
    settings = [["", *(f"#{number + 1}" for number in range(len(rows)))]]
    settings += [list(column) for column in zip(*cells, strict=True) if "." in column[0]]
    kept = [[name, *column] for name, *column in zip(*cells, strict=True) if "." not in name]
    ranked = [list(row) for row in zip(settings[0], *kept, strict=True)]
    return [*format_columns(ranked, range(len(kept) + 1)), "", *format_columns(settings, range(1, len(rows) + 1))]


def format_best(best: dict[str, Any]) -> list[str]:
    """Format the best run.

    Args:
        best: As `choose_best` returns it.

    Returns:
        Lines.
    """
    text = f"best: {best['run']}, {best['change']:+.1%} held-out loss vs. base at step {best['step']}"
    use = "use it" if best["is_better"] else "to try it all the same"
    return [text, *best["notes"], f"{use}: --lora {best['adapter']}={best['strength']:g}"]


def _format_value(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else shorten(str(value), 24)
