#!/usr/bin/env bash
# Upload runs that were recorded offline (logger.mode=offline, or the server did not answer) to Weights & Biases.
#   bash launch/wandb_sync.sh              all runs below runs/
#   bash launch/wandb_sync.sh RUN_DIR …    these runs
#   DRY=1 bash launch/wandb_sync.sh …      print what would be uploaded
# The parts of a resumed run are uploaded in order under one id.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ "$#" -gt 0 ] || set -- runs
found=()
while IFS= read -r folder; do
    found+=("$folder/")
done < <(find "$@" -type d -name 'offline-run-*' 2>/dev/null | sort)
if [ "${#found[@]}" -eq 0 ]; then
    echo "error: no offline runs below: $*. Give the folder of a run." >&2
    exit 1
fi
exec "$here/.venv/bin/wandb" sync --yes ${DRY:+--dry-run} "${found[@]}"
