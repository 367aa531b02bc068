#!/usr/bin/env bash
# Set up and start the studio, a local web page, with nano: http://127.0.0.1:7860. Arguments go to sa3-studio.
#   bash launch/studio.sh                          in the current folder
#   bash launch/studio.sh runs my_audio --model small-music
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/launch/setup.sh" --ui
exec "$root/.venv/bin/sa3-studio" "$@"
