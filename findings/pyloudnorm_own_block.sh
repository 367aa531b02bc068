#!/usr/bin/env bash
# pyloudnorm refuses a clip whose length equals the meter's block, for about one length in thirteen.
#
# A one-shot under 0.4 s is shorter than BS.1770's gating block, so one makes the block as long as the clip:
# Meter(rate, block_size=len(clip) / rate). An expert would expect that to work for every length or for none. pyloudnorm
# multiplies block and rate back and compares with the length, and the product of the quotient is sometimes a little
# larger than the length it came from: "Audio must have length greater than the block size."
#
# Seen with: pyloudnorm 0.2.0, numpy 2.4.6, scipy 1.17.1, Python 3.11 (2026-11-29).
# What it means here: loudness of one-shots is measured with a block of (1 - 1e-9) times the clip's length.
# Exits 1 when the behavior has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check pyloudnorm==0.2.0 numpy==2.4.6 scipy==1.17.1
"$work/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import pyloudnorm

RATE, LENGTHS = 44100, range(4410, 17640)
rng = np.random.default_rng(0)
noise = rng.uniform(-0.5, 0.5, max(LENGTHS))


def is_refused(length: int, block_s: float) -> bool:
    try:
        pyloudnorm.Meter(RATE, block_size=block_s).integrated_loudness(noise[:length])
    except ValueError as error:
        assert "length greater than the block size" in str(error)
        return True
    return False


exact = [length for length in LENGTHS[::7] if is_refused(length, length / RATE)]
shorter = [length for length in LENGTHS[::7] if is_refused(length, length / RATE * (1 - 1e-9))]
tried = len(LENGTHS[::7])
print(f"block = length: {len(exact)} of {tried} lengths refused, one in {tried / max(1, len(exact)):.1f}; first {exact[:3]}")
print(f"block = length * (1 - 1e-9): {len(shorter)} refused")
if not 0.05 < len(exact) / tried < 0.12 or shorter:
    sys.exit("CHANGED")
print("as described")
PYTHON
