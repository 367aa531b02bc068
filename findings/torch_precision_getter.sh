#!/usr/bin/env bash
# torch.get_float32_matmul_precision() raises once torch.backends.cuda.matmul.allow_tf32 has been set beside it.
#
# An expert would think that reading a setting cannot fail, and that allow_tf32 and set_float32_matmul_precision are
# two names for one thing, as the documentation of both says. After set_float32_matmul_precision("medium"), which also
# speeds up fp32 on CPUs, the line `torch.backends.cuda.matmul.allow_tf32 = False` (two older setters, without the new
# `fp32_precision`) makes the getter raise RuntimeError about "a mix of the legacy and new APIs". No GPU is needed. In
# the other order nothing happens.
#
# Seen with: Python 3.11, Linux x86-64, torch 2.14.1 (2026-11-29).
# What it means here: one process may load models with sa3train and with the released project, which sets allow_tf32.
# sa3train/models/precision.py takes the error for a choice of the user. Exits 1 when the behavior has changed.
# Downloads several GB.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}

"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.14.1
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch

torch.set_float32_matmul_precision("medium")
print("after set_float32_matmul_precision:", torch.get_float32_matmul_precision())
torch.backends.cuda.matmul.allow_tf32 = False
try:
    print("CHANGED: after allow_tf32 = False:", torch.get_float32_matmul_precision())
    sys.exit(1)
except RuntimeError as error:
    print("after allow_tf32 = False:", str(error)[:140])
torch.set_float32_matmul_precision("medium")
print("set again:", torch.get_float32_matmul_precision())
PYTHON
echo "as described"
