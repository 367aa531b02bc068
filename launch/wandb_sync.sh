#!/usr/bin/env bash
# Send runs that were recorded offline (logger.mode=offline, or a server that did not answer) to Weights & Biases.
#   bash launch/wandb_sync.sh              every run under runs/
#   bash launch/wandb_sync.sh RUN_DIR …    these
#   DRY=1 bash launch/wandb_sync.sh …      say what would be sent
# A run that was resumed is sent in order, part after part, under one id.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ "$#" -gt 0 ] || set -- runs
shopt -s globstar nullglob
found=()
for folder in "$@"; do
    found+=("$folder"/**/offline-run-*/)
done
if [ "${#found[@]}" -eq 0 ]; then
    echo "error: no offline runs under: $*" >&2
    exit 1
fi
exec "$here/.venv/bin/wandb" sync --yes ${DRY:+--dry-run} "${found[@]}"
