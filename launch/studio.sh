#!/usr/bin/env bash
# Set up and start the studio, a local web page, with nano: http://127.0.0.1:7860. Arguments go to sa3-studio.
#   bash launch/studio.sh my_pack                            reads my_pack, writes to ./sa3-studio
#   bash launch/studio.sh my_pack runs --model small-music   reads two folders
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/launch/setup.sh" --ui
exec "$root/.venv/bin/sa3-studio" "$@"
