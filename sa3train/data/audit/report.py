"""Present an audit: a table for the screen, `audit.json`, and a page with waveforms (`assets/audit.html`)."""

import heapq
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader

from sa3train.core.files import path_exists, replace_file
from sa3train.core.text import format_columns
from sa3train.data.audit.checks import (
    ERROR,
    FINDING_TYPES,
    SEVERITIES,
    THUMBNAIL_COLUMNS,
    UNCAPTIONED,
    FindingType,
    is_rejected,
    rank_clip,
)
from sa3train.data.sources.facts import format_fact_value
from sa3train.data.sources.listing import OWN

_EXAMPLES = 5
_PAGE_ROWS = 2000
"""Number of clips on the page, worst first; audit.json has all."""


@dataclass
class AuditSummary:
    """Counts over an audit.

    Attributes:
        source: Where the clips come from.
        clips: Number of clips.
        rejected: Number of clips with an error.
        seconds: Length of the accepted clips in seconds.
        uncaptioned_seconds: Length of the clips that are rejected for nothing but a missing caption.
        findings: Number of clips with each finding.
        applied: Fixes that the encode applies, such as "fixes=dc"; empty for an audit alone.
        composed: The first captions that were composed, with what each rests on.
    """

    source: str
    clips: int = 0
    rejected: int = 0
    seconds: float = 0.0
    uncaptioned_seconds: float = 0.0
    findings: Counter[str] = field(default_factory=Counter)
    applied: Sequence[str] = ()
    composed: list[str] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        """Count one clip, or only the findings of a row that is of no clip.

        Args:
            row: Its audit row.
        """
        rejected = is_rejected(row)
        self.clips += all(finding["code"] != OWN for finding in row["findings"])
        self.rejected += rejected
        if not rejected:
            self.seconds += row.get("seconds", 0.0)
        elif {each["code"] for each in row["findings"] if each["severity"] == ERROR} <= UNCAPTIONED:
            self.uncaptioned_seconds += row.get("seconds", 0.0)
        self.findings.update({finding["code"] for finding in row["findings"]})
        details = [finding["detail"] for finding in row["findings"] if finding["code"] == "auto_caption"]
        if details and len(self.composed) < _EXAMPLES:
            self.composed.append(f"{row['source']}: {row['caption']}  [{details[0]}]")

    def as_json(self) -> dict[str, Any]:
        """Return the summary as it is stored in `audit.json`.

        Returns:
            Counts, and each finding with its severity and fix, worst first.
        """
        return {
            "source": self.source,
            "clips": self.clips,
            "rejected": self.rejected,
            "seconds": round(self.seconds, 3),
            "uncaptioned_seconds": round(self.uncaptioned_seconds, 3),
            "findings": {
                code: {"clips": count, "severity": kind.severity, "fix": kind.fix}
                for code, count, kind in self.sort_findings()
            },
        }

    def format_table(self) -> str:
        """Format the counts as a table for the screen.

        Returns:
            Several lines: findings with their fixes, worst first.
        """
        head = f"{self.source}: {self.count_clips()}"
        if not self.findings:
            return f"{head}\nno problems found"
        rows = [("", "clips", "finding", "fix")]
        rows += [(kind.severity, str(count), kind.title, kind.fix) for _, count, kind in self.sort_findings()]
        composed = ["composed, such as:", *self.composed] if self.composed else []
        return "\n".join([head, *format_columns(rows, (1,)), *composed])

    def sort_findings(self) -> list[tuple[str, int, FindingType]]:
        """Sort the findings by severity, then by frequency.

        Returns:
            (code, number of clips, what `describe_finding` returns) of each.
        """
        found = [(code, count, self.describe_finding(code)) for code, count in self.findings.items()]
        return sorted(found, key=lambda entry: (SEVERITIES.index(entry[2].severity), -entry[1]))

    def describe_finding(self, code: str) -> FindingType:
        """Describe a finding, whose fix may be one that is applied.

        Args:
            code: Key of `FINDING_TYPES`.

        Returns:
            Its severity, title and fix.
        """
        return FINDING_TYPES[code].after(self.applied)

    def count_clips(self) -> str:
        """Count the clips in words.

        Returns:
            Text such as "3 clips, 1 rejected, 9.0 s of usable audio, 4.0 s more with captions".
        """
        more = f", {_format_duration(self.uncaptioned_seconds)} more with captions" if self.uncaptioned_seconds else ""
        return f"{self.clips} clips, {self.rejected} rejected, {_format_duration(self.seconds)} of usable audio{more}"


def write_audit_report(
    folder: Path, source: str, rows: Iterable[dict[str, Any]], applied: Sequence[str] = ()
) -> AuditSummary:
    """Write `audit.json` and `audit.html`.

    Args:
        folder: Folder for the two files.
        source: Name of the source.
        rows: Audit rows; they are streamed to the file, one per line.
        applied: Fixes that the encode applies, such as "fixes=dc". Findings that they fix become notes.

    Returns:
        Counts over all rows.
    """
    summary = AuditSummary(source, applied=applied)

    def write_rows(file: TextIO) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(rows):
            for finding in row["findings"]:
                finding["severity"] = summary.describe_finding(finding["code"]).severity
            summary.add(row)
            public = {name: value for name, value in row.items() if name != "stamp"}
            file.write((",\n" if number else "") + json.dumps(public))
            yield row

    with replace_file(folder / "audit.json") as path, path.open("w", encoding="utf-8") as file:
        file.write('{"clips": [\n')
        worst_first = heapq.nsmallest(_PAGE_ROWS, write_rows(file), key=rank_clip)
        file.write('\n],\n"summary": ' + json.dumps(summary.as_json(), indent=1) + "}\n")
    worst_first = [row | {"audio": _make_audio_link(folder, source, row["source"])} for row in worst_first]
    with replace_file(folder / "audit.html") as path:
        page = _templates.get_template("audit.html").render(summary=summary, rows=worst_first)
        path.write_text(page, encoding="utf-8", errors="replace")
    return summary


def _make_audio_link(folder: Path, source: str, clip: str) -> str:
    """Make the relative address of a clip's file for a page in `folder`; empty if it is none on this machine."""
    root = Path(source) if Path(source).is_dir() else Path(source).parent
    return quote(os.fsencode(os.path.relpath(root / clip, folder))) if path_exists(root / clip) else ""


def format_clip(row: dict[str, Any]) -> str:
    """Format one clip with its findings as a line.

    Args:
        row: Its audit row.

    Returns:
        The source, and each finding with its severity and detail. Line breaks in file names are escaped.
    """
    findings = "; ".join(
        f"{finding['severity']}: {FINDING_TYPES[finding['code']].title}"
        + (f" ({finding['detail']})" if finding["detail"] else "")
        for finding in row["findings"]
    )
    line = f"{row['source']}: {findings}"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


def format_measurements(row: Mapping[str, Any]) -> str:
    """Format the main measurements of a clip as a line.

    Args:
        row: Its audit row, or what `sa3train.data.audit.checks.measure` returned.

    Returns:
        Length, sample rate, channels, peak and loudness; empty for a clip that was not measured.
    """
    if "seconds" not in row:
        return ""
    lufs = "" if row["lufs"] is None else f" · {row['lufs']} LUFS"
    peak = "" if row["peak_db"] is None else f" · peak {row['peak_db']} dB"
    return f"{row['seconds']:.2f} s · {row['sample_rate']} Hz · {row['channels']} ch{peak}{lufs}"


def format_facts(row: Mapping[str, Any]) -> str:
    """Format what tags, names and sound say of a clip's tempo, key, genre and the like, with where it stands.

    Args:
        row: Its audit row.

    Returns:
        Such as "bpm 128 (ACID chunk), key A minor (file name)"; empty where there is nothing.
    """
    return ", ".join(f"{name} {format_fact_value(value)} ({source})" for name, value, source in row.get("facts", ()))


def draw_waveform(thumbnail: str | None) -> str:
    """Draw the outline of a clip.

    Args:
        thumbnail: What `sa3train.data.audit.checks.make_thumbnail` returned; may be empty or None.

    Returns:
        SVG; empty without a thumbnail.
    """
    if not thumbnail:
        return ""
    levels = [int(digit, 36) for digit in thumbnail]
    top = " ".join(f"L{column} {35 - level}" for column, level in enumerate(levels))
    bottom = " ".join(f"L{column} {36 + levels[column]}" for column in reversed(range(len(levels))))
    outline = f"M0 35 {top} {bottom} Z"
    return f'<svg viewBox="0 0 {THUMBNAIL_COLUMNS} 72" preserveAspectRatio="none"><path d="{outline}"/></svg>'


def _format_duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "assets"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_templates.filters["measurements"] = format_measurements
_templates.filters["waveform"] = draw_waveform
_templates.filters["facts"] = format_facts
