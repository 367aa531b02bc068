"""The tables in docs/performance.md: a section for each kind of device, rewritten from records; the rest stays."""

from collections.abc import Sequence
from pathlib import Path

from sa3train.errors import SA3Error
from sa3train.files import write_text
from sa3train.jobs.benches.figures import Record, table


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
