"""Runs of a sweep side by side, the best first: `python -m sa3train.cli.compare runs/sweep-NAME`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sa3train.core.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    from sa3train.cli.hydra_app import run_job

    parser = argparse.ArgumentParser(description="Runs side by side, the lowest held-out loss first.")
    parser.add_argument("folder", type=Path, help="a folder that holds run folders, such as runs/sweep-20260101-120000")
    arguments = parser.parse_args(argv)
    return run_job(lambda: print("\n".join(table(compare(arguments.folder)))))


def compare(folder: Path) -> list[dict[str, Any]]:
    """Each run under `folder`: its name, what was set differently from the others, its losses. Best first.

    Raises `ConfigError` when no run there has been judged.
    """
    from sa3train.reports.run_files import load_settings

    runs = []
    for heldout in sorted(folder.glob("**/heldout.json")):
        found = json.loads(heldout.read_text(encoding="utf-8"))
        settings = _flat(load_settings(heldout.parent / "config.yaml"))
        runs.append((str(heldout.parent.relative_to(folder)), settings, found))
    if not runs:
        raise ConfigError(
            f"{folder} holds no run with a heldout.json: runs are judged when callbacks.judge.enabled=true."
        )
    varied = [key for key in runs[0][1] if len({repr(settings.get(key)) for _, settings, _ in runs}) > 1]
    rows = []
    for name, settings, found in runs:
        row: dict[str, Any] = {"run": name}
        row |= {key: settings.get(key) for key in varied if key not in ("run_dir", "name")}
        part = "heldout" if "heldout" in found["base"] else "train"
        losses = [entry[part]["loss"] for entry in found["history"]]
        row |= {"base": found["base"][part]["loss"], "best": min(losses), "last": losses[-1]}
        row["best step"] = found["history"][losses.index(min(losses))]["step"]
        rows.append(row)
    return sorted(rows, key=lambda row: row["best"])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as aligned columns."""
    head = list(rows[0])
    cells = [head, *([_text(row[key]) for key in head] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {prefix.rstrip("."): settings}
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat


if __name__ == "__main__":
    sys.exit(main())
