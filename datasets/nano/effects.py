"""Procedural effects: noise sweeps, impacts, drones, clicks, wind, zaps and beeps. Shapes: N samples; (2, N)
float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from composer import Plan
from numpy.typing import NDArray
from render import SAMPLE_RATE, Audio
from scipy.signal import lfilter, sosfilt

F64 = NDArray[np.float64]


def _time(plan: Plan) -> F64:
    return np.arange(round(plan.seconds * SAMPLE_RATE)) / SAMPLE_RATE


def _noise(plan: Plan, rng: np.random.Generator) -> F64:
    return rng.standard_normal((2, len(_time(plan))))


def _swept_band(noise_CN: F64, cutoff_N: F64, resonance: float = 0.35) -> F64:
    """A band-pass whose centre follows `cutoff_N` in Hz, in blocks of 256 samples (two-pole, state carried over)."""
    out, state = np.empty_like(noise_CN), np.zeros((2, 2))
    for start in range(0, noise_CN.shape[1], 256):
        w = 2 * np.pi * min(cutoff_N[start], 0.45 * SAMPLE_RATE) / SAMPLE_RATE
        r = 1 - resonance * np.sin(w) / 2
        b, a = [1 - r, 0, -(1 - r)], [1, -2 * r * np.cos(w), r * r]
        block, state = lfilter(b, a, noise_CN[:, start : start + 256], axis=1, zi=state)
        out[:, start : start + 256] = block
    return out


def _sweep(plan: Plan, rng: np.random.Generator, up: bool) -> F64:
    place = np.linspace(0, 1, len(_time(plan)))
    low, high = rng.uniform(150, 400), rng.uniform(4000, 9000)
    cutoff = low * (high / low) ** (place if up else 1 - place)
    swell = 0.05 + 0.95 * (place if up else 1 - place) ** 1.5
    return _swept_band(_noise(plan, rng), cutoff) * swell


def riser(plan: Plan, rng: np.random.Generator) -> F64:
    """Noise that rises in pitch and loudness."""
    return _sweep(plan, rng, up=True)


def downlifter(plan: Plan, rng: np.random.Generator) -> F64:
    """Noise that falls in pitch and loudness."""
    return _sweep(plan, rng, up=False)


def impact(plan: Plan, rng: np.random.Generator) -> F64:
    """A falling low thump under a burst of dark noise."""
    t, base = _time(plan), rng.uniform(38, 60)
    thump = np.sin(2 * np.pi * (base * t + 9 * (1 - np.exp(-t * 9)))) * np.exp(-t * rng.uniform(1.6, 3))
    burst = lfilter([0.12], [1, -0.88], _noise(plan, rng)) * np.exp(-t * rng.uniform(6, 12))
    return thump + burst


def drone(plan: Plan, rng: np.random.Generator) -> F64:
    """Slowly beating low partials, a little different on each side."""
    t, base = _time(plan), rng.uniform(50, 110)
    out = np.zeros((2, len(t)))
    for partial in range(1, 7):
        for side in range(2):
            f = base * partial * (1 + rng.normal(0, 0.002))
            swell = 1 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.1, 0.5) * t + rng.uniform(0, 6.3))
            out[side] += swell * np.sin(2 * np.pi * f * t + rng.uniform(0, 6.3)) / partial**1.2
    return out


def clicks(plan: Plan, rng: np.random.Generator) -> F64:
    """Short dry ticks at a steady rate, each side of the centre by chance."""
    t, rate = _time(plan), rng.choice((4.0, 6.0, 8.0))
    out = np.zeros((2, len(t)))
    pulse_t = np.arange(round(0.012 * SAMPLE_RATE)) / SAMPLE_RATE
    for start in np.arange(0.02, plan.seconds - 0.05, 1 / rate):
        pulse = np.sin(2 * np.pi * rng.uniform(1800, 3200) * pulse_t) * np.exp(-pulse_t * 500)
        first, side = round(start * SAMPLE_RATE), rng.uniform(0.3, 0.7)
        out[:, first : first + len(pulse)] += np.stack([side * pulse, (1 - side) * pulse])
    return out


def wind(plan: Plan, rng: np.random.Generator) -> F64:
    """Band noise whose centre and strength wander."""
    t = _time(plan)
    wander = np.sin(2 * np.pi * rng.uniform(0.15, 0.4) * t + rng.uniform(0, 6.3))
    return _swept_band(_noise(plan, rng), 500 * 2 ** (0.9 * wander), 0.25) * (0.6 + 0.4 * wander)


def laser_zap(plan: Plan, rng: np.random.Generator) -> F64:
    """Falling chirps, one every 0.5 s."""
    t, speed = _time(plan) % 0.5, rng.uniform(9, 16)
    high = rng.uniform(2500, 4500)
    phase = 2 * np.pi * (high / speed * (1 - np.exp(-speed * t)) + 120 * t)
    return np.tile(np.sign(np.sin(phase)) * np.exp(-6 * t), (2, 1))


def alarm_beeps(plan: Plan, rng: np.random.Generator) -> F64:
    """A square-ish tone, on and off twice a second."""
    t, f = _time(plan), rng.choice((880.0, 1000.0, 1320.0))
    gate = sosfilt([[0.02, 0, 0, 1, -0.98, 0]], ((t * 2) % 1 < 0.5).astype(float))
    return np.tile(np.tanh(3 * np.sin(2 * np.pi * f * t)) * gate, (2, 1))


MAKERS: dict[str, Callable[[Plan, np.random.Generator], F64]] = {
    "riser": riser,
    "downlifter": downlifter,
    "impact": impact,
    "drone": drone,
    "clicks": clicks,
    "wind": wind,
    "laser zap": laser_zap,
    "alarm beeps": alarm_beeps,
}


def make_effect(plan: Plan) -> Audio:
    """The plan's effect as (2, N) float32, unnormalised."""
    return MAKERS[plan.sound.name](plan, np.random.default_rng(plan.seed)).astype(np.float32)
