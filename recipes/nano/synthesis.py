"""Synthesize what a soundfont has not: drum one-shots, synthesizer tones, plucked strings, voices, textures, effects.

Every maker takes numpy's generator and seconds and returns samples, (N,) or (2, N) float64, at no particular level.
Shapes: N samples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, fftconvolve, lfilter, sawtooth, sosfilt, square

RATE = 44_100
F64 = NDArray[np.float64]
Maker = Callable[[np.random.Generator, float], F64]


def make_time(seconds: float) -> F64:
    """Return the times of samples."""
    return np.arange(round(seconds * RATE)) / RATE


def draw_log(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a number evenly in its logarithm."""
    return float(low * (high / low) ** rng.random())


def limit_band(x: F64, low: float, high: float, order: int = 2) -> F64:
    """Filter to a band in Hz."""
    edges = [max(10.0, low), min(high, 0.49 * RATE)]
    return np.asarray(sosfilt(butter(order, edges, "band", fs=RATE, output="sos"), x, axis=-1))


def sweep_filter(x: F64, cutoff_N: F64, resonance: float) -> F64:
    """Low-pass with a moving cutoff in Hz: blocks of 256 samples with the state carried over."""
    out, state = np.empty_like(x), np.zeros((*x.shape[:-1], 2))
    for start in range(0, x.shape[-1], 256):
        w = 2 * np.pi * min(cutoff_N[start], 0.4 * RATE) / RATE
        alpha = np.sin(w) / (2 * (0.6 + 6 * resonance))
        b = np.array([1, 2, 1]) * (1 - np.cos(w)) / 2 / (1 + alpha)
        a = [1, -2 * np.cos(w) / (1 + alpha), (1 - alpha) / (1 + alpha)]
        out[..., start : start + 256], state = lfilter(b, a, x[..., start : start + 256], axis=-1, zi=state)
    return out


def add_room(rng: np.random.Generator, x: F64, decay: float, share: float) -> F64:
    """Add stereo reverb: a decaying burst of noise, duller as it dies."""
    t = make_time(min(3.0, 1.5 * decay))
    echo = rng.standard_normal((2, len(t))) * np.exp(-6.9 * t / decay)
    echo = limit_band(echo, 150, draw_log(rng, 2000, 12000), 1)
    wet = fftconvolve(np.broadcast_to(x, (2, x.shape[-1])), echo, axes=1)[:, : x.shape[-1]]
    return np.asarray(x + share * wet * np.abs(x).max() / (np.abs(wet).max() + 1e-9))


def make_kick(rng: np.random.Generator, seconds: float) -> F64:
    """A sine that falls to 35..70 Hz, with a click."""
    t = make_time(seconds)
    base, drop, speed = draw_log(rng, 35, 70), draw_log(rng, 50, 800), draw_log(rng, 15, 120)
    body = np.sin(2 * np.pi * (base * t + drop / speed * (1 - np.exp(-speed * t))) + rng.uniform(0, 1.5))
    body *= np.exp(-t * draw_log(rng, 3, 25))
    click = rng.standard_normal(len(t)) * np.exp(-t * draw_log(rng, 150, 900)) * rng.uniform(0, 0.5)
    return np.asarray(np.tanh(draw_log(rng, 0.5, 6) * (body + click)))


def make_snare(rng: np.random.Generator, seconds: float) -> F64:
    """Two drum modes under a noise."""
    t, base = make_time(seconds), draw_log(rng, 130, 280)
    body = sum(np.sin(2 * np.pi * base * ratio * t + 3 * np.exp(-60 * t)) for ratio in (1, rng.uniform(1.4, 1.9)))
    noise = limit_band(rng.standard_normal((2, len(t))), draw_log(rng, 300, 2500), draw_log(rng, 5000, 18000))
    mix = body * np.exp(-t * draw_log(rng, 12, 50)) + rng.uniform(0.5, 3) * noise * np.exp(-t * draw_log(rng, 8, 45))
    return np.asarray(np.tanh(draw_log(rng, 0.5, 3) * mix))


def make_hat(rng: np.random.Generator, seconds: float) -> F64:
    """Six inharmonic squares or noise, high-passed."""
    t, base = make_time(seconds), draw_log(rng, 200, 700)
    metal = sum(square(2 * np.pi * base * ratio * t) for ratio in (2, 3.0, 4.16, 5.43, 6.79, 8.21))
    share = rng.random()
    mix = share * metal / 3 + (1 - share) * rng.standard_normal((2, len(t)))
    mix = limit_band(mix, draw_log(rng, 2500, 8000), draw_log(rng, 10000, 21000))
    return np.asarray(mix * np.exp(-t * draw_log(rng, 2, 90)))


def make_clap(rng: np.random.Generator, seconds: float) -> F64:
    """Three or four bursts of band noise, the last one dying slowly."""
    t = make_time(seconds)
    noise = limit_band(rng.standard_normal((2, len(t))), draw_log(rng, 500, 1200), draw_log(rng, 2000, 9000))
    starts = np.cumsum(rng.uniform(0.006, 0.015, int(rng.integers(3, 5))))
    hits = sum((t >= start) * np.exp(-(t - start).clip(0) * 180) for start in starts)
    return np.asarray(noise * (hits + (t >= starts[-1]) * np.exp(-(t - starts[-1]).clip(0) * draw_log(rng, 8, 40))))


def make_tom(rng: np.random.Generator, seconds: float) -> F64:
    """A drum skin's inharmonic modes: toms, congas, wood and metal percussion."""
    t, base = make_time(seconds), draw_log(rng, 70, 900)
    modes = np.array([1, 1.59, 2.14, 2.3, 2.65, 2.92]) ** rng.uniform(0.8, 1.6)
    decay, bend = draw_log(rng, 5, 40), rng.uniform(0, 0.6)
    phases = 2 * np.pi * base * (t + bend * (1 - np.exp(-25 * t)) / 25)
    rings = [rng.random() / n * np.sin(m * phases) * np.exp(-t * decay * m**0.7) for n, m in enumerate(modes, 1)]
    return np.asarray(sum(rings) + 0.2 * rng.standard_normal(len(t)) * np.exp(-t * 300))


def make_tone(rng: np.random.Generator, seconds: float, pitch: float) -> F64:
    """A synthesizer's tone with a random patch: detuned waves or FM, swept filter, envelope, vibrato."""
    t = make_time(seconds)
    bend = 2 ** (rng.choice([0, 0, 0.01]) * np.sin(2 * np.pi * rng.uniform(4, 7) * t))
    phase = 2 * np.pi * np.cumsum(pitch * bend) / RATE
    kind, voices = rng.integers(5), int(rng.choice([1, 1, 2, 5]))
    out = np.zeros((2, len(t)))
    for _ in range(voices):
        own = phase * (1 + rng.normal(0, 0.004) * (voices > 1)) + rng.uniform(0, 6.3)
        if kind == 4:
            ratio, depth = rng.choice([0.5, 1, 2, 3, 3.5, 7]), draw_log(rng, 0.3, 6)
            wave = np.sin(own + depth * np.exp(-t * draw_log(rng, 0.5, 12)) * np.sin(ratio * own))
        else:
            wave = (sawtooth(own), square(own, rng.uniform(0.1, 0.9)), np.sin(own), sawtooth(own, 0.5))[kind]
        side = rng.uniform(0.2, 0.8) if voices > 1 else 0.5
        out += wave * np.array([[side], [1 - side]])
    top, floor, speed = draw_log(rng, 500, 16000), draw_log(rng, 120, 2000), draw_log(rng, 0.3, 15)
    return sweep_filter(out, floor + top * np.exp(-speed * t), rng.random() ** 2)


def make_envelope(rng: np.random.Generator, seconds: float, kind: str) -> F64:
    """A pluck dies, a pad swells, everything else is held and released."""
    t = make_time(seconds)
    if kind == "pluck":
        return np.asarray((1 - np.exp(-t * 800)) * np.exp(-t * draw_log(rng, 1.5, 12)))
    attack = rng.uniform(0.2, 1.0) * seconds / 2 if kind == "pad" else draw_log(rng, 0.003, 0.05)
    release = (0.3 if kind == "pad" else 0.05) * seconds
    return np.asarray(np.minimum(np.minimum(t / attack, 1), ((seconds - t) / release).clip(0, 1)))


def make_string(rng: np.random.Generator, seconds: float, pitch: float) -> F64:
    """A plucked string (Karplus and Strong 1983)."""
    size = max(2, round(RATE / pitch))
    burst = np.zeros(round(seconds * RATE))
    burst[: min(size, len(burst))] = rng.uniform(-1, 1, size)[: len(burst)]
    loss, tone = 0.5 * draw_log(rng, 0.985, 0.9995), rng.uniform(0.05, 0.95)
    feedback = np.zeros(size + 2)
    feedback[0], feedback[size], feedback[size + 1] = 1, -2 * loss * (1 - tone / 2), -2 * loss * tone / 2
    return np.asarray(lfilter([1.0], feedback, burst))


VOWELS = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))


def make_voice(rng: np.random.Generator, seconds: float, pitch: float) -> F64:
    """A voice-like tone: glottal saw and breath through the formants of two vowels, one fading into the other."""
    t = make_time(seconds)
    wobble = 1 + 0.012 * np.sin(2 * np.pi * rng.uniform(4.5, 6.5) * t) * np.minimum(1, 2 * t)
    source = sawtooth(2 * np.pi * np.cumsum(pitch * wobble) / RATE) + rng.uniform(0.02, 0.3) * rng.standard_normal(
        len(t)
    )
    both = []
    for vowel in rng.choice(len(VOWELS), 2):
        bands = enumerate(VOWELS[vowel])
        both.append(sum(limit_band(source, f * 0.93, f * 1.07, 1) * 0.6**n for n, f in bands))
    fade = np.clip(t / seconds * 2 - 0.5, 0, 1)
    return np.asarray(both[0] * (1 - fade) + both[1] * fade)


def make_texture(rng: np.random.Generator, seconds: float) -> F64:
    """Wide noise of a random color whose bands come and go: wind, sea, rain, air, rumble; with crackle by chance."""
    t = make_time(seconds)
    out = np.zeros((2, len(t)))
    for _ in range(int(rng.integers(1, 5))):
        center = draw_log(rng, 60, 9000)
        part = limit_band(
            rng.standard_normal((2, len(t))), center / draw_log(rng, 1.1, 4), center * draw_log(rng, 1.1, 4)
        )
        swell = 1 + rng.random() * np.sin(2 * np.pi * draw_log(rng, 0.1, 3) * t + rng.uniform(0, 6.3))
        out += part / (part.std() + 1e-9) * swell * draw_log(rng, 0.1, 1)
    if rng.random() < 0.4:
        drops = (rng.random((2, len(t))) < draw_log(rng, 3, 300) / RATE) * rng.standard_normal((2, len(t)))
        out += limit_band(drops, 500, 15000, 1) * draw_log(rng, 5, 50)
    return out


def make_drone(rng: np.random.Generator, seconds: float) -> F64:
    """Slowly beating partials of a low tone, each with its own place."""
    t, base = make_time(seconds), draw_log(rng, 40, 200)
    out, stretch = np.zeros((2, len(t))), rng.choice([1, 1, 1.07])
    for partial in range(1, int(rng.integers(4, 14))):
        f, swell = base * partial**stretch, 1 + rng.random() * np.sin(2 * np.pi * rng.uniform(0.05, 0.8) * t)
        for side in range(2):
            out[side] += (
                swell * np.sin(2 * np.pi * f * (1 + rng.normal(0, 0.002)) * t) / partial ** rng.uniform(0.6, 1.6)
            )
    return out


def make_sweep(rng: np.random.Generator, seconds: float) -> F64:
    """Noise or a tone that rises or falls through the spectrum: risers, downlifters, whooshes, zaps."""
    t = make_time(seconds)
    place = np.linspace(0, 1, len(t)) if rng.random() < 0.5 else np.linspace(1, 0, len(t))
    path = draw_log(rng, 60, 400) * draw_log(rng, 10, 60) ** (place ** rng.uniform(0.5, 2))
    tone = sawtooth(2 * np.pi * np.cumsum(path) / RATE)
    noise = sweep_filter(rng.standard_normal((2, len(t))), 2 * path, 0.5)
    share = rng.choice([0, 0, 0.5, 1])
    return np.asarray((share * tone + (1 - share) * noise) * (0.05 + place ** rng.uniform(0.5, 2)))


def make_impact(rng: np.random.Generator, seconds: float) -> F64:
    """A low thump under a burst of dark noise, in a hall."""
    t = make_time(seconds)
    dark = lfilter([0.1], [1, -0.9], rng.standard_normal((2, len(t)))) * np.exp(-t * draw_log(rng, 2, 15))
    return add_room(rng, make_kick(rng, seconds) + 2 * dark, draw_log(rng, 0.8, 3), rng.random())


def make_glitch(rng: np.random.Generator, seconds: float) -> F64:
    """Crushed beeps and stutters on a grid."""
    step, out = draw_log(rng, 0.05, 0.2), []
    while sum(map(len, out)) < seconds * RATE:
        beep = make_tone(rng, step, draw_log(rng, 80, 3000))[0] if rng.random() < 0.7 else np.zeros(round(step * RATE))
        out += [np.round(beep * 8) / 8] * int(rng.integers(1, 4))
    return np.concatenate(out)[: round(seconds * RATE)]


DRUMS: dict[str, Maker] = {
    "kick": make_kick,
    "snare": make_snare,
    "hi-hat": make_hat,
    "clap": make_clap,
    "tom": make_tom,
}
FREE: dict[str, Maker] = {
    "texture": make_texture,
    "drone": make_drone,
    "sweep": make_sweep,
    "impact": make_impact,
    "glitch": make_glitch,
}
