"""Configuration files of the user's own (`--config-dir`): found, and refused where Hydra misreads or ignores them."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sa3train.core.errors import ConfigError
from sa3train.core.files import get_config_dir
from sa3train.core.overrides import format_override
from sa3train.core.text import list_few

RECIPE = "recipe"
GLOBAL = "_global_"
SHOWN_RUNS = 3
_PACKAGE = re.compile(r"\s*#\s*@package\s+(\S+)")
_MISREAD = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
"""Numbers that YAML 1.1 reads in base 8 (`010` is 8) or 60 (`1:30` is 90)."""


def find_flag(arguments: Sequence[str], *names: str) -> str | None:
    """Find the value of a flag.

    Args:
        arguments: Of the command line.
        names: Of the flag, such as "--config-dir" and "-cd".

    Returns:
        The value, or None.
    """
    for flag, following in zip(arguments, [*arguments, ""][1:], strict=True):
        name, equals, value = flag.partition("=")
        if name in names:
            return value if equals else following
    return None


def suggest_runs(folder: str, setting: str) -> str:
    """Suggest the runs in a folder that is none itself.

    Args:
        folder: The folder, as the user wrote it.
        setting: What is written before a run, such as "resume=".

    Returns:
        A sentence with the newest of them; empty where there are none.
    """
    if not folder or not Path(folder).is_dir():
        return ""
    from sa3train.reports.runs import find_runs

    names = [f"{setting}{run.path.as_posix()}" for run in find_runs([Path(folder)])]
    return f"It holds runs: {list_few(names, SHOWN_RUNS)}." if names else ""


def find_config_dir(arguments: Sequence[str]) -> Path | None:
    """Find the folder given with `--config-dir` or `-cd`.

    Args:
        arguments: Of the command line.

    Returns:
        The folder, or None.
    """
    folder = find_flag(arguments, "--config-dir", "-cd")
    return None if folder is None else Path(folder)


def read_config(path: Path) -> tuple[dict[str, Any], str]:
    """Read a configuration file as Hydra does, but refuse numbers that are not what they look like.

    Args:
        path: The YAML file.

    Returns:
        Its settings, and its `@package`; empty without one.

    Raises:
        ConfigError: It cannot be read, or holds no settings by name, or a number in base 8 or 60.
    """
    import yaml
    from omegaconf import OmegaConf

    try:
        text = path.read_bytes().decode("utf-8")
        body: Any = OmegaConf.to_container(OmegaConf.load(path))
        plain = [token for token in yaml.scan(text) if isinstance(token, yaml.ScalarToken) and token.plain]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text. Save it as UTF-8.") from error
    except (yaml.YAMLError, OSError) as error:
        raise ConfigError(f"cannot read {path}: {error}. Correct that file.") from error
    if text.startswith("\ufeff"):  # Hydra would not see the line `# @package` after it
        raise ConfigError(f"{path} begins with a byte order mark. Save it as UTF-8 without one.")
    if not isinstance(body, dict):
        raise ConfigError(f"{path} must hold settings by name, such as `seed: 1`.")
    for token in plain:
        if _MISREAD.fullmatch(token.value):
            raise ConfigError(
                f"{path}, line {token.start_mark.line + 1}: YAML reads {token.value} in base 8 or 60. "
                "Write a decimal number, without leading zeros or colons, or quote it if it is text."
            )
    package = _PACKAGE.match(text)  # Hydra reads it in the first line alone
    return body, package[1] if package else ""


def check_config_dir(folder: Path, arguments: Sequence[str]) -> None:
    """Check the user's own files that a command line chooses, with those they are made from.

    Args:
        folder: That of `--config-dir`.
        arguments: Of the command line.

    Raises:
        ConfigError: A file cannot be read, or would have no effect.
    """
    for shipped in sorted(get_config_dir().rglob("*.yaml")):
        own = folder / shipped.relative_to(get_config_dir())
        if own.is_file() and own.read_bytes() != shipped.read_bytes():
            raise ConfigError(f"{own} has no effect: sa3train has a file of that name, which counts. Rename yours.")
    chosen = [argument.lstrip("+").partition("=") for argument in arguments if argument[:1] != "-"]
    pending = [(key.partition("@")[0], option) for key, _, value in chosen for option in value.split(",")]
    pending.append(("", find_flag(arguments, "--config-name", "-cn") or ""))
    checked = set()
    while pending:
        group, option = pending.pop()
        path = folder / group / f"{option}.yaml"
        if path in checked or not os.path.lexists(path):
            continue
        checked.add(path)
        body, package = read_config(path)
        if group == RECIPE and package != GLOBAL:
            raise ConfigError(f"{path} sets values of other groups, so its first line must be: # @package {GLOBAL}")
        if not group and "defaults" not in body:
            raise ConfigError(f"{path} must say what it changes. Begin it with: defaults: [train, _self_]")
        for entry in body.get("defaults", []):
            made_from = entry if isinstance(entry, dict) else {group: entry}
            pending += [(str(key).split()[-1].strip("/"), str(name)) for key, name in made_from.items() if key]


def adapt_options(
    arguments: Sequence[str], shorthand: Mapping[str, str] = MappingProxyType({}), *, is_resumed: bool = False
) -> list[str]:
    """Quote options whose name Hydra takes for a number (`recipe=5`); refuse options in a resumed run, which has none.

    Args:
        arguments: Of the command line.
        shorthand: Full key by shorthand, which replaces an option in a resumed run.
        is_resumed: Whether the settings are those of an earlier run.

    Returns:
        The arguments for Hydra.

    Raises:
        ConfigError: A resumed run is given an option.
    """
    adapted = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.isalpha() and (get_config_dir() / key).is_dir() and re.fullmatch(r"(?!null$)[\w.+-]+", value):
            if is_resumed and key not in shorthand:
                raise ConfigError(
                    f"{argument} cannot be chosen: a resumed run has the settings in its config.yaml. Change single "
                    "ones, such as trainer.max_steps=4000."
                )
            argument = format_override(shorthand[key] if is_resumed else key, value)
        adapted.append(argument)
    return adapted
