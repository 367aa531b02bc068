"""Results, jobs and load reports as HTML. Every text that came from elsewhere is escaped here."""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from sa3train.adapters.apply.load_report import LoadReport
from sa3train.studio.play.history import Entry
from sa3train.studio.play.request import name_of
from sa3train.studio.server.commands import generate_command
from sa3train.studio.server.jobs import Job
from sa3train.studio.server.widgets import command_box, empty, notice
from sa3train.studio.server.workspace import Workspace

MODE_NAMES = {"text": "text to audio", "restyle": "audio to audio", "inpaint": "inpainted", "continue": "continued"}
ACTIONS = (
    ("again", "Again", "Again with these settings"),
    ("restyle", "Audio to audio", "Audio to audio from this"),
    ("inpaint", "Inpaint", "Inpaint this"),
    ("continue", "Continue", "Continue this"),
)
NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?\s?%?")
LAYER_COUNTS = ("matched", "missing", "unexpected", "shape_wrong")
NOTHING_YET = "Nothing here yet. Write a prompt and press Generate: what you make is listed here, and kept on disk."


def result_items(workspace: Workspace, groups: Sequence[Sequence[Entry]]) -> list[dict[str, str]]:
    """The list of results for the page's script, each card with a key of its own."""
    if not groups:
        return [{"key": "nothing", "html": empty(NOTHING_YET)}]
    return [{"key": group[0].group, "html": card(workspace, group)} for group in groups]


def card(workspace: Workspace, group: Sequence[Entry]) -> str:
    """One result, or the takes of a comparison or batch side by side."""
    first = group[0]
    settings = first.record["settings"]
    takes = "".join(_take(workspace, entry, many=len(group) > 1) for entry in group)
    warnings = dict.fromkeys(text for entry in group for text in _warnings(entry))
    return (
        f'<article class="card" aria-label="result {escape(first.group)}">'
        f"<h3>{escape(settings['prompt'][first.record['item']])}</h3>"
        f'<p class="facts">{escape(facts_of(first))}</p>{_frame(group)}{takes}</div>'
        f"{''.join(notice(text, 'warning') for text in warnings)}</article>"
    )


def _frame(group: Sequence[Entry]) -> str:
    """The takes of a comparison stand in rows by model; other takes flow."""
    rows = len({entry.record["model"]["source"] for entry in group})
    if "cell" not in group[0].studio or len(group) % rows:
        return '<div class="takes">'
    return f'<div class="takes grid" style="--columns: {len(group) // rows}">'


def facts_of(entry: Entry) -> str:
    """How a result was made, in one line."""
    record, settings = entry.record, entry.record["settings"]
    mode = MODE_NAMES.get(str(entry.studio.get("mode", "text")), "")
    facts = [entry.studio.get("created", ""), mode, f"{record['seconds']:.1f} s", f"seed {record['seed']}"]
    if "cell" not in entry.studio:
        facts.insert(1, record["model"]["source"])
        facts.append(f"{settings['steps']} steps, {settings['sampler_type']}, guidance {settings['cfg_scale']:g}")
        facts += [f"{name_of(each['path'] or 'an adapter')} ×{each['strength']:g}" for each in record["adapters"]]
    if settings["negative_prompt"]:
        facts.append(f"not: {settings['negative_prompt'][record['item']]}")
    return " · ".join(str(fact) for fact in facts if fact)


def _take(workspace: Workspace, entry: Entry, many: bool) -> str:
    label = str(entry.studio.get("cell") or (f"item {entry.record['item']}" if many else ""))
    name = escape(entry.name, quote=True)
    head = f"<b>{escape(label)}</b>" if label else ""
    buttons = "".join(
        f'<button type="button" data-action="{action}" data-name="{name}" title="{title}">{text}</button>'
        for action, text, title in ACTIONS
    )
    sound, picture = escape(workspace.url(entry.audio), quote=True), escape(workspace.url(entry.picture), quote=True)
    told = escape(label or "the result", quote=True)
    command = workspace.command(generate_command(entry.record, f"{entry.name}.wav"))
    return (
        f'<div class="take" data-group="{escape(entry.group, quote=True)}">{head}'
        f'<div class="picture"><img alt="mel spectrogram of {told}" src="{picture}">'
        f'<span class="playhead"></span></div>'
        f'<audio controls preload="metadata" aria-label="{told}" src="{sound}"></audio>'
        f"<small>{escape(measures_of(entry))}</small>"
        f'<div class="actions">{buttons}<a href="{sound}" download="{name}.wav">Download</a></div>'
        f"{_reports(entry)}{command_box(command)}</div>"
    )


def measures_of(entry: Entry) -> str:
    """Loudness and true peak of a result, in words."""
    measures = entry.studio.get("measures") or []
    item = entry.record["item"]
    found = measures[item] if item < len(measures) else {}
    loud, peak = found.get("loudness_lufs"), found.get("true_peak_db")
    return "silent" if loud is None or peak is None else f"{loud:.1f} LUFS · true peak {peak:.1f} dBTP"


def _reports(entry: Entry) -> str:
    """What was said when the adapters of a result were loaded."""
    reports = entry.studio.get("reports") or []
    if not reports:
        return ""
    pairs = zip(entry.record["adapters"], reports, strict=False)
    lines = "".join(f"<li>{escape(name_of(each['path'] or ''))}: {escape(one['summary'])}</li>" for each, one in pairs)
    return f"<details><summary>Adapters</summary><ul>{lines}</ul></details>"


def _warnings(entry: Entry) -> list[str]:
    reports = entry.studio.get("reports") or []
    notes = [str(entry.studio["note"])] if entry.studio.get("note") else []
    return [*notes, *entry.record.get("warnings", []), *(text for report in reports for text in report["warnings"])]


def status(jobs: Sequence[Job]) -> str:
    """What runs, what waits, and what became of the last one when it was not done."""
    lines = [_line(job, workspace) for workspace, job in enumerate(job for job in jobs if job.pending)]
    last = jobs[-1] if jobs else None
    if last is not None and last.state == "failed":
        lines.append(notice(f"{last.title}: {last.message}", "error"))
    elif last is not None and last.state == "cancelled":
        lines.append(notice(f"{last.title}: cancelled.", "warning"))
    return "".join(lines)


def _line(job: Job, ahead: int) -> str:
    title = escape(job.title, quote=True)
    if job.state == "waiting":
        told, bar = f"waits in the queue, {ahead} before it", ""
    else:
        told = job.message or "starting"
        bar = f'<progress max="1" value="{job.share:.3f}" aria-label="progress of {title}"></progress>'
    return (
        f'<div class="job" data-state="{job.state}"><div><b>{title}</b> <span>{escape(told)}</span></div>'
        f'<button type="button" class="small" data-cancel="{job.number}" aria-label="Cancel {title}">Cancel</button>'
        f"{bar}</div>"
    )


def load_reports(reports: Sequence[LoadReport]) -> str:
    """The load reports of adapters: what fits, on which base, how much each part of the model changes."""
    return "".join(load_report(report.to_dict(), report.summary()) for report in reports)


def load_report(report: dict[str, Any], summary: str, refused: str | None = None) -> str:
    """One load report; `refused` says why the adapter would not be loaded."""
    counts_heads = [name.replace("_", " ") for name in LAYER_COUNTS]
    counts = [str(len(report[name])) for name in LAYER_COUNTS]
    base, loaded = report["base"], report["base_loaded"]
    bases = [
        [key, base.get(key, "not recorded")[:16], loaded.get(key, "-")[:16]] for key in ("name", "architecture", "hash")
    ]
    effects = [[group, f"{value:.3%}"] for group, value in report["effect"].items()]
    parts = [
        notice(refused, "error") if refused else "",
        *(notice(text, "warning") for text in report["warnings"]),
        table(counts_heads, [counts], "Layers of the adapter"),
        table(["", "trained on", "loaded"], bases, "Base model"),
        table(["group", "‖W' − W‖ / ‖W‖"], effects, "Change of the weights at strength 1") if effects else "",
    ]
    name = name_of(report["source"])
    return f'<div class="card"><h3>{escape(name)}</h3><p class="facts">{escape(summary)}</p>{"".join(parts)}</div>'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """An HTML table of plain texts; cells after the first that look like numbers are set to the right."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' if head else "<td></td>" for head in heads)
    body = "".join(f"<tr>{''.join(_cell(cell, column) for column, cell in enumerate(row))}</tr>" for row in rows)
    return (
        f'<div class="studio-table" tabindex="0" role="region" aria-label="{escape(caption, quote=True)}">'
        f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(text: str, column: int) -> str:
    numeric = column > 0 and NUMBER.fullmatch(text) is not None
    return f'<td class="n">{escape(text)}</td>' if numeric else f"<td>{escape(text)}</td>"
