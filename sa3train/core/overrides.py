"""Values as Hydra and OmegaConf read them: an override gives back exactly the value that it was made from.

Text that people type (paths, prompts, names) becomes an override here and nowhere else: quotes, commas, brackets,
`${…}` and backslashes in it are letters, never grammar. This needs neither library; the tests hold it against both.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from sa3train.core.errors import ConfigError

_BARE = re.compile(r"(?!(?i:true|false|null|nan|inf)$)[A-Za-z_/][A-Za-z0-9_/.-]*", re.ASCII)
_KEY = re.compile(r"(?!(?i:true|false|null|nan|inf)$)[A-Za-z_][A-Za-z0-9_.-]*", re.ASCII)
_BEFORE_QUOTE = re.compile(r'(\\*)("|\Z)')
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"' + r"|'(?:[^'\\]|\\.)*'", re.DOTALL)


def format_override(key: str, value: Any) -> str:
    """Format a setting as an override on the command line.

    Args:
        key: Full key, such as `data.dir`, or the name of a group.
        value: As for `format_value`.

    Returns:
        `key=value`.
    """
    return f"{key}={format_value(value)}"


def format_value(value: Any) -> str:
    """Format a value in Hydra's grammar, so that composing a configuration gives it back unchanged.

    Args:
        value: Text, a path, a number, True, False or None, or sequences and mappings of these. Keys of mappings are
            names, which the grammar cannot quote.

    Returns:
        Text for the right side of an override; plain words and paths stay as they are.

    Raises:
        ConfigError: A key is no plain name, or the value is of another type.
    """
    if isinstance(value, str | PurePath):
        text = str(value)
        return text if _BARE.fullmatch(text) else quote_text(escape_interpolations(text))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                raise ConfigError(f"{key!r} cannot be the key of a setting. Use letters, digits, dots, '-' and '_'.")
        return "{" + ",".join(f"{key}:{format_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return "[" + ",".join(map(format_value, value)) + "]"
    raise ConfigError(f"{value!r} cannot be the value of a setting. Use text, numbers, lists or mappings.")


def quote_text(text: str) -> str:
    """Quote text for Hydra's grammar; interpolations in it stay interpolations.

    Args:
        text: Any text.

    Returns:
        The text in double quotes. Backslashes count only before a quote, so `C:\\clips` needs none twice.
    """
    return '"' + _BEFORE_QUOTE.sub(lambda found: found[1] * 2 + found[2].replace('"', '\\"'), text) + '"'


def is_quoted(text: str) -> bool:
    """Tell whether text is one quoted value of Hydra's grammar.

    Args:
        text: The right side of an override.

    Returns:
        Whether it stands in single or double quotes as a whole.
    """
    return _QUOTED.fullmatch(text) is not None


def escape_interpolations(text: str) -> str:
    """Escape `${` for OmegaConf, on the command line and in YAML files that it reads.

    Args:
        text: Any text.

    Returns:
        Text that OmegaConf resolves to the given one.
    """
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def unescape_interpolations(text: str) -> str:
    """Undo `escape_interpolations`.

    Args:
        text: What it returned.

    Returns:
        The text given to it.
    """
    return re.sub(r"(\\+)\$\{", lambda found: found[1][: len(found[1]) // 2] + "${", text)


def flatten_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings.

    Args:
        values: The settings.
        prefix: What full keys begin with, such as "trainer.".

    Returns:
        Values by full key.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flatten_settings(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
