"""The corpus composer and the recipes are scripts that import their siblings: their folders go on the path."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
for folder in ("datasets", "datasets/nano", "recipes/nano"):
    sys.path.insert(0, str(ROOT / folder))
