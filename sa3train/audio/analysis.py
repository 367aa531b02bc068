"""Hear what a caption says of a clip: tempo, key, how dense, bright, loud and percussive it is, loop or one-shot.

numpy, scipy and torch suffice: on loops and scores of known tempo and key these estimators are more often right than
librosa's and Essentia's (docs/captions.md has the figures, `launch/check_captions.py` measures them).

Shapes: C audio channels, N samples, F frequencies or bands, T frames.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torchaudio

from sa3train.audio.metrics import measure_loudness_lufs
from sa3train.audio.notes import NOTES
from sa3train.audio.resample import resample

RATE = 22050
"""Sample rate in Hz at which clips are analyzed."""
MOST_SECONDS = 120.0
"""Longer clips are analyzed up to here."""
_WINDOW, _HOP, _BANDS = 512, 128, 40
_FRAMES_PER_SECOND = RATE / _HOP
_SLOWEST, _FASTEST = 70.0, 180.0
"""Tempos in beats per minute. Slower and faster pulses count as half or double ones."""
_GRID = 60 * 2 ** np.arange(0, math.log2(200 / 60), 0.005)
_LOOP_BEATS = (4, 8, 16, 32, 64)
_LOOP_SHARE = 0.7
"""Least share of the strongest pulse that the pulse of whole bars has in a loop: 99% of 164 loops, none of them cut."""
_LEAST_PULSE, _LEAST_ONSETS, _LEAST_ODDS = 0.25, 6, 0.7
"""Below these a tempo is not said: strength of the pulse, attacks in the clip, log odds against the half or double."""
_MULTIPLES = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
_OCTAVE_WEIGHTS = np.array([1.52, -1.53, 1.56, -0.1, -1.59, -1.21, -0.86, -0.22, -0.51, -1.91, -0.67, 1.55, -9.56])
"""Logistic regression of "the faster of two tempos": of the log strength of `_MULTIPLES` of the slower one, and the
constant. It knows nothing of how fast music usually is. Fitted by `launch/check_captions.py --fit`.
"""

_PROFILES = {
    "major": (0.748, 0.060, 0.488, 0.082, 0.670, 0.460, 0.096, 0.715, 0.104, 0.366, 0.057, 0.400),
    "minor": (0.712, 0.084, 0.474, 0.618, 0.049, 0.460, 0.105, 0.747, 0.404, 0.067, 0.133, 0.330),
}
"""How often each degree is heard in a measure (Temperley, "The Cognition of Basic Musical Structures", 2001)."""
_KEY_WINDOW, _KEY_HOP, _KEY_RANGE = 8192, 2048, (55.0, 2000.0)
_HARMONICS, _HARMONIC_DECAY = 6, 0.8
_LEAST_KEY, _LEAST_NOTES, _LEAST_SHARE = 0.75, 3, 0.04
"""A key is said from this correlation on, where so many notes are each the strongest for such a share of the clip."""
_LEAST_KEY_SECONDS, _LEAST_TEMPO_SECONDS = 4.0, 1.9

_PERCUSSIVE, _TONAL = 0.4, 0.3
_BRIGHT_HZ, _DARK_HZ = 3500.0, 600.0
_BUSY, _SPARSE = 8.0, 1.0
_LOUD_LUFS, _QUIET_LUFS = -12.0, -32.0
_LONGEST_ONE_SHOT = 4.0


@dataclass(frozen=True)
class AudioAnalysis:
    """What is heard in a clip; None or empty where it is not clear enough to be said.

    Attributes:
        bpm: Tempo in beats per minute.
        key: Such as "A minor".
        key_strength: How clear the key is, a correlation.
        form: "loop", "one-shot" or "".
        sound: "percussive", "tonal" or "".
        brightness: "dark", "bright" or "".
        density: "sparse", "busy" or "".
        loudness: "quiet", "loud" or "".
        onsets_per_second: Attacks per second.
        centroid_hz: Center of gravity of the spectrum in Hz.
        lufs: Loudness; -inf for silence.
        percussive_share: Share of the energy that lies in attacks, from 0 to 1.
    """

    bpm: float | None = None
    key: str | None = None
    key_strength: float = 0.0
    form: str = ""
    sound: str = ""
    brightness: str = ""
    density: str = ""
    loudness: str = ""
    onsets_per_second: float = 0.0
    centroid_hz: float = 0.0
    lufs: float = -math.inf
    percussive_share: float = 0.0


@dataclass(frozen=True)
class Tempo:
    """A tempo that was heard.

    Attributes:
        bpm: Beats per minute.
        is_loop: Whether the clip is whole bars long at it.
        is_sure: Whether it can be said.
    """

    bpm: float
    is_loop: bool
    is_sure: bool


def analyze_audio(audio_CN: np.ndarray, rate: int) -> AudioAnalysis:
    """Measure a clip, and say of it what is clear.

    Args:
        audio_CN: (C, N) float32 samples, finite, N > 0.
        rate: Sample rate in Hz.

    Returns:
        What is heard.
    """
    audio_CN = audio_CN[:, : round(MOST_SECONDS * rate)]
    mono_N = resample(torch.from_numpy(audio_CN).mean(0, keepdim=True), rate, RATE)[0]
    lufs = measure_loudness_lufs(torch.from_numpy(audio_CN[:2]), rate)
    if not math.isfinite(lufs):
        return AudioAnalysis()
    seconds = len(mono_N) / RATE
    envelope_T = measure_attacks(mono_N)
    onsets = count_onsets(envelope_T)
    tempo = estimate_tempo(envelope_T, seconds)
    share, centroid = measure_percussion(mono_N)
    sound = "percussive" if share > _PERCUSSIVE else "tonal" if share < _TONAL else ""
    is_sure = tempo is not None and tempo.is_sure and onsets >= _LEAST_ONSETS
    is_sure &= tempo is not None and (tempo.is_loop or sound != "tonal")  # pads and drones beat without a tempo
    is_loop = is_sure and tempo is not None and tempo.is_loop
    density = onsets / seconds
    key, key_strength = estimate_key(mono_N) if sound == "tonal" else (None, 0.0)
    return AudioAnalysis(
        bpm=round(tempo.bpm, 2) if is_sure and tempo else None,
        key=key,
        key_strength=round(key_strength, 4),
        form="loop" if is_loop else "one-shot" if onsets <= 1 and seconds < _LONGEST_ONE_SHOT else "",
        sound=sound,
        brightness=_choose_word(centroid, _DARK_HZ, "dark", _BRIGHT_HZ, "bright"),
        density=_choose_word(density, _SPARSE, "sparse", _BUSY, "busy") if onsets > 1 else "",
        loudness=_choose_word(lufs, _QUIET_LUFS, "quiet", _LOUD_LUFS, "loud"),
        onsets_per_second=round(density, 3),
        centroid_hz=round(centroid, 1),
        lufs=round(lufs, 2),
        percussive_share=round(share, 4),
    )


def _choose_word(value: float, low: float, low_word: str, high: float, high_word: str) -> str:
    return low_word if value < low else high_word if value > high else ""


def measure_attacks(mono_N: torch.Tensor) -> np.ndarray:
    """Measure how the level rises, over all bands of a mel spectrogram.

    Args:
        mono_N: (N,) samples at `RATE`.

    Returns:
        (T,) mean rise in dB at each step of `_HOP` samples; the first is that from the clip's end to its start.
    """
    padded_N = torch.cat([mono_N[-_WINDOW // 2 :], mono_N, mono_N[: _WINDOW // 2]])
    padded_N = torch.nn.functional.pad(padded_N, (0, max(0, 2 * _WINDOW - len(padded_N))))
    spectrum_FT = torch.stft(
        padded_N, _WINDOW, _HOP, window=torch.hann_window(_WINDOW), center=False, return_complex=True
    )
    power_FT = (_get_mel_bands().T @ spectrum_FT.abs().square()).numpy()
    level_FT = 10 * np.log10(np.maximum(power_FT, power_FT.max() * 1e-8 + 1e-20))
    return np.asarray(np.maximum(np.diff(level_FT, axis=1, prepend=level_FT[:, -1:]), 0).mean(0))


@functools.cache
def _get_mel_bands() -> torch.Tensor:
    bands: torch.Tensor = torchaudio.functional.melscale_fbanks(_WINDOW // 2 + 1, 60.0, 10000.0, _BANDS, RATE)
    return bands


def count_onsets(envelope_T: np.ndarray) -> int:
    """Count attacks.

    Args:
        envelope_T: (T,) as `measure_attacks` returns.

    Returns:
        The number of peaks, at least 60 ms apart, that stand out.
    """
    from scipy.signal import find_peaks

    least = max(1.5, 0.25 * float(envelope_T.max()))
    return len(find_peaks(np.pad(envelope_T, 1), height=least, distance=round(0.06 * _FRAMES_PER_SECOND))[0])


def estimate_tempo(envelope_T: np.ndarray, seconds: float) -> Tempo | None:
    """Estimate the tempo.

    A clip whose whole bars have nearly the strongest pulse is a loop: its tempo follows from its length, exactly.
    Of a tempo and its double, logistic regression chooses by how strong bars, beats and their parts are.

    Args:
        envelope_T: (T,) as `measure_attacks` returns.
        seconds: Length of the clip.

    Returns:
        The tempo; None for a clip without pulse, or too short for one.
    """
    centered_T = envelope_T - envelope_T.mean()
    if seconds < _LEAST_TEMPO_SECONDS or not centered_T.any():
        return None
    spectrum = np.abs(np.fft.rfft(centered_T, 2 * len(centered_T))) ** 2
    overlap_T = np.maximum(len(centered_T) - np.arange(len(centered_T)), len(centered_T) / 4)
    similarity_T = np.fft.irfft(spectrum)[: len(centered_T)] / overlap_T
    similarity_T /= similarity_T[0]
    strengths = [_measure_pulse(similarity_T, bpm) for bpm in _GRID]
    strongest = float(_GRID[int(np.argmax(strengths))])
    whole = [bpm for beats in _LOOP_BEATS if _SLOWEST <= (bpm := 60 * beats / seconds) <= _FASTEST]
    is_loop = max((_measure_pulse(similarity_T, bpm) for bpm in whole), default=-1.0) >= _LOOP_SHARE * max(strengths)
    found = whole if is_loop else [bpm for k in (0.5, 1, 2) if _SLOWEST <= (bpm := k * strongest) <= _FASTEST]
    odds = -math.inf
    if len(found) > 1:
        odds = float(measure_octave(centered_T, found[0]) @ _OCTAVE_WEIGHTS)
    bpm = found[1] if odds > 0 else found[0]
    return Tempo(bpm, is_loop, max(strengths) >= _LEAST_PULSE and abs(odds) >= _LEAST_ODDS)


def _measure_pulse(similarity_T: np.ndarray, bpm: float) -> float:
    """Mean similarity of the clip with itself one, two and four beats later, as far as it is long enough."""
    lags = [m * 60 * _FRAMES_PER_SECOND / bpm for m in (1, 2, 4)]
    found = [similarity_T[int(lag) - 1 : int(lag) + 3].max() for lag in lags if lag < 0.75 * len(similarity_T)]
    return float(np.mean(found)) if found else 0.0


def measure_octave(centered_T: np.ndarray, bpm: float) -> np.ndarray:
    """Measure what tells a tempo from its double.

    Args:
        centered_T: (T,) attacks less their mean.
        bpm: The slower tempo.

    Returns:
        Log strength of each of `_MULTIPLES` of its beat, and 1.
    """
    seconds_T = np.arange(len(centered_T)) / _FRAMES_PER_SECOND
    scale = np.linalg.norm(centered_T) * math.sqrt(len(centered_T) / 2)
    waves = (np.exp(-2j * np.pi * seconds_T * bpm / 60 * multiple) for multiple in _MULTIPLES)
    return np.array([*(math.log(abs(wave @ centered_T) / scale + 0.01) for wave in waves), 1.0])


def measure_percussion(mono_N: torch.Tensor) -> tuple[float, float]:
    """Measure the share of energy in attacks, and the center of gravity of the spectrum.

    Medians over time keep what lasts, those over frequency what is short (Fitzgerald, "Harmonic/Percussive Separation
    using Median Filtering", DAFx 2010).

    Args:
        mono_N: (N,) samples at `RATE`.

    Returns:
        Share from 0 to 1, and the centroid in Hz.
    """
    from scipy.ndimage import median_filter

    size, hop = 1024, 512
    mono_N = torch.nn.functional.pad(mono_N, (0, max(0, 2 * size - len(mono_N))))
    level_FT = torch.stft(mono_N, size, hop, window=torch.hann_window(size), return_complex=True).abs().numpy()
    lasting_FT, short_FT = median_filter(level_FT, (1, 17)), median_filter(level_FT, (17, 1))
    energy_FT = level_FT**2
    share_FT = short_FT**2 / (short_FT**2 + lasting_FT**2 + 1e-12)
    frequencies_F1 = np.fft.rfftfreq(size, 1 / RATE)[:, None]
    whole = float(energy_FT.sum()) + 1e-12
    return float((share_FT * energy_FT).sum()) / whole, float(
        (frequencies_F1 * level_FT).sum() / (level_FT.sum() + 1e-9)
    )


def estimate_key(mono_N: torch.Tensor) -> tuple[str | None, float]:
    """Estimate the key from the pitch classes of spectral peaks.

    A peak counts for the notes of which it may be a harmonic (Gómez, "Tonal Description of Music Audio Signals",
    2006); the tuning is that which the peaks agree on. The profile with the greatest correlation wins.

    Args:
        mono_N: (N,) samples at `RATE`.

    Returns:
        Such as "A minor", None where it is not clear; and the correlation.
    """
    if len(mono_N) < _LEAST_KEY_SECONDS * RATE:
        return None, 0.0
    pitches_12T = measure_pitch_classes(mono_N)
    pitches_12 = pitches_12T.sum(1)
    if not pitches_12.any():
        return None, 0.0
    strongest_12 = np.bincount(pitches_12T.argmax(0), pitches_12T.max(0), 12)
    has_melody = (strongest_12 > _LEAST_SHARE * strongest_12.sum()).sum() >= _LEAST_NOTES
    scores = {
        f"{NOTES[tonic]} {mode}": float(np.corrcoef(np.roll(profile, tonic), pitches_12)[0, 1])
        for mode, profile in _PROFILES.items()
        for tonic in range(12)
    }
    best = max(scores, key=lambda key: scores[key])
    return (best if has_melody and scores[best] >= _LEAST_KEY else None), scores[best]


def measure_pitch_classes(mono_N: torch.Tensor) -> np.ndarray:
    """Measure how strong each pitch class is in each frame.

    Args:
        mono_N: (N,) samples at `RATE`.

    Returns:
        (12, T) strengths from C on.
    """
    spectrum_FT = torch.stft(mono_N, _KEY_WINDOW, _KEY_HOP, window=torch.hann_window(_KEY_WINDOW), return_complex=True)
    level_FT = spectrum_FT.abs().numpy()
    low, high = (round(edge * _KEY_WINDOW / RATE) for edge in _KEY_RANGE)
    middle = level_FT[low:high]
    before, after = level_FT[low - 1 : high - 1], level_FT[low + 1 : high + 1]
    peaks = (middle > before) & (middle >= after) & (middle > 0.003 * level_FT.max())
    bin_P, frame_P = np.nonzero(peaks)
    if not bin_P.size:
        return np.zeros((12, 1))
    a, b, c = (np.log(part[bin_P, frame_P] + 1e-12) for part in (before, middle, after))
    frequency_P = (bin_P + low + 0.5 * (a - c) / (a - 2 * b + c)) * RATE / _KEY_WINDOW
    weight_P = middle[bin_P, frame_P] ** 0.5
    pitch_P = 69 + 12 * np.log2(frequency_P / 440)
    tuning = np.angle((weight_P * np.exp(2j * np.pi * pitch_P)).sum()) / (2 * np.pi)
    pitches_12T = np.zeros((12, level_FT.shape[1]))
    for harmonic in range(1, _HARMONICS + 1):
        place_P = pitch_P - tuning - 12 * math.log2(harmonic)
        nearest_P = np.round(place_P)
        closeness_P = np.cos(np.pi / 2 * np.minimum(1, np.abs(place_P - nearest_P) / 0.5)) ** 2
        strength_P = weight_P * closeness_P * _HARMONIC_DECAY ** (harmonic - 1)
        np.add.at(pitches_12T, (nearest_P.astype(int) % 12, frame_P), strength_P)
    return pitches_12T
