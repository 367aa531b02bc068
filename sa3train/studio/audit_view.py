"""An audit as the Data page shows it: what was found with its remedy, the gravest clips with waveform and player."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from sa3train.data.audit_report import waveform
from sa3train.data.findings import KINDS, SEVERITIES, worst
from sa3train.errors import DataError
from sa3train.studio.messages import notice
from sa3train.studio.runs_view import view
from sa3train.studio.workplace import StudioError, Workplace
from sa3train.training.report import duration
from sa3train.training.report_page import table, tile

SHOWN = 60


@dataclass(frozen=True)
class Audit:
    """An audit's summary, and its gravest rows."""

    summary: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]


def read_audit(path: Path, most: int = SHOWN) -> Audit:
    """Read an `audit.json`, a line at a time. Raises `DataError` when it is damaged."""
    groups: list[list[dict[str, Any]]] = [[] for _ in range(len(SEVERITIES) + 1)]
    summary = ""
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.startswith('{"source"'):
                    row = json.loads(line.rstrip().rstrip(","))
                    group = groups[worst(row)]
                    if len(group) < most:
                        group.append(row)
                elif summary or line.startswith('"summary"'):
                    summary += line
        # The file ends with the object that began on its first line.
        found = json.loads("{" + summary)["summary"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): audit the folder again.") from error
    return Audit(found, [row for group in groups for row in group][:most])


def audit_view(place: Workplace, audit: Audit, source: Path) -> str:
    """HTML of the whole audit."""
    summary = audit.summary
    tiles = [
        tile(f"{summary['clips']:,}", "clips"),
        tile(f"{summary['rejected']:,}", "cannot be encoded", "bad" if summary["rejected"] else "good"),
        tile(duration(summary["seconds"]), "of audio to use"),
    ]
    found = [
        [f'<span class="{item["severity"]}">{escape(item["severity"])}</span>', f"{item['clips']:,}",
         escape(KINDS[code].title), escape(item["remedy"])]
        for code, item in summary["findings"].items()
    ]  # fmt: skip
    findings = table(("", "clips", "finding", "remedy"), found, numbers=(1,)) if found else notice("Nothing amiss.")
    rows = [_row(place, source, row) for row in audit.rows]
    clips = table(("waveform", "clip", "findings", "listen"), rows)
    left = summary["clips"] - len(rows)
    more = f'<p class="soft">and {left:,} less grave ones: all are in audit.json.</p>' if left > 0 else ""
    return view(f'<div class="tiles">{"".join(tiles)}</div>{findings}<h3>Clips, the gravest first</h3>{clips}{more}')


def _row(place: Workplace, source: Path, row: Mapping[str, Any]) -> list[str]:
    found = "<br>".join(
        f'<span class="{item["severity"]}">{escape(KINDS[item["code"]].title)}</span> {escape(item["detail"])}'
        for item in sorted(row["findings"], key=lambda item: SEVERITIES.index(item["severity"]))
    )
    facts = []
    if "seconds" in row:
        facts = [f"{row['seconds']:.2f} s", f"{row['sample_rate']} Hz", f"{row['channels']} ch"]
        facts += [f"{row['lufs']} LUFS"] if row["lufs"] is not None else []
    about = f"<b>{escape(row['source'])}</b><br><small>{' · '.join(facts)}</small>"
    caption = f"<br>{escape(row['caption'][:200])}" if row.get("caption") else ""
    picture = f'<div class="wave">{waveform(str(row.get("thumb", "")))}</div>'
    return [picture, about + caption, found or "nothing amiss", player(place, source / row["source"])]


def player(place: Workplace, path: Path) -> str:
    """HTML of a player for a file, or why there is none."""
    try:
        url = place.url(place.file(path))
    except StudioError:
        return "<small>not a file of its own</small>"
    return f'<audio controls preload="none" src="{escape(url)}" aria-label="{escape(path.name)}"></audio>'
