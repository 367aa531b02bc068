#!/usr/bin/env bash
# diffusers' AutoencoderSAME needs memory with the square of the duration, although every token sees 17 neighbors.
#
# SAME-L attends in a sliding window of 17 tokens to each side, which takes memory in proportion to the duration. diffusers
# builds the whole (tokens x tokens) mask in 64-bit indices, booleans and floats before the first layer, 17 tokens for each
# latent of 93 ms, and decodes in one piece: it has no chunks and no tiling. Twice the duration takes four times the memory:
# 0.2 GB at 20 s and 0.9 GB at 40 s with an autoencoder of one layer and 64 channels, which needs next to nothing itself;
# the released model's longest clip, 380 s, would take 80 GB for the mask alone.
#
# Seen with: diffusers 0.42.1, transformers 5.23.0, torch 2.14.1 (CPU), Python 3.11 (2026-11-29).
# What it means here: a model written for diffusers decodes short clips there; ours decodes in chunks of 12 s.
# Exits 1 when the behavior has changed. Downloads torch.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check diffusers==0.42.1 transformers==5.23.0 torch==2.14.1
measure() { # SECONDS: the most memory that decoding takes, in MiB
    "$work/venv/bin/python" -W ignore - "$1" <<'PYTHON'
import resource
import sys

import torch
from diffusers import AutoencoderSAME

latents = torch.zeros(1, 16, round(float(sys.argv[1]) * 44100 / 4096))
same = AutoencoderSAME(encoder_channels=64, encoder_c_mults=[1], encoder_transformer_depths=[1], latent_dim=16).eval()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    same.decode(latents)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
PYTHON
}
short=$(measure 20)
long=$(measure 40)
echo "decoding 20 s takes $short MiB, 40 s $long MiB"
if [ "$long" -lt $((short * 3)) ]; then
    echo "CHANGED"
    exit 1
fi
echo "as described"
