"""Audible attributes of a clip, measured without a neural network: pitch, brightness, pace, noise, decay, width.

Shapes: C channels, N samples, F frequencies, T frames, L lags. Times in seconds, frequencies in Hz, levels in dB.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sa3train.audio.metrics import compute_spectral_centroid, compute_stereo_width

WINDOW, HOP = 2048, 512
LOWEST_HZ, HIGHEST_HZ = 40.0, 2000.0
ACTIVE_DB = -35.0  # frames this far under the loudest count as silent
END_DB = -45.0
ONSET_GAP = 0.08


def _mono(audio_CN: Tensor) -> Tensor:
    return audio_CN.float().mean(dim=0)


def measure_frame_levels(audio_CN: Tensor) -> Tensor:
    """Measure the RMS of each frame of `HOP` samples.

    Args:
        audio_CN: The clip.

    Returns:
        dB relative to the loudest frame (T,), at least -120.
    """
    padded_CN = F.pad(audio_CN.float(), (0, -audio_CN.shape[1] % HOP))
    power_T = padded_CN.square().mean(dim=0).unflatten(0, (-1, HOP)).mean(dim=1)
    return 10 * torch.log10((power_T / power_T.max().clamp_min(1e-20)).clamp_min(1e-12))


def find_end_of_sound(audio_CN: Tensor, sample_rate: int) -> float:
    """Find where the sound ends.

    Args:
        audio_CN: The clip.
        sample_rate: Samples per second.

    Returns:
        End of the last frame within 45 dB of the loudest, in seconds; 0 for silence.
    """
    if not audio_CN.any():
        return 0.0
    loud = torch.nonzero(measure_frame_levels(audio_CN) > END_DB)
    return float(loud[-1] + 1) * HOP / sample_rate


def _frames(audio_CN: Tensor, size: int) -> Tensor:
    """Windows (T, size) of the mono mix every `HOP` samples without the silent ones; at least one."""
    mono_N = _mono(audio_CN)
    mono_N = F.pad(mono_N, (0, max(0, size - len(mono_N))))
    frames_TN = mono_N.unfold(0, size, HOP)
    energy_T = frames_TN.square().mean(dim=1)
    return frames_TN[energy_T >= energy_T.max() * 10 ** (ACTIVE_DB / 10)]


def measure_pitch(audio_CN: Tensor, sample_rate: int) -> float:
    """Measure the pitch by normalized autocorrelation.

    Args:
        audio_CN: The clip.
        sample_rate: Samples per second.

    Returns:
        Median fundamental in Hz over the more periodic half of the frames.
    """
    frames_TN = _frames(audio_CN, 4096)
    frames_TN = frames_TN - frames_TN.mean(dim=1, keepdim=True)
    spectrum = torch.fft.rfft(frames_TN, 8192)
    correlation_TL = torch.fft.irfft(spectrum.abs().square(), 8192)[:, :2048]
    taper_L = 1 - torch.arange(2048) / 4096  # fewer samples overlap at longer lags
    correlation_TL = correlation_TL / (correlation_TL[:, :1].clamp_min(1e-12) * taper_L)
    first, last = int(sample_rate / HIGHEST_HZ), min(2047, int(sample_rate / LOWEST_HZ))
    heights_TL = correlation_TL[:, first:last]
    peaks_TL = (heights_TL[:, 1:-1] > heights_TL[:, :-2]) & (heights_TL[:, 1:-1] >= heights_TL[:, 2:])
    inner_TL = torch.where(peaks_TL, heights_TL[:, 1:-1], -1.0)
    best_T = inner_TL.max(dim=1).values
    # The first peak nearly as high as the highest: later ones are multiples of the period.
    lag_T = (inner_TL >= 0.9 * best_T[:, None]).float().argmax(dim=1) + first + 1
    is_clear = best_T >= best_T.median()
    return float(sample_rate / lag_T[is_clear].float().median())


def find_onsets(audio_CN: Tensor, sample_rate: int) -> Tensor:
    """Find the onsets of notes at peaks of the rise of log energy in 24 bands of the spectrum.

    Args:
        audio_CN: The clip.
        sample_rate: Samples per second.

    Returns:
        Times in seconds.
    """
    mono_N = F.pad(_mono(audio_CN), (WINDOW, WINDOW))
    spectrum_FT = torch.stft(mono_N, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True, center=False)
    edges = torch.logspace(math.log10(4), math.log10(WINDOW // 2), 25).long()
    power_FT = spectrum_FT.abs().square()
    bands_BT = torch.stack([power_FT[a : max(b, a + 1)].sum(dim=0) for a, b in itertools.pairwise(edges)])
    log_BT = torch.log10(bands_BT / bands_BT.max().clamp_min(1e-12) + 1e-5)
    rise_T = F.pad((log_BT[:, 2:] - log_BT[:, :-2]).clamp_min(0).mean(dim=0), (1, 1))
    near = max(1, round(ONSET_GAP * sample_rate / HOP))
    highest_T = F.max_pool1d(rise_T[None, None], 2 * near + 1, 1, near)[0, 0]
    limit = max(0.12, 0.3 * float(rise_T.max()))
    frames = torch.nonzero((rise_T == highest_T) & (rise_T > limit))[:, 0]
    return (frames.float() * HOP - WINDOW / 2).clamp_min(0) / sample_rate


def measure_onset_rate(audio_CN: Tensor, sample_rate: int) -> float:
    """Measure the pace.

    Args:
        audio_CN: The clip.
        sample_rate: Samples per second.

    Returns:
        Onsets per second of sound.
    """
    return len(find_onsets(audio_CN, sample_rate)) / max(0.5, find_end_of_sound(audio_CN, sample_rate))


def measure_flatness(audio_CN: Tensor, sample_rate: int) -> float:
    """Measure the spectral flatness between 60 Hz and 8 kHz.

    Args:
        audio_CN: The clip.
        sample_rate: Samples per second.

    Returns:
        Median flatness of the frames in dB: near 0 for noise, far below for tones.
    """
    frames_TN = _frames(audio_CN, 4096) * torch.hann_window(4096)
    power_TF = torch.fft.rfft(frames_TN).abs().square()
    bins = slice(int(60 * 4096 / sample_rate), int(8000 * 4096 / sample_rate))
    power_TF = power_TF[:, bins] + 1e-9 * power_TF[:, bins].amax(dim=1, keepdim=True) + 1e-20
    flatness_T = power_TF.log().mean(dim=1) - power_TF.mean(dim=1).log()
    return float(flatness_T.median()) * 10 / math.log(10)


def measure_sustain(audio_CN: Tensor, sample_rate: int) -> float:
    """Measure the level of the third quarter of the sound relative to its first.

    Args:
        audio_CN: The clip.
        sample_rate: Samples per second.

    Returns:
        dB: near 0 for held sounds, far below for decaying ones.
    """
    length = max(4, round(find_end_of_sound(audio_CN, sample_rate) * sample_rate))
    quarters = [part.square().mean().clamp_min(1e-20) for part in _mono(audio_CN)[:length].chunk(4)]
    return float(10 * torch.log10(quarters[2] / quarters[0])) if len(quarters) == 4 else 0.0


@dataclass(frozen=True)
class Attribute:
    """A measurement turned into one of two answers; 50 % are right by chance.

    Attributes:
        measure: Measures a clip.
        threshold: Border between the answers.
        less: Answer up to the threshold.
        more: Answer above it.
    """

    measure: Callable[[Tensor, int], float]
    threshold: float
    less: str
    more: str

    def answer(self, audio_CN: Tensor, sample_rate: int) -> str:
        """Return the answer for a clip.

        Args:
            audio_CN: The clip.
            sample_rate: Samples per second.

        Returns:
            `less` or `more`.
        """
        return self.more if self.measure(audio_CN, sample_rate) > self.threshold else self.less


ATTRIBUTES: dict[str, Attribute] = {
    "register": Attribute(measure_pitch, 260.0, "low", "high"),
    "brightness": Attribute(compute_spectral_centroid, 1500.0, "dark", "bright"),
    "pace": Attribute(measure_onset_rate, 3.4, "slow", "fast"),
    "texture": Attribute(measure_flatness, -14.0, "tonal", "noisy"),
    "decay": Attribute(measure_sustain, -8.0, "dying", "held"),
    "width": Attribute(lambda audio_CN, _: compute_stereo_width(audio_CN), 0.002, "mono", "stereo"),
}
