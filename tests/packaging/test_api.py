"""docs/api.md lists what the packages export. `python tests/packaging/test_api.py` writes it again."""

import importlib
import inspect
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "api.md"
HEADER = """# Public API

What each package exports: `from sa3train.PACKAGE import NAME`. Modules and names that are not listed here may change
without notice. `python tests/packaging/test_api.py` writes this page from the packages' stubs (`__init__.pyi`) and
docstrings.
"""


def list_packages() -> list[str]:
    """List the packages of sa3train that export something (they have a stub), and `compat`, by dotted name."""
    stubs = (ROOT / "sa3train").rglob("__init__.pyi")
    return sorted([*(".".join(path.parent.relative_to(ROOT).parts) for path in stubs), "sa3train.compat"])


def summarize(item: object) -> str:
    """Return the first line of an item's docstring; nothing for plain values, whose type documents another thing."""
    documented = inspect.isclass(item) or callable(item) or inspect.ismodule(item)
    return (inspect.getdoc(item) or "").partition("\n")[0] if documented else ""


def render_page() -> str:
    """Render docs/api.md from the packages."""
    parts = [HEADER]
    for name in list_packages():
        package = importlib.import_module(name)
        summary = (package.__doc__ or "").strip().partition("\n\n")[0].replace("\n", " ")
        parts.append(f"\n## {name}\n\n{summary}\n\n| name | |\n|---|---|\n")
        for public in sorted(package.__all__, key=str.lower):
            line = summarize(getattr(package, public)).replace("|", "\\|")
            parts.append(f"| `{public}` | {line} |\n")
    return "".join(parts)


def test_the_page_lists_what_the_packages_export() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_page(), "run: python tests/packaging/test_api.py"


@pytest.mark.parametrize("name", list_packages())
def test_exports_exist_and_are_sorted(name: str) -> None:
    package = importlib.import_module(name)
    assert len(set(package.__all__)) == len(package.__all__)
    for public in package.__all__:
        assert getattr(package, public) is not None


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")
