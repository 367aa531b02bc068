"""An adapter as the form asks for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa3train.errors import RequestError
from sa3train.inference.checks import number
from sa3train.studio.workplace import StudioError, Workplace


@dataclass(frozen=True)
class AdapterWish:
    """An adapter and how it is to play; `conditioner_strength` None: as `strength`."""

    path: str
    strength: float = 1.0
    conditioner_strength: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    exclude_layers: str = ""
    allow_partial: bool = False

    def arguments(self, place: Workplace) -> dict[str, Any]:
        """Keyword arguments of `Generator.load_adapter`."""
        path = place.inside(self.path)
        if not path.exists():
            raise StudioError(f"there is no adapter {path}.")
        return {
            "adapter": str(path),
            "strength": self.strength,
            "conditioner_strength": self.conditioner_strength,
            "interval": self.interval,
            "exclude_layers": self.exclude_layers,
            "allow_partial": self.allow_partial,
        }

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "AdapterWish":
        """From a row of the page's rack. Raises `RequestError` for what is no number."""
        path = str(row.get("path") or "")
        if not path.strip():
            raise StudioError("an adapter has no file: choose one, or remove it.")
        level = row.get("conditioner")
        return cls(
            path,
            read_number(f"the strength of {path}", row.get("strength"), 1.0),
            None if level in (None, "") else read_number(f"the conditioner strength of {path}", level, 1.0),
            (
                read_number(f"the interval of {path}", row.get("low"), 0.0),
                read_number(f"the interval of {path}", row.get("high"), 1.0),
            ),
            str(row.get("exclude") or ""),
            bool(row.get("partial")),
        )

    @classmethod
    def of_record(cls, entry: Mapping[str, Any]) -> "AdapterWish":
        """From an adapter of a sidecar."""
        return cls(
            entry["path"] or "",
            entry["strength"],
            entry["conditioner_strength"],
            (entry["interval"][0], entry["interval"][1]),
            ", ".join(entry["exclude_layers"]),
            entry["allow_partial"],
        )

    def row(self) -> dict[str, Any]:
        """As a row of the rack."""
        return {
            "path": self.path,
            "strength": self.strength,
            "conditioner": self.conditioner_strength,
            "low": self.interval[0],
            "high": self.interval[1],
            "exclude": self.exclude_layers,
            "partial": self.allow_partial,
        }


def read_number(what: str, value: Any, default: float | None) -> float:
    """`value`, a number or its text; empty is `default`, if there is one. Raises `RequestError` naming `what` it is."""
    if value in (None, "") and default is not None:
        return default
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError as error:
            raise RequestError(f"{what} must be a number, not {value!r}.") from error
    return number(what, value)


def name_of(path: str | Path) -> str:
    """A short name for an adapter: its file's, or its run's where every run calls it the same."""
    file = Path(path)
    return file.parent.name if file.stem == "adapter" and file.parent.name else file.stem
