"""Where a run is recorded: `metrics.csv` always, TensorBoard or Weights & Biases by choice (`logger=`).

Every logger gets the same metrics under the same names:

- `train/loss`, `train/context_loss` (over context frames), `train/gradient_norm`, `train/learning_rate`, and
  `train/level/0.05` to `train/level/0.95`, the loss by noise level: means over the steps since the last line.
- `val/loss` on fixed held-out clips, `val/loss_delta` (minus the base model's), `val/gap` (minus the loss on training
  clips), `val/level/…`; the same for fixed training clips as `train_eval/loss`, `train_eval/loss_delta`,
  `train_eval/level/…`.
- `time/steps_per_second`, `time/audio_seconds_per_second`, `time/peak_memory_gib`.
- `demos/MODEL/STRENGTH/MEASURE` (loudness and the like, means over demos), and per demo the audio
  `demos/MODEL/DEMO/STRENGTH` with its spectrogram `…/mel`.

W&B artifacts: inputs `data-<hash>` (type dataset) and `base-<hash>` (type model), output `adapter-<run id>`
(type adapter; aliases `latest` and `step-N`).

No logger stops a run: when a server does not answer, training continues and the records stay on disk. wandb is
imported here and nowhere else.
"""

import csv
import io
import json
import math
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import override

from sa3train.core.errors import ConfigError, SA3Error
from sa3train.core.files import write_text
from sa3train.core.log import get_logger
from sa3train.reports.run_files import STEP, read_metrics
from sa3train.training.settings import LoggingSettings

_logger = get_logger(__name__)


class RunLogger:
    """Base of the loggers; what a logger does not override is not recorded by it."""

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers.

        Args:
            values: Numbers by metric name.
            step: Optimizer step they belong to.
        """

    def log_audio(self, name: str, audio_CN: Tensor, sample_rate: int, step: int, caption: str) -> None:
        """Record audio.

        Args:
            name: Name of the series.
            audio_CN: (channels, samples) in -1..1; its level is not changed.
            sample_rate: In Hz.
            step: Optimizer step it belongs to.
            caption: Text shown beside it.
        """

    def log_image(self, name: str, png: bytes, step: int, caption: str) -> None:
        """Record a picture.

        Args:
            name: Name of the series.
            png: The PNG file.
            step: Optimizer step it belongs to.
            caption: Text shown beside it.
        """

    def log_adapter(self, path: Path, metadata: Mapping[str, Any], aliases: Sequence[str]) -> None:
        """Record an adapter file.

        Args:
            path: The file.
            metadata: Its provenance.
            aliases: Names of this version, such as "latest".
        """

    def close(self, failed: bool) -> None:
        """Finish the record.

        Args:
            failed: Whether the run ended early.
        """


class CSVLogger(RunLogger):
    """`metrics.csv`: one row per logged step, one column per metric; audio and adapters are in the run folder anyway.

    Args:
        path: The file.
        keep_through: Keep the rows of an existing file up to this step: a resumed run logs later ones again, and a torn
            last line is dropped. None starts a new file.
    """

    def __init__(self, path: Path, keep_through: int | None = None) -> None:
        self.path = path
        self.columns: list[str] = [STEP]
        self.rows: list[dict[str, str]] = []
        if path.is_file() and keep_through is not None:
            self.columns, self.rows = read_metrics(path)
            self.rows = [row for row in self.rows if int(row[STEP]) <= keep_through]
            self._rewrite()

    @override
    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Append a row, or extend the last one if it has the same step; new columns rewrite the file."""
        row = {STEP: str(step), **{name: repr(float(value)) for name, value in values.items()}}
        if self.rows and not self.path.parent.is_dir():
            raise SA3Error(f"{self.path.parent} was removed or moved during the run. Leave it in place; start again.")
        new = [name for name in row if name not in self.columns]
        is_same_step = bool(self.rows) and self.rows[-1][STEP] == row[STEP]
        if is_same_step:
            self.rows[-1].update(row)
        else:
            self.rows.append(row)
        self.columns += new
        if new or is_same_step or not self.path.is_file():
            self._rewrite()
        else:
            try:
                with self.path.open("a", encoding="utf-8", newline="") as file:
                    csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)
            except OSError as error:
                raise SA3Error(f"cannot write {self.path}: {error.strerror or error}. Free disk space.") from error

    def _rewrite(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())


class TensorBoardLogger(RunLogger):
    """TensorBoard event files.

    Args:
        folder: Where they are written.
        purge_from: Step from which earlier records are discarded, as a resumed run logs them again.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, purge_from: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError('logger=tensorboard needs TensorBoard: pip install "sa3train[tensorboard]".') from error
        self.writer = SummaryWriter(str(folder), purge_step=purge_from)

    @override
    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each scalar curve."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    @override
    def log_audio(self, name: str, audio_CN: Tensor, sample_rate: int, step: int, caption: str) -> None:
        """Add the mean of all channels: TensorBoard plays one."""
        self.writer.add_audio(name, audio_CN.mean(dim=0).clamp(-1, 1), step, sample_rate)

    @override
    def log_image(self, name: str, png: bytes, step: int, caption: str) -> None:
        """Add a picture."""
        import numpy as np
        from PIL import Image

        self.writer.add_image(name, np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), step, dataformats="HWC")

    @override
    def log_adapter(self, path: Path, metadata: Mapping[str, Any], aliases: Sequence[str]) -> None:
        """Add path and provenance as text."""
        self.writer.add_text("adapter", f"{path}\n\n```\n{json.dumps(dict(metadata), indent=2)}\n```")

    @override
    def close(self, failed: bool) -> None:
        """Flush the event file."""
        self.writer.close()


class WandbLogger(RunLogger):
    """A Weights & Biases run: online if its server answers, else offline, to be uploaded later.

    Args:
        folder: Where wandb keeps its files.
        settings: Mode, project and the like; `timeout` is waited for at the start and at the end, where uploading
            artifacts may take another minute. Writing to disk is always waited for.
        name: Name of the run.
        run_id: Id of the run; a resumed run continues the same record.
        config: The configuration shown with the run.
    """

    def __init__(
        self, folder: Path, settings: LoggingSettings, *, name: str, run_id: str, config: Mapping[str, Any]
    ) -> None:
        import wandb

        mode, timeout = settings.mode, settings.timeout
        server = os.environ.get("WANDB_BASE_URL", wandb.setup().settings.base_url).rstrip("/")
        if mode == "online" and not _is_reachable(server, min(timeout, 3.0)):
            _warn_unreachable(server, folder)
            mode = "offline"
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.absolute()  # wandb's own process may have another working directory
        options = wandb.Settings(
            base_url=server, init_timeout=timeout, console="off", disable_git=True, silent=True,
            **_make_retry_settings(timeout),
        )  # fmt: skip
        arguments: dict[str, Any] = {
            "dir": str(folder), "project": settings.project, "entity": settings.entity, "group": settings.group,
            "tags": settings.tags, "name": name, "id": run_id, "resume": "allow", "config": dict(config),
            "settings": options,
        }  # fmt: skip
        try:
            if mode == "online":  # the end of an offline run waits for the disk only, which needs no limit
                online = options.model_copy(update={"finish_timeout": timeout})
                self.run = wandb.init(mode="online", **(arguments | {"settings": online}))
            else:
                self.run = wandb.init(mode=mode, **arguments)
        except (wandb.errors.Error, OSError, RuntimeError, ValueError) as error:
            _logger.warning("W&B did not accept the run (%s).", str(error).splitlines()[0])
            _warn_unreachable(server, folder)
            wandb.teardown(exit_code=1)  # releases the run's id
            try:
                self.run = wandb.init(mode="offline", **arguments)
            except (wandb.errors.Error, ValueError) as refusal:  # not even offline: the names are to blame
                reason = " ".join(str(refusal).split())
                raise ConfigError(f"W&B refuses logger.project, entity, group or tags: {reason}") from refusal
        self.run.define_metric(STEP, hidden=True)
        self.run.define_metric("*", step_metric=STEP)

    def log_input(self, artifact_type: str, name: str, metadata: Mapping[str, Any], file: Path | None = None) -> None:
        """Declare an input artifact of the run, so that W&B shows where the adapter comes from.

        Args:
            artifact_type: "dataset" or "model".
            name: Name of the artifact.
            metadata: What identifies it.
            file: File to add; without it, `metadata` is added as `provenance.json`.
        """
        import wandb

        artifact = wandb.Artifact(name, type=artifact_type, metadata=_make_json_safe(metadata))
        if file is not None and file.is_file():
            artifact.add_file(str(file))
        else:
            with artifact.new_file("provenance.json") as note:
                note.write(json.dumps(_make_json_safe(metadata), indent=2))
        publish_artifact(self.run, artifact, (), is_input=True)

    @override
    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers against our own step: a resumed run may log a step again."""
        self.run.log({STEP: step, **values})

    @override
    def log_audio(self, name: str, audio_CN: Tensor, sample_rate: int, step: int, caption: str) -> None:
        """Record a playable clip."""
        import wandb

        data = audio_CN.T.cpu().float().numpy()
        self.run.log({STEP: step, name: wandb.Audio(data, sample_rate=sample_rate, caption=caption)})

    @override
    def log_image(self, name: str, png: bytes, step: int, caption: str) -> None:
        """Record a picture."""
        import wandb
        from PIL import Image

        self.run.log({STEP: step, name: wandb.Image(Image.open(io.BytesIO(png)), caption=caption)})

    @override
    def log_adapter(self, path: Path, metadata: Mapping[str, Any], aliases: Sequence[str]) -> None:
        """Record the adapter as an output artifact."""
        import wandb

        artifact = wandb.Artifact(f"adapter-{self.run.id}", type="adapter", metadata=_make_json_safe(metadata))
        artifact.add_file(str(path), name=path.name)
        publish_artifact(self.run, artifact, aliases, is_input=False)

    @override
    def close(self, failed: bool) -> None:
        """Upload what is left, waiting `timeout` seconds at most; the rest stays on disk."""
        self.run.finish(exit_code=1 if failed else 0)


def publish_artifact(run: Any, artifact: Any, aliases: Sequence[str], is_input: bool) -> None:
    """Publish an artifact as `log_artifact` and `use_artifact` do, without asking the server first.

    Those block the run until the server answers. This way the artifact is in the record on disk at once and is uploaded
    when possible. wandb has no public call for it, so its private ones are used here and nowhere else; a test fails
    when they change.

    Args:
        run: The wandb run.
        artifact: The artifact.
        aliases: Names of this version.
        is_input: Whether the run uses the artifact rather than making it.
    """
    interface = run._interface
    if interface is not None:  # there is none in mode disabled
        ready, names = run._prepare_artifact(artifact, aliases=list(aliases) or None)
        interface.publish_artifact(run, ready, names, is_user_created=is_input, use_after_commit=is_input)


class LoggerCollection:
    """All loggers of a run as one; without loggers (on ranks other than 0) it does nothing.

    A logger that fails is reported once and dropped, except for the CSV file, which is the record of the run.

    Args:
        loggers: The loggers.
    """

    def __init__(self, loggers: Sequence[RunLogger] = ()) -> None:
        self.loggers = list(loggers)

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record the finite numbers; warn about the others.

        Args:
            values: Numbers by metric name.
            step: Optimizer step they belong to.
        """
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        if len(finite) < len(values):
            _logger.warning("step %d: not finite: %s", step, ", ".join(sorted(set(values) - set(finite))))
        self._call_each("log_metrics", finite, step)

    def log_audio(self, name: str, audio_CN: Tensor, sample_rate: int, step: int, caption: str = "") -> None:
        """Record audio.

        Args:
            name: Name of the series.
            audio_CN: (channels, samples) in -1..1.
            sample_rate: In Hz.
            step: Optimizer step it belongs to.
            caption: Text shown beside it.
        """
        self._call_each("log_audio", name, audio_CN, sample_rate, step, caption)

    def log_image(self, name: str, png: bytes, step: int, caption: str = "") -> None:
        """Record a picture.

        Args:
            name: Name of the series.
            png: The PNG file.
            step: Optimizer step it belongs to.
            caption: Text shown beside it.
        """
        self._call_each("log_image", name, png, step, caption)

    def log_adapter(self, path: Path, metadata: Mapping[str, Any], aliases: Sequence[str] = ("latest",)) -> None:
        """Record an adapter file.

        Args:
            path: The file.
            metadata: Its provenance.
            aliases: Names of this version.
        """
        self._call_each("log_adapter", path, metadata, aliases)

    def close(self, failed: bool = False) -> None:
        """Finish every record.

        Args:
            failed: Whether the run ended early.
        """
        self._call_each("close", failed)

    def _call_each(self, method: str, *arguments: Any) -> None:
        for logger in list(self.loggers):
            try:
                getattr(logger, method)(*arguments)
            except _list_failures() as error:
                if isinstance(logger, CSVLogger):
                    raise
                _logger.warning("%s failed and is disabled: %s", type(logger).__name__, error)
                self.loggers.remove(logger)


def _list_failures() -> tuple[type[Exception], ...]:
    """Errors that a failing logger may raise; wandb's own where wandb is imported."""
    wandb = sys.modules.get("wandb")
    return (OSError, RuntimeError, TimeoutError, *(() if wandb is None else (wandb.errors.Error,)))


def _make_retry_settings(timeout: float) -> dict[str, Any]:
    """How long wandb retries to upload an artifact, which its own limit on the end of a run does not bound.

    The default is twenty times with up to a minute in between: half an hour for a server that never answers.
    """
    import wandb

    wanted = {
        "x_graphql_retry_max": 2,
        "x_graphql_retry_wait_max_seconds": 2.0,
        "x_graphql_timeout_seconds": min(timeout, 10.0),
    }
    return {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}


def _is_reachable(url: str, timeout: float) -> bool:
    """Whether the server answers a query with anything but a server error."""
    query = json.dumps({"query": "query { serverInfo { cliVersionInfo } }"}).encode()
    request = urllib.request.Request(f"{url}/graphql", query, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError):
        return False


def _warn_unreachable(server: str, folder: Path) -> None:
    _logger.warning(
        "The W&B server %s does not answer; the run is recorded offline in %s. Upload it later with: "
        "bash launch/wandb_sync.sh %s",
        server,
        folder,
        folder.parent,
    )


def _make_json_safe(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(metadata), default=str))
