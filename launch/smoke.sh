#!/usr/bin/env bash
# Smoke test: audit, encode, two training steps and one generation on nano, with whatever Python environment is found.
# Nothing is installed or downloaded, and no GPU is needed.
#   bash launch/smoke.sh                                       with .venv
#   PYTHON=/path/to/python bash launch/smoke.sh                with another environment; this checkout goes on its path
#   INSTALLED=1 PYTHON=/path/to/python bash launch/smoke.sh    the sa3train and commands installed there instead
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python=${PYTHON:-$root/.venv/bin/python}
case "$python" in */*) python="$(cd "$(dirname "$python")" && pwd)/$(basename "$python")" ;; esac

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work" # "python -m" puts the current folder on the path: an installed package must not be hidden by the checkout
export HF_HUB_OFFLINE=1 SA3TRAIN_CACHE="$work/cache"
if [ -n "${INSTALLED:-}" ]; then
    unset PYTHONPATH
    cli() { local name=$1 && shift && "$(dirname "$python")/sa3-$name" "$@"; }
else
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    cli() { local name=$1 && shift && "$python" -m "sa3train.cli.$name" "$@"; }
fi

run() { # NAME COMMAND...: show its output only when it fails
    local name=$1 start=$SECONDS
    shift
    if "$@" >"$work/$name.log" 2>&1; then
        printf '  %-10s passed (%d s)\n' "$name" "$((SECONDS - start))"
    else
        printf '  %-10s FAILED\n' "$name"
        sed 's/^/    /' "$work/$name.log"
        exit 1
    fi
}

make_audio() { # Eight plucked tones of 1 to 2 s with captions.
    "$python" - <<'END'
import math, pathlib, struct, wave

folder = pathlib.Path("audio")
folder.mkdir()
for number in range(8):
    pitch, count = 220 * 2 ** (number / 12), 44100 + 5000 * number
    tone = (math.sin(2 * math.pi * pitch * index / 44100) * math.exp(-index / 20000) for index in range(count))
    samples = b"".join(struct.pack("<h", int(12000 * value)) for value in tone)
    with wave.open(str(folder / f"tone{number}.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(44100)
        file.writeframes(samples)
    (folder / f"tone{number}.txt").write_text(f"plucked string, {pitch:.0f} Hz", encoding="utf-8")
END
}

"$python" - <<'END'
import importlib.metadata, platform

import torch, torchaudio

import sa3train

others = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("lightning", "peft", "transformers", "numpy"))
print(f"Python {platform.python_version()}, torch {torch.__version__}, torchaudio {torchaudio.__version__}, {others}")
print(f"sa3train from {sa3train.__path__[0]}")
END
run audio make_audio
run audit cli data audit audio
run encode cli encode source=audio out=latents model=nano-base split=0.25
run train cli train data=latents model=nano-base run_dir=run trainer.max_steps=2 \
    scheduler.warmup_steps=0 callbacks.demos.duration=2 callbacks.demos.steps=2
run generate cli generate --model nano -p "plucked string" --duration 2 \
    --lora run/adapter.safetensors=0.8 -o clip.wav
run check test -s clip.wav -a -s run/report.html
