#!/usr/bin/env bash
# Every figure of an NVIDIA GPU into docs/performance.md, in at most 8 minutes, with no network and no download.
#
#   bash launch/bench_gpu.sh                 results also in bench_gpu.json.d/ (or the folder given)
#
# Needs: torch 2.11 with CUDA 12.8 or later (the wheels of constraints.txt), a GPU with bf16 (compute capability 8.0 or later),
# 16 GB of disk for random checkpoints in SA3TRAIN_CACHE. flash-attn is not needed: torch's own varlen attention is used.
# PYTHON names another interpreter than .venv's; it needs this folder on its path.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
out=${1:-bench_gpu.json.d}
end=$((SECONDS + 480))
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "error: torch sees no CUDA device here.")'

measure() { # NAME LIMIT [FLAGS]: what does not end in time keeps its place in the list as not measured
    local name=$1 limit=$2 left=$((end - SECONDS))
    shift 2
    if [ "$left" -lt 20 ]; then
        printf 'not measured (8 minutes are over): %s %s\n' "$name" "$*"
        return
    fi
    timeout "$((limit < left ? limit : left))" "$python" -m sa3train.cli.bench "$name" --device cuda "$@" \
        --write docs/performance.md --json "$out/$name-$SECONDS.json" || printf 'not measured: %s %s\n' "$name" "$*"
}

printf 'golden cases in fp32 on the GPU\n'
SA3TRAIN_TEST_DEVICE=cuda timeout 120 "$python" -m pytest -q tests/unit/*/test_*golden*.py ||
    printf 'golden cases: FAILED or not run\n'

measure load 150 --arch medium
measure generate 120 --arch medium --seconds 120
measure generate 90 --arch small --seconds 30
measure train 120 --arch medium --seconds 120
measure decode 60 --arch medium --seconds 120
measure adapters 60 --arch small --kinds lora,dora-rows,bora
