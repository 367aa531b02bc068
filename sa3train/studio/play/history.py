"""Results on disk: an audio file, its sidecar and a picture of each. The page has no other memory.

The sidecar is the one `sa3-generate` writes, with one more entry, `studio`: the mode, the comparison it belongs to, its
time and levels. `sa3-generate --from` reads it.
"""

import functools
import io
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sa3train.audio.io import load_audio
from sa3train.audio.metrics import PLOT_RANGE_DB, compute_mel_spectrogram, measure_loudness_lufs, measure_true_peak_db
from sa3train.core.config import build
from sa3train.core.errors import ConfigError, SA3Error
from sa3train.core.files import path_exists, write_bytes
from sa3train.core.log import get_logger
from sa3train.inference.outputs import GenerationOutput, get_sidecar_path, list_output_paths
from sa3train.inference.sidecar import read_sidecar
from sa3train.studio.play.settings import Mode
from sa3train.studio.server.workspace import StudioError, Workspace

logger = get_logger(__name__)

PEAKS = 600
SAMPLE_RATE = 44100


@dataclass(frozen=True)
class _Report:
    summary: str
    warnings: list[str]


@dataclass(frozen=True)
class _Facts:
    """What the studio adds to a sidecar."""

    mode: Mode
    created: str
    group: str
    cell: str
    note: str
    measures: list[dict[str, float | None]]
    reports: list[_Report]


_NO_FACTS = {"mode": "text", "created": "", "group": "", "cell": "", "note": "", "measures": [], "reports": []}


@dataclass(frozen=True)
class Result:
    """A result of the history.

    Attributes:
        folder: Where its files are.
        name: Their common name.
        record: Content of its sidecar.
    """

    folder: Path
    name: str
    record: dict[str, Any]

    @property
    def audio(self) -> Path:
        """Its audio file."""
        return self.folder / self.record["file"]

    @property
    def picture(self) -> Path:
        """Its mel spectrogram, a PNG."""
        return self.folder / f"{self.name}.png"

    @property
    def studio(self) -> dict[str, Any]:
        """What the studio added to the sidecar."""
        return dict(self.record.get("studio") or {})

    @property
    def group(self) -> str:
        """The comparison it belongs to, or its own name."""
        return str(self.studio.get("group") or self.name)


def make_name() -> str:
    """Make a name for a new result.

    Returns:
        A unique name; names sort by time.
    """
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def save_results(
    workspace: Workspace, output: GenerationOutput, facts: Mapping[str, Any], name: str | None = None
) -> list[Result]:
    """Save every item of an output to the history.

    Args:
        workspace: The studio's folders.
        output: What was generated.
        facts: What the sidecar records under `studio`.
        name: Common name of the files; None for a new one.

    Returns:
        The result of each item.
    """
    name = name or make_name()
    levels = [measure_levels(audio_CN, output.sample_rate) for audio_CN in output.audio]
    output.record["studio"] = {**facts, "created": time.strftime("%Y-%m-%d %H:%M:%S"), "measures": levels}
    paths = list_output_paths(workspace.history / f"{name}.wav", len(output.audio))
    for path, audio_CN in zip(paths, output.audio, strict=True):
        write_bytes(path.with_suffix(".png"), render_mel_png(audio_CN, output.sample_rate))
    output.save(workspace.history / f"{name}.wav")
    return [read_result(get_sidecar_path(path)) for path in paths]


def list_results(workspace: Workspace, count: int | None = None) -> list[Result]:
    """List the latest results; incomplete ones are skipped with a warning.

    Args:
        workspace: The studio's folders.
        count: How many at most; None for all.

    Returns:
        The results, newest first.
    """
    found: list[Result] = []
    for sidecar in sorted(workspace.history.glob("*.wav.json"), reverse=True):
        if count is not None and len(found) >= count:
            break
        try:
            result = read_result(sidecar)
        except SA3Error as error:
            logger.warning("history: %s", error)
            continue
        if result.audio.is_file():
            found.append(result)
    return found


def read_result(sidecar: Path) -> Result:
    """Read a result.

    Args:
        sidecar: Its sidecar.

    Returns:
        The result.

    Raises:
        StudioError: When what the studio added to the sidecar was damaged.
    """
    record = read_sidecar(sidecar)
    try:
        build(_Facts, _NO_FACTS | (record.get("studio") or {}))
    except ConfigError as error:
        raise StudioError(f"{sidecar}: studio: {error}") from error
    return Result(sidecar.parent, Path(sidecar.stem).stem, record)


def find_result(workspace: Workspace, name: str) -> Result:
    """Find a result by its name.

    Args:
        workspace: The studio's folders.
        name: The name.

    Returns:
        The result.

    Raises:
        StudioError: When the history has no such result.
    """
    sidecar = workspace.history / f"{name}.wav.json"
    if Path(name).name != name or not path_exists(sidecar):
        raise StudioError(f"The history has no result {name!r}.")
    return read_result(sidecar)


def group_results(results: Sequence[Result]) -> list[list[Result]]:
    """Sort results into comparisons and batches.

    Args:
        results: Results, newest first.

    Returns:
        The groups in the order of their newest results, each in the order of generation.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    return [sorted(group, key=lambda result: result.name) for group in groups.values()]


def measure_levels(audio_CN: Tensor, sample_rate: int) -> dict[str, float | None]:
    """Measure loudness and true peak.

    Args:
        audio_CN: Audio, full scale ±1.
        sample_rate: Samples per second.

    Returns:
        `loudness_lufs` and `true_peak_db`, each None for silence.
    """
    levels = {
        "loudness_lufs": measure_loudness_lufs(audio_CN, sample_rate),
        "true_peak_db": measure_true_peak_db(audio_CN, sample_rate),
    }
    return {name: value if value > -float("inf") else None for name, value in levels.items()}


def render_mel_png(audio_CN: Tensor, sample_rate: int) -> bytes:
    """Draw the mel spectrogram without axes, low frequencies at the bottom.

    Args:
        audio_CN: Audio.
        sample_rate: Samples per second.

    Returns:
        A PNG that shows 80 dB below the loudest point.
    """
    from matplotlib.image import imsave

    level_MT = compute_mel_spectrogram(audio_CN, sample_rate).cpu().numpy()
    file = io.BytesIO()
    top = float(level_MT.max())
    imsave(file, level_MT, cmap="magma", vmin=top - PLOT_RANGE_DB, vmax=top, origin="lower", format="png")
    return file.getvalue()


def compute_waveform(path: Path) -> dict[str, Any]:
    """Compute the peaks of an audio file for drawing.

    Args:
        path: The audio file.

    Returns:
        `peaks` from 0 to 1, and `seconds`, its length.
    """
    return dict(_compute_waveform(path, path.stat().st_mtime_ns))


@functools.lru_cache(16)
def _compute_waveform(path: Path, stamp: int) -> dict[str, Any]:
    audio_CN = load_audio(path, SAMPLE_RATE)
    block = max(1, audio_CN.shape[1] // PEAKS)
    loudest_N = audio_CN.abs().amax(dim=0)[: block * (audio_CN.shape[1] // block)]
    peaks = loudest_N.reshape(-1, block).amax(dim=1)
    return {"peaks": [round(value, 3) for value in peaks.tolist()], "seconds": audio_CN.shape[1] / SAMPLE_RATE}


def compute_state(workspace: Workspace) -> str:
    """Compute a text that changes when a result is added or removed.

    Args:
        workspace: The studio's folders.

    Returns:
        The text.
    """
    names = sorted(path.name for path in workspace.history.glob("*.wav.json"))
    return json.dumps([len(names), names[-1:]])
