"""Two places where Hydra's own course is changed: what `--help` composes, and what a sweep checks before it starts."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sa3train.core.errors import ConfigError, SA3Error

_HELP_FLAGS = ("--help", "-h")


@contextmanager
def share_help_queries(arguments: Sequence[str]) -> Iterator[None]:
    """Share one copy of the configuration among Hydra's queries without overrides while `--help` is printed.

    Hydra lists every group's options by a query of its own, and deep-copies the composed configuration's sources for
    each: 110 copies took half of the second that `sa3-train --help` needs on a slow core. It has no public switch for
    that, so its private loader is patched here and nowhere else; a test fails when it changes.

    Args:
        arguments: Of the command line.

    Yields:
        Nothing.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    name = "_parse_overrides_and_create_caching_repo"
    original = getattr(ConfigLoaderImpl, name, None)
    if original is None or not set(_HELP_FLAGS) & set(arguments):  # another Hydra: leave it alone
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


@contextmanager
def check_jobs_first(build: Callable[[Any], object]) -> Iterator[None]:
    """Build the settings of all jobs of a sweep where Hydra composes them, before the first job starts.

    Args:
        build: Builds the settings of a job from its configuration.

    Yields:
        Nothing.

    Raises:
        ConfigError: Jobs have settings that cannot be.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.plugins.sweeper import Sweeper
    from omegaconf import open_dict

    original = Sweeper.validate_batch_is_legal

    def validate(self: Sweeper, batch: Sequence[Sequence[str]]) -> None:
        assert self.hydra_context is not None
        assert self.config is not None
        faults: list[str] = []
        current = HydraConfig.instance()
        before = current.cfg
        logging.disable(logging.WARNING)  # each job says it again
        try:
            for overrides in batch:
                config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
                current.set_config(config)
                with open_dict(config):
                    del config["hydra"]
                try:
                    build(config)
                except SA3Error as error:
                    faults.append(str(error))
        finally:
            logging.disable(logging.NOTSET)
            current.cfg = before
        if faults:
            lines = [f"{len(faults)} of {len(batch)} jobs of the sweep cannot run:", *dict.fromkeys(faults)]
            raise ConfigError("\n       ".join(lines))

    Sweeper.validate_batch_is_legal = validate  # type: ignore[method-assign]
    try:
        yield
    finally:
        Sweeper.validate_batch_is_legal = original  # type: ignore[method-assign]
