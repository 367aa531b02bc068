"""Runs of a sweep side by side, best first; a sweep ends with it. `python -m sa3train.cli.compare runs/sweep-NAME`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from sa3train.cli.precedence import flatten_settings
from sa3train.core.errors import ConfigError
from sa3train.core.user_files import read_file
from sa3train.reports.run_files import CONFIG_FILE, VALIDATION_FILE, load_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table.

    Args:
        argv: Command-line arguments; None for `sys.argv`.

    Returns:
        Exit code.
    """
    from sa3train.cli.hydra_app import run_job

    parser = argparse.ArgumentParser(description="Compare runs by validation loss, best first.")
    parser.add_argument("folder", type=Path, help="folder that holds run folders, such as runs/sweep-20260101-120000")
    arguments = parser.parse_args(argv)
    return run_job(lambda: print("\n".join(format_table(compare_runs(arguments.folder)))))


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
            print(f"{config.run_dir}, best first:", *format_table(compare_runs(Path(config.run_dir))), sep="\n")
        except ConfigError as error:
            print(f"nothing to compare: {error}")


def _list_overrides(config: DictConfig) -> list[str]:
    return cast("list[str]", OmegaConf.to_container(config.hydra.overrides.task))  # `${…}` in them stays as it is


def compare_runs(folder: Path) -> list[dict[str, Any]]:
    """Compare the runs below a folder.

    Args:
        folder: Folder that holds run folders.

    Returns:
        One row per run, best first: its name, the settings that differ between runs, its losses.

    Raises:
        ConfigError: No run there has been validated.
    """
    runs = []
    for file in sorted(folder.glob(f"**/{VALIDATION_FILE}")):
        validation = json.loads(read_file(file))
        settings = flatten_settings(load_settings(file.parent / CONFIG_FILE))
        runs.append((str(file.parent.relative_to(folder)), settings, validation))
    if not runs:
        raise ConfigError(
            f"{folder} holds no run with a {VALIDATION_FILE}: none got as far as a validation, or "
            "callbacks.validation.enabled=false."
        )
    varied = [key for key in runs[0][1] if len({repr(settings.get(key)) for _, settings, _ in runs}) > 1]
    rows = []
    for name, settings, validation in runs:
        row: dict[str, Any] = {"run": name}
        row |= {key: settings.get(key) for key in varied if key not in ("run_dir", "name")}
        part = "val" if "val" in validation["base"] else "train_eval"
        losses = [entry[part]["loss"] for entry in validation["history"]]
        row |= {"base": validation["base"][part]["loss"], "best": min(losses), "last": losses[-1]}
        row["best step"] = validation["history"][losses.index(min(losses))]["step"]
        rows.append(row)
    return sorted(rows, key=lambda row: row["best"])


def format_table(rows: list[dict[str, Any]]) -> list[str]:
    """Format rows as aligned columns.

    Args:
        rows: Values by column.

    Returns:
        Lines, the names of the columns first.
    """
    head = list(rows[0])
    cells = [head, *([_format_value(row[key]) for key in head] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def _format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
