"""Where metrics, audio and adapters of a run are recorded: CSV always, TensorBoard and W&B by choice.

Every sink gets the same metrics under the same names. No sink may stop a run: when a server does not answer, the run
goes
on and its records stay on disk. wandb is imported here and nowhere else.
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
from typing import Any, Protocol

import torch
from torch import Tensor

from sa3train.core.errors import ConfigError
from sa3train.core.files import write_text
from sa3train.core.log import get_logger
from sa3train.reports.run_files import STEP, read_metrics

_logger = get_logger(__name__)


class Sink(Protocol):
    """One place where a run is recorded."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at a training step."""

    def audio(self, name: str, audio_CN: Tensor, sample_rate: int, step: int, caption: str) -> None:
        """Record a clip (channels, samples) in -1..1."""

    def image(self, name: str, png: bytes, step: int, caption: str) -> None:
        """Record a picture."""

    def adapter(self, path: Path, metadata: Mapping[str, Any], aliases: Sequence[str]) -> None:
        """Record an adapter file as an artifact."""

    def close(self, failed: bool) -> None:
        """Finish the record."""


class CsvSink:
    """`metrics.csv`: one row per logged step, a column per metric. Audio and adapters are in the run folder anyway.

    Opening an existing file drops rows after `keep_through` (what a resumed run will log again) and a torn last line.
    """

    def __init__(self, path: Path, keep_through: int | None = None) -> None:
        self.path = path
        self.columns: list[str] = [STEP]
        self.rows: list[dict[str, str]] = []
        if path.is_file() and keep_through is not None:
            self.columns, self.rows = read_metrics(path)
            self.rows = [row for row in self.rows if int(row[STEP]) <= keep_through]
            self._rewrite()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Append a row, or add to the last one when it is of the same step; new columns rewrite the file."""
        row = {STEP: str(step), **{name: repr(float(value)) for name, value in values.items()}}
        new = [name for name in row if name not in self.columns]
        same_step = bool(self.rows) and self.rows[-1][STEP] == row[STEP]
        if same_step:
            self.rows[-1].update(row)
        else:
            self.rows.append(row)
        self.columns += new
        if new or same_step or not self.path.is_file():
            self._rewrite()
        else:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)

    def audio(self, name: str, audio_CN: Tensor, sample_rate: int, step: int, caption: str) -> None:
        """Nothing to do: the run folder holds the file."""

    def image(self, name: str, png: bytes, step: int, caption: str) -> None:
        """Nothing to do: the run folder holds the file."""

    def adapter(self, path: Path, metadata: Mapping[str, Any], aliases: Sequence[str]) -> None:
        """Nothing to do: the run folder holds the file."""

    def close(self, failed: bool) -> None:
        """Nothing is open between rows."""

    def _rewrite(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())


class TensorBoardSink:
    """Event files for TensorBoard in a folder of their own."""

    def __init__(self, folder: Path, purge_from: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError('logger=tensorboard needs TensorBoard: pip install "sa3train[tensorboard]".') from error
        self.writer = SummaryWriter(str(folder), purge_step=purge_from)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """One scalar curve per metric."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def audio(self, name: str, audio_CN: Tensor, sample_rate: int, step: int, caption: str) -> None:
        """TensorBoard plays one channel: the mean of all."""
        self.writer.add_audio(name, audio_CN.mean(dim=0).clamp(-1, 1), step, sample_rate)

    def image(self, name: str, png: bytes, step: int, caption: str) -> None:
        """A picture beside the curves."""
        import numpy as np
        from PIL import Image

        self.writer.add_image(name, np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), step, dataformats="HWC")

    def adapter(self, path: Path, metadata: Mapping[str, Any], aliases: Sequence[str]) -> None:
        """Its place and provenance as text."""
        self.writer.add_text("adapter", f"{path}\n\n```\n{json.dumps(dict(metadata), indent=2)}\n```")

    def close(self, failed: bool) -> None:
        """Flush the event file."""
        self.writer.close()


class WandbSink:
    """A Weights & Biases run: online when its server answers, else offline, to be sent later.

    `mode`: online, offline or disabled. `timeout`: seconds to wait for the server at the start and at the end, where
    artifacts on their way may take another minute; what is written to disk is waited for. The run's id is kept, so that
    a resumed run goes on in the same record.
    """

    def __init__(
        self,
        folder: Path,
        *,
        mode: str,
        project: str,
        entity: str | None,
        name: str,
        run_id: str,
        config: Mapping[str, Any],
        tags: Sequence[str] = (),
        group: str | None = None,
        timeout: float = 30.0,
    ) -> None:
        import wandb

        server = os.environ.get("WANDB_BASE_URL", wandb.setup().settings.base_url).rstrip("/")
        if mode == "online" and not _answers(server, min(timeout, 3.0)):
            _unreachable(server, folder)
            mode = "offline"
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.absolute()  # wandb's own process may be in another folder than this one
        settings = wandb.Settings(
            base_url=server, init_timeout=timeout, console="off", disable_git=True, silent=True, **_patience(timeout)
        )
        arguments: dict[str, Any] = {
            "dir": str(folder),
            "project": project,
            "entity": entity,
            "name": name,
            "id": run_id,
            "resume": "allow",
            "config": dict(config),
            "tags": list(tags),
            "group": group,
            "settings": settings,
        }
        try:
            if mode == "online":  # an offline run's end waits for the disk only, which is always to be waited for
                online = settings.model_copy(update={"finish_timeout": timeout})
                self.run = wandb.init(mode="online", **(arguments | {"settings": online}))
            else:
                self.run = wandb.init(mode=mode, **arguments)  # type: ignore[arg-type]
        except (wandb.errors.Error, OSError, RuntimeError) as error:
            _logger.warning("W&B does not take the run (%s).", str(error).splitlines()[0])
            _unreachable(server, folder)
            wandb.teardown(exit_code=1)  # lets go of the run's id
            self.run = wandb.init(mode="offline", **arguments)
        self.run.define_metric(STEP, hidden=True)
        self.run.define_metric("*", step_metric=STEP)

    def used(self, kind: str, name: str, metadata: Mapping[str, Any], file: Path | None = None) -> None:
        """Declare an input of the run (`kind`: dataset or model), so that adapters show where they come from."""
        import wandb

        artifact = wandb.Artifact(name, type=kind, metadata=_clean(metadata))
        if file is not None and file.is_file():
            artifact.add_file(str(file))
        else:
            with artifact.new_file("provenance.json") as note:
                note.write(json.dumps(_clean(metadata), indent=2))
        self._send(artifact, [], used=True)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers, against our own step: a resumed run may log a step again."""
        self.run.log({STEP: step, **values})

    def audio(self, name: str, audio_CN: Tensor, sample_rate: int, step: int, caption: str) -> None:
        """A clip to play, unchanged in level."""
        import wandb

        data = audio_CN.T.cpu().float().numpy()
        self.run.log({STEP: step, name: wandb.Audio(data, sample_rate=sample_rate, caption=caption)})

    def image(self, name: str, png: bytes, step: int, caption: str) -> None:
        """A picture."""
        import wandb
        from PIL import Image

        self.run.log({STEP: step, name: wandb.Image(Image.open(io.BytesIO(png)), caption=caption)})

    def adapter(self, path: Path, metadata: Mapping[str, Any], aliases: Sequence[str]) -> None:
        """The adapter as an artifact of this run."""
        import wandb

        artifact = wandb.Artifact(f"adapter-{self.run.id}", type="adapter", metadata=_clean(metadata))
        artifact.add_file(str(path), name=path.name)
        self._send(artifact, aliases, used=False)

    def _send(self, artifact: Any, aliases: Sequence[str], used: bool) -> None:
        """What `log_artifact` and `use_artifact` do, but for their questions to the server.

        Each of those holds the run up until it is answered, and ends it when it never is. This way the artifact is in
        the record on disk at once, and goes to the server when it can.
        """
        interface = self.run._interface
        if interface is not None:  # there is none in mode disabled
            ready, names = self.run._prepare_artifact(artifact, aliases=list(aliases) or None)
            interface.publish_artifact(self.run, ready, names, is_user_created=used, use_after_commit=used)

    def close(self, failed: bool) -> None:
        """Send what is left, waiting `timeout` seconds at most; the rest stays on disk."""
        self.run.finish(exit_code=1 if failed else 0)


class Tracker:
    """All sinks of a run as one. Without sinks (ranks other than 0) it does nothing.

    A sink that fails is reported once and left out from then on: the record on disk is the run folder's.
    """

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self.sinks = list(sinks)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record finite numbers at a step; what is not finite is said aloud and left out."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        if len(finite) < len(values):
            _logger.warning("step %d: not finite: %s", step, ", ".join(sorted(set(values) - set(finite))))
        self._each("metrics", finite, step)

    def audio(self, name: str, audio_CN: Tensor, sample_rate: int, step: int, caption: str = "") -> None:
        """Record a clip."""
        self._each("audio", name, audio_CN, sample_rate, step, caption)

    def image(self, name: str, png: bytes, step: int, caption: str = "") -> None:
        """Record a picture."""
        self._each("image", name, png, step, caption)

    def adapter(self, path: Path, metadata: Mapping[str, Any], aliases: Sequence[str] = ("latest",)) -> None:
        """Record an adapter file."""
        self._each("adapter", path, metadata, aliases)

    def close(self, failed: bool = False) -> None:
        """Finish every record."""
        self._each("close", failed)

    def _each(self, method: str, *arguments: Any) -> None:
        for sink in list(self.sinks):
            try:
                getattr(sink, method)(*arguments)
            except _failures() as error:
                if isinstance(sink, CsvSink):
                    raise
                _logger.warning("%s fails and is left out from here on: %s", type(sink).__name__, error)
                self.sinks.remove(sink)


def _failures() -> tuple[type[Exception], ...]:
    """What a sink that fails may raise; wandb's own errors where wandb is in use."""
    wandb = sys.modules.get("wandb")
    return (OSError, RuntimeError, TimeoutError, *(() if wandb is None else (wandb.errors.Error,)))


def _patience(timeout: float) -> dict[str, Any]:
    """How long wandb tries to send an artifact: its end of a run waits for that without regard to its own limit.

    By default twenty times with up to a minute between, for a server that says nothing half an hour.
    """
    import wandb

    wanted = {
        "x_graphql_retry_max": 2,
        "x_graphql_retry_wait_max_seconds": 2.0,
        "x_graphql_timeout_seconds": min(timeout, 10.0),
    }
    return {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}


def _answers(url: str, timeout: float) -> bool:
    """Whether the server answers a harmless question with anything but a server error."""
    question = json.dumps({"query": "query { serverInfo { cliVersionInfo } }"}).encode()
    request = urllib.request.Request(f"{url}/graphql", question, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError):
        return False


def _unreachable(server: str, folder: Path) -> None:
    _logger.warning(
        "The W&B server %s does not answer; the run is recorded offline in %s. Send it later with: "
        "bash launch/wandb_sync.sh %s",
        server,
        folder,
        folder.parent,
    )


def _clean(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(metadata), default=str))


def peak_memory() -> float:
    """The most memory this process has held, in GiB: on the GPU when there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the peak of the process which started this one
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line[:5] == "VmHWM") / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
