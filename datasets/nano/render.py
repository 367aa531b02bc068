"""Scores to audio through FluidSynth and the MIT-licensed FluidR3 soundfont (Debian: fluidsynth, fluid-soundfont-gm).

Shapes: N samples; audio is (2, N) float32 at 44 100 Hz.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from score import Score, midi_bytes

SAMPLE_RATE = 44_100
GAP = 1.5  # seconds between two clips of a run: long enough for the reverb of the first to die away
SOUNDFONTS = (Path("/usr/share/sounds/sf2/FluidR3_GM.sf2"), Path("/usr/share/soundfonts/FluidR3_GM.sf2"))

Audio = NDArray[np.float32]


def find_soundfont(path: Path | None = None) -> Path:
    """The FluidR3 soundfont: the path given, or where Debian and Fedora put it."""
    for candidate in (path,) if path else SOUNDFONTS:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"no soundfont at {path or SOUNDFONTS}: apt-get install fluidsynth fluid-soundfont-gm")


def render(scores: Sequence[Score], soundfont: Path | None = None, gain: float = 0.4) -> list[Audio]:
    """All scores in one FluidSynth run, each as (2, N) float32 of its own length (unnormalised).

    Raises FileNotFoundError without FluidSynth or the soundfont, RuntimeError when FluidSynth fails.
    """
    program = shutil.which("fluidsynth")
    if program is None:
        raise FileNotFoundError("fluidsynth is not installed: apt-get install fluidsynth fluid-soundfont-gm")
    starts = np.concatenate([[0.1], 0.1 + np.cumsum([score.seconds + GAP for score in scores])])
    with tempfile.TemporaryDirectory() as folder:
        midi, raw = Path(folder, "clips.mid"), Path(folder, "clips.raw")
        midi.write_bytes(midi_bytes(scores, starts[:-1]))
        command = [program, "-ni", "-q", "-g", str(gain), "-r", str(SAMPLE_RATE)]
        command += ["-T", "raw", "-O", "s16", "-F", str(raw), str(find_soundfont(soundfont)), str(midi)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not raw.is_file():
            raise RuntimeError(f"fluidsynth failed ({done.returncode}): {done.stderr.strip()[-500:]}")
        audio = np.fromfile(raw, np.int16).reshape(-1, 2).T
    clips = []
    for score, start in zip(scores, starts[:-1], strict=True):
        first = round(float(start) * SAMPLE_RATE)
        clip = audio[:, first : first + round(score.seconds * SAMPLE_RATE)]
        clips.append(clip.astype(np.float32) / 32768)
    return clips


def trim_tail(audio_CN: Audio, floor_db: float = -60.0, keep: float = 0.05) -> Audio:
    """Cut trailing silence: everything after the last 10 ms block within `floor_db` of the peak, plus `keep`
    seconds.
    """
    block = SAMPLE_RATE // 100
    blocks = audio_CN.shape[1] // block
    peaks = np.abs(audio_CN[:, : blocks * block]).reshape(2, blocks, block).max((0, 2))
    loud = np.flatnonzero(peaks > peaks.max() * 10 ** (floor_db / 20))
    if not len(loud) or peaks.max() == 0:
        return audio_CN
    return audio_CN[:, : min(audio_CN.shape[1], (loud[-1] + 1) * block + round(keep * SAMPLE_RATE))]


def fade_ends(audio_CN: Audio, fade_in: float = 0.002, fade_out: float = 0.02) -> Audio:
    """Raised-cosine fades (seconds) at both ends, so that a cut clicks nowhere."""
    audio_CN = audio_CN.copy()
    for seconds, side in ((fade_in, slice(None)), (fade_out, slice(None, None, -1))):
        length = min(round(seconds * SAMPLE_RATE), audio_CN.shape[1])
        ramp = (0.5 - 0.5 * np.cos(np.linspace(0, np.pi, length))).astype(np.float32)
        audio_CN[:, side][:, :length] *= ramp
    return audio_CN


def level(audio_CN: Audio, rms_db: float, peak: float = 0.9) -> Audio:
    """Scale to an active-part RMS (dB re full scale) without passing `peak`."""
    power = (audio_CN**2).mean(0)
    block = SAMPLE_RATE // 10
    frames = power[: max(1, len(power) // block) * block].reshape(-1, min(block, len(power))).mean(1)
    active = frames[frames > frames.max() * 1e-3]
    if not len(active) or active.mean() == 0:
        return audio_CN
    gain = 10 ** (rms_db / 20) / np.sqrt(active.mean())
    gain = min(gain, peak / np.abs(audio_CN).max())
    return (audio_CN * gain).astype(np.float32)
