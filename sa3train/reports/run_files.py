"""What a run folder holds, read for the report, and what its numbers say.

The demos that a run has played, as its folder holds them. Light: what reads it need not be able to train.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

CONFIG, RECORD = "config.yaml", "run.json"


def dump_settings(settings: Mapping[str, Any]) -> str:
    """The configuration as YAML that Hydra reads back unchanged: `${` in text is escaped."""
    return yaml.safe_dump(_escaped(json.loads(json.dumps(dict(settings)))), sort_keys=False, allow_unicode=True)


def load_settings(path: Path) -> dict[str, Any]:
    """What `dump_settings` wrote."""
    loaded: dict[str, Any] = _unescaped(yaml.safe_load(path.read_text(encoding="utf-8")))
    return loaded


def _escaped(value: Any) -> Any:
    return _walk(value, lambda text: text.replace("${", "\\${"))


def _unescaped(value: Any) -> Any:
    return _walk(value, lambda text: text.replace("\\${", "${"))


def _walk(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: _walk(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_walk(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


STEP = "step"


def read_metrics(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and whole rows of a `metrics.csv`; empty cells are left out of their rows."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole))
    columns = list(reader.fieldnames or [STEP])
    rows = [{name: value for name, value in row.items() if value} for row in reader]
    return columns, [row for row in rows if row.get(STEP, "").isdigit()]


FOLDER, INDEX = "demos", "demos.json"


@dataclass(frozen=True)
class Played:
    """One file: what it is, and how it measures (`measure`: LUFS, dBTP, Hz, width)."""

    file: str
    picture: str
    demo: str
    mode: str
    prompt: str
    model: str
    strength: float
    seed: int
    step: int
    measures: dict[str, float | None]


def played_demos(run_dir: Path) -> list[Played]:
    """Everything that was played in a run, oldest first, with `file` and `picture` relative to the run folder."""
    found = []
    for index in sorted((run_dir / FOLDER).glob(f"step-*/{INDEX}")):
        for entry in json.loads(index.read_text(encoding="utf-8")):
            place = index.parent.relative_to(run_dir)
            demo = Played(**entry)
            found.append(replace(demo, file=str(place / demo.file), picture=str(place / demo.picture)))
    return found


DATA, INSPECTION, MACHINE = "data.json", "inspection.json", "machine.json"
"""What the report shows of data, adapter and machine; see `sa3train.training.callbacks.report`."""

HELDOUT, GENERATED = "heldout.json", "generated.json"
"""What `sa3train.training.callbacks.validation` and `sa3train.training.memorization` leave."""

COPIED = 0.5
"""Share of the distance between unseen and training clips below which generations count as copies."""

WORSE = 0.01
"""Share above its best at which held-out loss counts as getting worse."""


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds; an absent file is an empty value."""

    path: Path
    config: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, float]] = ()
    heldout: Mapping[str, Any] = field(default_factory=dict)
    generated: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    inspection: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    played: Sequence[Played] = ()

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a metric."""
        return [(row["step"], row[name]) for row in self.rows if name in row]

    @property
    def step(self) -> int:
        """The last step that left a trace."""
        last = [int(row["step"]) for row in self.rows[-1:]] + [row["step"] for row in self.heldout.get("history", [])]
        return max(last, default=0)

    @property
    def seconds(self) -> float:
        """Time in the loop by the logged speeds, with what happened between two log lines."""
        total, before = 0.0, 0.0
        for step, speed in self.curve("time/steps_per_second"):
            total += (step - before) / max(speed, 1e-9)
            before = step
        return total


def read_run(run_dir: Path) -> RunFiles:
    """Read a run folder. Whatever is not there yet is left empty; a run in progress can be read at any moment."""
    pass  # DROPPED
    pass  # DROPPED

    metrics, config = run_dir / "metrics.csv", run_dir / CONFIG
    rows = read_metrics(metrics)[1] if metrics.is_file() else []
    return RunFiles(
        run_dir,
        config.read_text(encoding="utf-8") if config.is_file() else "",
        _json(run_dir / RECORD),
        [{name: float(value) for name, value in row.items()} for row in rows],
        _json(run_dir / HELDOUT),
        _json(run_dir / GENERATED),
        _json(run_dir / DATA),
        _json(run_dir / INSPECTION),
        _json(run_dir / MACHINE),
        played_demos(run_dir),
    )


def change(run: RunFiles, part: str) -> float | None:
    """Relative change of the last fixed loss of `part` (heldout or train) against the base, or None."""
    history, base = run.heldout.get("history", []), run.heldout.get("base", {}).get(part)
    if not history or part not in history[-1] or not base or not base["loss"]:
        return None
    return float(history[-1][part]["loss"] / base["loss"] - 1)


def reading(run: RunFiles) -> list[str]:
    """What the numbers say, in sentences."""
    heldout, train = change(run, "heldout"), change(run, "train")
    found = []
    if heldout is not None:
        also = f"; on its training clips it is {_beside(train)}" if train is not None else ""
        found.append(f"On clips it has never seen, loss is {_beside(heldout)} the base model's{also}.")
    elif train is not None:
        found.append(f"On its training clips loss is {train:+.1%} against the base. Nothing is held out to check it.")
    best, history = run.heldout.get("best_loss"), run.heldout.get("history", [])
    if best and history and heldout is not None:
        last = history[-1]["heldout"]["loss"]
        if last > best * (1 + WORSE):
            found.append(
                f"It was lower at step {run.heldout['best_step']} and has risen by {last / best - 1:.1%} since: the "
                "adapter has begun to learn its clips by heart. Take the best one (callbacks.judge.select_best=true)."
            )
    if heldout is not None and train is not None and heldout > 0 > train:
        found.append("Training clips got better and unseen ones worse: fewer steps, a lower rank, or more data.")
    if run.generated.get("memorisation", {}).get("score", 1.0) < COPIED:
        found.append("Generations come closer to training clips than unseen clips do: they may be copies.")
    return found


def _beside(value: float) -> str:
    return f"{abs(value):.1%} {'below' if value < 0 else 'above'}"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
