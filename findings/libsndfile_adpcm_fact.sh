#!/usr/bin/env bash
# libsndfile writes half the true length into the `fact` chunk of a stereo IMA ADPCM file, and never reads the chunk.
#
# ADPCM is coded in blocks, so the last block is padded, and the RIFF specification gives `fact` as the number of samples
# per channel that are real: players of loops cut there. libsndfile's own stereo files state about half of that, its mono
# files the padded length instead of the true one. In the other direction, libsndfile ignores a correct `fact`: a one-bar
# loop comes back with the block's padding behind it and no longer repeats in time.
#
# Seen with: soundfile 0.14.0 (libsndfile 1.2.2), Python 3.11, Linux x86-64 (2026-11-29).
# What it means here: `fact` counts where it lies within the last block of what was decoded, and is ignored otherwise
# (sa3train/audio/scan_chunks.py).
# Exits 1 when the behavior has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check soundfile==0.14.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import struct
import sys

import numpy as np
import soundfile

RATE, TRUE = 44100, 2 * 44100
clip = np.random.default_rng(0).uniform(-0.3, 0.3, TRUE)


def write(name: str, samples: np.ndarray) -> tuple[bytearray, int, int, int]:
    soundfile.write(name, samples, RATE, subtype="IMA_ADPCM")
    content = bytearray(open(name, "rb").read())
    at = content.find(b"fact") + 8
    return content, at, struct.unpack_from("<I", content, at)[0], len(soundfile.read(name)[0])


stereo, _, stated_stereo, read_stereo = write("stereo.wav", np.stack([clip, clip], 1))
mono, at, stated_mono, read_mono = write("mono.wav", clip)
struct.pack_into("<I", mono, at, TRUE)
open("corrected.wav", "wb").write(mono)
read_corrected = len(soundfile.read("corrected.wav")[0])
print(f"written: {TRUE} samples per channel")
print(f"stereo: fact says {stated_stereo}, read {read_stereo}")
print(f"mono: fact says {stated_mono}, read {read_mono}")
print(f"mono with the true number in fact: read {read_corrected}")
if not (stated_stereo < 0.51 * TRUE and read_corrected == read_mono > TRUE):
    sys.exit("CHANGED")
print("as described")
PYTHON
