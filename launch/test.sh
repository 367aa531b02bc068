#!/usr/bin/env bash
# All checks that must pass before a commit: style, types, import direction, tests. Arguments go to pytest.
#   bash launch/test.sh                   everything
#   bash launch/test.sh -m "not slow"     the fast tier: without slow tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh --dev
bin=.venv/bin

$bin/ruff check .
$bin/ruff format --check .
$bin/mypy
$bin/lint-imports
# One torch thread per worker: for many small tests, two workers are faster than one worker with two threads.
OMP_NUM_THREADS=1 $bin/pytest -n "${SA3TRAIN_TEST_WORKERS:-2}" --dist loadscope "$@"
