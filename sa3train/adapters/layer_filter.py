"""Which layers an adapter goes to.

A filter is a list of substrings of the module path. A number written at an end of a substring, or as a range `[a-b]`,
matches whole numbers only: `layers.1` is not `layers.10`, and `layers[0-11]` means layers.0. up to layers.11.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from sa3train.core.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn

MAX_PATTERN = 300
_RANGE = re.compile(r"\[([^\[\]]*)\]")
_NUMBERS = re.compile(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?")


def split_patterns(patterns: Sequence[str] | str) -> tuple[str, ...]:
    """A list of patterns from a list or a comma-separated string; empty ones are dropped, commas in brackets kept."""
    if isinstance(patterns, str):
        patterns = re.split(r",(?![^\[]*\])", patterns)
    if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise AdapterError(f"a layer filter must be a list of texts, not {repr(patterns)[:60]}.")
    return tuple(pattern.strip() for pattern in patterns if pattern.strip())


class Pattern:
    """One substring of a module path, with ranges. Raises `AdapterError` when it cannot be read."""

    def __init__(self, text: str) -> None:
        if not text.strip() or len(text) > MAX_PATTERN:
            raise AdapterError(f"a layer filter must be 1 to {MAX_PATTERN} characters long, not {text[:40]!r}.")
        self.text = text.strip()
        self.ranges: list[tuple[tuple[int, int], ...]] = []
        expression = "".join(self._pieces())
        start = r"(?<!\d)" if self.text[0].isdigit() else ""
        end = r"(?!\d)" if self.text[-1].isdigit() else ""
        self._expression = re.compile(f"(?={start}{expression}{end})")

    def _pieces(self) -> Iterable[str]:
        position = 0
        for found in _RANGE.finditer(self.text):
            before = self.text[position : found.start()]
            yield self._literal(before)
            if before and not before.endswith("."):
                yield r"\.?"
            yield r"(?<!\d)(\d+)(?!\d)"
            self.ranges.append(self._numbers(found.group(1)))
            position = found.end()
        yield self._literal(self.text[position:])

    def _literal(self, text: str) -> str:
        if "[" in text or "]" in text:
            raise AdapterError(f"the layer filter {self.text!r} has a bracket without its partner.")
        return re.escape(text)

    def _numbers(self, text: str) -> tuple[tuple[int, int], ...]:
        spans = []
        for part in text.split(","):
            found = _NUMBERS.fullmatch(part)
            if not found:
                raise AdapterError(f"the layer filter {self.text!r} needs a range such as [0-11] or [3], not [{text}].")
            low = int(found.group(1))
            high = int(found.group(2)) if found.group(2) else low
            if high < low:
                raise AdapterError(f"the layer filter {self.text!r} has a range that ends before it starts: [{text}].")
            spans.append((low, high))
        return tuple(spans)

    def matches(self, path: str) -> bool:
        """Whether the pattern occurs in the module `path`."""
        return any(
            all(
                any(low <= int(number) <= high for low, high in spans)
                for number, spans in zip(found.groups(), self.ranges, strict=True)
            )
            for found in self._expression.finditer(path)
        )


class Filter:
    """Layers to take (`include` None: all) less those to leave."""

    def __init__(self, include: Sequence[str] | str | None = None, exclude: Sequence[str] | str | None = None) -> None:
        self.include = None if include is None else split_patterns(include)
        self.exclude = () if exclude is None else split_patterns(exclude)
        _ = self._compiled

    @cached_property
    def _compiled(self) -> tuple[list[Pattern] | None, list[Pattern]]:
        include = [Pattern(text) for text in self.include] if self.include else None
        return include, [Pattern(text) for text in self.exclude]

    def matches(self, path: str) -> bool:
        """Whether the layer at the module `path` is taken."""
        include, exclude = self._compiled
        wanted = include is None or any(pattern.matches(path) for pattern in include)
        return wanted and not any(pattern.matches(path) for pattern in exclude)

    def select(self, paths: Iterable[str]) -> list[str]:
        """The `paths` taken. Raises `AdapterError` when none is, or when a pattern matches nothing at all."""
        known = list(paths)
        include, exclude = self._compiled
        idle = [
            pattern.text for pattern in (*(include or ()), *exclude) if not any(pattern.matches(path) for path in known)
        ]
        if idle:
            raise AdapterError(
                f"the layer filter {', '.join(map(repr, idle))} matches none of the {len(known)} layers that can be "
                f"adapted. They look like {_examples(known)}."
            )
        taken = [path for path in known if self.matches(path)]
        if not taken:
            raise AdapterError(
                f"no layer is left to adapt: include={self.include}, exclude={list(self.exclude)} over {len(known)} "
                f"layers such as {_examples(known)}."
            )
        return taken


def adaptable_layers(root: "nn.Module") -> "dict[str, nn.Module]":
    """Every Linear and Conv1d under `root` by its module path; a layer already wrapped by PEFT counts as its base."""
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


def _examples(paths: Sequence[str]) -> str:
    shown = [paths[0], paths[len(paths) // 2], paths[-1]] if len(paths) > 2 else list(paths)
    return ", ".join(dict.fromkeys(shown)) or "(none)"
