"""Results on disk: each an audio file, its sidecar, and a picture. What lies there is the page's memory.

The sidecar is the one `sa3-generate` writes, with one entry more, `studio`: the mode, the comparison it belongs to,
when it was made, what was measured. `sa3-generate --from` reads it.
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
from sa3train.audio.metrics import PICTURE_RANGE_DB, loudness_lufs, mel_spectrogram, true_peak_db
from sa3train.core.errors import SA3Error
from sa3train.core.files import write_bytes
from sa3train.core.log import get_logger
from sa3train.inference.outputs import GenerationOutput, output_paths
from sa3train.inference.sidecar import read_record
from sa3train.studio.server.workspace import StudioError, Workspace

logger = get_logger(__name__)

PEAKS = 600


@dataclass(frozen=True)
class Entry:
    """A result: its files' common name and what its sidecar says."""

    folder: Path
    name: str
    record: dict[str, Any]

    @property
    def audio(self) -> Path:
        """Its sound."""
        return self.folder / self.record["file"]

    @property
    def picture(self) -> Path:
        """Its mel spectrogram, a PNG."""
        return self.folder / f"{self.name}.png"

    @property
    def studio(self) -> dict[str, Any]:
        """What the studio added to the sidecar."""
        return dict(self.record.get("studio", {}))

    @property
    def group(self) -> str:
        """The comparison it belongs to, or its own name."""
        return str(self.studio.get("group") or self.name)


def new_name() -> str:
    """A name for a result that sorts by time and is not taken."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def keep(
    workspace: Workspace, output: GenerationOutput, facts: Mapping[str, Any], name: str | None = None
) -> list[Entry]:
    """Write every item of `output` to the history, with `facts` in the sidecar; the newest state of it is returned."""
    name = name or new_name()
    measures = [measured(audio_CN, output.sample_rate) for audio_CN in output.audio]
    output.record["studio"] = {**facts, "created": time.strftime("%Y-%m-%d %H:%M:%S"), "measures": measures}
    places = output_paths(workspace.history / f"{name}.wav", len(output.audio))
    for path, audio_CN in zip(places, output.audio, strict=True):
        write_bytes(path.with_suffix(".png"), mel_png(audio_CN, output.sample_rate))
    output.save(workspace.history / f"{name}.wav")
    return [entry_of(path.with_suffix(".json")) for path in places]


def entries(workspace: Workspace, count: int | None = None) -> list[Entry]:
    """The latest results, newest first; files that are no whole result are passed over."""
    found: list[Entry] = []
    for sidecar in sorted(workspace.history.glob("*.json"), reverse=True):
        if count is not None and len(found) >= count:
            break
        try:
            entry = entry_of(sidecar)
        except SA3Error as error:
            logger.warning("history: %s", error)
            continue
        if entry.audio.is_file():
            found.append(entry)
    return found


def entry_of(sidecar: Path) -> Entry:
    """The result that `sidecar` belongs to. Raises `RequestError` when it is no sidecar."""
    return Entry(sidecar.parent, sidecar.stem, read_record(sidecar))


def entry(workspace: Workspace, name: str) -> Entry:
    """The result called `name`. Raises `StudioError` when the history has none."""
    sidecar = workspace.history / f"{name}.json"
    if Path(name).name != name or not sidecar.is_file():
        raise StudioError(f"the history has no result {name!r}.")
    return entry_of(sidecar)


def grouped(found: Sequence[Entry]) -> list[list[Entry]]:
    """Results by comparison or batch, in the order of each one's newest, within each as they were made."""
    groups: dict[str, list[Entry]] = {}
    for each in found:
        groups.setdefault(each.group, []).append(each)
    return [sorted(group, key=lambda each: each.name) for group in groups.values()]


def measured(audio_CN: Tensor, sample_rate: int) -> dict[str, float | None]:
    """Loudness in LUFS and true peak in dBTP; None for silence, which has neither."""
    values = {
        "loudness_lufs": loudness_lufs(audio_CN, sample_rate),
        "true_peak_db": true_peak_db(audio_CN, sample_rate),
    }
    return {name: value if value > -float("inf") else None for name, value in values.items()}


def mel_png(audio_CN: Tensor, sample_rate: int) -> bytes:
    """The mel spectrogram without axes, low notes below, 80 dB down from its loudest point."""
    from matplotlib.image import imsave

    level_MT = mel_spectrogram(audio_CN, sample_rate).cpu().numpy()
    file = io.BytesIO()
    top = float(level_MT.max())
    imsave(file, level_MT, cmap="magma", vmin=top - PICTURE_RANGE_DB, vmax=top, origin="lower", format="png")
    return file.getvalue()


def waveform(path: Path) -> dict[str, Any]:
    """Peaks of the sound at `path` for drawing, and its length. Raises `AudioError` for no audio."""
    return dict(_waveform(path, path.stat().st_mtime_ns))


@functools.lru_cache(16)
def _waveform(path: Path, stamp: int) -> dict[str, Any]:
    audio_CN = load_audio(path)
    block = max(1, audio_CN.shape[1] // PEAKS)
    whole_N = audio_CN.abs().amax(dim=0)[: block * (audio_CN.shape[1] // block)]
    peaks = whole_N.reshape(-1, block).amax(dim=1)
    return {"peaks": [round(value, 3) for value in peaks.tolist()], "seconds": audio_CN.shape[1] / 44100}


def state_of(workspace: Workspace) -> str:
    """Changes when a result is added or taken away."""
    names = sorted(path.name for path in workspace.history.glob("*.json"))
    return json.dumps([len(names), names[-1:]])
