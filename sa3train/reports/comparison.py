"""Runs against each other: their settings, their losses, and which is best."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sa3train.adapters.formats.run_dir import ADAPTER_FILE, get_checkpoint_path
from sa3train.core.config import find_differences
from sa3train.core.errors import DataError, SA3Error
from sa3train.core.log import get_logger
from sa3train.core.overrides import flatten_settings
from sa3train.core.processes import read_json
from sa3train.core.text import list_few
from sa3train.reports.loss_change import compute_change
from sa3train.reports.pick import list_comparable
from sa3train.reports.run_files import (
    BEST_ADAPTER_FILE,
    CONFIG_FILE,
    EVALUATION_FILE,
    VALIDATION_FILE,
    load_settings,
    read_run,
)
from sa3train.reports.runs import find_runs, load_run
from sa3train.reports.verdict import ALL_COPIES, TOOK, choose_strength, describe_later, describe_verdict

_logger = get_logger(__name__)


def compare_runs(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Compare runs by how much their validation loss falls below the base's.

    Args:
        folders: Run folders, or folders that hold runs.

    Returns:
        One row per run, best first: its folder, the settings that differ between runs, its losses, and the measure
        where they have several, each ranked by itself.

    Raises:
        DataError: No run there has been validated, or a newer version wrote one.
    """
    if not folders:
        raise DataError("name at least one run.")
    runs, left_out = [], []
    for path in dict.fromkeys(run.path for run in find_runs(folders)):
        files = read_run(path)
        if _list_measured(files.validation)[1]:
            runs.append((path, flatten_settings(load_settings(path / CONFIG_FILE)), files.validation))
        else:
            left_out.append(str(path))
    if not runs:
        where = ", ".join(map(str, folders))
        raise DataError(
            f"{where}: no run there has a {VALIDATION_FILE}. None got as far as a validation, or "
            "callbacks.validation.enabled=false."
        )
    if left_out:
        _logger.warning("not validated, so not compared: %s", list_few(left_out, 5))
    keys = dict.fromkeys(key for _, settings, _ in runs for key in settings)
    varied = [key for key in keys if len({repr(settings.get(key)) for _, settings, _ in runs}) > 1]
    rows = []
    for path, settings, validation in runs:
        row: dict[str, Any] = {"run": str(path)}
        row |= {key: settings.get(key) for key in varied if key not in ("run_dir", "name")}
        part, history = _list_measured(validation)
        base, last = validation["base"][part], validation["history"][-1][part]["loss"]
        best = min(history, key=lambda entry: compute_change(base, entry[part]))
        row |= {"base": base["loss"], "best": best[part]["loss"], "last": last}
        row["best step"] = best["step"]
        row["measure"] = validation.get("measure")
        row["evaluated"] = (read_evaluation(path) or {}).get("change")
        rows.append(row)
    measures = sorted({row["measure"] for row in rows}, key=lambda measure: (measure is not None, measure))
    if len(measures) > 1:
        _logger.warning("decoder runs are measured by round trips, others by their loss: each kind is ranked by itself")
    else:
        rows = [row | {"measure": None} for row in rows]
    if all(row["evaluated"] is not None for row in rows):
        return sorted(rows, key=lambda row: row["evaluated"])
    if any(not math.isclose(row["base"], rows[0]["base"], rel_tol=1e-3) for row in rows):
        _logger.warning("measured on other clips or base models: each is ranked by its change against its own base")
    rows = [row | {"evaluated": None} for row in rows]
    changes = {row["run"]: read_changes(Path(row["run"]))[row["best step"]] for row in rows}
    return sorted(rows, key=lambda row: (measures.index(row["measure"] or measures[0]), changes[row["run"]]))


def read_changes(run_dir: Path) -> dict[int, float]:
    """Read the change of a run's loss against the base at each validation.

    Args:
        run_dir: The run folder.

    Returns:
        The change by step, of held-out clips where there are any; without steps that cannot be compared with the base.
    """
    validation = read_json(run_dir / VALIDATION_FILE)
    part, history = _list_measured(validation)
    return {row["step"]: compute_change(validation["base"][part], row[part]) for row in history}


def _list_measured(validation: Mapping[str, Any]) -> tuple[str, list[Mapping[str, Any]]]:
    """The part to judge a run by, and its rows that can be compared with the base."""
    part = "val" if "val" in validation.get("base", {}) else "train_eval"
    return part, list_comparable(validation, part)


def read_evaluation(run_dir: Path, file: Path | None = None) -> dict[str, Any] | None:
    """Read which of a run's adapters `sa3-eval` found best.

    Args:
        run_dir: The run folder.
        file: What `sa3-eval --json` has written; None for that in the folder.

    Returns:
        `adapter`, `step` and `strength` of the lowest held-out loss, its `change` against the base, whether it
        `is_better` beyond noise, and `notes`: what to use, how sure that is, and what was not measured. None without
        an evaluation, or when the adapter of that step is gone: a resumed run replaces the file of its end.
    """
    found = read_json(file or run_dir / EVALUATION_FILE)
    if not found.get("pick"):
        return None
    row = found["candidates"][found["pick"]["candidate"]]
    step, written = row["step"], run_dir / Path(row["adapter"]).name  # the folder may have been moved since
    adapter = str(written)
    if written.name.endswith(f"@{step}") or not _is_of_step(written, step):
        if not get_checkpoint_path(run_dir, step).is_file():
            return None
        adapter = f"{run_dir}@{step}"
    return {
        "adapter": adapter, "step": step, "strength": row["strength"], "change": row["against_base"]["loss"]["change"],
        "is_better": not found["pick"]["is_base"],
        "notes": list(filter(None, (found["pick"]["text"], describe_later(found, read_run(run_dir).step)))),
    }  # fmt: skip


def _is_of_step(file: Path, step: int | None) -> bool:
    """Whether an adapter file is still that of a step."""
    from sa3train.core.safetensors_file import read_header  # imports torch

    try:
        return step is None or read_header(file).metadata.get("step") == str(step)
    except SA3Error:
        return False


def choose_best(folders: Sequence[Path]) -> dict[str, Any]:
    """Choose the best run, and the file that holds its weights of then.

    Runs that all have an evaluation are ranked by it, others by their validation.

    Args:
        folders: Run folders, or folders that hold runs.

    Returns:
        `run`; `adapter`: a file, or RUN@STEP; its `step` and `strength`; `change` of its held-out loss against the
        base, as a share; whether that `is_better` beyond noise; `notes`: what to know.

    Raises:
        DataError: No run there has been validated, or the best one has no adapter.
    """
    found = {path: read_evaluation(path) for path in dict.fromkeys(run.path for run in find_runs(folders))}
    measured = {path: each for path, each in found.items() if each or read_changes(path)}
    if measured and all(measured.values()):
        path, evaluation = min(((path, each) for path, each in measured.items() if each), key=lambda e: e[1]["change"])
        return {"run": str(path), **evaluation}
    rows = compare_runs(folders)
    row = rows[0]
    folder, step = Path(row["run"]), row["best step"]
    run, notes = load_run(folder), list[str]()
    others = {other["measure"]: other["run"] for other in reversed(rows) if other["measure"] != row["measure"]}
    notes += [f"The best of the decoder runs: {other}." for other in others.values()]
    ends_best = row["last"] == row["best"] and run is not None and run.state == "finished"
    best, last, state = folder / BEST_ADAPTER_FILE, folder / ADAPTER_FILE, get_checkpoint_path(folder, step)
    if best.is_file():
        adapter = str(best)
    elif state.is_file() and not ends_best:
        adapter = f"{folder}@{step}"
    elif last.is_file():
        adapter = str(last)
        notes += [] if ends_best else [f"The adapter is not that of step {step}: no checkpoint of it was kept."]
    else:
        raise DataError(f"{folder}, the best run, has no adapter yet: its first checkpoint writes one.")
    evaluation = read_json(folder / EVALUATION_FILE)
    if evaluation.get("candidates") and not evaluation.get("pick"):
        notes.append(f"sa3-eval picks the {ALL_COPIES}.")
    change = read_changes(folder)[step]
    files = read_run(folder)
    took = [answer.text for answer in describe_verdict(files) if answer.question == TOOK]
    doubts = [text for text in took if not text.startswith("Yes")]
    notes += ["No run is better than the base model."] if change >= 0 else doubts
    strength = choose_strength(files.validation) if row["last"] == row["best"] else 1.0
    return {
        "run": row["run"], "adapter": adapter, "step": step, "strength": strength, "change": change,
        "is_better": change < 0 and not doubts, "notes": notes,
    }  # fmt: skip


def compare_settings(one: Path, other: Path) -> list[tuple[str, str, str]]:
    """Compare the settings of two runs.

    Args:
        one: A run folder.
        other: Another run folder.

    Returns:
        (key, value in `one`, value in `other`) of each setting that differs, except for the folder, by key.

    Raises:
        DataError: The settings of one of them cannot be read.
    """
    try:
        old, new = (load_settings(folder / CONFIG_FILE) for folder in (one, other))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"Cannot read {CONFIG_FILE} of a run: {error}. Restore the file or choose another run."
        ) from error
    found = find_differences(old, new)
    return [(key, _format_setting(a), _format_setting(b)) for key, (a, b) in sorted(found.items()) if key != "run_dir"]


def _format_setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
