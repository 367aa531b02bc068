#!/usr/bin/env bash
# A comment above `# @package` turns it off: Hydra reads a config file's header up to the first line that is no `# @`.
#
# With a license or a description above it, `# @package _global_` is an ordinary comment. The file is read without a
# word, and its values land under the name of its group: a file that is to set `lr` for the whole program sets `recipe.lr`.
# An empty line above it does no harm.
#
# Seen with: hydra-core 1.3.8, omegaconf 2.3.1, Python 3.11 (2026-11-30).
# What it means here: sa3train refuses such a file and says which line must be the first.
# Exits 1 when the behavior has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check hydra-core==1.3.8 omegaconf==2.3.1
mkdir -p "$work/conf/recipe"
printf 'lr: 0\n' >"$work/conf/main.yaml"
printf '# @package _global_\nlr: 1\n' >"$work/conf/recipe/first.yaml"
printf '\n# @package _global_\nlr: 1\n' >"$work/conf/recipe/empty_line.yaml"
printf '# Rates of the small model.\n# @package _global_\nlr: 1\n' >"$work/conf/recipe/comment.yaml"
"$work/venv/bin/python" - "$work/conf" <<'PYTHON'
import sys

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

found = {}
with initialize_config_dir(sys.argv[1], version_base=None):
    for name in ("first", "empty_line", "comment"):
        found[name] = OmegaConf.to_container(compose("main", overrides=[f"+recipe={name}"]))
        print(f"{name}: {found[name]}")
expected = {"first": {"lr": 1}, "empty_line": {"lr": 1}, "comment": {"lr": 0, "recipe": {"lr": 1}}}
sys.exit(found != expected)
PYTHON
