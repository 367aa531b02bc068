#!/usr/bin/env bash
# Sweep ranks and learning rates (recipe sweep); at the end, the runs by held-out loss. Arguments go to sa3-train.
#   bash launch/sweep.sh data=DIR model=small-music-base
#   bash launch/sweep.sh data=DIR launcher=slurm hydra.launcher.partition=gpu      one job per run
#   bash launch/sweep.sh data=DIR adapter.rank=4,64 optimizer.lr=1e-4              other values
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
exec "$root/.venv/bin/sa3-train" recipe=sweep paths.runs="${RUNS:-runs}" "$@"
