#!/usr/bin/env bash
# safetensors writes the same tensors and metadata as different bytes in each process.
#
# The metadata passes through a hash map whose order is drawn anew, so that a file with three entries or more has another
# SHA-256 each time it is saved. Tensors are in a fixed order, and sorting the dict before the call changes nothing.
#
# Seen with: safetensors 0.8.0, Python 3.11 (2026-11-30).
# What it means here: an adapter that was written again was taken for another one by its hash; our writer sorts the header.
# Exits 1 when the behavior has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check safetensors==0.8.0 numpy
for _ in 1 2 3 4 5 6; do
    "$work/venv/bin/python" - <<'PYTHON'
import hashlib

import numpy
from safetensors.numpy import save

content = save({"a": numpy.zeros(3)}, metadata={name: "text" for name in "abcdefgh"})
print(hashlib.sha256(content).hexdigest())
PYTHON
done | sort -u | tee "$work/hashes"
test "$(wc -l < "$work/hashes")" -gt 1
