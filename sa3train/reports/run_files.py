"""The contract of a run folder: training writes it; the report, the studio and `sa3-runs` read it. docs/runs.md has it.

| file | holds |
|---|---|
| `config.yaml` | all settings, as Hydra reads them back |
| `run.json` | format, id, version, started, status, seconds, steps, identity, process (pid, started, host), resumed |
| `metrics.csv` | a column `step` and one for each metric; a cell is empty where a metric was not logged |
| `validation.json` | measure, levels; base, history, items by part (`val`, `train_eval`); strengths; best step, loss |
| `memorization.json` | clips, seconds and spread of generations; memorization: score and closest training clips |
| `data.json` | manifest; sources with their path, role, model, splits and card; some prompts |
| `adapter_stats.json` | adapter_type, rank, alpha, parameters, step; effect (relative change of weights); layers |
| `system.json` | device; plan (memory in bytes by part), plan_accuracy |
| `demos/step-*/demos.json` | a list of `DemoFile` entries, next to their audio and spectrograms |
| `checkpoints/step-*.safetensors` | state to resume from |
| `adapter.safetensors` | the trained adapter |
| `adapter-best.safetensors` | the adapter of the lowest validation loss, with `callbacks.validation.select_best` |
| `evaluation.json` | what `sa3-eval --json` measured, for the report; `sa3-sweep` writes it |
| `report.html` | the report, made from the files above |
| `README.md` | the adapter's card: what it is, what it was trained on, how to play it |
| `run.lock` | locked by the process that trains |
"""

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from sa3train.adapters.formats.run_dir import ADAPTER_FILE, CHECKPOINTS_DIR, list_checkpoints
from sa3train.core.errors import DataError
from sa3train.core.overrides import escape_interpolations, unescape_interpolations
from sa3train.core.user_files import read_file, read_text
from sa3train.data.sources.own_folders import CONFIG_FILE, RECORD_FILE

RUN_FORMAT = 1
"""Version of this contract, in `run.json`. It grows when an older reader would misread a folder."""
METRICS_FILE = "metrics.csv"
VALIDATION_FILE, MEMORIZATION_FILE = "validation.json", "memorization.json"
DATA_FILE, ADAPTER_STATS_FILE, SYSTEM_FILE = "data.json", "adapter_stats.json", "system.json"
DEMOS_DIR, DEMOS_FILE = "demos", "demos.json"
REPORT_FILE, CARD_FILE = "report.html", "README.md"
BEST_ADAPTER_FILE = "adapter-best.safetensors"
EVALUATION_FILE = "evaluation.json"
LOCK_FILE = "run.lock"
RUN_FILES = (
    CONFIG_FILE, RECORD_FILE, METRICS_FILE, VALIDATION_FILE, MEMORIZATION_FILE, DATA_FILE, ADAPTER_STATS_FILE,
    SYSTEM_FILE, DEMOS_DIR, REPORT_FILE, CARD_FILE, ADAPTER_FILE, BEST_ADAPTER_FILE, CHECKPOINTS_DIR, EVALUATION_FILE,
    LOCK_FILE,
)  # fmt: skip
"""Everything that a run writes into its folder."""
STEP = "step"
ROUND_TRIPS = "round_trips"
"""`measure` of a validation and `mode` of a demo that encode and decode clips again and again."""
ORIGINAL = "original"
"""`model` of a demo that is a clip itself."""
_JSON_FILES = {
    "record": RECORD_FILE, "validation": VALIDATION_FILE, "memorization": MEMORIZATION_FILE, "data": DATA_FILE,
    "adapter_stats": ADAPTER_STATS_FILE, "system": SYSTEM_FILE, "evaluation": EVALUATION_FILE,
}  # fmt: skip
"""Files that hold the fields of `RunFiles`."""


def holds_run(run_dir: Path) -> bool:
    """Check whether a folder holds a run.

    Args:
        run_dir: The folder.

    Returns:
        Whether it does.
    """
    return (run_dir / CONFIG_FILE).is_file() and (run_dir / RECORD_FILE).is_file()


def check_format(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Check that this version can read a run folder.

    Args:
        run_dir: The folder.
        record: Content of its `run.json`; one without a format is of format 1.

    Raises:
        DataError: A newer version wrote it, or it is damaged.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{run_dir / RECORD_FILE} is damaged: it holds no object. Restore it, or choose another run.")
    found = record.get("format", RUN_FORMAT)
    if not isinstance(found, int) or found > RUN_FORMAT:
        raise DataError(
            f"{run_dir} is a run of format {found}, made by sa3train {record.get('version')}; this version reads up to "
            f"format {RUN_FORMAT}. Update sa3train."
        )


def format_settings(settings: Mapping[str, Any]) -> str:
    """Format settings as YAML that Hydra reads back unchanged: `${` in text is escaped.

    Args:
        settings: Nested settings of plain values.

    Returns:
        The YAML document.
    """
    plain = json.loads(json.dumps(dict(settings)))
    escaped = _map_text(plain, escape_interpolations)
    return yaml.dump(escaped, Dumper=_SettingsDumper, sort_keys=False, allow_unicode=True)


def load_settings(path: Path) -> dict[str, Any]:
    """Load settings that `format_settings` wrote.

    Args:
        path: The YAML file.

    Returns:
        The settings.
    """
    return parse_settings(read_text(path))


def parse_settings(text: str) -> dict[str, Any]:
    """Parse settings that `format_settings` wrote.

    Args:
        text: The YAML document.

    Returns:
        The settings.
    """
    settings: dict[str, Any] = _map_text(yaml.safe_load(text), unescape_interpolations)
    return settings


class _SettingsDumper(yaml.SafeDumper):
    """Quotes text that Hydra would read as a number, although YAML 1.1 does not: 1e-3."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "'" if text[:1] in "+-.0123456789" else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_SettingsDumper.add_representer(str, _represent_text)


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _map_text(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def read_metrics(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read a `metrics.csv`, which may still be written to.

    Args:
        path: The file.

    Returns:
        (columns, complete rows); a row has no entry for an empty cell.
    """
    text = read_text(path)
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    columns = list(reader.fieldnames or [STEP])
    rows = [{name: value for name, value in row.items() if value} for row in reader]
    return columns, [row for row in rows if row.get(STEP, "").isdigit()]


@dataclass(frozen=True)
class DemoFile:
    """One demo: an audio file with its spectrogram.

    Args:
        file: Path of the audio file.
        picture: Path of its mel spectrogram.
        demo: Name of the demo, the same for every step and strength.
        mode: `text`, `inpaint` or `round_trips`.
        prompt: The prompt.
        model: Name of the model that generated it; `original` for a clip itself.
        strength: Strength of the adapter; 0 for the base model alone.
        seed: Seed of the generation.
        step: Training step of the adapter.
        measures: Values by measure: loudness_lufs (LUFS), true_peak_db (dBTP), spectral_centroid_hz (Hz),
            stereo_width (0 to 1), clipped_share (0 to 1); None where it cannot be measured.
    """

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


def list_demos(run_dir: Path) -> list[DemoFile]:
    """List the demos of a run.

    Args:
        run_dir: The run folder.

    Returns:
        The demos, oldest first, with paths relative to the run folder.
    """
    demos = []
    for index in sorted(filter(Path.is_file, (run_dir / DEMOS_DIR).glob(f"step-*/{DEMOS_FILE}"))):
        folder = index.parent.relative_to(run_dir)
        for entry in json.loads(read_file(index)):
            demo = DemoFile(**entry)
            demos.append(replace(demo, file=str(folder / demo.file), picture=str(folder / demo.picture)))
    return demos


@dataclass(frozen=True)
class RunFiles:
    """Content of a run folder; a missing file is an empty value. The module's docstring lists the keys.

    Args:
        path: The run folder.
        config: Text of `config.yaml`.
        record: `run.json`.
        rows: Rows of `metrics.csv`, as numbers.
        validation: `validation.json`.
        memorization: `memorization.json`.
        data: `data.json`.
        adapter_stats: `adapter_stats.json`.
        system: `system.json`.
        evaluation: `evaluation.json`.
        demos: All demos, oldest first.
    """

    path: Path
    config: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, float]] = ()
    validation: Mapping[str, Any] = field(default_factory=dict)
    memorization: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    adapter_stats: Mapping[str, Any] = field(default_factory=dict)
    system: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    demos: Sequence[DemoFile] = ()

    def get_curve(self, name: str) -> list[tuple[float, float]]:
        """Return the values of a metric.

        Args:
            name: Name of the metric.

        Returns:
            (step, value) of each row that has it.
        """
        return [(row[STEP], row[name]) for row in self.rows if name in row]

    @property
    def step(self) -> int:
        """The last step of which a metric, validation or checkpoint is known."""
        last = [int(row[STEP]) for row in self.rows[-1:]]
        return max(
            [*last, *list_checkpoints(self.path), *(row["step"] for row in self.validation.get("history", []))],
            default=0,
        )

    @property
    def seconds(self) -> float:
        """Time of all starts together, until the last checkpoint or end."""
        return float(self.record.get("seconds", 0.0))

    @property
    def peak_memory_gib(self) -> float | None:
        """Highest memory use in GiB, or None while it is unknown."""
        return max((value for _, value in self.get_curve("time/peak_memory_gib")), default=None)


def read_run(run_dir: str | os.PathLike[str]) -> RunFiles:
    """Read a run folder, at any moment of a run.

    Args:
        run_dir: The run folder.

    Returns:
        Its content.

    Raises:
        DataError: A newer version wrote it.
    """
    run_dir = Path(run_dir)
    metrics, config = run_dir / METRICS_FILE, run_dir / CONFIG_FILE
    rows = read_metrics(metrics)[1] if metrics.is_file() else []
    contents = {}
    for name, file in _JSON_FILES.items():
        path = run_dir / file
        contents[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    check_format(run_dir, contents["record"])
    if not any(row["step"] > 0 for row in contents["validation"].get("history", [])):
        contents["validation"].pop("items", None)  # of the base alone: no result of the adapter
    return RunFiles(
        run_dir,
        config.read_text(encoding="utf-8") if config.is_file() else "",
        rows=[{name: float(value) for name, value in row.items()} for row in rows],
        demos=list_demos(run_dir),
        **contents,
    )
