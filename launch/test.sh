#!/usr/bin/env bash
# Everything that must hold before a commit: style, types, import direction, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh --dev
bin=.venv/bin

$bin/ruff check .
$bin/ruff format --check .
$bin/mypy
$bin/lint-imports
# One torch thread a worker: two workers on two cores beat one worker on two threads for many small tests.
OMP_NUM_THREADS=1 $bin/pytest -n "${SA3TRAIN_TEST_WORKERS:-2}" --dist loadscope "$@"
