#!/usr/bin/env bash
# torchaudio 2.11.1 accepts torch 2.11 in its metadata, and cannot be imported with it.
#
# An expert would pair torch 2.11.0 with torchaudio 2.11.1: a patch release of the same minor version, and pip agrees,
# since the wheel asks for `torch>=2.11`. Its compiled extension needs symbols of a later stable interface of
# torch: with torch 2.11.0 `import torchaudio` raises OSError (undefined symbol), with torch 2.14.1 it works.
#
# Seen with: Python 3.11, Linux x86-64, torch 2.11.0 and 2.14.1, torchaudio 2.11.1 (2026-11-29).
# What it means here: pyproject.toml asks for torch>=2.14 with torchaudio>=2.11.1, and a torchaudio that cannot be
# loaded is an error that names both versions. Exits 1 when the behavior has changed. Downloads several GB.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}

"$python" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
try_import() { "$work/venv/bin/python" -W ignore -c "import torchaudio" >"$work/said" 2>&1 || tail -1 "$work/said"; }

pip install torch==2.11.0 torchaudio==2.11.1
pip check >/dev/null && echo "pip check: no broken requirements (torch 2.11.0, torchaudio 2.11.1)"
"$work/venv/bin/python" - <<'PYTHON'
from importlib.metadata import requires

print("torchaudio 2.11.1 requires:", requires("torchaudio"))
PYTHON
old=$(try_import)
echo "torch 2.11.0: ${old:-imported}"
pip install torch==2.14.1
new=$(try_import)
echo "torch 2.14.1: ${new:-imported}"

case "$old" in OSError*) ;; *) echo "CHANGED: torch 2.11.0 was expected to fail with OSError"; exit 1 ;; esac
[ -z "$new" ] || { echo "CHANGED: torch 2.14.1 was expected to work"; exit 1; }
echo "as described"
