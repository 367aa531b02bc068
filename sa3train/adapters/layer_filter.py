"""Choose the layers that an adapter changes, by `include` and `exclude` patterns.

A pattern is a substring of the module path, as in the released trainer. PEFT's `target_modules` differ: they match the
end of a path, or are regular expressions. A number at either end of a pattern, or in a range `[a-b]`, matches whole
numbers only: `layers.1` does not match `layers.10`, and `layers[0-11]` matches `layers.0.` up to `layers.11`.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from sa3train.core.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn

MAX_PATTERN = 300
MAX_RANGES = 4
MAX_PATTERNS = 1000
"""Largest number of patterns in one setting: more than any model has layers, and few enough to match in no time."""

_RANGE = re.compile(r"\[([^\[\]]*)\]")
_NUMBERS = re.compile(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?")
_Spans = tuple[tuple[int, int], ...]


def split_patterns(patterns: Sequence[str] | str) -> tuple[str, ...]:
    """Normalize layer patterns to a tuple.

    Args:
        patterns: A list of patterns, or one string with commas between them (commas inside brackets do not split).

    Returns:
        The patterns without surrounding spaces; empty ones are dropped.

    Raises:
        AdapterError: If `patterns` is neither a string nor a list of strings.
    """
    if isinstance(patterns, str):
        patterns = re.split(r",(?![^\[]*\])", patterns)
    if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise AdapterError(f"Layer patterns must be a list of strings, not {repr(patterns)[:60]}.")
    return tuple(pattern.strip() for pattern in patterns if pattern.strip())


def check_patterns(patterns: Iterable[str]) -> None:
    """Check that every pattern can be parsed.

    Args:
        patterns: Patterns of `include`, `exclude`, `rank_pattern` or `alpha_pattern`.

    Raises:
        AdapterError: If a pattern is empty, too long or has a malformed range, or if there are more than 1000.
    """
    given = list(patterns)
    if len(given) > MAX_PATTERNS:
        raise AdapterError(
            f"{len(given)} layer patterns are given; {MAX_PATTERNS} are allowed. Use ranges such as layers.[0-11]."
        )
    for pattern in given:
        _compile(pattern)


def matches_pattern(pattern: str, path: str) -> bool:
    """Check whether a pattern occurs in a module path.

    Args:
        pattern: A substring with optional ranges.
        path: Module path, such as `model.transformer.layers.0.ff.up`.

    Returns:
        Whether it matches.
    """
    text, expression, ranges = _compile(pattern)
    if expression is None:
        return text in path
    return any(
        all(
            any(low <= int(number) <= high for low, high in spans)
            for number, spans in zip(found.groups(), ranges, strict=True)
        )
        for found in expression.finditer(path)
    )


def is_included(path: str, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None) -> bool:
    """Check whether `include` and `exclude` leave a layer in.

    Args:
        path: Module path of the layer.
        include: Patterns of which one must match; None or empty includes every layer.
        exclude: Patterns of which none may match.

    Returns:
        Whether the layer is included.
    """
    included = not include or any(matches_pattern(pattern, path) for pattern in include)
    return included and not any(matches_pattern(pattern, path) for pattern in exclude or ())


def select_layers(
    paths: Iterable[str], include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> list[str]:
    """Select the layers that `include` and `exclude` leave in.

    Args:
        paths: Module paths of all layers that can be adapted.
        include: Patterns of which one must match; None or empty includes every layer.
        exclude: Patterns of which none may match.

    Returns:
        The selected paths, in the order given.

    Raises:
        AdapterError: If a pattern matches no layer at all, or if no layer is left.
    """
    known = list(paths)
    unused = [
        pattern
        for pattern in (*(include or ()), *(exclude or ()))
        if not any(matches_pattern(pattern, path) for path in known)
    ]
    if unused:
        raise AdapterError(
            f"The layer pattern {', '.join(map(repr, unused))} matches none of the {len(known)} adaptable layers. "
            f"Their paths look like {_give_examples(known)}."
        )
    selected = [path for path in known if is_included(path, include, exclude)]
    if not selected:
        raise AdapterError(
            f"No layer is left to adapt with include={include}, exclude={list(exclude or ())}. The {len(known)} "
            f"adaptable layers are named like {_give_examples(known)}."
        )
    return selected


def find_adaptable_layers(root: "nn.Module") -> "dict[str, nn.Module]":
    """Find every Linear and ungrouped Conv1d below a module.

    Args:
        root: The model.

    Returns:
        The layers by module path. A layer that PEFT has wrapped is listed once, as its base layer.
    """
    from torch import nn

    layers: dict[str, nn.Module] = {}
    wrapped: list[str] = []
    for path, module in root.named_modules():
        if any(path.startswith(prefix) for prefix in wrapped):
            continue
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module):
            wrapped.append(path + ".")
            while isinstance(inner := getattr(base, "base_layer", None), nn.Module):
                base = inner
            layers[path] = base
        elif isinstance(module, nn.Linear) or (isinstance(module, nn.Conv1d) and module.groups == 1):
            layers[path] = module
    return {path: layer for path, layer in layers.items() if isinstance(layer, nn.Linear | nn.Conv1d)}


@functools.lru_cache(maxsize=16 * MAX_PATTERNS)
def _compile(pattern: str) -> tuple[str, re.Pattern[str] | None, tuple[_Spans, ...]]:
    """Compile a pattern to an expression with one group per range, and the numbers that each range allows.

    The expression is None where the pattern, returned first without spaces around it, is a mere substring.
    """
    text = pattern.strip()
    if not text or len(pattern) > MAX_PATTERN:
        raise AdapterError(f"A layer pattern must have 1 to {MAX_PATTERN} characters; got {pattern[:40]!r}.")
    if not (text[0].isdigit() or text[-1].isdigit() or "[" in text or "]" in text):
        return text, None, ()
    if text.count("[") > MAX_RANGES:
        raise AdapterError(f"The layer pattern {text[:40]!r} has more than {MAX_RANGES} ranges.")
    start = r"(?<!\d)" if text[0].isdigit() else ""
    end = r"(?!\d)" if text[-1].isdigit() else ""
    expression = "".join(_translate(text))
    ranges = tuple(_parse_range(text, found.group(1)) for found in _RANGE.finditer(text))
    return text, re.compile(f"(?={start}{expression}{end})"), ranges


def _translate(text: str) -> Iterator[str]:
    position = 0
    for found in _RANGE.finditer(text):
        before = text[position : found.start()]
        yield _escape(text, before)
        if before and not before.endswith("."):
            yield r"\.?"
        yield r"(?<!\d)(\d+)(?!\d)"
        position = found.end()
    yield _escape(text, text[position:])


def _escape(text: str, part: str) -> str:
    if "[" in part or "]" in part:
        raise AdapterError(f"The layer pattern {text!r} has an unmatched bracket.")
    return re.escape(part)


def _parse_range(text: str, inner: str) -> _Spans:
    spans = []
    for part in inner.split(","):
        found = _NUMBERS.fullmatch(part)
        if not found:
            raise AdapterError(f"The layer pattern {text!r} needs a range such as [0-11] or [3], not [{inner}].")
        low = int(found.group(1))
        high = int(found.group(2)) if found.group(2) else low
        if high < low:
            raise AdapterError(f"The layer pattern {text!r} has a range that ends before it starts: [{inner}].")
        spans.append((low, high))
    return tuple(spans)


def _give_examples(paths: Sequence[str]) -> str:
    shown = [paths[0], paths[len(paths) // 2], paths[-1]] if len(paths) > 2 else list(paths)
    return ", ".join(dict.fromkeys(shown)) or "(none)"
