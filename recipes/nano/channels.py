"""Layout and units of the channels in the stream of nano's decoder. See `vocoder.py`."""

from __future__ import annotations

import math

from targets import MID_BANDS, PATCH_WAVE, QUARTER_WAVE, SIDE_BANDS, TONES
from wiring import CONST, MARK

PATCH, PLACES = 256, 16
BANDS = MID_BANDS + SIDE_BANDS
FETCHED = QUARTER_WAVE + BANDS  # channels of a quarter in the frame's token
LEVELS, PLACE = QUARTER_WAVE, FETCHED  # first channels of the stream's parts
GAINS = 64
SHARES = GAINS + BANDS
AMPLITUDES = SHARES + TONES
WAVE_OUT = AMPLITUDES + TONES
NOISE = WAVE_OUT + PATCH_WAVE
BASS_OUT = slice(WAVE_OUT, NOISE)
MID_NOISE, SIDE_NOISE = 38, 16
HIGH = 15  # oscillators above the semitones: the levels' channels take them
REGIONS = (250.0, 440.0, 700.0, 1100.0, 1700.0, 2500.0, 3800.0)  # Hz: between two of them noisiness is one figure
NOISY = PLACE + 1  # first channel of the regions' noisiness
# Where the shares travel in the frame's token: channels of later quarters that the first layer does not write.
SLOTS = [64 * quarter + spare for quarter in (1, 2, 3) for spare in range(FETCHED, 64)]
SLOTS = [slot for slot in SLOTS if slot >= SHARES and slot not in (MARK, CONST)]
SLOTS, NOISY_SLOTS = SLOTS[:TONES], SLOTS[TONES : TONES + len(REGIONS) - 1]
KNOTS, STEEP, GAIN = 16, 60.0, 60.0
LEVEL, SHARE = 4.0, 4.0  # stream units: far above the noise of the new tokens
LOUD = 40.0  # gate per share: SiLU bends within a fortieth
ALL_NOISE = (0.47, 0.63, 0.82, 1.0, 1.24, 1.48)  # mean share of a region where all is noise: wind
LOWEST_NOISE, HIGHEST_NOISE = 300.0, 20500.0  # Hz
NOISINESS = (0.55, 0.95)  # of that, where a region begins to be noise, and where it is nothing else
SLIGHT = 0.1  # a share under which there is no partial
QUIET = (0.08, 0.15)  # compressed levels of the lowest two bands between which the bass fades in: -73 and -55 dB
PLACE_REACH, PLACE_GAIN = 8.0, 8.5  # largest factor of a logit, and the gain of queries and keys that reaches it
# Units of each feed-forward:
TAKEN = (
    KNOTS * BANDS + 2 * (len(REGIONS) - 1) + BANDS,
    TONES + HIGH + BANDS + 2 * MID_BANDS + 2 * QUARTER_WAVE,
    4 * (TONES + HIGH) + 5 * PATCH_WAVE + 2 * (MID_NOISE + SIDE_NOISE),
)
WIDE = (math.sqrt(8 * 6.7), math.sqrt(8 * 88.6))  # gains of queries and keys: a window of a quarter
