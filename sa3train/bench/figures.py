"""Options of a benchmark, the figures it measures, and the tables of them in docs/performance.md.

The page has a section for each kind of device, updated from records; the rest of the page is kept.
"""

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sa3train.adapters.spec import KINDS, PEFT_METHODS
from sa3train.core.config import check_settings, setting
from sa3train.core.errors import SA3Error
from sa3train.core.files import write_text

ARCHES = ("nano", "small", "medium")


@dataclass(frozen=True)
class Options:
    """Settings of a benchmark."""

    arch: str | None = setting(None, help="Architecture, one of `ARCHES`; None for the benchmark's own.")
    device: str = setting("cpu", help="Device to measure.", text="filled")
    dtype: str = setting("bf16", help="bf16, fp16 or fp32.", choices=("bf16", "fp16", "fp32"))
    threads: int = setting(2, help="CPU threads.", min=1, max=1024)
    repeats: int = setting(5, help="Measured rounds, after the warm-up.", min=1, max=10_000)
    seconds: float | None = setting(
        None, help="Duration of the audio; None for the benchmark's own.", unit="seconds", min=0.1, max=600
    )
    steps: int = setting(8, help="Sampling steps.", min=1, max=1000)
    adapter_types: tuple[str, ...] = setting(
        (), help="Adapter types to measure; empty for all.", choices=(*KINDS, *PEFT_METHODS)
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def is_cuda(self) -> bool:
        """Whether the device is an NVIDIA GPU."""
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Figure:
    """A measured number with its target.

    Attributes:
        name: What was measured.
        value: The number; None if it could not be measured (then `note` says why, and the target counts as missed).
        unit: Unit of value and target.
        target: Number to reach; None if there is none.
        sense: Whether the value should be at most ("<=") or at least (">=") the target.
        note: Remark printed below the table.
    """

    name: str
    value: float | None
    unit: str
    target: float | None = None
    sense: Literal["<=", ">="] = "<="
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without a target."""
        if self.value is None:
            return False
        if self.target is None:
            return None
        return self.value <= self.target if self.sense == "<=" else self.value >= self.target

    def describe_target(self) -> str:
        """Format the target.

        Returns:
            Text such as "≤ 0.4 ×", or nothing without a target.
        """
        if self.target is None:
            return ""
        return f"{'≤' if self.sense == '<=' else '≥'} {self.target:g} {self.unit}".rstrip()

    def describe_value(self) -> str:
        """Format the value and whether the target is reached.

        Returns:
            Text such as "0.31 ×: reached".
        """
        if self.value is None:
            return "not measured"
        verdict = {None: "", True: ": reached", False: ": NOT reached"}[self.reached]
        return f"{_format_number(self.value)} {self.unit}".rstrip() + verdict


@dataclass(frozen=True)
class Record:
    """The figures of one benchmark run.

    Attributes:
        bench: Name of the benchmark.
        options: Its options.
        figures: What it measured.
        machine: Hardware, versions and command, as `describe_machine` returns them.
    """

    bench: str
    options: Options
    figures: list[Figure]
    machine: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Convert to plain values for JSON.

        Returns:
            The fields, and "reached" of each figure.
        """
        figures = [{**asdict(figure), "reached": figure.reached} for figure in self.figures]
        return {"bench": self.bench, "options": asdict(self.options), "machine": self.machine, "figures": figures}

    @property
    def missed(self) -> list[Figure]:
        """Figures that miss their target."""
        return [figure for figure in self.figures if figure.reached is False]


def _format_number(value: float) -> str:
    """Format with three significant digits, or all of a larger whole part."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def render_table(figures: list[Figure]) -> str:
    """Render figures as a table, aligned for a terminal and valid as Markdown.

    Args:
        figures: Rows of the table.

    Returns:
        The table and, below it, the notes.
    """
    header = ("figure", "target", "measured")
    rows = [header, *((figure.name, figure.describe_target(), figure.describe_value()) for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    notes = [f"- {figure.name}: {figure.note}" for figure in figures if figure.note]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def describe_machine(device: str) -> dict[str, Any]:
    """Describe hardware, versions, load of the last minute and the command.

    Args:
        device: Device that is measured; a GPU is named.

    Returns:
        Plain values for JSON.
    """
    import torch

    machine: dict[str, Any] = {
        "processor": _describe_processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "command": " ".join(["sa3-bench", *sys.argv[1:]]),
    }
    if device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def _describe_processor() -> str:
    """Name the processor and, on Linux, its 16-bit and matrix instructions."""
    name, flags = platform.processor() or platform.machine(), ""
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        key, _, value = line.partition(":")
        name = value.strip() if key.strip() == "model name" else name
        flags = value if key.strip() == "flags" else flags
    present = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags.split()]
    return f"{name} ({', '.join(present)})" if present else name


def split_page(path: Path, device: str) -> tuple[str, str, str]:
    """Split a Markdown page at the section of one kind of device.

    Args:
        path: The page.
        device: Such as "cpu" or "cuda:0".

    Returns:
        What is before the section's tables, with its first mark; the tables; the last mark with what is after.

    Raises:
        SA3Error: The page is no text, or has no section for the device.
    """
    kind = device.partition(":")[0]
    begin, end = f"<!-- {kind}: begin -->", f"<!-- {kind}: end -->"
    try:
        page = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SA3Error(f"{path} is not UTF-8 text. Name a Markdown page.") from error
    before, has_begin, rest = page.partition(begin)
    section, has_end, after = rest.partition(end)
    if not has_begin or not has_end:
        raise SA3Error(f"{path} has no section for {kind}. Add the lines {begin} and {end} where the table belongs.")
    return before + begin, section, end + after


def update_page(path: Path, records: Sequence[Record]) -> None:
    """Update the tables of one kind of device in a Markdown page.

    The section lies between `<!-- cpu: begin -->` and `<!-- cpu: end -->` (likewise for cuda). Tables of benchmarks
    that have no record are kept.

    Args:
        path: The page.
        records: Benchmark runs, all on the same kind of device.
    """
    before, section, after = split_page(path, records[0].options.device)
    tables = {}
    for part in section.split("### ")[1:]:
        name, _, text = part.partition("\n")
        tables[name.strip()] = text
    tables |= {_make_heading(record): _render_record(record) for record in records}
    body = "\n".join(f"### {name}\n\n{text.strip()}\n" for name, text in tables.items())
    write_text(path, f"{before}\n\n{body}\n{after}")


def _make_heading(record: Record) -> str:
    options = record.options
    return ", ".join([record.bench, *filter(None, (options.arch, options.dtype if options.dtype != "bf16" else None))])


def _render_record(record: Record) -> str:
    machine = record.machine
    gpu = f"{machine['gpu']}, " if "gpu" in machine else ""
    return (
        f"`{machine['command']}` on {gpu}{machine['processor']}, {record.options.threads} threads, load "
        f"{machine['load']} of {machine['cores']} cores at the end; torch {machine['torch']}, Python "
        f"{machine['python']}.\n\n{render_table(record.figures)}\n"
    )
