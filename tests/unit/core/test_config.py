"""Plain values become typed settings; what is unknown, missing or of another kind is refused by its full key."""

import math
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from sa3train.core.config import (
    Setting,
    build,
    check_settings,
    find_differences,
    is_known,
    list_keys,
    list_settings,
    setting,
)
from sa3train.core.errors import ConfigError
from sa3train.core.text import suggest_name


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
        ({"lrr": 1}, "unknown setting 'lrr'. Did you mean lr"),
        ({"rank": 1}, "Did you mean inner.rank"),
        ({"zzz": 1}, "Known settings: lr, name"),
        ({"lr": "fast"}, "'lr' must be a number, but is 'fast'"),
        ({"lr": True}, "'lr' must be a number"),
        ({"lr": "???"}, "'lr' must be given"),
        ({"devices": "all"}, "'devices' must be an integer or auto"),
        ({"inner": 3}, "'inner' must be a section"),
        ({"betas": 3}, "'betas' must be a list"),
        ({"name": 808}, """Quote it: name="'808'"."""),
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
    assert suggest_name("inner.rnk", list_keys(Outer)) == "Did you mean inner.rank?"
    assert suggest_name("qqqq", list_keys(Outer), "Choose.") == "Choose."


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


@pytest.mark.parametrize("text", ["", "   ", "x" * 256, "x/" + "y" * 256, "x/" * 2048 + "y", "a\0b", "a\ud800"])
def test_a_path_is_one_that_file_systems_take(text: str) -> None:
    assert Setting("", text="path").find_problem(text)


@pytest.mark.parametrize("text", [" x", "x" * 255, "x/" * 2000, "s3://bucket/" + "y" * 256, "ä" * 127, "C:\\x"])
def test_other_paths_are_left_to_the_disk(text: str) -> None:
    assert not Setting("", text="path").find_problem(text)


def test_lists_and_mappings_have_a_length_and_no_number_is_ever_nan() -> None:
    few = Setting("", items=(1, 2))
    assert few.find_problem([]) == few.find_problem({"a": 1, "b": 2, "c": 3}) == "have 1 to 2 items"
    for value in (math.nan, [1, math.inf], {"a": {"b": [-math.inf]}}):
        assert Setting("").find_problem(value) == "be a finite number"
    assert not Setting("").find_problem([10**400, True, "nan", None])


def test_whole_numbers_and_mappings_are_read_as_people_write_them() -> None:
    assert build(Outer, values(devices=8.0)).devices == 8
    given = values()
    assert build(Outer, given | {"inner": given["inner"] | {"options": '{"a b": 1}'}}).inner.options == {"a b": 1}
    for wrong in ("{", "[1]", "3"):
        with pytest.raises(ConfigError, match=r"inner\.options"):
            build(Outer, given | {"inner": given["inner"] | {"options": wrong}})


def test_a_setting_is_declared_once_with_default_unit_range_and_choices() -> None:
    found = list_settings(Declared)
    assert found["mode"].choices == ("a", "b") and found["duration"].help == "Length."
    assert found["duration"].describe_range() == "above 0 and at most 10 seconds"
    assert Setting("", min=0, max=10**9).describe_range() == "from 0 to 1000000000"
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


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (int, (1, np.int64(2)), ("1", 1.0, True, None)),
        (float, (1, 0.5, np.float32(1)), ("1", True, None)),
        (str, ("x", Path("x")), (1, None, b"x")),
        (bool, (True,), (1, "true", None)),
        (int | Literal["auto"] | None, (1, None, "auto"), (1.5, [1])),
    ],
)
def test_python_code_is_told_of_a_wrong_type_too(kind: Any, right: tuple[Any, ...], wrong: tuple[Any, ...]) -> None:
    schema = make_dataclass("schema", [("value", kind, setting(help="A value."))])
    for value in right:
        check_settings(schema(value))
    for value in wrong:
        with pytest.raises(ConfigError, match="value="):
            check_settings(schema(value))
