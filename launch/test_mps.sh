#!/usr/bin/env bash
# Check this checkout on a Mac's GPU (or another device) with nano, beside the CPU: generate, encode, train, stop and
# resume. It takes under five minutes after the installation, downloads no weights, and prints a summary for an issue.
#   bash launch/test_mps.sh
#   bash launch/test_mps.sh --device xpu                another device; cpu shows that the script itself runs
#   PYTHON=/path/to/python bash launch/test_mps.sh      another environment than .venv; this checkout goes on its path
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
    bash launch/setup.sh
    PYTHON=.venv/bin/python
fi
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" launch/check_device.py "$@"
