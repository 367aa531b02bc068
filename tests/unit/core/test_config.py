"""Plain values become typed settings; what is unknown, missing or of another kind is refused by its full key."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from sa3train.core.config import (
    build,
    check_settings,
    find_closest,
    find_differences,
    is_known,
    list_keys,
    list_settings,
    setting,
)
from sa3train.core.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    rank: int
    kind: Literal["lora", "dora"]
    include: list[str] | None
    options: dict[str, Any]


@dataclass(frozen=True)
class Outer:
    lr: float
    name: str | None
    devices: int | Literal["auto"]
    weighting: str | list[float]
    betas: tuple[float, ...]
    inner: Inner


def values(**changes: Any) -> dict[str, Any]:
    inner = {"rank": 4, "kind": "lora", "include": None, "options": {"a": 1}}
    whole = {"lr": 1e-4, "name": None, "devices": 2, "weighting": "none", "betas": [0.9, 1], "inner": inner}
    return whole | changes


def test_values_are_converted_to_the_declared_kinds() -> None:
    built = build(Outer, values(lr=1))
    assert built.lr == 1.0 and isinstance(built.lr, float)
    assert built.betas == (0.9, 1.0) and built.devices == 2 and built.inner.options == {"a": 1}
    assert build(Outer, values(devices="auto", weighting=[1, 2])).weighting == [1.0, 2.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lrr": 1}, "unknown setting 'lrr'. Did you mean 'lr'"),
        ({"rank": 1}, "Did you mean 'inner.rank'"),
        ({"zzz": 1}, "Known settings: lr, name"),
        ({"lr": "fast"}, "'lr' must be a number, but is 'fast'"),
        ({"lr": True}, "'lr' must be a number"),
        ({"lr": "???"}, "'lr' must be given"),
        ({"devices": "all"}, "'devices' must be an integer or auto"),
        ({"inner": 3}, "'inner' must be a section"),
        ({"betas": 3}, "'betas' must be a list"),
        ({"inner": {"rank": 4, "kind": "lora", "include": None}}, "'inner.options' is missing"),
        ({"inner": {"rank": 4, "kind": "bora", "include": None, "options": {}}}, "choose one of: lora, dora"),
        ({"inner": {"rank": 4.5, "kind": "lora", "include": None, "options": {}}}, "'inner.rank' must be an integer"),
        ({"inner": {"rank": 4, "kind": "lora", "include": [1], "options": {}}}, r"'inner.include\[0\]' must be text"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Outer, values(**changes))


def test_keys_are_known_at_every_depth_and_free_inside_dictionaries() -> None:
    assert "inner.rank" in list_keys(Outer)
    assert is_known(Outer, "inner.rank") and is_known(Outer, "inner.options.anything.at.all")
    assert not is_known(Outer, "inner.rnk") and not is_known(Outer, "lr.x")
    assert (
        find_closest("inner.rnk", list_keys(Outer)) == "inner.rank" and find_closest("qqqq", list_keys(Outer)) is None
    )


def test_differences_are_by_full_key_with_both_values() -> None:
    old, new = {"a": {"b": 1, "c": [1, 2]}, "d": 1}, {"a": {"b": 2, "c": (1, 2)}, "e": 3}
    assert find_differences(old, new) == {"a.b": (1, 2), "d": (1, None), "e": (None, 3)}


@dataclass(frozen=True)
class Declared:
    folder: str = setting(help="Required.")
    steps: int = setting(3, help="Steps.", min=1)
    duration: float = setting(1.0, help="Length.", unit="seconds", above=0, max=10)
    mode: Literal["a", "b"] | None = setting(None, help="Mode.")
    strengths: list[float] = setting([0.5, 1.0], help="Strengths.", min=0, below=2)

    def __post_init__(self) -> None:
        check_settings(self, "section")


def test_a_setting_is_declared_once_with_default_unit_range_and_choices() -> None:
    found = list_settings(Declared)
    assert found["mode"].choices == ("a", "b") and found["duration"].help == "Length."
    assert found["duration"].describe_range() == "above 0 and at most 10 seconds"
    one, two = Declared("x"), Declared("y")
    one.strengths.append(0.1)
    assert two.strengths == [0.5, 1.0], "a default list is copied"
    with pytest.raises(TypeError, match="folder"):
        Declared()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "values", [{"steps": 0}, {"duration": 0.0}, {"duration": math.nan}, {"mode": "c"}, {"strengths": [1.0, 2.0]}]
)
def test_a_value_out_of_range_is_refused_by_its_full_name(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(ConfigError, match=rf"section\.{name}="):
        Declared("x", **values)
