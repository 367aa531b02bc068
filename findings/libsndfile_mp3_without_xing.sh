#!/usr/bin/env bash
# libsndfile stops in the middle of a VBR MP3 that has no Xing frame, without an error.
#
# Streams ripped from radio, files cut by tools and everything an encoder writes into a pipe have no Xing/Info frame. A
# decoder would be expected to read to the end, as ffmpeg does. Through soundfile, libsndfile reports an estimated number
# of frames and delivers exactly that many: of 5 s of LAME's V0, 65 % when the clip starts quietly, 47 % when it starts
# loudly. The rest is absent from what read() returns, and the length it reports agrees with what it delivers, so that
# nothing looks wrong.
#
# Seen with: soundfile 0.14.0 (libsndfile 1.2.2), imageio-ffmpeg 0.6.0 (ffmpeg 7.0.2, libmp3lame), Python 3.11, Linux
# x86-64 (2026-11-29).
# What it means here: the reported length of an MP3 without such a frame is no evidence that all of it was read.
# Exits 1 when the behavior has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check soundfile==0.14.0 numpy==2.4.6 imageio-ffmpeg==0.6.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import subprocess
import sys

import imageio_ffmpeg
import numpy as np
import soundfile

RATE = 44100
FFMPEG = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"]
rng = np.random.default_rng(0)
tone = 0.01 * np.sin(2 * np.pi * 220 * np.arange(RATE // 2) / RATE)
noise = rng.uniform(-0.5, 0.5, 5 * RATE - len(tone))


def read_share(name: str, clip: np.ndarray, xing: int) -> tuple[float, float]:
    soundfile.write("clip.wav", clip, RATE)
    options = ["-c:a", "libmp3lame", "-q:a", "0", "-write_xing", str(xing), "-id3v2_version", "0"]
    subprocess.run([*FFMPEG, "-i", "clip.wav", *options, name], check=True)
    claimed = soundfile.info(name).frames / len(clip)
    delivered = len(soundfile.read(name)[0]) / len(clip)
    decoded = subprocess.run([*FFMPEG, "-i", name, "-f", "s16le", "-ac", "1", "-"], check=True, capture_output=True)
    print(
        f"{name}: soundfile says {claimed:.0%} of the clip's length and delivers {delivered:.0%}, "
        f"ffmpeg delivers {len(decoded.stdout) / 2 / len(clip):.0%}"
    )
    return claimed, delivered


quiet_first = np.concatenate([tone, noise])
_, whole = read_share("with_xing.mp3", quiet_first, 1)
claimed, delivered = read_share("quiet_first.mp3", quiet_first, 0)
claimed_loud, delivered_loud = read_share("loud_first.mp3", np.concatenate([noise, tone]), 0)
same = abs(claimed - delivered) < 0.01 and abs(claimed_loud - delivered_loud) < 0.01
if not (whole > 0.99 and same and 0.6 < delivered < 0.7 and 0.42 < delivered_loud < 0.52):
    sys.exit("CHANGED")
print("as described")
PYTHON
