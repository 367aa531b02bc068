"""What an adapter is: its type, rank, scale and layers. Without torch, since light code reads specs too."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sa3train.adapters.layer_filter import check_patterns, is_included, matches_pattern, split_patterns
from sa3train.core.errors import AdapterError
from sa3train.core.text import format_range, shorten

MAX_RANK = 16384
MAX_VALUE = 1e9
"""Largest alpha or strength: far beyond any use, and far below what overflows."""

BIAS_CHANGE = "diff_b"
"""Name of the tensor that is added to a layer's bias."""

BASES = ("U", "V")
"""Names of the bases that some files of -xs types bring along."""


@dataclass(frozen=True)
class AdapterKind:
    """One adapter type of the SA3 family: a low-rank change, with or without frozen bases and norms.

    Attributes:
        name: The `adapter_type`, as the released trainer writes it.
        is_xs: Whether the bases are W's frozen singular vectors, and only an r × r matrix trains.
        scales_rows: Whether rows are renormalized to trained magnitudes.
        scales_columns: Whether columns are renormalized to trained magnitudes.
    """

    name: str
    is_xs: bool = False
    scales_rows: bool = False
    scales_columns: bool = False

    @property
    def scales_both(self) -> bool:
        """Whether rows and columns are renormalized."""
        return self.scales_rows and self.scales_columns

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the stored tensors, as in the released files."""
        low_rank = ("M_xs",) if self.is_xs else ("lora_A", "lora_B")
        if self.scales_both:
            return (*low_rank, "magnitude_r", "magnitude_c")
        return (*low_rank, "magnitude") if self.scales_rows or self.scales_columns else low_rank

    @property
    def optional(self) -> tuple[str, ...]:
        """Names of tensors that files of other tools may hold besides: a change of the bias, and bases of their own."""
        return (BIAS_CHANGE, *BASES) if self.is_xs else (BIAS_CHANGE,)

    def shapes(self, rows: int, cols: int, rank: int, names: Iterable[str] | None = None) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors for one weight.

        Args:
            rows: Rows of the weight (out).
            cols: Columns of the weight (in); a convolution's taps count as columns.
            rank: Rank of the adapter.
            names: Names of the tensors; None means `parameters`.

        Returns:
            Shapes by tensor name.
        """
        every = {
            "lora_A": (rank, cols),
            "lora_B": (rows, rank),
            "M_xs": (rank, rank),
            "magnitude": (rows,) if self.scales_rows else (cols,),
            "magnitude_r": (rows,),
            "magnitude_c": (cols,),
            "U": (rows, rank),
            "V": (cols, rank),
            BIAS_CHANGE: (rows,),
        }
        return {name: every[name] for name in (self.parameters if names is None else names)}


KINDS: dict[str, AdapterKind] = {
    kind.name: kind
    for kind in (
        AdapterKind("lora"),
        AdapterKind("dora-rows", scales_rows=True),
        AdapterKind("dora-cols", scales_columns=True),
        AdapterKind("bora", scales_rows=True, scales_columns=True),
        AdapterKind("lora-xs", is_xs=True),
        AdapterKind("dora-rows-xs", is_xs=True, scales_rows=True),
        AdapterKind("dora-cols-xs", is_xs=True, scales_columns=True),
        AdapterKind("bora-xs", is_xs=True, scales_rows=True, scales_columns=True),
    )
}

INFERENCE_ONLY_TYPES = ("diff", "comfy")
"""Types that files of other tools hold, for generating and not for training: full weight deltas, and layers that only
ComfyUI's rules give: LoHa, LoKr, OFT, and its own DoRA, which divides rows by the norms of the untouched weight."""

PEFT_METHODS = (
    "lokr", "loha", "hira", "oft", "boft", "hra", "miss", "fourierft", "waveft", "c3a", "delora", "gralora",
    "deft", "psoft", "peanut",
)  # fmt: skip
"""PEFT methods that adapt Linear (lokr, loha and hira also Conv1d) layers and can be merged into the weight. Methods
that share state between layers or need hooks in the training loop (VeRA, RandLoRA, AdaLoRA, …) are not supported."""

ADAPTER_TYPES = (*KINDS, *INFERENCE_ONLY_TYPES, *PEFT_METHODS)

CARRIED_BY = {
    "lora": ("peft", "diffusers", "comfy", "sa3cpp"),
    "dora-rows": ("peft", "diffusers", "comfy", "sa3cpp"),
    "dora-cols": ("comfy", "sa3cpp"),
    "bora": ("sa3cpp",),
    "lora-xs": ("comfy",),
    "dora-rows-xs": ("comfy",),
    "dora-cols-xs": ("comfy",),
    "bora-xs": (),
    "diff": ("comfy",),
    "comfy": ("comfy",),
    "lokr": ("peft", "comfy"),
    "loha": ("peft", "comfy"),
    **dict.fromkeys(("hira", "oft", "boft", "hra", "miss", "fourierft", "waveft", "c3a"), ("peft",)),
    **dict.fromkeys(("delora", "gralora", "deft", "psoft", "peanut"), ("peft",)),
}
"""Formats besides native, which carries all, that carry a type exactly as small factors. Every type has its row."""


def get_layer_type(adapter_type: str, names: Iterable[str]) -> str:
    """Get the type of one layer: a lora or comfy file may hold layers that are simpler.

    Args:
        adapter_type: The adapter's type.
        names: Names of the layer's tensors.

    Returns:
        "diff" where a lora or comfy layer has a full delta or only a change of its bias, "lora" where a comfy layer
        has two factors and no magnitude, else the adapter's type.
    """
    found = set(names)
    if adapter_type in ("lora", "comfy") and found <= {"diff", BIAS_CHANGE}:
        return "diff"
    return "lora" if adapter_type == "comfy" and "lora_A" in found and "magnitude" not in found else adapter_type


@dataclass(frozen=True)
class AdapterSpec:
    """Settings of an adapter. Construction raises `AdapterError` for an invalid value.

    Attributes:
        adapter_type: One of `KINDS`, `PEFT_METHODS` or `INFERENCE_ONLY_TYPES`.
        rank: Rank of the low-rank product.
        alpha: Scale numerator: the product is multiplied by alpha / rank. None means equal to the rank (scale 1).
        dropout: Dropout probability on the adapter's input, in [0, 1).
        include: Layer patterns (see `layer_filter`) of which one must match; None means every Linear and Conv1d.
        exclude: Layer patterns of which none may match.
        rslora: Divide by √rank instead of rank (rsLoRA, arXiv 2312.03732).
        rank_pattern: Ranks by layer pattern; the first pattern that matches wins.
        alpha_pattern: Alphas by layer pattern; the first pattern that matches wins.
        options: Further settings of PEFT's config, for `PEFT_METHODS` only.
    """

    adapter_type: str
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
        if self.adapter_type not in ADAPTER_TYPES:
            raise AdapterError(
                f"Unknown adapter_type {self.adapter_type!r}. Choose one of {', '.join(KINDS)}, or a PEFT method: "
                f"{', '.join(PEFT_METHODS)}."
            )
        ranks = {f"rank_pattern[{pattern!r}]": rank for pattern, rank in self.rank_pattern.items()}
        for name, rank in {"rank": self.rank, **ranks}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
                raise AdapterError(f"{name} must be an integer from 1 to {MAX_RANK}, not {shorten(repr(rank))}.")
        alphas = {f"alpha_pattern[{pattern!r}]": alpha for pattern, alpha in self.alpha_pattern.items()}
        for name, alpha in {"alpha": self.alpha, **alphas}.items():
            if alpha is not None and not (is_finite_number(alpha) and alpha != 0):
                raise AdapterError(
                    f"{name} must be a number other than 0, up to {MAX_VALUE:g}, not {shorten(repr(alpha))}."
                )
        if not (is_finite_number(self.dropout) and 0 <= self.dropout < 1):
            raise AdapterError(f"dropout must be in [0, 1), not {shorten(repr(self.dropout))}.")
        if self.options and self.adapter_type not in PEFT_METHODS:
            raise AdapterError(
                f"options {sorted(self.options)} are for PEFT's own methods; {self.adapter_type} has none."
            )
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            split = () if patterns is None else split_patterns(patterns)
            check_patterns(split)
            object.__setattr__(self, name, split or None)
        for name in ("rank_pattern", "alpha_pattern", "options"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        for patterns in (self.rank_pattern, self.alpha_pattern):
            check_patterns(patterns)

    def includes(self, path: str) -> bool:
        """Check whether the adapter goes to a layer.

        Args:
            path: Module path of the layer.

        Returns:
            Whether `include` and `exclude` leave it in.
        """
        return is_included(path, self.include, self.exclude)

    def get_rank(self, path: str) -> int:
        """Get the rank at one layer.

        Args:
            path: Module path of the layer.

        Returns:
            The rank from `rank_pattern`, else `rank`.
        """
        return _find_first(self.rank_pattern, path, self.rank)

    def get_alpha(self, path: str) -> float:
        """Get the alpha at one layer.

        Args:
            path: Module path of the layer.

        Returns:
            The alpha from `alpha_pattern`, else `alpha`, else the layer's rank.
        """
        alpha = _find_first(self.alpha_pattern, path, self.alpha)
        return float(self.get_rank(path) if alpha is None else alpha)

    def get_scale(self, path: str) -> float:
        """Get the factor of the low-rank product at strength 1.

        Args:
            path: Module path of the layer.

        Returns:
            alpha / rank, or alpha / √rank with rsLoRA.
        """
        rank = self.get_rank(path)
        return self.get_alpha(path) / (math.sqrt(rank) if self.rslora else rank)

    def format_rank(self, paths: Iterable[str]) -> str:
        """Format the ranks of layers for people.

        Args:
            paths: Module paths of the layers.

        Returns:
            A number, a range such as "4 to 8", or "full" for full weight deltas.
        """
        return "full" if self.adapter_type == "diff" else format_range([self.get_rank(path) for path in paths])

    def format_alpha(self, paths: Iterable[str]) -> str:
        """Format the alphas of layers for people.

        Args:
            paths: Module paths of the layers.

        Returns:
            A number, a range such as "4 to 8", or "-" where the type has no alpha.
        """
        return format_range([self.get_alpha(path) for path in paths]) if self.adapter_type in KINDS else "-"


def is_finite_number(value: object) -> bool:
    """Check whether a value is a finite number small enough to multiply fp32 weights with.

    Args:
        value: Anything, such as a value from JSON, whose numbers have no bounds.

    Returns:
        Whether it is an int or float (no bool, no NaN) of magnitude up to 1e9.
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_VALUE


def _find_first(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    if path in patterns:  # a layer named in full, as the tools write it
        return patterns[path]
    return next((value for pattern, value in patterns.items() if matches_pattern(pattern, path)), default)
