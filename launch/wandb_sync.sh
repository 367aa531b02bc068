#!/usr/bin/env bash
# Send runs that were tracked with logger=wandb logger.mode=offline.
#   bash launch/wandb_sync.sh [FOLDER OF RUNS, default: runs]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
runs=${1:-runs}
[ -d "$runs" ] || {
    echo "There is no folder $runs. Name the folder that holds your runs: bash launch/wandb_sync.sh FOLDER" >&2
    exit 1
}
found=0
while IFS= read -r -d '' run; do
    found=$((found + 1))
    .venv/bin/wandb sync "$run"
done < <(find "$runs" -type d -name 'offline-run-*' -print0)
[ "$found" -gt 0 ] || echo "No offline run was found below $runs: nothing to send."
