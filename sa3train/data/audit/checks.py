"""Measurements of one clip, and what they say about it.

Shapes: C audio channels, N samples, F frequency bands, S time segments.

Which clips are the same audio, or sound the same, over a million of them.

What an audit can find, each with a code, a severity and a remedy. An `error` keeps a clip from being encoded.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sa3train.audio.metrics import loudness_lufs

NEAR_BITS = 18
"""Of 240 fingerprint bits, the most that may differ: other encodings of one sound differ in up to 10, two takes of the
same instrument in 45 or more (measured on datasets/sample).
"""

NEAR_SECONDS = 0.05
"""Relative difference of length up to which two clips may be the same."""

_WORD = 20
"""Bits of a hash word. Two fingerprints that differ in 18 bits still share one of the 12 words 96 times in 100."""

_CROWD = 64
"""In a hash bucket with more clips than this, each is compared with this many neighbours only."""


def exact_originals(content: np.ndarray, comparable: np.ndarray) -> np.ndarray:
    """For each clip, the number of the first clip with the same content; its own where not comparable."""
    originals = np.arange(len(content))
    chosen = np.flatnonzero(comparable)
    if chosen.size:
        _, first, inverse = np.unique(content[chosen], return_index=True, return_inverse=True)
        originals[chosen] = chosen[first[inverse]]
    return originals


def near_originals(prints: np.ndarray, seconds: np.ndarray, comparable: np.ndarray) -> np.ndarray:
    """For each clip, the first clip of those it sounds like, directly or through others; its own where alone."""
    parents = np.arange(len(prints))
    chosen = np.flatnonzero(comparable)
    if chosen.size < 2:
        return parents
    bits = np.unpackbits(prints[chosen], axis=1)
    weights = 1 << np.arange(_WORD, dtype=np.int64)
    for start in range(0, bits.shape[1], _WORD):
        words = bits[:, start : start + _WORD] @ weights
        for one, two in _pairs(words):
            near = _near(prints[chosen[one]], prints[chosen[two]], seconds[chosen[one]], seconds[chosen[two]])
            for first, second in zip(chosen[one[near]].tolist(), chosen[two[near]].tolist(), strict=True):
                _join(parents, first, second)
    return np.array([_root(parents, number) for number in range(len(parents))], dtype=np.int64)


def _pairs(words: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of places with equal words: neighbours at distance 1, 2, … in sorted order while any pair is equal."""
    order = np.argsort(words, kind="stable")
    ordered = words[order]
    for distance in range(1, min(_CROWD, len(words) - 1) + 1):
        equal = np.flatnonzero(ordered[distance:] == ordered[:-distance])
        if not equal.size:
            break
        yield order[equal], order[equal + distance]


def _near(one: np.ndarray, two: np.ndarray, seconds_one: np.ndarray, seconds_two: np.ndarray) -> np.ndarray:
    differing = np.bitwise_count(one ^ two).sum(axis=1)
    lengths = np.abs(seconds_one - seconds_two) <= NEAR_SECONDS * np.maximum(seconds_one, seconds_two)
    return (differing <= NEAR_BITS) & lengths


def _root(parents: np.ndarray, number: int) -> int:
    while parents[number] != number:
        parents[number] = parents[parents[number]]
        number = int(parents[number])
    return number


def _join(parents: np.ndarray, one: int, two: int) -> None:
    roots = sorted((_root(parents, one), _root(parents, two)))
    parents[roots[1]] = roots[0]


ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)


@dataclass(frozen=True)
class Kind:
    """A kind of finding: how grave it is, what it says, and what to do."""

    severity: str
    title: str
    remedy: str


KINDS: dict[str, Kind] = {
    "unreadable": Kind(ERROR, "cannot be read", "export it again, as WAV or FLAC"),
    "not_finite": Kind(ERROR, "holds NaN or infinity", "export it again; check the effect or format that made it"),
    "implausible": Kind(ERROR, "its rate or level cannot be right", "export it again; its header may be damaged"),
    "too_short": Kind(ERROR, "shorter than one latent frame (93 ms)", "remove it, or join it with others"),
    "silent": Kind(ERROR, "silent throughout", "remove it, or export it again"),
    "no_caption": Kind(ERROR, "no caption", "write one to a .txt of the same name, or encode with captions=optional"),
    "empty_caption": Kind(ERROR, "the caption is empty", "write one, or encode with captions=optional"),
    "bad_text": Kind(ERROR, "its text cannot be read", "save the caption as UTF-8 text"),
    "bad_fields": Kind(WARNING, "its fields cannot be used", "mend the .json: one object with text and numbers"),
    "damaged_source": Kind(ERROR, "its container is damaged or its listing is wrong", "mend the manifest or the tar"),
    "changed": Kind(ERROR, "changed while it was being encoded", "run the same command again"),
    "bad_latent": Kind(ERROR, "the autoencoder gave no finite latents", "encode with model.dtype=fp32"),
    "dropped_duplicate": Kind(ERROR, "the same audio as another clip, dropped", "encode with duplicates=keep"),
    "duplicate": Kind(WARNING, "the same audio as another clip", "remove one, or encode with duplicates=drop"),
    "near_duplicate": Kind(WARNING, "sounds the same as another clip", "keep the better one"),
    "caption_conflict": Kind(WARNING, "two captions that differ", "keep one"),
    "caption_long": Kind(WARNING, "the caption is longer than the model reads", "shorten it; the end goes unread"),
    "cut_short": Kind(WARNING, "the file ends before its header says", "copy or download it again"),
    "clipped": Kind(WARNING, "clipped", "use the unclipped original, or restore it"),
    "over_full_scale": Kind(NOTE, "peaks beyond full scale", "turn it down before export, or encode with fix=loudness"),
    "leading_silence": Kind(WARNING, "starts with silence", "encode with fix=trim_silence"),
    "trailing_silence": Kind(WARNING, "ends with silence", "encode with fix=trim_silence"),
    "dc_offset": Kind(WARNING, "the waveform is off centre", "encode with fix=dc"),
    "quiet": Kind(WARNING, "very quiet", "encode with fix=loudness"),
    "low_rate": Kind(WARNING, "a low sample rate: no high frequencies", "use a source of 44.1 kHz or more"),
    "one_sided": Kind(WARNING, "one channel is silent", "export it as mono, or mend the channel"),
    "mono_as_stereo": Kind(NOTE, "both channels are the same", "nothing, if it is meant to be mono"),
    "mono": Kind(NOTE, "one channel; it will be doubled", "nothing, if it is meant to be mono"),
    "multichannel": Kind(NOTE, "more than two channels; they will be mixed", "mix it to stereo yourself to be sure"),
    "long": Kind(NOTE, "longer than the model's longest; training takes crops", "cut it into pieces with own captions"),
}


def finding(code: str, detail: str = "") -> dict[str, Any]:
    """A finding as it stands in an audit row."""
    return {"code": code, "severity": KINDS[code].severity, "detail": detail}


def is_rejected(row: dict[str, Any]) -> bool:
    """Whether an audit row has an error among its findings."""
    return any(found["severity"] == ERROR for found in row["findings"])


def reason(row: dict[str, Any]) -> str:
    """Why a row is rejected, in words."""
    errors = [found for found in row["findings"] if found["severity"] == ERROR]
    return "; ".join(KINDS[e["code"]].title + (f": {e['detail']}" if e["detail"] else "") for e in errors)


def worst(row: dict[str, Any]) -> int:
    """0 for an error, 1 for a warning, 2 for a note, 3 for a clean row."""
    return min((SEVERITIES.index(found["severity"]) for found in row["findings"]), default=len(SEVERITIES))


FRAME_SECONDS = 4096 / 44100
SILENCE = 10 ** (-60 / 20)
"""Amplitude (-60 dBFS) below which samples count as silence."""

THUMB_COLUMNS = 96
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"

BANDS, SEGMENTS, BITS = 72, 16, 240
_LOWEST = 110.0


LOWEST_RATE, HIGHEST_RATE = 2000, 768_000
LOUDEST = 1000.0
"""Hz, Hz, and times full scale (+60 dB): beyond these a file's header, not its sound, is to blame."""


def implausible(audio_CN: np.ndarray, rate: int) -> str | None:
    """Why these samples cannot be what was recorded, or None."""
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        return f"a sample rate of {rate} Hz"
    peak = float(np.abs(audio_CN).max())
    return f"a peak of {peak:.3g} times full scale" if peak > LOUDEST else None


def content_hash(audio_CN: np.ndarray, rate: int) -> str:
    """SHA-256 of the decoded samples and their rate: the same whatever container or tags they came in."""
    digest = hashlib.sha256(f"{rate} {audio_CN.shape[0]}".encode())
    digest.update(np.ascontiguousarray(audio_CN.T, dtype="<f4").data)
    return digest.hexdigest()


def measure(audio_CN: np.ndarray, rate: int) -> dict[str, Any]:
    """Everything an audit row says of the audio itself (float32, finite, N > 0). dB, LUFS, seconds, Hz."""
    channels, samples = audio_CN.shape
    centred_CN = audio_CN - audio_CN.mean(axis=1, keepdims=True)
    loud_N = np.abs(centred_CN).max(axis=0) > SILENCE
    first, last = (int(loud_N.argmax()), int(samples - loud_N[::-1].argmax())) if loud_N.any() else (samples, samples)
    peak = float(np.abs(audio_CN).max())
    return {
        "seconds": round(samples / rate, 6),
        "samples": samples,
        "sample_rate": rate,
        "channels": channels,
        "peak_db": _decibels(peak),
        "lufs": _loudness(audio_CN, rate),
        "clipped": round(clipped_share(audio_CN), 6),
        "over": round(float((np.abs(audio_CN) > 1).mean()), 6),
        "leading_silence": round(first / rate, 4),
        "trailing_silence": round((samples - last) / rate, 4) if first < samples else 0.0,
        "dc": round(float(np.abs(audio_CN.mean(axis=1, dtype=np.float64)).max()), 6),
        "same_channels": channels == 2 and bool(np.abs(audio_CN[0] - audio_CN[1]).max() <= 1e-4 * max(peak, 1e-9)),
        "silent_channels": int((np.abs(centred_CN).max(axis=1) <= SILENCE).sum()),
        "content": content_hash(audio_CN, rate),
        "fingerprint": fingerprint(audio_CN, rate),
        "thumb": thumbnail(audio_CN),
    }


def judge(row: dict[str, Any], longest_seconds: float | None = None) -> list[dict[str, Any]]:
    """Findings that follow from the measurements of one clip."""
    seconds, silent = row["seconds"], row["silent_channels"] == row["channels"]
    if silent:
        return [finding("silent", f"{seconds:.2f} s")]
    rules = (
        ("too_short", seconds < FRAME_SECONDS, f"{seconds * 1000:.0f} ms"),
        ("clipped", row["clipped"] > 1e-3, f"{row['clipped']:.1%} of the samples lie on flat tops"),
        ("over_full_scale", row["over"] > 1e-4, f"{row['over']:.2%} of the samples, up to {row['peak_db']:+.1f} dBFS"),
        ("leading_silence", row["leading_silence"] > 0.5, f"{row['leading_silence']:.2f} s"),
        ("trailing_silence", row["trailing_silence"] > 1.0, f"{row['trailing_silence']:.2f} s"),
        ("dc_offset", row["dc"] > 0.005, f"by {row['dc']:.3f} of full scale"),
        ("quiet", row["lufs"] is None or row["lufs"] < -40, f"{row['lufs']} LUFS"),
        (
            "low_rate",
            row["sample_rate"] < 32000,
            f"{row['sample_rate']} Hz: nothing above {row['sample_rate'] // 2} Hz",
        ),
        ("one_sided", row["silent_channels"] > 0 and row["channels"] == 2, ""),
        ("mono_as_stereo", row["same_channels"], ""),
        ("mono", row["channels"] == 1, ""),
        ("multichannel", row["channels"] > 2, f"{row['channels']} channels"),
        ("long", longest_seconds is not None and seconds > longest_seconds, f"{seconds:.0f} s"),
    )
    return [finding(code, detail) for code, found, detail in rules if found]


def clipped_share(audio_CN: np.ndarray) -> float:
    """Share of samples on flat tops: four or more in a row at the peak, where the peak is near full scale."""
    peak = float(np.abs(audio_CN).max())
    if peak < 0.98:
        return 0.0
    at_top_CN = np.abs(audio_CN) >= 0.9999 * peak
    run_CN = at_top_CN[:, 3:] & at_top_CN[:, 2:-1] & at_top_CN[:, 1:-2] & at_top_CN[:, :-3]
    flat_CN = np.zeros_like(at_top_CN)
    for shift in range(4):
        flat_CN[:, shift : shift + run_CN.shape[1]] |= run_CN
    return float(flat_CN.mean())


def thumbnail(audio_CN: np.ndarray) -> str:
    """The waveform's outline: 96 peaks, each a base-36 digit of full scale."""
    peak_N = np.abs(audio_CN).max(axis=0)
    edges = np.linspace(0, len(peak_N), THUMB_COLUMNS + 1).astype(int)[:-1]
    columns = np.maximum.reduceat(peak_N, np.minimum(edges, len(peak_N) - 1))
    return "".join(_DIGITS[int(level)] for level in np.minimum(np.round(columns * 35), 35))


def fingerprint(audio_CN: np.ndarray, rate: int) -> str:
    """240 bits in hex that say how a clip sounds: near-equal for the same sound at another level, rate or encoding.

    Energies in semitone bands from 110 Hz over 16 stretches of time, in dB over a floor, freed of their mean; each bit
    is the side of a fixed random plane (SimHash, Charikar 2002), so the share of unequal bits grows with the angle
    between two clips' energies.
    """
    energy_FS = _band_energies(audio_CN.mean(axis=0), rate)
    decibels_FS = 10 * np.log10(energy_FS + energy_FS.max() * 1e-5 + 1e-20)
    signs = (decibels_FS - decibels_FS.mean()).ravel() @ _planes() > 0
    return np.packbits(signs).tobytes().hex()


def _band_energies(mono_N: np.ndarray, rate: int) -> np.ndarray:
    """(F, S) mean power of a band's bins; a few windows of each stretch will do, so long files cost no more."""
    size = min(1 << round(math.log2(rate * 0.19)), 1 << max(5, len(mono_N).bit_length()))
    padded_N = np.pad(mono_N, (0, max(0, size - len(mono_N))))
    starts = np.linspace(0, len(padded_N) - size, SEGMENTS * 6).astype(int)
    windows = padded_N[starts[:, None] + np.arange(size)] * np.hanning(size).astype(np.float32)
    power = np.abs(np.fft.rfft(windows, axis=1)) ** 2
    bands = np.floor(12 * np.log2(np.maximum(np.fft.rfftfreq(size, 1 / rate), 1) / _LOWEST) + 0.5).astype(int)
    energy_FS = np.zeros((BANDS, SEGMENTS))
    inside = (bands >= 0) & (bands < BANDS)
    by_segment = power.reshape(SEGMENTS, -1, power.shape[1]).mean(axis=1)
    np.add.at(energy_FS, bands[inside], by_segment[:, inside].T)
    return energy_FS / np.maximum(np.bincount(bands[inside], minlength=BANDS), 1)[:, None]


_PLANES: list[np.ndarray] = []


def _planes() -> np.ndarray:
    if not _PLANES:
        _PLANES.append(np.random.default_rng(0).standard_normal((BANDS * SEGMENTS, BITS)).astype(np.float32))
    return _PLANES[0]


def _loudness(audio_CN: np.ndarray, rate: int) -> float | None:
    """Integrated LUFS, None when it cannot be had (silence, or more channels than there is a rule for)."""
    try:
        loudness = loudness_lufs(torch.from_numpy(audio_CN), rate)
    except ValueError:
        return None
    return round(loudness, 2) if math.isfinite(loudness) else None


def _decibels(amplitude: float) -> float | None:
    return round(20 * math.log10(amplitude), 2) if amplitude > 0 else None
