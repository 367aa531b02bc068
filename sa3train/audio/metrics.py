"""Measurements of audio (C, N): loudness, peaks, spectrum, width; and a picture of it."""

import io
import math

import numpy as np
import torch
import torchaudio.functional
from torch import Tensor

from sa3train.audio.edit import to_channels
from sa3train.audio.resample import resample

LOUDNESS_BLOCK = 0.4
OVERSAMPLING = 4
FFT_SIZE = 2048
HOP = 512
MEL_BANDS = 128
PICTURE_RANGE_DB = 80.0


def loudness_lufs(audio_CN: Tensor, sample_rate: int) -> float:
    """Integrated loudness in LUFS (ITU-R BS.1770-4) of mono or stereo; -inf for silence.

    Audio shorter than one gating block (0.4 s) is measured as one block of its own length.
    """
    import pyloudnorm

    seconds = audio_CN.shape[1] / sample_rate
    meter = pyloudnorm.Meter(sample_rate, block_size=min(LOUDNESS_BLOCK, seconds))
    with np.errstate(divide="ignore", invalid="ignore"):
        loudness = float(meter.integrated_loudness(to_channels(audio_CN, 2).double().cpu().T.numpy()))
    return loudness if math.isfinite(loudness) else -math.inf


def peak_db(audio_CN: Tensor) -> float:
    """The largest sample in dBFS; -inf for silence."""
    return _decibels(float(audio_CN.abs().max()))


def true_peak_db(audio_CN: Tensor, sample_rate: int) -> float:
    """The largest value between samples too, in dBTP (ITU-R BS.1770-4 annex 2: four times oversampled)."""
    oversampled_CN = resample(audio_CN, sample_rate, OVERSAMPLING * sample_rate)
    return _decibels(max(float(oversampled_CN.abs().max()), float(audio_CN.abs().max())))


def rms_db(audio_CN: Tensor) -> float:
    """Root mean square over all channels in dBFS; -inf for silence."""
    return _decibels(float(audio_CN.double().square().mean().sqrt()))


def spectral_centroid(audio_CN: Tensor, sample_rate: int) -> float:
    """The power-weighted mean frequency in Hz; 0 for silence."""
    power_F = _power_spectrogram(audio_CN).double().mean(dim=(0, 2))
    frequencies_F = torch.linspace(0, sample_rate / 2, len(power_F), dtype=torch.float64, device=power_F.device)
    total = power_F.sum()
    return float((power_F * frequencies_F).sum() / total) if total > 0 else 0.0


def stereo_width(audio_CN: Tensor) -> float:
    """Side energy over the whole, 0 (mono) to 1 (opposite phases); 0 for silence and for mono."""
    if len(audio_CN) != 2:
        return 0.0
    middle, side = audio_CN[0] + audio_CN[1], audio_CN[0] - audio_CN[1]
    total = float(middle.double().square().sum() + side.double().square().sum())
    return float(side.double().square().sum()) / total if total > 0 else 0.0


def clipped_share(audio_CN: Tensor) -> float:
    """The share of samples at or beyond full scale."""
    return float((audio_CN.abs() >= 1).float().mean())


def mel_spectrogram(audio_CN: Tensor, sample_rate: int, bands: int = MEL_BANDS) -> Tensor:
    """Mel power spectrogram in dB of the mean of the channels: (bands, frames), 2048-point windows every 512."""
    power_FT = _power_spectrogram(audio_CN.mean(dim=0, keepdim=True))[0]
    filters_FM = torchaudio.functional.melscale_fbanks(
        power_FT.shape[0], 20.0, sample_rate / 2, bands, sample_rate, norm="slaney", mel_scale="slaney"
    )
    return 10 * torch.log10((filters_FM.T.to(power_FT) @ power_FT).clamp(min=1e-10))


def mel_picture(audio_CN: Tensor, sample_rate: int, title: str = "") -> bytes:
    """A PNG of the mel spectrogram, 80 dB below its loudest point to that point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    decibels = mel_spectrogram(audio_CN, sample_rate).cpu().numpy()
    figure = Figure(figsize=(8, 3), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(
        decibels,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=decibels.max() - PICTURE_RANGE_DB,
        vmax=decibels.max(),
        extent=(0.0, audio_CN.shape[1] / sample_rate, 0.0, float(len(decibels))),
    )
    axes.set(xlabel="seconds", ylabel="mel band", title=title)
    figure.colorbar(image, label="dB")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def measure(audio_CN: Tensor, sample_rate: int) -> dict[str, float]:
    """Everything above but the picture, by name; units in the names (lufs, db, hz)."""
    return {
        "loudness_lufs": loudness_lufs(audio_CN, sample_rate),
        "true_peak_db": true_peak_db(audio_CN, sample_rate),
        "rms_db": rms_db(audio_CN),
        "spectral_centroid_hz": spectral_centroid(audio_CN, sample_rate),
        "stereo_width": stereo_width(audio_CN),
        "clipped_share": clipped_share(audio_CN),
    }


def _power_spectrogram(audio_CN: Tensor) -> Tensor:
    window = torch.hann_window(FFT_SIZE, device=audio_CN.device)
    spectrum_CFT = torch.stft(
        audio_CN.float(), FFT_SIZE, HOP, window=window, center=True, pad_mode="constant", return_complex=True
    )
    return spectrum_CFT.abs().square()


def _decibels(amplitude: float) -> float:
    return 20 * math.log10(amplitude) if amplitude > 0 else -math.inf
