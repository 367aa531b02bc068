"""An audit for people: a table for the screen, `audit.json`, and a page with waveforms."""

import html
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sa3train.core.files import atomic_path
from sa3train.data.audit.checks import ERROR, KINDS, SEVERITIES, THUMB_COLUMNS, WARNING, worst

PAGE_ROWS = 2000
"""The page shows this many clips, the gravest first; audit.json has all."""

_COLOURS = {"error": "#b3261e", "warning": "#8a5a00", "note": "#3b5b8c"}


@dataclass
class Summary:
    """Counts over an audit; `seconds` is of the clips that can be encoded."""

    source: str
    clips: int = 0
    rejected: int = 0
    seconds: float = 0.0
    findings: Counter[str] = field(default_factory=Counter)

    def add(self, row: dict[str, Any]) -> None:
        """Count one row."""
        self.clips += 1
        bad = any(found["severity"] == ERROR for found in row["findings"])
        self.rejected += bad
        self.seconds += 0.0 if bad else row.get("seconds", 0.0)
        self.findings.update({found["code"] for found in row["findings"]})

    def as_json(self) -> dict[str, Any]:
        """As it stands in `audit.json`."""
        return {
            "source": self.source,
            "clips": self.clips,
            "rejected": self.rejected,
            "seconds": round(self.seconds, 3),
            "findings": {
                code: {"clips": count, "severity": KINDS[code].severity, "remedy": KINDS[code].remedy}
                for code, count in self._ordered()
            },
        }

    def table(self) -> str:
        """What was found, gravest first, with the remedy."""
        head = f"{self.source}: {self.clips} clips, {self.rejected} rejected, {_duration(self.seconds)} of audio to use"
        if not self.findings:
            return f"{head}\nnothing amiss"
        rows = [("", "clips", "finding", "remedy")]
        rows += [(KINDS[c].severity, str(count), KINDS[c].title, KINDS[c].remedy) for c, count in self._ordered()]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]}".rstrip() for row in rows
        ]
        return "\n".join([head, *lines])

    def _ordered(self) -> list[tuple[str, int]]:
        return sorted(self.findings.items(), key=lambda pair: (SEVERITIES.index(KINDS[pair[0]].severity), -pair[1]))


def write_audit(folder: Path, source: str, rows: Iterable[dict[str, Any]]) -> Summary:
    """Write `audit.json` and `audit.html` to `folder`; rows are streamed, one a line."""
    summary = Summary(source)
    shown: list[list[dict[str, Any]]] = [[] for _ in range(len(SEVERITIES) + 1)]
    with atomic_path(folder / "audit.json") as path, path.open("w", encoding="utf-8") as file:
        file.write('{"clips": [\n')
        for number, row in enumerate(rows):
            summary.add(row)
            group = shown[worst(row)]
            if len(group) < PAGE_ROWS:
                group.append(row)
            public = {name: value for name, value in row.items() if name != "stamp"}
            file.write((",\n" if number else "") + json.dumps(public))
        file.write('\n],\n"summary": ' + json.dumps(summary.as_json(), indent=1) + "}\n")
    worst_first = [row for group in shown for row in group][:PAGE_ROWS]
    with atomic_path(folder / "audit.html") as path:
        path.write_text(_page(summary, worst_first), encoding="utf-8", errors="replace")
    return summary


def clip_line(row: dict[str, Any]) -> str:
    """One clip with its findings, for the screen."""
    found = "; ".join(
        f"{item['severity']}: {KINDS[item['code']].title}" + (f" ({item['detail']})" if item["detail"] else "")
        for item in row["findings"]
    )
    return f"{row['source']}: {found}"


def _page(summary: Summary, rows: list[dict[str, Any]]) -> str:
    findings = "".join(
        f'<tr><td class="{KINDS[code].severity}">{KINDS[code].severity}</td><td>{count}</td>'
        f"<td>{html.escape(KINDS[code].title)}</td><td>{html.escape(KINDS[code].remedy)}</td></tr>"
        for code, count in summary._ordered()
    )
    rest = (
        f"<p>The {len(rows)} gravest of {summary.clips} clips; audit.json has all.</p>"
        if len(rows) < summary.clips
        else ""
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Audit of {html.escape(summary.source)}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1d1d1f }}
table {{ border-collapse: collapse; width: 100%; margin: 1rem 0 }}
td, th {{ text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid #ddd }}
svg {{ display: block; width: 12rem; height: 2.5rem; background: #f4f4f6 }} path {{ fill: #5b6b8c }}
{" ".join(f".{name} {{ color: {colour}; font-weight: 600 }}" for name, colour in _COLOURS.items())}
.small {{ color: #555; font-size: 13px }}
</style>
<h1>Audit of {html.escape(summary.source)}</h1>
<p>{summary.clips} clips, {summary.rejected} rejected, {_duration(summary.seconds)} of audio to use.</p>
<table><tr><th>severity<th>clips<th>finding<th>remedy</tr>{findings}</table>{rest}
<table><tr><th>waveform<th>clip<th>findings</tr>
{"".join(_page_row(row) for row in rows)}</table></html>
"""


def _page_row(row: dict[str, Any]) -> str:
    found = "".join(
        f'<div><span class="{item["severity"]}">{html.escape(KINDS[item["code"]].title)}</span> '
        f'{html.escape(item["detail"])}<br><span class="small">{html.escape(KINDS[item["code"]].remedy)}</span></div>'
        for item in row["findings"]
    )
    facts = ""
    if "seconds" in row:
        lufs = "" if row["lufs"] is None else f" · {row['lufs']} LUFS"
        peak = "" if row["peak_db"] is None else f" · peak {row['peak_db']} dB"
        facts = f"{row['seconds']:.2f} s · {row['sample_rate']} Hz · {row['channels']} ch{peak}{lufs}"
    return (
        f"<tr><td>{waveform(row.get('thumb', ''))}<td>{html.escape(row['source'])}"
        f'<div class="small">{facts}<br>{html.escape(row.get("caption", "")[:300])}</div><td>{found}</tr>\n'
    )


def waveform(thumb: str) -> str:
    """The outline of a clip (`sa3train.data.audit.checks.thumbnail`) as SVG; nothing without one."""
    if not thumb:
        return ""
    levels = [int(digit, 36) for digit in thumb]
    top = " ".join(f"L{column} {35 - level}" for column, level in enumerate(levels))
    bottom = " ".join(f"L{column} {36 + levels[column]}" for column in reversed(range(len(levels))))
    outline = f"M0 35 {top} {bottom} Z"
    return f'<svg viewBox="0 0 {THUMB_COLUMNS} 72" preserveAspectRatio="none"><path d="{outline}"/></svg>'


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def is_clean(summary: Summary) -> bool:
    """Whether nothing graver than a note was found."""
    return not any(KINDS[code].severity in (ERROR, WARNING) for code in summary.findings)
