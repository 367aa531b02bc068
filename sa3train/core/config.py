"""Typed settings: declaring them, building them from a composed YAML, and messages about wrong ones.

`build(Schema, values)` turns plain nested dictionaries into dataclasses and refuses what is unknown, missing or of the
wrong type. The fields of a schema may be other dataclasses, `Literal`, unions, `list[X]`, `tuple[X, ...]`,
`dict[str, X]`, numbers, booleans, text or `Any`. `setting` declares a field with its default, unit, range and help;
`check_settings`, called in `__post_init__`, checks the ranges.
"""

import copy
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from sa3train.core.errors import ConfigError, SA3Error

Schema = TypeVar("Schema")

MISSING = "???"
"""Value of a required setting in YAML; the user must override it."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a settings dataclass declares about one field; see `setting`."""

    help: str
    unit: str = ""
    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    label: str = ""
    flags: tuple[str, ...] = ()

    def describe_range(self) -> str:
        """Describe the allowed numbers.

        Returns:
            Text such as "at least 1" or "above 0 and at most 1", with the unit; empty without limits.
        """
        limits = {"at least": self.min, "above": self.above, "at most": self.max, "below": self.below}
        words = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)
        return f"{words} {self.unit}" if words and self.unit else words

    def allows(self, number: float) -> bool:
        """Check a number against the limits; NaN is never allowed where there are any.

        Args:
            number: The value to check.

        Returns:
            Whether it lies within the limits.
        """
        return (
            (self.min is None or number >= self.min)
            and (self.max is None or number <= self.max)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    unit: str = "",
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Iterable[Any] = (),
    label: str = "",
    flags: Iterable[str] = (),
) -> Any:
    """Declare one field of a settings dataclass: value, meaning, unit and range in one place.

    Command lines, forms, range checks and the YAML files in `conf/` are made from or checked against this declaration.

    Args:
        default: Value when none is given; a list or dictionary is copied for each instance. Without it, the field must
            be given.
        help: What the setting does, as one or two plain sentences.
        unit: Unit of a number, such as "seconds"; empty for none.
        min: Smallest allowed number.
        max: Largest allowed number.
        above: Numbers must be greater than this.
        below: Numbers must be less than this.
        choices: Allowed values; those of a `Literal` annotation need not be repeated.
        label: Name in a form; empty for the setting's own name.
        flags: Command-line flags; none for the setting's own name with dashes.

    Returns:
        A dataclass field with a `Setting` as its metadata "setting". The limits hold for each number in a list or
        mapping too.
    """
    metadata = {"setting": Setting(help, unit, min, max, above, below, tuple(choices), label, tuple(flags))}
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
    declared = {
        field.name: field.metadata["setting"] for field in dataclasses.fields(schema) if "setting" in field.metadata
    }
    hints = typing.get_type_hints(schema if isinstance(schema, type) else type(schema))
    return {
        name: found if found.choices else dataclasses.replace(found, choices=_list_choices(hints[name]))
        for name, found in declared.items()
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
    for name, declared in list_settings(settings).items():
        full, value = f"{section}.{name}" if section else name, getattr(settings, name)
        if declared.choices:
            for item in _list_items(value):
                check_choice(full, item, declared.choices, error)
        elif allowed := declared.describe_range():
            numbers = [
                item for item in _list_items(value) if isinstance(item, int | float) and not isinstance(item, bool)
            ]
            if not all(map(declared.allows, numbers)):
                raise error(f"{full}={value} must be {allowed}.")


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
        close = find_closest(str(value), [str(choice) for choice in known])
        hint = f"Did you mean {close}?" if close else f"Choose from: {', '.join(map(str, known))}."
        raise error(f"{name}={value} is unknown. {hint}")


def _list_choices(kind: Any) -> tuple[Any, ...]:
    """List the values of `Literal[…]` or `Literal[…] | None`; none for types that admit others too."""
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    choices: list[Any] = []
    for option in options:
        if typing.get_origin(option) is not typing.Literal and option is not type(None):
            return ()
        choices += typing.get_args(option)
    return tuple(choices)


def _list_items(value: Any) -> list[Any]:
    """List the values of a mapping or sequence, or the value alone; none for None."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    return [] if value is None else [value]


def build(schema: type[Schema], values: Mapping[str, Any]) -> Schema:
    """Build a settings dataclass from plain values.

    Args:
        schema: The dataclass.
        values: Its values; sections are nested mappings.

    Returns:
        An instance.

    Raises:
        ConfigError: A key is unknown, a value is missing or of the wrong type. The message has the full key
            (`adapter.rank`), and for an unknown one the closest known key.
    """
    check_keys(schema, values)
    built: Schema = _convert(schema, values, "")
    return built


def check_keys(schema: type, values: Mapping[str, Any]) -> None:
    """Check that a schema knows all keys, at any depth.

    Args:
        schema: The dataclass.
        values: Nested mappings.

    Raises:
        ConfigError: A key is unknown.
    """
    unknown = list(_find_unknown(schema, values, ""))
    if unknown:
        raise ConfigError(describe_unknown_keys(schema, unknown))


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
        section = _find_dataclass(kind)
        if section is not None:
            keys += list_keys(section, f"{prefix}{name}.")
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
        close = find_closest(key, known)
        hint = f" Did you mean '{close}'?" if close else f" Known settings: {_list_siblings(known, key)}."
        lines.append(f"unknown setting '{key}'.{hint}")
    return "\n       ".join(lines)


def find_closest(name: str, known: Iterable[str]) -> str | None:
    """Find the known name most like a mistyped one: first among whole names, then by the part after the last dot.

    Args:
        name: What was written.
        known: Known names.

    Returns:
        The closest name, or None.
    """
    candidates = list(known)
    whole = difflib.get_close_matches(name, candidates, n=1, cutoff=0.75)
    if whole:
        return whole[0]
    last = name.rpartition(".")[2]
    by_last = {candidate.rpartition(".")[2]: candidate for candidate in reversed(candidates)}
    similar = difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.75)
    return by_last[similar[0]] if similar else None


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
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _is_mapping(kind: Any) -> bool:
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    return any(option is Any or typing.get_origin(option) is dict for option in options)


def _find_unknown(schema: Any, values: Mapping[str, Any], prefix: str) -> Iterable[str]:
    fields = _get_field_types(schema)
    for key, value in values.items():
        if key not in fields:
            yield f"{prefix}{key}"
        elif isinstance(value, Mapping) and (section := _find_dataclass(fields[key])) is not None:
            yield from _find_unknown(section, value, f"{prefix}{key}.")


def _list_siblings(known: list[str], key: str) -> str:
    parent = key.rpartition(".")[0]
    same_level = [name for name in known if name.rpartition(".")[0] == parent]
    return ", ".join(same_level or [name for name in known if "." not in name])


def _convert(kind: Any, value: Any, key: str) -> Any:
    """Convert `value` to `kind`; `key` is its full name."""
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
    for name, field_kind in _get_field_types(kind).items():
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
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    origin = typing.get_origin(kind)
    if origin in (list, tuple):
        return f"a list, each item {_describe(typing.get_args(kind)[0])}"
    if origin is dict:
        return "a mapping"
    if origin is typing.Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    return names.get(kind, getattr(kind, "__name__", str(kind)))
