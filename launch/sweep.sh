#!/usr/bin/env bash
# Sweep ranks and learning rates (recipe sweep), then print the runs by held-out loss. Arguments go to sa3-train.
#   bash launch/sweep.sh data=DIR model=small-music-base
#   bash launch/sweep.sh data=DIR launcher=slurm hydra.launcher.partition=gpu      one job per run
#   bash launch/sweep.sh data=DIR adapter.rank=4,64 optimizer.lr=1e-4              other values
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export SA3TRAIN_RUN_STAMP="${SA3TRAIN_RUN_STAMP:-$(date +%Y%m%d-%H%M%S)}"
runs="${RUNS:-runs}"
.venv/bin/sa3-train recipe=sweep paths.runs="$runs" "$@"
exec .venv/bin/python -m sa3train.cli.compare "$runs/sweep-$SA3TRAIN_RUN_STAMP"
