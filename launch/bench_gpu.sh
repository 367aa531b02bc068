#!/usr/bin/env bash
# Benchmark an NVIDIA GPU and update docs/performance.md, in at most 8 minutes, without network access or downloads.
#   bash launch/bench_gpu.sh                            figures also go to bench_gpu.json.d/ (or the folder given)
#   PYTHON=/path/to/python bash launch/bench_gpu.sh     another environment than .venv; this checkout goes on its path
# It needs torch with CUDA (torch 2.14 or 2.15 with torchaudio 2.11.1, or 2.11.0 with 2.11.0; launch/smoke.sh tests the
# environment), a GPU with bf16 (compute capability 8.0 or later), and 16 GB of disk for random checkpoints in
# SA3TRAIN_CACHE. flash-attn is not needed: torch's own varlen attention is used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
out=${1:-bench_gpu.json.d}
end=$((SECONDS + 480))
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "error: torch finds no CUDA device.")'

measure() { # NAME LIMIT [FLAGS]: a benchmark that does not finish in time is reported as not measured
    local name=$1 limit=$2 left=$((end - SECONDS))
    shift 2
    if [ "$left" -lt 20 ]; then
        printf 'not measured (8 minutes are over): %s %s\n' "$name" "$*"
        return
    fi
    timeout "$((limit < left ? limit : left))" "$python" -m sa3train.cli.bench "$name" --device cuda "$@" \
        --update docs/performance.md --json "$out/$name-$SECONDS.json" || printf 'not measured: %s %s\n' "$name" "$*"
}

printf 'golden cases in fp32 on the GPU\n'
SA3TRAIN_TEST_DEVICE=cuda timeout 120 "$python" -m pytest -q tests/unit/*/test_*golden*.py ||
    printf 'golden cases: FAILED or not run\n'

measure load 150 --arch medium
measure generate 120 --arch medium --seconds 120
measure generate 90 --arch small --seconds 30
measure train 120 --arch medium --seconds 120
measure decode 60 --arch medium --seconds 120
measure adapters 60 --arch small --adapter-types lora,dora-rows,bora
