"""A run folder: started, resumed, or refused. `run.json` says what the run is, `config.yaml` how it was configured.

A resumed run must be the run that was started: what differs in settings, data, base model or random draws is listed and
refused unless allowed by name.
"""

import datetime
import fnmatch
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sa3train import __version__
from sa3train.core.config import find_differences
from sa3train.core.errors import ConfigError
from sa3train.core.files import write_json, write_text
from sa3train.core.log import get_logger, get_rank
from sa3train.reports.run_files import CONFIG_FILE, RECORD_FILE, format_settings, load_settings
from sa3train.training.callbacks.checkpoint import find_latest_checkpoint

_logger = get_logger(__name__)

FREE_SETTINGS = (
    "resume", "allow_resume_changes", "run_dir", "paths.*", "logger.*", "callbacks.checkpoint.*", "callbacks.demos.*",
    "data.num_workers", "trainer.log_every", "trainer.activation_checkpointing", "launcher*",
)  # fmt: skip
"""Settings that may change when a run is resumed: they do not touch what is learned."""

STORED_SETTINGS = ("trainer.activation_checkpointing",)
"""Those of them that later resumes keep, as they make the run fit into memory."""

REASONS = {
    "identity.draws": "this version of sa3train draws clips or noise differently, so the run could not continue exactly"
}
"""Why a difference matters, where its name does not say it."""


@dataclass
class RunDir:
    """A run's folder and record.

    Attributes:
        path: The folder.
        record: Content of `run.json`.
        state: Step and file of the training state to resume from, or None.
        changes: What differs from the run as it was started and was allowed: old and new value by name.
    """

    path: Path
    record: dict[str, Any]
    state: tuple[int, Path] | None = None
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def run_id(self) -> str:
        """Id of this run, the same after every resume."""
        return str(self.record["id"])

    def save(self, **values: Any) -> None:
        """Save values in `run.json`, on rank 0.

        Args:
            **values: What to add to the record.
        """
        self.record.update(values)
        if get_rank() == 0:
            write_json(self.path / RECORD_FILE, self.record)

    def abandon(self) -> None:
        """Remove the folder of a run that failed before it made anything; else log how to resume. On rank 0."""
        if get_rank() != 0:
            return
        is_new = not self.record["resumed"]
        if is_new and {entry.name for entry in self.path.iterdir()} <= {CONFIG_FILE, RECORD_FILE}:
            for name in (CONFIG_FILE, RECORD_FILE):
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()
        elif state := find_latest_checkpoint(self.path):
            _logger.info("step %d is saved. After fixing the error, run: sa3-train resume=%s", state[0], self.path)


def is_requeued() -> bool:
    """Check whether a scheduler or torchrun restarted this job.

    Returns:
        Whether it did.
    """
    return any(int(os.environ.get(name) or 0) > 0 for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def open_run(
    run_dir: Path,
    settings: Mapping[str, Any],
    identity: Mapping[str, str],
    *,
    resume: bool,
    allowed: Sequence[str] = (),
) -> RunDir:
    """Open a run folder: start a run in it, or resume the one that is there. Call it on rank 0.

    Args:
        run_dir: The folder.
        settings: The whole configuration.
        identity: What the run depends on besides: hashes of data and base model, version of the random draws.
        resume: Whether the folder is expected to hold a run.
        allowed: Settings or identities that may differ on resume, as names or patterns; "all" allows any.

    Returns:
        The run folder.

    Raises:
        ConfigError: The folder holds another run and `resume` is off, holds none and `resume` is on, or differs.
    """
    exists = (run_dir / CONFIG_FILE).is_file() and (run_dir / RECORD_FILE).is_file()
    if exists and not resume and not is_requeued():
        raise ConfigError(
            f"{run_dir} already holds a run. Resume it: sa3-train resume={run_dir}; "
            f"or start another one elsewhere: run_dir=FOLDER."
        )
    if resume and not exists:
        raise ConfigError(f"cannot resume {run_dir}: it holds no run ({CONFIG_FILE} and {RECORD_FILE}).")
    return _resume(run_dir, settings, identity, allowed) if exists else _start(run_dir, settings, identity)


def _start(run_dir: Path, settings: Mapping[str, Any], identity: Mapping[str, str]) -> RunDir:
    record = {
        "id": uuid.uuid4().hex[:8],
        "version": __version__,
        "started": _now(),
        "status": "running",
        "identity": dict(identity),
        "resumed": [],
    }
    run = RunDir(run_dir, record)
    write_text(run_dir / CONFIG_FILE, format_settings(settings))
    run.save()
    return run


def _resume(run_dir: Path, settings: Mapping[str, Any], identity: Mapping[str, str], allowed: Sequence[str]) -> RunDir:
    record = json.loads((run_dir / RECORD_FILE).read_text(encoding="utf-8"))
    saved = load_settings(run_dir / CONFIG_FILE)
    differences = find_differences(saved, json.loads(json.dumps(dict(settings))))
    changes = {key: change for key, change in differences.items() if not _matches(key, FREE_SETTINGS)}
    changes |= find_differences(record["identity"], dict(identity), "identity.")
    refused = {key: change for key, change in changes.items() if "all" not in allowed and not _matches(key, allowed)}
    if refused:
        lines = [
            f"         {key}: {old} -> {new}{f' ({REASONS[key]})' if key in REASONS else ''}"
            for key, (old, new) in refused.items()
        ]
        raise ConfigError(
            f"cannot resume {run_dir}: this differs from the run as it was started:\n"
            + "\n".join(lines)
            + f"\n       Leave it as it was, or allow it: allow_resume_changes=[{','.join(refused)}]"
        )
    state = find_latest_checkpoint(run_dir)
    run = RunDir(run_dir, record, state, changes)
    resumed = {"at": _now(), "step": state[0] if state else 0, "version": __version__}
    if changes:
        resumed["changes"] = {key: [old, new] for key, (old, new) in changes.items()}
    if changes or any(_matches(key, STORED_SETTINGS) for key in differences):
        write_text(run_dir / CONFIG_FILE, format_settings(settings))
    run.save(status="running", identity=dict(identity), resumed=[*record["resumed"], resumed])
    return run


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) or key.startswith(f"{pattern}.") for pattern in patterns)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
