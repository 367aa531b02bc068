"""What a bench is asked and what it answers: options, figures, and the record of where they were measured.

The tables in docs/performance.md: a section for each kind of device, rewritten from records; the rest stays.
"""

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sa3train.core.errors import SA3Error
from sa3train.core.files import write_text

ARCHES = ("nano", "small", "medium")


@dataclass(frozen=True)
class Options:
    """Settings of a bench. None, and no kinds of adapters: the bench's own. `repeats`: rounds after the warm-up."""

    arch: str | None = None
    device: str = "cpu"
    dtype: str = "bf16"
    threads: int = 2
    repeats: int = 5
    seconds: float | None = None
    steps: int = 8
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """One measured number, and the bar it is held to, if any; `sense` says on which side of the bar is good.

    The value None: it could not be measured, and the note says why. That counts as a bar not reached.
    """

    name: str
    value: float | None
    unit: str
    bar: float | None = None
    sense: Literal["<=", ">="] = "<="
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the bar is reached; None without a bar."""
        if self.value is None:
            return False
        if self.bar is None:
            return None
        return self.value <= self.bar if self.sense == "<=" else self.value >= self.bar

    def bar_text(self) -> str:
        """Such as "≤ 0.4 ×"."""
        if self.bar is None:
            return ""
        return f"{'≤' if self.sense == '<=' else '≥'} {self.bar:g} {self.unit}".rstrip()

    def value_text(self) -> str:
        """Such as "0.31 ×: reached"."""
        if self.value is None:
            return "not measured"
        verdict = {None: "", True: ": reached", False: ": NOT reached"}[self.reached]
        return f"{number(self.value)} {self.unit}".rstrip() + verdict


@dataclass(frozen=True)
class Record:
    """The figures of one bench, with what is needed to measure them again."""

    bench: str
    options: Options
    figures: list[Figure]
    machine: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        figures = [{**asdict(figure), "reached": figure.reached} for figure in self.figures]
        return {"bench": self.bench, "options": asdict(self.options), "machine": self.machine, "figures": figures}

    @property
    def missed(self) -> list[Figure]:
        """Figures whose bar is not reached."""
        return [figure for figure in self.figures if figure.reached is False]


def number(value: float) -> str:
    """Three significant digits, or all of a larger whole part."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(figures: list[Figure]) -> str:
    """`figure | bar | reached`, aligned for a terminal and valid as Markdown."""
    rows = [("figure", "bar", "reached"), *((f.name, f.bar_text(), f.value_text()) for f in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    notes = [f"- {figure.name}: {figure.note}" for figure in figures if figure.note]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def machine(device: str) -> dict[str, Any]:
    """Processor, cores, load of the last minute, GPU, and versions."""
    import torch

    found: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "command": " ".join(["sa3-bench", *sys.argv[1:]]),
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def processor() -> str:
    """The processor's name and, where Linux says so, its 16-bit and matrix instructions."""
    name, flags = platform.processor() or platform.machine(), ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            for line in file:
                key, _, value = line.partition(":")
                name = value.strip() if key.strip() == "model name" else name
                flags = value if key.strip() == "flags" else flags
    except OSError:
        return name
    present = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags.split()]
    return f"{name} ({', '.join(present)})" if present else name


def renew(path: Path, records: Sequence[Record]) -> None:
    """Put the figures of `records` in the place of those measured before on the same kind of device.

    The section lies between `<!-- cpu: begin -->` and `<!-- cpu: end -->` (cuda likewise). Benches that were not run
    now keep the part they had. Raises `SA3Error` when the page has no such section.
    """
    device = records[0].options.device.partition(":")[0]
    begin, end = f"<!-- {device}: begin -->", f"<!-- {device}: end -->"
    page = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, found, rest = page.partition(begin)
    section, closed, after = rest.partition(end)
    if not found or not closed:
        raise SA3Error(f"{path} has no section for {device}: add the lines {begin} and {end} where the table belongs.")
    parts = _parts(section) | {_heading(record): _part(record) for record in records}
    body = "\n".join(f"### {name}\n\n{text.strip()}\n" for name, text in parts.items())
    write_text(path, f"{before}{begin}\n\n{body}\n{end}{after}")


def _heading(record: Record) -> str:
    options = record.options
    return ", ".join([record.bench, *filter(None, (options.arch, options.dtype if options.dtype != "bf16" else None))])


def _parts(section: str) -> dict[str, str]:
    """Text of each bench in a section."""
    found = {}
    for part in section.split("### ")[1:]:
        name, _, text = part.partition("\n")
        found[name.strip()] = text
    return found


def _part(record: Record) -> str:
    machine = record.machine
    where = f"{machine['gpu']}, " if "gpu" in machine else ""
    return (
        f"`{machine['command']}` on {where}{machine['processor']}, {record.options.threads} threads, load "
        f"{machine['load']} of {machine['cores']} cores at the end; torch {machine['torch']}, Python "
        f"{machine['python']}.\n\n{table(record.figures)}\n"
    )
