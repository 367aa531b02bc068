#!/usr/bin/env bash
# Ranks × learning rates, one run each. Arguments go to sa3-train.
#   bash launch/sweep.sh data=latents model=small-music-base                     one after another, here
#   bash launch/sweep.sh data=latents model=small-music-base launcher=slurm      one SLURM job each (extra slurm)
# RANKS and RATES choose the grid. Compare the runs by heldout/over_base in their metrics.csv, or in W&B (logger=wandb).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec .venv/bin/sa3-train -m recipe=sweep "adapter.rank=${RANKS:-8,16,32}" "optimizer.lr=${RATES:-3e-5,1e-4,3e-4}" "$@"
