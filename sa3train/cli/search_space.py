"""The search space of `sa3-sweep`, in the grammar of Hydra's overrides, as Optuna's distributions.

`choice(a,b)` or `a,b`; `range(4,17,4)`; `interval(0,0.5)`, of whole numbers `int(interval(4,64))`; on a log scale
`tag(log,interval(1e-5,1e-3))`. Everything else is a fixed setting.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    OverrideType,
    QuotedString,
    RangeSweep,
)
from hydra.errors import HydraException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from sa3train.core.errors import ConfigError
from sa3train.core.overrides import format_value
from sa3train.core.user_files import read_text

MAX_POINTS = 100_000
"""Spaces of more points are searched without a list of those that are left."""
_FORBIDDEN = ("run_dir", "resume", "hydra", "launcher")
_FORMS = "choice(a,b), range(4,17,4), interval(0,1), int(interval(4,64)) or tag(log,interval(1e-5,1e-3))"


def read_space(path: Path) -> list[str]:
    """Read a search space from a YAML file.

    Args:
        path: File of `key: expression`, such as `adapter.rank: choice(4,8,16)`.

    Returns:
        The overrides.

    Raises:
        ConfigError: The file cannot be read, or is no such mapping.
    """
    try:
        found = yaml.safe_load(read_text(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"Cannot read {path}: {error}. Give a YAML file of lines like adapter.rank: choice(4,8)."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ConfigError(f"{path} must hold lines like adapter.rank: choice(4,8,16), one for each setting.")
    return [f"{key}={value}" for key, value in found.items()]


def parse_space(overrides: Sequence[str]) -> tuple[list[str], dict[str, BaseDistribution]]:
    """Split overrides into fixed settings and a search space.

    Args:
        overrides: Overrides as for `sa3-train`, some of which name several values.

    Returns:
        (fixed overrides, distribution by key). Choices are the text of their values.

    Raises:
        ConfigError: One cannot be parsed, searched or set here, or a key is given twice.
    """
    fixed, space = list[str](), dict[str, BaseDistribution]()
    parser, seen = OverridesParser.create(), set[str]()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise ConfigError(f"Cannot read {text!r}: {error}. Give key=value, or {_FORMS}.") from error
        key = override.key_or_group
        if key.partition(".")[0] in _FORBIDDEN or (key == "recipe" and override.value() in ("sweep", "decoder")):
            raise ConfigError(f"{text} has no place in a sweep of runs on latents, each in its own folder. Remove it.")
        if key in seen:
            raise ConfigError(f"{key} is given twice. Remove one.")
        seen.add(key)
        if not override.is_sweep_override():
            fixed.append(text)
            continue
        space[key] = _make_distribution(text, override)
    if not space:
        raise ConfigError(f"Nothing is searched: all settings have one value. Give one as {_FORMS}.")
    return fixed, space


def format_point(point: Mapping[str, Any]) -> list[str]:
    """Format a point of the space as overrides.

    Args:
        point: Value by key, as Optuna draws it.

    Returns:
        The overrides.
    """
    return [f"{key}={value if isinstance(value, str) else repr(round_value(value))}" for key, value in point.items()]


def round_value(value: Any) -> Any:
    """Round a number to 12 digits, so that the same point is the same number however it was computed.

    Args:
        value: A number, or anything else.

    Returns:
        The number rounded; anything else as it is.
    """
    return float(f"{value:.12g}") if isinstance(value, float) else value


def iterate_points(space: Mapping[str, BaseDistribution]) -> Iterator[dict[str, Any]] | None:
    """Iterate over all points of a space.

    Args:
        space: Distribution by key.

    Returns:
        The points; None where there are infinitely many, or more than `MAX_POINTS`.
    """
    axes, points = list[list[Any]](), 1
    for distribution in space.values():
        if isinstance(distribution, CategoricalDistribution):
            axes.append(list(distribution.choices))
        elif isinstance(distribution, IntDistribution):
            axes.append(list(range(distribution.low, distribution.high + 1, distribution.step)))
        elif isinstance(distribution, FloatDistribution) and distribution.step is not None:
            count = round((distribution.high - distribution.low) / distribution.step) + 1
            axes.append([round_value(distribution.low + number * distribution.step) for number in range(count)])
        else:
            return None
        points *= len(axes[-1])
        if points > MAX_POINTS:
            return None
    return (dict(zip(space, point, strict=True)) for point in itertools.product(*axes))


def _make_distribution(text: str, override: Override) -> BaseDistribution:
    sweep, is_log = override._value, False
    if override.type is not OverrideType.CHANGE:
        raise ConfigError(f"{text} adds or removes a key. Search one that exists.")
    if isinstance(sweep, ChoiceSweep | RangeSweep | IntervalSweep):
        if sweep.tags - {"log"}:
            raise ConfigError(f"{text} has the tag {', '.join(sorted(sweep.tags - {'log'}))}. The only one is log.")
        is_log = "log" in sweep.tags
    if is_log and not (isinstance(sweep, IntervalSweep) and sweep.start is not None and sweep.start > 0):
        raise ConfigError(f"{text} cannot be on a log scale. Give an interval above 0: tag(log,interval(1e-5,1e-3)).")
    try:
        if isinstance(sweep, ChoiceSweep):
            return CategoricalDistribution([format_value(_unquote(value)) for value in sweep.list])
        if isinstance(sweep, RangeSweep) and sweep.start is not None and sweep.stop is not None:
            numbers = (sweep.start, sweep.stop, sweep.step)
            start, stop, step = (Decimal(str(number)) for number in numbers)
            last = start + (math.ceil((stop - start) / step) - 1) * step  # `stop` itself is left out
            if all(isinstance(number, int) for number in numbers):
                return IntDistribution(int(start), int(last), step=int(step))
            return FloatDistribution(float(start), float(last), step=float(step))
        if isinstance(sweep, IntervalSweep) and isinstance(sweep.start, int) and isinstance(sweep.end, int):
            return IntDistribution(sweep.start, sweep.end, log=is_log)
        if isinstance(sweep, IntervalSweep) and sweep.start is not None and sweep.end is not None:
            return FloatDistribution(sweep.start, sweep.end, log=is_log)
    except ValueError as error:
        raise ConfigError(f"{text} is no range: {error} Give {_FORMS}.") from error
    raise ConfigError(f"{text} cannot be searched. Give {_FORMS}.")


def _unquote(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_unquote(item) for item in value]
    return {key: _unquote(item) for key, item in value.items()} if isinstance(value, dict) else value
