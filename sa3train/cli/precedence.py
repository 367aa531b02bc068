"""Whose value counts in a composed configuration, where Hydra's merging alone would not say.

A recipe suggests; what the user names decides. When two settings exclude each other (`ConflictError`), the one that the
user did not name gives way. A `???` in a chosen option must be filled, also over a value of its group.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sa3train.cli.config_files import GLOBAL, RECIPE, read_config
from sa3train.core.config import MISSING, build
from sa3train.core.errors import ConfigError, ConflictError
from sa3train.core.log import get_logger
from sa3train.core.overrides import flatten_settings

_logger = get_logger(__name__)
Schema = TypeVar("Schema")

_DEFAULT, _RECIPE, _OPTION, _NAMED = range(4)
"""Where a value comes from, the nearest to the user last: a group's default, the recipe, an option of a group that was
chosen by name or a configuration of the user's own, the command line."""


def build_composed(
    schema: type[Schema],
    values: dict[str, Any],
    command: str,
    suggest: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    check: Callable[[Schema], object] | None = None,
) -> Schema:
    """Build a settings dataclass from a configuration that Hydra has composed.

    Args:
        schema: The dataclass.
        values: The configuration; settings that give way are changed in it.
        command: Name of the command's own primary configuration.
        suggest: Gives values by full key that suit the others, and replace those of defaults and recipes.
        check: Checks the instance. Replaced values are logged after it: an error is not about them.

    Returns:
        An instance.

    Raises:
        ConfigError: As `build` and `check` do; or a `???` of a chosen option is not filled.
    """
    origins, missing = _trace_origins(command)
    for key, option in missing.items():
        if origins[key] < _NAMED or _get(values, key) in (None, MISSING):
            raise ConfigError(f"{option} needs {key}. Add {key}=VALUE.")
    notes: list[str] = []
    for key, value in (suggest(values) if suggest else {}).items():
        if _rank(origins, key) < _OPTION and (others := _get(values, key)) != value:
            notes.append(f"using {key}={value}, which suits this run, in place of {others}")
            _set(values, key, value)
    while True:
        try:
            settings = build(schema, values)
            break
        except ConflictError as error:
            ranks = {key: _rank(origins, key) for key in error.off}
            weaker = {
                key: off for key, off in error.off.items()
                if off is not ... and ranks[key] < max(ranks.values()) and _get(values, key) != off
            }  # fmt: skip
            if not weaker:
                raise
            stronger = ", ".join(key for key, rank in ranks.items() if rank == max(ranks.values()))
            for key, off in weaker.items():
                notes.append(f"{key}={_get(values, key)} gives way to {stronger}: using {off}")
                _set(values, key, off)
    if check:
        check(settings)
    for note in notes:
        _logger.info(note)
    return settings


def _trace_origins(command: str) -> tuple[dict[str, int], dict[str, str]]:
    """Trace the rank of each key that is not a default, and which keys a chosen option demands, with its name."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    if not HydraConfig.initialized():
        return {}, {}
    hydra = HydraConfig.get()
    # Read as they are: `${…}` in a path or an override is nothing that Hydra's own configuration could resolve.
    task: Any = OmegaConf.to_container(hydra.overrides.task)
    sources: Any = OmegaConf.to_container(hydra.runtime.config_sources)
    given = dict(argument.lstrip("+~").partition("=")[::2] for argument in task)
    folders = [Path(source["path"]) for source in sources if source["schema"] == "file"]
    origins: dict[str, int] = {}
    missing: dict[str, str] = {}

    def add(body: Mapping[str, Any], rank: int, name: str) -> None:
        for key, value in body.items():
            origins[key] = max(rank, origins.get(key, rank))
            if value == MISSING:
                missing[key] = name
            elif rank > _RECIPE:
                missing.pop(key, None)

    choices = {group: option for group, option in hydra.runtime.choices.items() if option and "/" not in group}
    for group, option in sorted(choices.items(), key=lambda choice: choice[0] != RECIPE):
        if group == RECIPE or group in given:
            rank = _RECIPE if group == RECIPE else _OPTION
            add(_read_option(folders, group, option), rank, f"{group}={option}")
    primary = str(hydra.job.config_name)
    if primary not in (command, "config"):  # "config" is that of a resumed run
        add(_read_option(folders, "", primary), _OPTION, primary)
    origins |= dict.fromkeys((key for key in given if key not in choices), _NAMED)
    return origins, missing


def _rank(origins: Mapping[str, int], key: str) -> int:
    """Rank of a key, or of a section above it that was given as a whole."""
    parts = key.split(".")
    return max(origins.get(".".join(parts[:depth]), _DEFAULT) for depth in range(1, len(parts) + 1))


def _read_option(folders: list[Path], group: str, option: str) -> dict[str, Any]:
    """Read the values of an option by full key, with those of the options it is made from, but its group's base."""
    path = next((path for folder in folders if (path := folder / group / f"{option}.yaml").is_file()), None)
    if path is None:
        return {}
    body, package = read_config(path)
    prefix = "" if not group or package == GLOBAL else f"{group}."
    found: dict[str, Any] = {}
    for entry in body.pop("defaults", []):
        if isinstance(entry, str) and entry not in ("_self_", "base"):
            found |= _read_option(folders, group, entry)
    return found | flatten_settings(body, prefix)


def _get(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        values = values[section]
    values[name] = value
