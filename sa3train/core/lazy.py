"""Public names of a package, imported on first use, so that `--help` and `import sa3train` stay light."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def make_getattr(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Make a package's `__getattr__` (PEP 562) that imports each public name on first use.

    Args:
        package: Dotted name of the package, its `__name__`.
        modules: Module of each public name, relative to the package, such as `{"Generator": "generator"}`.

    Returns:
        A function to assign to `__getattr__` in the package's `__init__.py`.
    """

    def get_attribute(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    return get_attribute
