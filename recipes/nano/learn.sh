#!/usr/bin/env bash
# Train adapters of two instruments that nano was not trained on, from 24 clips each; for `sa3-bench nano`.
#   bash recipes/nano/learn.sh WORK [STEPS]
set -euo pipefail
work=$1 steps=${2:-500}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bin=$here/.venv/bin out=$here/sa3train/assets/nano/learned
mkdir -p "$out" "$work/learned"
cd "$work/learned"  # adapters record how they were made: relative paths make sense elsewhere too
for sound in koto "steel drums"; do
    name=${sound// /_}
    [ -d "$name" ] || "$bin/python" "$here/datasets/nano/corpus.py" "$name" --clips 24 --held-out "$sound"
    "$bin/sa3-encode" source="$name" out="$name-latents" model=nano-base split=0 overwrite=true
    rm -rf "$name-run"
    "$bin/sa3-train" data="$name-latents" model=nano-base recipe=instrument adapter=dora-rows \
        trainer.max_steps="$steps" optimizer.lr=1e-3 callbacks.demos.enabled=false run_dir="$name-run"
    cp "$name-run/adapter.safetensors" "$out/$name.safetensors"
    "$bin/python" "$here/recipes/nano/real_clips.py" "$sound" "$out"
done
