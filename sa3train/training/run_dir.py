"""A run folder: started, resumed, or refused. `run.json` says what the run is, `config.yaml` how it was configured.

A resumed run must be the run that was started: what differs in settings, data, base model or random draws is listed and
refused unless allowed by name. One process at a time trains in a folder: it holds the lock of `run.lock`, which the
system releases however the process ends. On a network file system, whether processes of other hosts see it depends on
how it is mounted: NFS passes such locks on, Lustre only with `-o flock`. Nothing heavy is imported before a
checkpoint is read, so that what is refused is refused at once.
"""

import contextlib
import fnmatch
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from sa3train import __version__
from sa3train.adapters.formats.run_dir import list_checkpoints
from sa3train.core.config import find_differences
from sa3train.core.errors import ConfigError, SA3Error
from sa3train.core.files import path_exists, relate_path, write_json, write_text
from sa3train.core.log import get_logger, get_rank
from sa3train.core.processes import describe_this_process
from sa3train.core.signals import Interrupted
from sa3train.core.text import format_command, get_utc_time
from sa3train.core.user_files import IS_WINDOWS, check_folder, read_file
from sa3train.reports.run_files import (
    ADAPTER_FILE,
    BEST_ADAPTER_FILE,
    CONFIG_FILE,
    LOCK_FILE,
    RECORD_FILE,
    RUN_FILES,
    RUN_FORMAT,
    check_format,
    format_settings,
    holds_run,
    load_settings,
)

_logger = get_logger(__name__)

FREE_SETTINGS = (
    "resume", "allow_resume_changes", "run_dir", "paths.*", "logger.*", "callbacks.checkpoint.*", "callbacks.demos.*",
    "callbacks.report", "data.dir", "source", "data.num_workers", "data.shared_prompts", "trainer.log_every",
    "trainer.activation_checkpointing", "launcher*",
)  # fmt: skip
"""Settings that may change when a run is resumed: they do not touch what is learned. What `data.dir` and
`source` hold is part of the identity."""

STORED_SETTINGS = ("trainer.activation_checkpointing", "trainer.max_steps")
"""Settings that may change and that later resumes keep: one makes the run fit into memory, one is its length."""

FIXED_SETTINGS = {
    "what it has learned fits no other tensors": (
        "adapter.adapter_type", "adapter.rank", "adapter.rank_pattern", "adapter.include", "adapter.exclude",
        "adapter.options",
    ),
    "the state of its optimizer fits no other": ("optimizer.name", "optimizer.lora_plus", "optimizer.options"),
    "the losses measured so far could not be compared": (
        "callbacks.validation.seed", "callbacks.validation.seconds", "callbacks.validation.round_trips",
    ),
    "a run starts once": ("adapter.start_from",),
}  # fmt: skip
"""Settings that can never change, by the reason."""

STEPLESS_SETTINGS = (
    *FREE_SETTINGS, "identity", "model", "trainer.accelerator", "trainer.devices", "trainer.num_nodes",
    "trainer.precision", "trainer.strategy", "trainer.threads",
)  # fmt: skip
"""What may differ without a further step: where the last files of a run are made, and with what."""

LENGTH = "trainer.max_steps"
"""May change where the learning rate does not depend on it."""

REASONS = {
    "identity.data": "the latents were encoded anew, or others lie there",
    "identity.draws": "this version draws clips or noise differently, so the run could not continue exactly",
}
"""Why a difference matters, where its name does not say it."""

LOCK_SECONDS = 10.0
"""How long to wait for a lock: a killed process' loader workers hold on to it until they notice."""


@dataclass
class RunDir:
    """A run's folder and record; as a context manager it releases its lock, and says after an error how to resume.

    Attributes:
        path: The folder.
        settings: The whole configuration.
        identity: What the run depends on besides.
        allowed: Settings or identities that may differ on resume.
        is_resumed: Whether the folder's own run continues.
        record: Content of `run.json`; empty until `begin`.
        state: Step and file of the checkpoint to resume from, or None.
        changes: What differs from the run as it was started and was allowed: old and new value by name.
        lock: Held by rank 0; the other ranks have none.
        since: Time of the last save, as of `time.perf_counter`.
    """

    path: Path
    settings: Mapping[str, Any]
    identity: dict[str, str]
    allowed: Sequence[str] = ()
    is_resumed: bool = False
    record: dict[str, Any] = field(default_factory=dict)
    state: tuple[int, Path] | None = None
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    lock: FileLock | None = None
    since: float = field(default_factory=time.perf_counter)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"lock": None}  # rank 0 sends the others a copy

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        try:
            if error is not None and self.record and get_rank() == 0 and self.path.is_dir():
                self._leave(error)
        finally:
            if self.lock is not None:
                _unlock(self.path, self.lock)

    @property
    def run_id(self) -> str:
        """Id of this run, the same after every resume."""
        return str(self.record["id"])

    def begin(self, **identity: str) -> Self:
        """Start the run or continue it, with everything known that it depends on. Call it on rank 0.

        Args:
            **identity: What was not known yet when the folder was opened: the hash of the base model.

        Returns:
            This run.

        Raises:
            ConfigError: The run to be resumed differs in it.
        """
        self.identity.update(identity)
        self._resume() if self.is_resumed else self._start()
        return self

    def save(self, **values: Any) -> None:
        """Save values in `run.json`, on rank 0, with the seconds of all starts so far.

        Args:
            **values: What to add to the record.
        """
        before, self.since = self.since, time.perf_counter()
        self.record["seconds"] = round(self.record.get("seconds", 0.0) + self.since - before, 3)
        self.record.update(values)
        if get_rank() == 0:
            write_json(self.path / RECORD_FILE, self.record)

    def check_changes(self) -> dict[str, tuple[Any, Any]]:
        """Check that what differs from the run as it was started is allowed; `changes` has it then.

        Returns:
            Also what differs and needs no leave.

        Raises:
            ConfigError: Something else differs.
        """
        saved, started = load_settings(self.path / CONFIG_FILE), _read_record(self.path)["identity"]
        differences = find_differences(saved, json.loads(json.dumps(dict(self.settings))))
        changes = {key: change for key, change in differences.items() if not _matches(key, FREE_SETTINGS)}
        if not (length := self._explain_length(*changes.get(LENGTH, (0, 0)))):
            changes.pop(LENGTH, None)
        known = {name: started.get(name) for name in self.identity}
        self.changes = changes | find_differences(known, self.identity, "identity.")
        every = differences | self.changes
        if fixed := {key: reason for key in every if (reason := self._find_obstacle(key))}:
            described = self._describe_changes("this cannot change", every, fixed)
            way = f"start another run from what it has learned: adapter.start_from={self.path}"
            raise ConfigError(f"{described}       Leave it as it was, or {way}")
        refused = [key for key in self.changes if "all" not in self.allowed and not _matches(key, self.allowed)]
        if refused:
            reasons = REASONS | {LENGTH: length}
            why, what = {key: reasons.get(key, "") for key in refused}, "this differs from the run as it was started"
            described = self._describe_changes(what, every, why)
            keys = ",".join((*self.allowed, *refused))
            raise ConfigError(f"{described}       Leave it as it was, or allow it: 'allow_resume_changes=[{keys}]'")
        return differences

    def _find_obstacle(self, key: str) -> str:
        """Find why a change can have no effect; empty if it can."""
        done, length = max(list_checkpoints(self.path), default=0), self.settings.get("trainer", {}).get("max_steps")
        if key == LENGTH:
            return f"{done} steps are done: set more" if length < done else ""
        demos = self.settings.get("callbacks", {}).get("demos", {})
        is_idle = key.startswith("callbacks.demos.") and not demos.get("memorization_clips")
        if done == length and (is_idle or not _matches(key, STEPLESS_SETTINGS)):
            return f"all of its {done} steps are done: set {LENGTH} above that"
        return next((reason for reason, keys in FIXED_SETTINGS.items() if _matches(key, keys)), "")

    def _describe_changes(self, what: str, changes: Mapping[str, Sequence[Any]], reasons: Mapping[str, str]) -> str:
        lines = [
            f"         {key}: {changes[key][0]} -> {changes[key][1]}{reason and f' ({reason})'}\n"
            for key, reason in reasons.items()
        ]
        return f"cannot resume {self.path}: {what}:\n{''.join(lines)}"

    def _explain_length(self, before: int, after: int) -> str:
        """Explain why a run of another length would not go on exactly; empty if it would."""
        if before == after:
            return ""
        from sa3train.training.schedules import keeps_rates

        done = max(list_checkpoints(self.path), default=0)
        if after >= done and keeps_rates(self.settings.get("scheduler", {}), before, after, done):
            return ""
        return f"its learning rate falls towards its end; to train on in another run: adapter.start_from={self.path}"

    def _start(self) -> None:
        if holds_run(self.path):
            _logger.info("%s: the run in it was killed before it saved anything, and is started again", self.path)
            _clear(self.path)
        write_text(self.path / CONFIG_FILE, format_settings(self.settings))
        self.save(
            format=RUN_FORMAT, id=uuid.uuid4().hex[:8], version=__version__, started=get_utc_time(), status="running",
            identity=self.identity, resumed=[], directory=relate_path(".", self.path), process=_describe_process(),
        )  # fmt: skip

    def _resume(self) -> None:
        from sa3train.training.callbacks.checkpoint import find_latest_checkpoint

        differences = self.check_changes()
        self.state = find_latest_checkpoint(self.path)
        if self.state is None:
            _logger.warning("%s has no checkpoint: it starts again from its first step.", self.path)
        step = self.state[0] if self.state else 0
        resumed: dict[str, Any] = {"at": get_utc_time(), "step": step, "version": __version__}
        if self.changes:
            resumed["changes"] = {key: list(change) for key, change in self.changes.items()}
        if self.changes or any(_matches(key, STORED_SETTINGS) for key in differences):
            write_text(self.path / CONFIG_FILE, format_settings(self.settings))
        self.record = _read_record(self.path)
        length = self.settings.get("trainer", {}).get("max_steps")
        is_over = self.record.get("status") == "finished" and resumed["step"] == length
        resumes = [*self.record["resumed"], *([] if is_over else [resumed])]  # else only its last files are made again
        self.save(status="running", identity=self.identity, resumed=resumes)

    def _leave(self, error: BaseException) -> None:
        """Remove what a run left that failed before it made anything; else log how to resume."""
        from sa3train.training.callbacks.checkpoint import find_latest_checkpoint

        is_stop = isinstance(error, Interrupted)
        if not self.record["resumed"] and not _has_results(self.path):
            _clear(self.path)
            if is_stop:
                _logger.warning("stopped before the first step: nothing is saved. The same command starts again.")
            return
        if is_stop or self.record.get("status") == "finished":  # its last files are still to be made
            self.save(status="interrupted" if is_stop else "running")
        if state := find_latest_checkpoint(self.path):
            when = "" if is_stop else "After fixing the error, "
            _logger.warning("step %d is saved. %sresume: %s", state[0], when, format_resume_command(self.path))


def locate_from_run(run_dir: Path, path: str) -> str:
    """Locate a path in the settings of a run to be resumed, which was relative to the working directory of then.

    Args:
        run_dir: The run folder.
        path: The path, or a URL or registry name.

    Returns:
        Where it leads from the working directory of now; as it is, where nothing was there.
    """
    then = Path(os.path.realpath(run_dir), _read_record(run_dir).get("directory", ""), path)
    return relate_path(then) if "://" not in path and path_exists(then) else path


def format_resume_command(run_dir: Path) -> str:
    """Format the command that resumes a run.

    Args:
        run_dir: The run folder.

    Returns:
        The command, quoted for a shell.
    """
    return format_command(["sa3-train", f"resume={run_dir}"])


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
    """Lock a run folder for a run to be started, or for the one in it to be resumed. Call it on rank 0.

    The run begins with `RunDir.begin`.

    Args:
        run_dir: The folder.
        settings: The whole configuration.
        identity: What the run depends on besides, as far as it is known: hash of the data, version of the random draws.
        resume: Whether the folder is expected to hold a run.
        allowed: Settings or identities that may differ on resume, as names or patterns; "all" allows any.

    Returns:
        The run folder.

    Raises:
        ConfigError: The folder holds another run and `resume` is off, holds none and `resume` is on, or differs; or
            another process trains in it.
    """
    if resume and not holds_run(run_dir):
        raise ConfigError(f"cannot resume {run_dir}: it holds no run ({CONFIG_FILE} and {RECORD_FILE}).")
    run = RunDir(run_dir, settings, dict(identity), allowed, lock=_lock(run_dir))
    try:
        run.is_resumed = holds_run(run_dir) and (resume or is_requeued())
        if run.is_resumed:
            run.check_changes()
            write_json(run_dir / RECORD_FILE, _read_record(run_dir) | {"process": _describe_process()})
        else:
            _check_free(run_dir)
    except BaseException:
        run.__exit__(None, None)
        raise
    return run


def _lock(run_dir: Path) -> FileLock:
    check_folder(run_dir)
    lock = FileLock(run_dir / LOCK_FILE, timeout=LOCK_SECONDS)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        process = _read_record(run_dir).get("process") if holds_run(run_dir) else None
        holder = f"process {process['pid']} on {process['host']}" if process else "another process"
        raise ConfigError(f"{run_dir} is in use: {holder} trains in it. Wait until it ends, or stop it.") from error
    except NotImplementedError:
        _logger.warning("%s is on a file system without locks: make sure that no other process trains in it.", run_dir)
    except OSError as error:
        raise SA3Error(f"cannot write {run_dir}: {error.strerror or error}. Choose another run_dir=FOLDER.") from error
    return lock


def _unlock(run_dir: Path, lock: FileLock) -> None:
    """Release the lock; where there is no run, its file goes, and the folder if it is empty then."""
    is_left = not holds_run(run_dir)
    if IS_WINDOWS:  # where a file in use cannot be removed, also not by another process
        lock.release()
    if is_left:
        with contextlib.suppress(OSError):
            (run_dir / LOCK_FILE).unlink()
            run_dir.rmdir()
    lock.release()


def _has_results(run_dir: Path) -> bool:
    return bool(list_checkpoints(run_dir)) or any(
        (run_dir / name).exists() for name in (ADAPTER_FILE, BEST_ADAPTER_FILE)
    )


def _clear(run_dir: Path) -> None:
    """Remove everything that a run wrote but its lock."""
    for path in (run_dir / name for name in RUN_FILES if name != LOCK_FILE):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def check_startable(run_dir: Path) -> None:
    """Check that a run can be started in a folder, without starting it.

    Args:
        run_dir: The folder.

    Raises:
        ConfigError: Another process trains in it, it holds a run that made something, or files that training would
            replace.
    """
    if holds_run(run_dir):
        _unlock(run_dir, _lock(run_dir))
    _check_free(run_dir)


def _check_free(run_dir: Path) -> None:
    if holds_run(run_dir) and _has_results(run_dir):
        raise ConfigError(
            f"{run_dir} already holds a run. Resume it: {format_resume_command(run_dir)}; "
            f"or start another one elsewhere: run_dir=FOLDER."
        )
    taken = [name for name in RUN_FILES if name != LOCK_FILE and (run_dir / name).exists()]
    if taken and not holds_run(run_dir):
        raise ConfigError(
            f"{run_dir} holds no run, but {', '.join(taken)}, which training would replace. "
            f"Choose another run_dir=FOLDER."
        )


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) or key.startswith(f"{pattern}.") for pattern in patterns)


def _read_record(run_dir: Path) -> dict[str, Any]:
    path = run_dir / RECORD_FILE
    try:
        record: dict[str, Any] = json.loads(read_file(path))
        check_format(run_dir, record)
        if missing := {"id", "identity", "resumed"}.difference(record):
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot read {path}: {error}. Start another run: run_dir=FOLDER.") from error
    return record


def _describe_process() -> dict[str, Any]:
    return {**describe_this_process(), "host": platform.node()}
