"""Plain values become typed settings; what is unknown, missing or of another kind is refused by its full key."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from sa3train.core.config import build, closest, differences, is_known, known_keys
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
        ({"zzz": 1}, "Known at this place: lr, name"),
        ({"lr": "fast"}, "'lr' must be a number, but is 'fast'"),
        ({"lr": True}, "'lr' must be a number"),
        ({"lr": "???"}, "'lr' must be given"),
        ({"devices": "all"}, "'devices' must be a whole number or auto"),
        ({"inner": 3}, "'inner' must be a section"),
        ({"betas": 3}, "'betas' must be a list"),
        ({"inner": {"rank": 4, "kind": "lora", "include": None}}, "'inner.options' is missing"),
        ({"inner": {"rank": 4, "kind": "bora", "include": None, "options": {}}}, "choose one of: lora, dora"),
        ({"inner": {"rank": 4.5, "kind": "lora", "include": None, "options": {}}}, "'inner.rank' must be a whole"),
        ({"inner": {"rank": 4, "kind": "lora", "include": [1], "options": {}}}, r"'inner.include\[0\]' must be text"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Outer, values(**changes))


def test_keys_are_known_at_every_depth_and_free_inside_dictionaries() -> None:
    assert "inner.rank" in known_keys(Outer)
    assert is_known(Outer, "inner.rank") and is_known(Outer, "inner.options.anything.at.all")
    assert not is_known(Outer, "inner.rnk") and not is_known(Outer, "lr.x")
    assert closest("inner.rnk", known_keys(Outer)) == "inner.rank" and closest("qqqq", known_keys(Outer)) is None


def test_differences_are_by_full_key_with_both_values() -> None:
    old, new = {"a": {"b": 1, "c": [1, 2]}, "d": 1}, {"a": {"b": 2, "c": (1, 2)}, "e": 3}
    assert differences(old, new) == {"a.b": (1, 2), "d": (1, None), "e": (None, 3)}
