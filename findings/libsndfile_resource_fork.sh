#!/usr/bin/env bash
# A file named "._" in the current folder makes every MP3 in memory unreadable, and libsndfile itself leaves such a file.
#
# soundfile reads audio from memory (io.BytesIO: members of archives, HTTP answers, databases). Such audio has no name
# and should depend on no folder. Before libsndfile tries MP3, it looks for the resource fork of a Sound Designer II
# file, which it expects in "._" + name beside the audio: without a name that is "._" in the current folder. Where it
# exists, an MP3 in memory is refused with "bad resource fork"; WAV, FLAC and Ogg, which are recognized earlier, are not.
# Writing SD2 to memory puts the resource fork into that same file in the current folder, although the audio goes to the
# buffer; the buffer alone cannot be read again. So one harmless write to memory disturbs all later reads from memory,
# in every process that starts in the same folder. An ID3v2 tag without entries in front of the frames avoids the search.
#
# Seen with: soundfile 0.14.0 (libsndfile 1.2.2), Python 3.11, Linux x86-64 (2026-11-29).
# What it means here: MP3 data from tar members gets an empty tag in front (sa3train/audio/scan_mpeg.py).
# Exits 1 when the behavior has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check soundfile==0.14.0 numpy==2.4.6
mkdir "$work/empty"
cd "$work/empty"
"$work/venv/bin/python" - <<'PYTHON'
import io
import os
import sys

import numpy as np
import soundfile

RATE = 44100
EMPTY_ID3 = b"ID3\x03\x00\x00\x00\x00\x00\x0a" + bytes(10)
clip = np.random.default_rng(0).uniform(-0.3, 0.3, (RATE, 2))


def write(format: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, clip, RATE, format=format)
    return buffer.getvalue()


def read(content: bytes) -> str:
    try:
        return f"{len(soundfile.read(io.BytesIO(content))[0])} samples"
    except soundfile.LibsndfileError as error:
        return f"error: {error.error_string}"


whole = f"{RATE} samples"
content = {format: write(format) for format in ("MP3", "WAV", "FLAC", "OGG")}
before = {format: read(audio) for format, audio in content.items()}
write("SD2")
left = os.listdir()
after = {format: read(audio) for format, audio in content.items()}
tagged = read(EMPTY_ID3 + content["MP3"])
os.remove("._")
again = read(content["MP3"])
print(f"in an empty folder: {before}")
print(f"SD2 written to memory left in the folder: {left}")
print(f"the same audio read from memory again: {after}")
print(f"MP3 behind an empty ID3v2 tag: {tagged}")
print(f"MP3 with the file removed: {again}")
others = {result for format, result in after.items() if format != "MP3"}
if not (
    set(before.values()) == others == {whole}
    and left == ["._"]
    and "resource fork" in after["MP3"]
    and tagged == again == whole
):
    sys.exit("CHANGED")
print("as described")
PYTHON
