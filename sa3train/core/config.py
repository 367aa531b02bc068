"""Turn plain nested dictionaries (a composed YAML) into typed dataclasses, refusing what is unknown, missing or of
the wrong kind.

`build(Schema, values)` is the whole interface. A schema is a dataclass whose fields may be other dataclasses,
`Literal`, unions, `list[X]`,
`tuple[X, ...]`, `dict[str, X]`, numbers, booleans, text or `Any`. Ranges are checked in a schema's own
`__post_init__` by raising `ConfigError`.
Schemas carry no defaults: the YAML files in `conf/` hold each default once, with a comment saying what it does.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from sa3train.core.errors import ConfigError

Schema = TypeVar("Schema")

MISSING = "???"
"""What a YAML writes for a value that the user must give."""


def build(schema: type[Schema], values: Mapping[str, Any]) -> Schema:
    """An instance of the dataclass `schema` from `values`.

    Raises `ConfigError` naming the full key (`adapter.rank`) when a key is unknown (with the closest known one), a
    value is missing, or a value is of
    another type than the schema's.
    """
    check_keys(schema, values)
    built: Schema = _convert(schema, values, "")
    return built


def check_keys(schema: type, values: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if `values` has keys, at any depth, that `schema` does not know."""
    unknown = list(_unknown(schema, values, ""))
    if unknown:
        raise ConfigError(unknown_key_message(schema, unknown))


def known_keys(schema: Any, prefix: str = "") -> list[str]:
    """Every full key of `schema`, sections included, in order."""
    keys: list[str] = []
    for name, kind in _fields(schema).items():
        keys.append(prefix + name)
        section = _dataclass_of(kind)
        if section is not None:
            keys += known_keys(section, f"{prefix}{name}.")
    return keys


def is_known(schema: type, key: str) -> bool:
    """Whether the dotted `key` is in `schema`, or lies inside one of its free-form dictionaries."""
    kind: Any = schema
    for name in key.split("."):
        section = _dataclass_of(kind)
        if section is None:
            return _is_mapping(kind)
        fields = _fields(section)
        if name not in fields:
            return False
        kind = fields[name]
    return True


def unknown_key_message(schema: type, unknown: Iterable[str]) -> str:
    """What to tell a user about keys that `schema` does not have."""
    known = known_keys(schema)
    lines = []
    for key in unknown:
        close = closest(key, known)
        hint = f" Did you mean '{close}'?" if close else f" Known at this place: {_siblings(known, key)}."
        lines.append(f"unknown setting '{key}'.{hint}")
    return "\n       ".join(lines)


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`: whole keys first, then keys whose last part is alike."""
    candidates = list(known)
    whole = difflib.get_close_matches(name, candidates, n=1, cutoff=0.75)
    if whole:
        return whole[0]
    last = name.rpartition(".")[2]
    by_last = {candidate.rpartition(".")[2]: candidate for candidate in reversed(candidates)}
    similar = difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.75)
    return by_last[similar[0]] if similar else None


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Full keys whose values differ between two nested dictionaries, each with its old and new value (`None` where
    absent).
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for name in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed |= differences(before, after, f"{prefix}{name}.")
        elif _plain(before) != _plain(after):
            changed[prefix + name] = (before, after)
    return changed


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _fields(schema: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def _dataclass_of(kind: Any) -> Any | None:
    """The dataclass inside `kind` (also inside `X | None`), if there is one."""
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _is_mapping(kind: Any) -> bool:
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    return any(option is Any or typing.get_origin(option) is dict for option in options)


def _unknown(schema: Any, values: Mapping[str, Any], prefix: str) -> Iterable[str]:
    fields = _fields(schema)
    for key, value in values.items():
        if key not in fields:
            yield f"{prefix}{key}"
        elif isinstance(value, Mapping) and (section := _dataclass_of(fields[key])) is not None:
            yield from _unknown(section, value, f"{prefix}{key}.")


def _siblings(known: list[str], key: str) -> str:
    parent = key.rpartition(".")[0]
    same_level = [name for name in known if name.rpartition(".")[0] == parent]
    return ", ".join(same_level or [name for name in known if "." not in name])


def _convert(kind: Any, value: Any, key: str) -> Any:
    """`value` as `kind`; `key` is its full name."""
    if kind is Any:
        return value
    if _is_union(kind):
        return _convert_union(kind, value, key)
    if value == MISSING and isinstance(value, str):
        raise ConfigError(f"'{key}' must be given, for example {key}=VALUE.")
    if dataclasses.is_dataclass(kind):
        return _convert_section(kind, value, key)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"'{key}' is {value!r}; choose one of: {', '.join(map(str, arguments))}.")
        return value
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(_convert(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {name: _convert(arguments[1], item, f"{key}.{name}") for name, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is None and type(value) is kind:
        return value
    raise ConfigError(f"'{key}' must be {_describe(kind)}, but is {value!r}.")


def _convert_section(kind: Any, value: Any, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"'{key}' must be a section with keys, but is {value!r}.")
    arguments = {}
    for name, field_kind in _fields(kind).items():
        full = f"{key}.{name}" if key else name
        if name not in value:
            raise ConfigError(f"'{full}' is missing from the configuration.")
        arguments[name] = _convert(field_kind, value[name], full)
    return kind(**arguments)


def _convert_union(kind: Any, value: Any, key: str) -> Any:
    options = typing.get_args(kind)
    if value is None and type(None) in options:
        return None
    real = [option for option in options if option is not type(None)]
    if len(real) == 1:
        return _convert(real[0], value, key)
    exact = [option for option in real if type(value) is option]
    for option in [*exact, *(option for option in real if option not in exact)]:
        try:
            return _convert(option, value, key)
        except ConfigError:
            continue
    raise ConfigError(f"'{key}' must be {' or '.join(_describe(option) for option in options)}, but is {value!r}.")


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    origin = typing.get_origin(kind)
    if origin in (list, tuple):
        return f"a list, each item {_describe(typing.get_args(kind)[0])}"
    if origin is dict:
        return "a mapping"
    if origin is typing.Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    return names.get(kind, getattr(kind, "__name__", str(kind)))
