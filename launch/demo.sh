#!/usr/bin/env bash
# Demo on the sample set: audit, encode, train an adapter, generate in all three modes. Arguments go to sa3-quickstart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
exec .venv/bin/sa3-quickstart "$@"
