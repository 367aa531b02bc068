"""What an adapter is: its kind, rank, scale and the layers it goes to. No torch here: light code reads specs too."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sa3train.adapters.layer_filter import Filter, split_patterns
from sa3train.core.errors import AdapterError

MAX_RANK = 16384
LARGEST = 1e9
"""Of alphas and strengths: far beyond any use, and far below what overflows."""


@dataclass(frozen=True)
class Kind:
    """One member of the SA3 family: a low-rank change, its bases frozen or not, rows and columns renormed or not."""

    name: str
    xs: bool = False
    rows: bool = False
    cols: bool = False

    @property
    def both(self) -> bool:
        """Whether rows and columns are renormed."""
        return self.rows and self.cols

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the stored tensors, as in the released files."""
        low_rank = ("M_xs",) if self.xs else ("lora_A", "lora_B")
        if self.both:
            return (*low_rank, "magnitude_r", "magnitude_c")
        return (*low_rank, "magnitude") if self.rows or self.cols else low_rank

    def shapes(self, rows: int, cols: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shape of every stored tensor for a weight of (rows, cols), a convolution's taps counted in the columns."""
        every = {
            "lora_A": (rank, cols),
            "lora_B": (rows, rank),
            "M_xs": (rank, rank),
            "magnitude": (rows,) if self.rows else (cols,),
            "magnitude_r": (rows,),
            "magnitude_c": (cols,),
        }
        return {name: every[name] for name in self.parameters}


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("lora"),
        Kind("dora-rows", rows=True),
        Kind("dora-cols", cols=True),
        Kind("bora", rows=True, cols=True),
        Kind("lora-xs", xs=True),
        Kind("dora-rows-xs", xs=True, rows=True),
        Kind("dora-cols-xs", xs=True, cols=True),
        Kind("bora-xs", xs=True, rows=True, cols=True),
    )
}

PLAY_ONLY = ("diff", "comfy-dora")
"""Kinds that other tools' files may hold and that can be played but not trained: a full difference of weights, and
ComfyUI's own reading of DoRA, which divides by the norm of the untouched weight."""

PEFT_METHODS = (
    "lokr", "loha", "hira", "oft", "boft", "hra", "miss", "fourierft", "waveft", "c3a", "delora", "gralora",
    "deft", "psoft", "peanut",
)  # fmt: skip
"""Methods of PEFT that adapt Linear (lokr, loha and hira Conv1d too) layers and can be merged into the weight. Left out
are those that share state between layers or need hooks in the training loop (VeRA, RandLoRA, AdaLoRA, …)."""


@dataclass(frozen=True)
class AdapterSpec:
    """How to adapt a model.

    `kind` is one of `KINDS` or of `PEFT_METHODS`. `alpha` None means equal to the rank, so that the scale is 1.
    `dropout` acts on the adapter's input. `include` and `exclude` are lists of substrings of the module path, with
    `[a-b]` ranges (see `targets`); None means every Linear and Conv1d. `rank_pattern` and `alpha_pattern` map such
    substrings to a rank or an alpha of their own; the first that matches counts. `rslora` divides by √rank instead of
    rank. `options` goes to PEFT's own config for the other methods. Raises `AdapterError` on an impossible value.
    """

    kind: str
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, *PLAY_ONLY, *PEFT_METHODS):
            raise AdapterError(
                f"unknown adapter kind {self.kind!r}. Choose one of {', '.join(KINDS)}, or a PEFT method: "
                f"{', '.join(PEFT_METHODS)}."
            )
        _check_rank("rank", self.rank)
        for pattern, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{pattern!r}]", rank)
        for name, alpha in {"alpha": self.alpha, **_named("alpha_pattern", self.alpha_pattern)}.items():
            if alpha is not None and not (is_finite_number(alpha) and alpha != 0):
                raise AdapterError(f"{name} must be a number other than 0, up to {LARGEST:g}, not {_shown(alpha)}.")
        if not (is_finite_number(self.dropout) and 0 <= self.dropout < 1):
            raise AdapterError(f"dropout must be at least 0 and below 1, not {_shown(self.dropout)}.")
        if self.options and self.kind not in PEFT_METHODS:
            raise AdapterError(f"options {sorted(self.options)} are for PEFT's own methods; {self.kind} takes none.")
        object.__setattr__(self, "include", _patterns(self.include))
        object.__setattr__(self, "exclude", _patterns(self.exclude))
        object.__setattr__(self, "rank_pattern", dict(self.rank_pattern))
        object.__setattr__(self, "alpha_pattern", dict(self.alpha_pattern))
        object.__setattr__(self, "options", dict(self.options))
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            Filter([pattern])

    @property
    def filter(self) -> Filter:
        """The layers this adapter goes to."""
        return Filter(self.include, self.exclude)

    def rank_of(self, path: str) -> int:
        """The rank at the module `path`."""
        return _first_match(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float:
        """The alpha at the module `path`; without one of its own it equals that layer's rank."""
        alpha = _first_match(self.alpha_pattern, path, self.alpha)
        return float(self.rank_of(path) if alpha is None else alpha)

    def scale_of(self, path: str) -> float:
        """What the low-rank product is multiplied by at strength 1: alpha / rank, or alpha / √rank with rsLoRA."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.rslora else rank)


def _first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    if path in patterns:  # a layer named in full, as the tools write it
        return patterns[path]
    return next((value for pattern, value in patterns.items() if Filter([pattern]).matches(path)), default)


def _named(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}[{key!r}]": value for key, value in values.items()}


def is_finite_number(value: object) -> bool:
    """Whether `value` is a number, not NaN, and small enough to multiply fp32 weights with (JSON's have no bounds)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _check_rank(name: str, rank: object) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
        raise AdapterError(f"{name} must be a whole number from 1 to {MAX_RANK}, not {_shown(rank)}.")


def _patterns(patterns: Sequence[str] | str | None) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    split = split_patterns(patterns)
    Filter(split)
    return split or None
