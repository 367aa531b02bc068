"""The documents of the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    path
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*/*/*.md")])
    if not {".venv", "shared", "golden"} & set(path.relative_to(ROOT).parts)
]
