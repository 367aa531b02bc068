"""Measurements of audio (C, N): loudness, peaks, spectrum, stereo width; and a plot of its spectrogram."""

import io
import math

import numpy as np
import torch
from torch import Tensor

from sa3train.audio.edit import mix_channels
from sa3train.audio.resample import resample
from sa3train.core.imports import explain_imports
from sa3train.core.mapped import release_pages

with explain_imports():
    import torchaudio.functional

SILENCE_AMPLITUDE = 10 ** (-60 / 20)
"""Amplitude (-60 dBFS) below which samples count as silence."""
LOUDNESS_BLOCK = 0.4
LONG_SECONDS, PART_SECONDS, WARM_UP_SECONDS = 120, 60, 1
"""Audio longer than the first is measured in parts, so that it needs no more memory; a filter forgets in the last."""
JOINS, CLICK_SECONDS, SIDE = 64, 0.002, 3072
"""Joins of a loop that are compared; around each, the time a click shows in and the samples of a side's spectrum."""
LOWEST_LOUDNESS_RATE = 11025
OVERSAMPLING = 4
FFT_SIZE = 2048
HOP = 512
MEL_BANDS = 128
PLOT_RANGE_DB = 80.0
HEARD_DB, MEL_FLOOR_DB = 60.0, -80.0


def measure_loudness_lufs(audio_CN: Tensor, sample_rate: int) -> float:
    """Measure integrated loudness of mono or stereo (ITU-R BS.1770-4).

    Audio shorter than one gating block (0.4 s), or with sound only after the last whole block, is measured as one
    block of its own length. Low sample rates are resampled: the weighting filters need frequencies up to 4 kHz.

    Args:
        audio_CN: Audio.
        sample_rate: Sample rate in Hz.

    Returns:
        Loudness in LUFS; -inf below the absolute threshold of -70 LUFS.
    """
    if sample_rate < LOWEST_LOUDNESS_RATE:
        audio_CN, sample_rate = resample(audio_CN, sample_rate, 48000), 48000
    if audio_CN.shape[1] > LONG_SECONDS * sample_rate:
        return _measure_long_loudness(audio_CN, sample_rate)
    stereo_CN = mix_channels(audio_CN, 2).double().cpu()
    # One sample of silence more, and a block a trifle longer: pyloudnorm's rounding refuses one length in thirteen.
    stereo_NC = torch.nn.functional.pad(stereo_CN, (0, 1)).T.numpy()
    whole = (stereo_CN.shape[1] + 1e-6) / sample_rate
    loudness = _integrate_loudness(stereo_NC, sample_rate, min(LOUDNESS_BLOCK, whole))
    return loudness if math.isfinite(loudness) else _integrate_loudness(stereo_NC, sample_rate, whole)


def _integrate_loudness(audio_NC: np.ndarray, sample_rate: int, block: float) -> float:
    import pyloudnorm

    with np.errstate(divide="ignore", invalid="ignore"):
        loudness = float(pyloudnorm.Meter(sample_rate, block_size=block).integrated_loudness(audio_NC))
    return loudness if math.isfinite(loudness) else -math.inf


def _measure_long_loudness(audio_CN: Tensor, sample_rate: int) -> float:
    """The same from the gating blocks of one part after the other, with the two gates of BS.1770-4 over all of them."""
    import pyloudnorm

    meter, powers = pyloudnorm.Meter(sample_rate, block_size=LOUDNESS_BLOCK), list[float]()
    warm_up, step = WARM_UP_SECONDS * 10, sample_rate // 10  # a block begins every 0.1 s
    blocks = int((audio_CN.shape[1] / sample_rate - LOUDNESS_BLOCK) * 10) + 1
    for first in range(0, blocks, PART_SECONDS * 10):
        count, skipped = min(PART_SECONDS * 10, blocks - first), min(warm_up, first)
        part_CN = audio_CN[:, (first - skipped) * step :][:, : (skipped + count + 4) * step]
        with np.errstate(divide="ignore", invalid="ignore"):
            meter.integrated_loudness(mix_channels(part_CN, 2).double().cpu().T.numpy())
        loudness = np.asarray(meter.blockwise_loudness)[skipped : skipped + count]
        powers += (10 ** ((loudness[loudness >= -70] + 0.691) / 10)).tolist()
        release_pages(audio_CN)
    if not powers:
        return -math.inf
    kept = np.asarray(powers)
    kept = kept[kept >= kept.mean() / 10]
    return float(10 * np.log10(kept.mean()) - 0.691)


def measure_offset(audio_CN: Tensor) -> Tensor:
    """Measure the DC offset: of mean and median the one nearer to 0, since the mean of a hit is seldom 0.

    Args:
        audio_CN: Audio.

    Returns:
        Offset of each channel (C, 1), in float64.
    """
    some_CN = audio_CN[:, :: 1 + audio_CN.shape[1] // 100_000]
    both_C2 = torch.stack((audio_CN.double().mean(dim=1), some_CN.double().median(dim=1).values), dim=1)
    return both_C2.gather(1, both_C2.abs().argmin(dim=1, keepdim=True))


def is_silent(audio_CN: Tensor) -> bool:
    """Check whether audio is silent but for a DC offset.

    Args:
        audio_CN: Audio.

    Returns:
        Whether no sample is above `SILENCE_AMPLITUDE`.
    """
    return bool((audio_CN - measure_offset(audio_CN)).abs().max() <= SILENCE_AMPLITUDE)


def measure_peak_db(audio_CN: Tensor) -> float:
    """Measure the largest sample.

    Args:
        audio_CN: Audio.

    Returns:
        Peak in dBFS; -inf for silence.
    """
    return _to_decibels(float(audio_CN.abs().max()))


def measure_true_peak_db(audio_CN: Tensor, sample_rate: int) -> float:
    """Measure the largest value, also between samples (ITU-R BS.1770-4 annex 2, four times oversampled).

    Args:
        audio_CN: Audio.
        sample_rate: Sample rate in Hz.

    Returns:
        True peak in dBTP; -inf for silence.
    """
    oversampled_CN = resample(audio_CN, sample_rate, OVERSAMPLING * sample_rate)
    return _to_decibels(max(float(oversampled_CN.abs().max()), float(audio_CN.abs().max())))


def measure_rms_db(audio_CN: Tensor) -> float:
    """Measure the root mean square over all channels.

    Args:
        audio_CN: Audio.

    Returns:
        RMS in dBFS; -inf for silence.
    """
    return _to_decibels(float(audio_CN.double().square().mean().sqrt()))


def compute_spectral_centroid(audio_CN: Tensor, sample_rate: int) -> float:
    """Compute the power-weighted mean frequency.

    Args:
        audio_CN: Audio.
        sample_rate: Sample rate in Hz.

    Returns:
        Frequency in Hz; 0 for silence.
    """
    power_F = _compute_power_spectrogram(audio_CN).double().mean(dim=(0, 2))
    frequencies_F = torch.linspace(0, sample_rate / 2, len(power_F), dtype=torch.float64, device=power_F.device)
    total = power_F.sum()
    return float((power_F * frequencies_F).sum() / total) if total > 0 else 0.0


def compute_stereo_width(audio_CN: Tensor) -> float:
    """Compute the energy of the side signal as a share of that of mid and side.

    Args:
        audio_CN: Audio.

    Returns:
        0 (mono) to 1 (opposite phases); 0 for silence and for other than two channels.
    """
    if len(audio_CN) != 2:
        return 0.0
    middle, side = audio_CN[0] + audio_CN[1], audio_CN[0] - audio_CN[1]
    total = float(middle.double().square().sum() + side.double().square().sum())
    return float(side.double().square().sum()) / total if total > 0 else 0.0


def compute_clipped_share(audio_CN: Tensor) -> float:
    """Compute the share of samples at or beyond full scale.

    Args:
        audio_CN: Audio.

    Returns:
        Share from 0 to 1.
    """
    return float((audio_CN.abs() >= 1).float().mean())


def compute_mel_spectrogram(audio_CN: Tensor, sample_rate: int, bands: int = MEL_BANDS) -> Tensor:
    """Compute the mel power spectrogram of the mean of the channels, by 2048-point windows every 512 samples.

    Args:
        audio_CN: Audio.
        sample_rate: Sample rate in Hz.
        bands: Mel bands from 20 Hz to half the sample rate (Slaney's scale and norm).

    Returns:
        Power in dB, (bands, frames).
    """
    power_FT = _compute_power_spectrogram(audio_CN.mean(dim=0, keepdim=True))[0]
    filters_FM = torchaudio.functional.melscale_fbanks(
        power_FT.shape[0], 20.0, sample_rate / 2, bands, sample_rate, norm="slaney", mel_scale="slaney"
    )
    return 10 * torch.log10((filters_FM.T.to(power_FT) @ power_FT).clamp(min=1e-10))


def compute_log_mel_distance(real_CN: Tensor, made_CN: Tensor, sample_rate: int) -> float:
    """Compute the mean absolute difference of mel power spectrograms, over what is heard of the reference.

    Args:
        real_CN: Reference.
        made_CN: Audio of the same length.
        sample_rate: Sample rate in Hz.

    Returns:
        Distance in dB over the cells within 60 dB of the reference's loudest; powers below -80 dB count as -80 dB.
    """
    real, made = (compute_mel_spectrogram(audio_CN, sample_rate) for audio_CN in (real_CN, made_CN))
    heard = real >= real.max() - HEARD_DB
    return float((real.clamp_min(MEL_FLOOR_DB) - made.clamp_min(MEL_FLOOR_DB))[heard].abs().mean())


def compute_si_sdr(real_CN: Tensor, made_CN: Tensor) -> float:
    """Compute the scale-invariant signal-to-distortion ratio over all channels (Le Roux et al. 2019).

    Args:
        real_CN: Reference.
        made_CN: Audio of the same length.

    Returns:
        Ratio in dB.
    """
    scaled_CN = (real_CN * made_CN).sum() / real_CN.square().sum().clamp_min(1e-12) * real_CN
    error = (made_CN - scaled_CN).square().sum().clamp_min(1e-12)
    return float(10 * torch.log10(scaled_CN.square().sum().clamp_min(1e-12) / error))


def measure_seam(audio_CN: Tensor, sample_rate: int) -> dict[str, float]:
    """Measure how well the end of a loop joins its start, beside other joins of the same clip.

    Both figures compare the 64 joins that divide the loop evenly, of which one is the seam: `seam_click` is the largest
    third difference of the samples within 2 ms of the seam, `seam_change_db` the mean absolute change of its mel
    spectrum from the 3072 samples before it to those after it. Each stands beside the median of the other joins.

    Args:
        audio_CN: The loop.
        sample_rate: Sample rate in Hz.

    Returns:
        `seam_click`, `usual_click`, `seam_change_db`, `usual_change_db`, and `seam_rank`: the share of the other joins
        that change less than the seam, of the two figures the larger.
    """
    samples = audio_CN.shape[1]
    starts = [samples * join // JOINS for join in range(JOINS)]
    near, pad = max(2, round(CLICK_SECONDS * sample_rate)), min(SIDE, samples)
    wrapped_CN = torch.cat((audio_CN[:, samples - pad :], audio_CN, audio_CN[:, :pad]), dim=1).float()
    jumps_N = wrapped_CN.diff(n=3, dim=1).abs().amax(dim=0)
    clicks = torch.stack([jumps_N[pad + start - near : pad + start + near - 3].amax() for start in starts])
    sides = torch.stack([wrapped_CN.mean(dim=0)[pad + start - pad : pad + start + pad] for start in starts])
    before, after = (_compute_mel_levels(side, sample_rate) for side in (sides[:, :pad], sides[:, pad:]))
    changes = (before - after).abs().mean(dim=1)
    ranks = [float((each[1:] < each[0]).float().mean()) for each in (clicks, changes)]
    return {
        "seam_click": float(clicks[0]),
        "usual_click": float(clicks[1:].median()),
        "seam_change_db": float(changes[0]),
        "usual_change_db": float(changes[1:].median()),
        "seam_rank": max(ranks),
    }


def _compute_mel_levels(sides_JN: Tensor, sample_rate: int) -> Tensor:
    """Mel levels in dB of short pieces of audio, within 60 dB of the loudest: (J, bands)."""
    power_JF = torch.fft.rfft(sides_JN * torch.hann_window(sides_JN.shape[1]), n=2 * FFT_SIZE).abs().square()
    filters_FM = torchaudio.functional.melscale_fbanks(
        power_JF.shape[1], 20.0, sample_rate / 2, 40, sample_rate, norm="slaney", mel_scale="slaney"
    )
    levels_JM = 10 * torch.log10((power_JF @ filters_FM).clamp(min=1e-10))
    return levels_JM.clamp(min=float(levels_JM.max()) - HEARD_DB)


def plot_mel_spectrogram(audio_CN: Tensor, sample_rate: int, title: str = "") -> bytes:
    """Plot a mel spectrogram, from its loudest point to 80 dB below.

    Args:
        audio_CN: Audio.
        sample_rate: Sample rate in Hz.
        title: Title of the plot.

    Returns:
        The content of a PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    decibels = compute_mel_spectrogram(audio_CN, sample_rate).cpu().numpy()
    figure = Figure(figsize=(4, 1.8), dpi=200, layout="constrained")  # its text is read at half this size too
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(
        decibels,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=decibels.max() - PLOT_RANGE_DB,
        vmax=decibels.max(),
        extent=(0.0, audio_CN.shape[1] / sample_rate, 0.0, float(len(decibels))),
    )
    axes.set(xlabel="seconds", ylabel="mel band")
    axes.set_title(title, fontsize="medium")
    figure.colorbar(image, label="dB")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def measure(audio_CN: Tensor, sample_rate: int) -> dict[str, float]:
    """Measure loudness, peaks, spectrum and width of audio.

    Args:
        audio_CN: Audio.
        sample_rate: Sample rate in Hz.

    Returns:
        Numbers by name; the names have their units (lufs, db, hz).
    """
    return {
        "loudness_lufs": measure_loudness_lufs(audio_CN, sample_rate),
        "true_peak_db": measure_true_peak_db(audio_CN, sample_rate),
        "rms_db": measure_rms_db(audio_CN),
        "spectral_centroid_hz": compute_spectral_centroid(audio_CN, sample_rate),
        "stereo_width": compute_stereo_width(audio_CN),
        "clipped_share": compute_clipped_share(audio_CN),
    }


def _compute_power_spectrogram(audio_CN: Tensor) -> Tensor:
    window = torch.hann_window(FFT_SIZE, device=audio_CN.device)
    spectrum_CFT = torch.stft(
        audio_CN.float(), FFT_SIZE, HOP, window=window, center=True, pad_mode="constant", return_complex=True
    )
    return spectrum_CFT.abs().square()


def _to_decibels(amplitude: float) -> float:
    return 20 * math.log10(amplitude) if amplitude > 0 else -math.inf
