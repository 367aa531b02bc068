"""A run's folder: begun, resumed, or refused. `run.json` says what the run is; `config.yaml` how it was set.

A resumed run must be the run that was started: what differs in settings, data or base model is listed and refused
unless allowed by name.
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
from sa3train.core.config import differences
from sa3train.core.errors import ConfigError
from sa3train.core.files import write_json, write_text
from sa3train.core.log import get_logger, rank
from sa3train.reports.run_files import CONFIG, RECORD, dump_settings, load_settings

_logger = get_logger(__name__)


FREE = (
    "resume", "resume_changes", "run_dir", "paths.*", "logger.*", "callbacks.save.*", "callbacks.demos.*",
    "data.num_workers", "trainer.log_every", "trainer.activation_checkpointing", "launcher*",
)  # fmt: skip
"""Settings that may change from one part of a run to the next: they do not touch what is learned."""

KEPT = ("trainer.activation_checkpointing",)
"""Those of them that later parts of a run go on with, as they make it fit into memory."""


@dataclass
class RunFolder:
    """One run's folder and record. `state`: (step, path) of the training state to go on from, or None."""

    path: Path
    record: dict[str, Any]
    state: tuple[int, Path] | None = None
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def run_id(self) -> str:
        """The id of this run, the same after every resume."""
        return str(self.record["id"])

    def save(self, **values: Any) -> None:
        """Add `values` to `run.json` (rank 0)."""
        self.record.update(values)
        if rank() == 0:
            write_json(self.path / RECORD, self.record)

    def abandon(self) -> None:
        """Take back a run that was refused before it made anything, so that its folder can be used; of one that was
        stopped by an error, say how to go on (rank 0).
        """
        from sa3train.training.callbacks.checkpoint import newest_state

        if rank() != 0:
            return
        begun_here = not self.record["resumed"]
        if begun_here and {entry.name for entry in self.path.iterdir()} <= {CONFIG, RECORD}:
            for name in (CONFIG, RECORD):
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()
        elif state := newest_state(self.path):
            _logger.info("step %d is saved; once this is mended, go on with: sa3-train resume=%s", state[0], self.path)


def requeued() -> bool:
    """Whether a scheduler or torchrun started this very job again."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def open_run(
    run_dir: Path,
    settings: Mapping[str, Any],
    identity: Mapping[str, str],
    *,
    resume: bool,
    allowed: Sequence[str] = (),
) -> RunFolder:
    """Begin a run in `run_dir`, or go on with the one that is there.

    `settings`: the whole configuration. `identity`: what the run depends on beside it (data manifest, base hash).
    `allowed`: settings or identities that may differ on resume, as names or patterns; "all" allows any.
    Call it on rank 0 (`parallel.on_rank_zero`). Raises `ConfigError` when the folder holds another run and resume is
    off, holds none and resume is on, or differs.
    """
    exists = (run_dir / CONFIG).is_file() and (run_dir / RECORD).is_file()
    if exists and not resume and not requeued():
        raise ConfigError(
            f"{run_dir} already holds a run. Go on with it: sa3-train resume={run_dir}; "
            f"or start another one elsewhere: run_dir=FOLDER."
        )
    if resume and not exists:
        raise ConfigError(f"cannot resume {run_dir}: it holds no run ({CONFIG} and {RECORD}).")
    if not exists:
        return _begin(run_dir, settings, identity)
    return _go_on(run_dir, settings, identity, allowed)


def _begin(run_dir: Path, settings: Mapping[str, Any], identity: Mapping[str, str]) -> RunFolder:
    record = {
        "id": uuid.uuid4().hex[:8],
        "version": __version__,
        "started": _now(),
        "status": "running",
        "identity": dict(identity),
        "resumed": [],
    }
    folder = RunFolder(run_dir, record)
    write_text(run_dir / CONFIG, dump_settings(settings))
    folder.save()
    return folder


def _go_on(
    run_dir: Path, settings: Mapping[str, Any], identity: Mapping[str, str], allowed: Sequence[str]
) -> RunFolder:
    from sa3train.training.callbacks.checkpoint import newest_state

    record = json.loads((run_dir / RECORD).read_text(encoding="utf-8"))
    saved = load_settings(run_dir / CONFIG)
    found = differences(saved, json.loads(json.dumps(dict(settings))))
    changes = {key: change for key, change in found.items() if not _matches(key, FREE)}
    changes |= differences(record["identity"], dict(identity), "identity.")
    refused = {key: change for key, change in changes.items() if "all" not in allowed and not _matches(key, allowed)}
    if refused:
        lines = "\n".join(f"         {key}: {old} -> {new}" for key, (old, new) in refused.items())
        names = ",".join(refused)
        raise ConfigError(
            f"cannot resume {run_dir}: this differs from the run as it was started:\n{lines}\n"
            f"       Leave it as it was, or allow it: resume_changes=[{names}]"
        )
    state = newest_state(run_dir)
    folder = RunFolder(run_dir, record, state, changes)
    resumed = {"at": _now(), "step": state[0] if state else 0, "version": __version__}
    if changes:
        resumed["changes"] = {key: [old, new] for key, (old, new) in changes.items()}
    if changes or any(_matches(key, KEPT) for key in found):
        write_text(run_dir / CONFIG, dump_settings(settings))
    folder.save(status="running", identity=dict(identity), resumed=[*record["resumed"], resumed])
    return folder


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) or key.startswith(f"{pattern}.") for pattern in patterns)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
