"""Typed settings: declaring them, building them from a composed YAML, and messages about wrong ones.

`build(Schema, values)` turns plain nested dictionaries into dataclasses and refuses what is unknown, missing or of the
wrong type. The fields of a schema may be other dataclasses, `Literal`, unions, `list[X]`, `tuple[X, ...]`,
`dict[str, X]`, numbers, booleans, text or `Any`. `setting` declares a field with its default, unit, range and help;
`check_settings`, called in `__post_init__`, checks the ranges. Numbers are finite in every setting.
"""

import contextlib
import copy
import dataclasses
import json
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from sa3train.core.errors import ConfigError, SA3Error
from sa3train.core.text import shorten, suggest_name

Schema = TypeVar("Schema")

MISSING = "???"
"""Value of a required setting in YAML; the user must override it."""

MAX_COUNT = 10**9
"""Largest number of steps, clips and the like: beyond any use, and far below what overflows."""

MAX_SEED = 2**63 - 1

MAX_TEXT = 10_000
"""Most characters of a text."""

DEVICES = "cpu, cuda, cuda:N, xpu or mps; AMD's GPUs are cuda"
"""Devices that can be named, for help and errors."""

TextForm = typing.Literal["any", "filled", "path"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a settings dataclass declares about one field.

    Attributes:
        help: What the setting does, as one or two plain sentences.
        unit: Unit of a number, such as "seconds"; empty for none.
        min: Smallest allowed number; limits hold for each number in a list or mapping too.
        max: Largest allowed number.
        above: Numbers must be greater than this.
        below: Numbers must be less than this.
        choices: Allowed values; those of a `Literal` annotation need not be repeated.
        items: Fewest and most items of a list or mapping.
        text: Form of a text: any, one that is filled (not empty), or a path.
        characters: Most characters of a text.
        label: Name in a form; empty for the setting's own name.
        flags: Command-line flags; none for the setting's own name with dashes.
    """

    help: str
    unit: str = ""
    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    items: tuple[int, int] = (0, MAX_TEXT)
    text: TextForm = "any"
    characters: int = MAX_TEXT
    label: str = ""
    flags: tuple[str, ...] = ()

    def describe_range(self) -> str:
        """Describe the allowed numbers.

        Returns:
            Text such as "from 1 to 8" or "above 0 and at most 1", with the unit; empty without limits.
        """
        limits = {"at least": self.min, "above": self.above, "at most": self.max, "below": self.below}
        words = " and ".join(f"{word} {_format_limit(limit)}" for word, limit in limits.items() if limit is not None)
        if self.min is not None and self.max is not None:
            words = f"from {_format_limit(self.min)} to {_format_limit(self.max)}"
        return f"{words} {self.unit}" if words and self.unit else words

    def allows(self, number: float) -> bool:
        """Check a number against the limits; NaN and infinity are never allowed.

        Args:
            number: The value to check.

        Returns:
            Whether it lies within the limits.
        """
        return (
            -math.inf < number < math.inf
            and (self.min is None or number >= self.min)
            and (self.max is None or number <= self.max)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def find_problem(self, value: Any) -> str:
        """Find what is wrong with a value, or with one in a list or mapping.

        Args:
            value: The value; its type is not checked.

        Returns:
            Words to follow "must", such as "be at least 1"; empty for an allowed value.
        """
        if isinstance(value, list | tuple | Mapping):
            low, high = self.items
            if not low <= len(value) <= high:
                return f"have {low if low == high else f'{low} to {high}'} items"
            items = value.values() if isinstance(value, Mapping) else value
            return next(filter(None, map(self.find_problem, items)), "")
        if isinstance(value, int | float) and not isinstance(value, bool) and not self.allows(value):
            return f"be {self.describe_range() or 'a finite number'}"
        return self._find_text_problem(value) if isinstance(value, str) else ""

    def _find_text_problem(self, text: str) -> str:
        if self.text != "any" and not text.strip():
            return "not be empty"
        if len(text) > self.characters:
            return f"have at most {self.characters} characters"
        encoded = text.encode("utf-8", "replace")
        if "\0" in text or encoded.decode("utf-8") != text:
            return "be valid text, without NUL characters"
        longest = max(map(len, re.split(rb"[/\\]", encoded))) if "://" not in text else 0
        if self.text == "path" and (len(encoded) > _MAX_PATH_BYTES or longest > _MAX_NAME_BYTES):
            return f"be a path: its names may have {_MAX_NAME_BYTES} bytes, the whole {_MAX_PATH_BYTES}"
        return ""


_MAX_FLOAT = 10**300
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 4095
"""Limits of the usual file systems."""


def _format_limit(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def setting(default: Any = dataclasses.MISSING, *, help: str, **declared: Any) -> Any:
    """Declare one field of a settings dataclass: value, meaning, unit and range in one place.

    Command lines, forms, range checks and the YAML files in `conf/` are made from or checked against this declaration.

    Args:
        default: Value when none is given; a list or dictionary is copied for each instance. Without it, the field must
            be given.
        help: What the setting does, as one or two plain sentences.
        **declared: Further fields of `Setting`, such as `min=1`.

    Returns:
        A dataclass field with a `Setting` as its metadata "setting".
    """
    metadata = {"setting": Setting(help, **declared)}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def list_settings(schema: Any) -> dict[str, Setting]:
    """List the declared settings of a dataclass or an instance of one.

    Args:
        schema: The dataclass or instance.

    Returns:
        Each field declared by `setting`, by its name; the choices of a `Literal` annotation are filled in.
    """
    kinds = _get_field_types(schema if isinstance(schema, type) else type(schema))
    declared = {field.name: field.metadata.get("setting") for field in dataclasses.fields(schema)}
    return {
        name: found if found.choices else dataclasses.replace(found, choices=_list_choices(kinds[name]))
        for name, found in declared.items()
        if found
    }


def check_settings(settings: Any, section: str = "", error: type[SA3Error] = ConfigError) -> None:
    """Check every declared field of a settings object against its limits and choices; call it in `__post_init__`.

    Args:
        settings: Instance of a dataclass whose fields are declared by `setting`.
        section: Name of its section, put in front of the setting's name in messages: "trainer" for
            "trainer.max_steps"; empty for none.
        error: Class of the error raised.

    Raises:
        SA3Error: (as `error`) naming the setting, its value and what is allowed.
    """
    kinds = _get_field_types(type(settings))
    for name, declared in list_settings(settings).items():
        full, value = f"{section}.{name}" if section else name, getattr(settings, name)
        if not declared.choices and not _has_type(kinds[name], value):
            raise error(f"{full}={shorten(repr(value))} must be {_describe(kinds[name])}.")
        items = list(value) if isinstance(value, list | tuple) else [value]
        for item in items if declared.choices else ():
            if items.count(item) > 1:
                raise error(f"{full} names {item} twice. Remove one.")
            if item is not None:
                check_choice(full, item, declared.choices, error)
        if problem := declared.find_problem(value):
            raise error(f"{full}={shorten(str(value))} must {problem}.")


def _has_type(kind: Any, value: Any) -> bool:
    """Tell whether a value that Python code gives is of a plain type; other types are left to who uses them."""
    if len(options := _list_options(kind)) > 1:
        return any(_has_type(option, value) for option in options)
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, str | os.PathLike)
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    return isinstance(value, kind) if kind in (bool, type(None)) else True


def check_choice(name: str, value: Any, choices: Iterable[Any], error: type[SA3Error] = ConfigError) -> None:
    """Check a value that must be one of a few.

    Args:
        name: Full name of the setting.
        value: Its value.
        choices: The allowed values.
        error: Class of the error raised.

    Raises:
        SA3Error: (as `error`) naming the closest choice, or all of them.
    """
    known = list(choices)
    if value not in known:
        names = [str(choice) for choice in known]
        hint = suggest_name(str(value), names, f"Choose from: {', '.join(names)}.")
        raise error(f"{name}={shorten(str(value))} is unknown. {hint}")


def _list_choices(kind: Any) -> tuple[Any, ...]:
    """List the values of `Literal[…]` or `Literal[…] | None`; none for types that admit others too."""
    choices: list[Any] = []
    for option in _list_options(kind):
        if typing.get_origin(option) is not typing.Literal and option is not type(None):
            return ()
        choices += typing.get_args(option)
    return tuple(choices)


def build(schema: type[Schema], values: Mapping[str, Any], *, ignore_unknown: bool = False) -> Schema:
    """Build a settings dataclass from plain values, and check them against its declarations.

    Args:
        schema: The dataclass.
        values: Its values; sections are nested mappings.
        ignore_unknown: Leave out keys that the dataclass does not have, instead of refusing them.

    Returns:
        An instance.

    Raises:
        ConfigError: A key is unknown, or a value is missing, of the wrong type or out of range. The message has the
            full key (`adapter.rank`), and for an unknown one the closest known key.
    """
    unknown = [] if ignore_unknown else list(_find_unknown(schema, values, ""))
    if unknown:
        raise ConfigError(describe_unknown_keys(schema, unknown))
    built: Schema = _convert(schema, values, "")
    return built


def list_keys(schema: Any, prefix: str = "") -> list[str]:
    """List the full keys of a schema, sections included, in order.

    Args:
        schema: The dataclass.
        prefix: Text before each key.

    Returns:
        Keys such as "adapter" and "adapter.rank".
    """
    keys: list[str] = []
    for name, kind in _get_field_types(schema).items():
        keys.append(prefix + name)
        section, item = _find_dataclass(kind), (typing.get_args(kind) or (None,))[0]
        if section is not None:
            keys += list_keys(section, f"{prefix}{name}.")
        elif dataclasses.is_dataclass(item):
            keys += list_keys(item, f"{prefix}{name}[0].")
    return keys


def is_known(schema: type, key: str) -> bool:
    """Tell whether a key is in a schema, or inside one of its free-form dictionaries.

    Args:
        schema: The dataclass.
        key: Full key with dots.

    Returns:
        Whether it may be set.
    """
    kind: Any = schema
    for name in key.split("."):
        section = _find_dataclass(kind)
        if section is None:
            return _is_mapping(kind)
        fields = _get_field_types(section)
        if name not in fields:
            return False
        kind = fields[name]
    return True


def describe_unknown_keys(schema: type, unknown: Iterable[str]) -> str:
    """Describe keys that a schema does not have, with the closest known ones.

    Args:
        schema: The dataclass.
        unknown: Full keys.

    Returns:
        One line per key.
    """
    known = list_keys(schema)
    lines = []
    for key in unknown:
        hint = suggest_name(key, known, f"Known settings: {_list_siblings(known, key)}.")
        lines.append(f"unknown setting '{key}'. {hint}")
    return "\n       ".join(lines)


def find_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Find the keys whose values differ between two nested dictionaries.

    Args:
        old: First dictionary.
        new: Second dictionary.
        prefix: Text before each key.

    Returns:
        Old and new value by full key, None where a key is absent.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for name in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed |= find_differences(before, after, f"{prefix}{name}.")
        elif _normalize(before) != _normalize(after):
            changed[prefix + name] = (before, after)
    return changed


def _normalize(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _get_field_types(schema: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def _find_dataclass(kind: Any) -> Any | None:
    """Find the dataclass inside `kind`, also inside `X | None`."""
    return next(filter(dataclasses.is_dataclass, _list_options(kind)), None)


def _list_options(kind: Any) -> tuple[Any, ...]:
    """List the types of a union; another type is its own option."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _is_mapping(kind: Any) -> bool:
    return any(option is Any or typing.get_origin(option) is dict for option in _list_options(kind))


def _find_unknown(schema: Any, values: Mapping[str, Any], prefix: str) -> Iterable[str]:
    fields = _get_field_types(schema)
    for key, value in values.items():
        if key not in fields:
            yield f"{prefix}{key}"
        elif isinstance(value, Mapping) and (section := _find_dataclass(fields[key])) is not None:
            yield from _find_unknown(section, value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and (items := typing.get_args(fields[key])):
            for index, item in enumerate(value):
                if dataclasses.is_dataclass(items[0]) and isinstance(item, Mapping):
                    yield from _find_unknown(items[0], item, f"{prefix}{key}[{index}].")


def _list_siblings(known: list[str], key: str) -> str:
    parent = key.rpartition(".")[0]
    same_level = [name for name in known if name.rpartition(".")[0] == parent]
    return ", ".join(same_level or [name for name in known if "." not in name])


def _convert(kind: Any, value: Any, key: str, allowed: str = "") -> Any:
    """Convert `value` to `kind`; `key` is its full name and `allowed` its range, for messages."""
    if kind is Any:
        return value
    if len(options := _list_options(kind)) > 1:
        return _convert_union(options, value, key, allowed)
    if value == MISSING and isinstance(value, str):
        raise ConfigError(f"'{key}' must be given, for example {key}=VALUE.")
    if dataclasses.is_dataclass(kind):
        return _convert_section(kind, value, key)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise ConfigError(f"'{key}' is {shorten(repr(value))}; choose one of: {', '.join(map(str, arguments))}.")
        return value
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(_convert(arguments[0], item, f"{key}[{index}]", allowed) for index, item in enumerate(value))
    if origin is dict and isinstance(value, str):  # of the command line
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if origin is dict and isinstance(value, Mapping):
        return {name: _convert(arguments[1], item, f"{key}.{name}", allowed) for name, item in value.items()}
    if kind is float and type(value) is int and abs(value) < _MAX_FLOAT:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():  # 1e6
        return int(value)
    if origin is None and type(value) is kind:
        return value
    limits = f" ({allowed})" if allowed and not isinstance(value, Mapping | list | tuple) else ""
    advice = f""" Quote it: {key}="'{value}'".""" if kind is str and type(value) in (bool, int) else ""
    raise ConfigError(f"'{key}' must be {_describe(kind)}{limits}, but is {shorten(repr(value))}.{shorten(advice)}")


def _convert_section(kind: Any, value: Any, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"'{key}' must be a section with keys, but is {shorten(repr(value))}.")
    arguments, types_by_name = {}, _get_field_types(kind)
    for field in dataclasses.fields(kind):
        full = f"{key}.{field.name}" if key else field.name
        if field.name in value:
            declared = field.metadata.get("setting")
            allowed = declared.describe_range() if declared else ""
            arguments[field.name] = _convert(types_by_name[field.name], value[field.name], full, allowed)
        elif not key.endswith("]") or field.default is field.default_factory:  # both missing; items are written by hand
            raise ConfigError(f"'{full}' is missing.")
    made = kind(**arguments)
    check_settings(made, key)
    return made


def _convert_union(options: tuple[Any, ...], value: Any, key: str, allowed: str) -> Any:
    if value is None and type(None) in options:
        return None
    real = [option for option in options if option is not type(None)]
    if len(real) == 1:
        return _convert(real[0], value, key, allowed)
    for option in sorted(real, key=lambda option: type(value) is not option):  # the exact type first
        with contextlib.suppress(ConfigError):
            return _convert(option, value, key, allowed)
    raise ConfigError(f"'{key}' must be {' or '.join(map(_describe, options))}, but is {shorten(repr(value))}.")


def _describe(kind: Any) -> str:
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if len(options := _list_options(kind)) > 1:
        return " or ".join(map(_describe, options))
    origin = typing.get_origin(kind)
    if origin in (list, tuple):
        return f"a list, each item {_describe(typing.get_args(kind)[0])}"
    if origin is dict or dataclasses.is_dataclass(kind):
        return "a mapping"
    if origin is typing.Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    return names.get(kind, getattr(kind, "__name__", str(kind)))
