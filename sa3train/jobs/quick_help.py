"""`--help` of a Hydra command in half the time.

Hydra lists every config group's options by a query of its own, and deep-copies the composed config's sources for each:
110 copies took half of the second that `sa3-train --help` needs on a slow core.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

FLAGS = ("--help", "-h")


@contextmanager
def quick_help(arguments: Sequence[str]) -> Iterator[None]:
    """While inside, Hydra's queries without overrides share one copy; nothing changes unless help is asked for."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    name = "_parse_overrides_and_create_caching_repo"
    original = getattr(ConfigLoaderImpl, name, None)
    if original is None or not set(FLAGS) & set(arguments):  # another Hydra is left alone
        yield
        return
    known: dict[int, Any] = {}

    def shared(self: ConfigLoaderImpl, config_name: str | None, overrides: list[str]) -> Any:
        if config_name is not None or overrides:
            return original(self, config_name, overrides)
        if id(self) not in known:
            known[id(self)] = original(self, config_name, overrides)
        return known[id(self)]

    setattr(ConfigLoaderImpl, name, shared)
    try:
        yield
    finally:
        setattr(ConfigLoaderImpl, name, original)
