"""Results, jobs and load reports as HTML. Every text from elsewhere is escaped here."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sa3train.adapters.apply.load_report import LoadReport
from sa3train.core.text import format_share
from sa3train.inference.outputs import describe_measured
from sa3train.inference.replay import build_command
from sa3train.reports.html import render_details
from sa3train.studio.play.history import Result
from sa3train.studio.play.settings import shorten_name
from sa3train.studio.server import widgets as ui
from sa3train.studio.server.jobs import Job
from sa3train.studio.server.workspace import Workspace

MODE_NAMES = {"text": "text to audio", "restyle": "audio to audio", "inpaint": "inpainted", "continue": "continued"}
ACTIONS = (
    ("again", "Reuse settings", "Fill the form with these settings"),
    ("restyle", "Audio to audio", "Use as source audio"),
    ("inpaint", "Inpaint", "Inpaint this result"),
    ("continue", "Continue", "Continue this result"),
)
LAYER_COUNTS = ("matched", "missing", "unexpected", "mismatched")
NO_RESULTS = (
    "No results yet. Enter a prompt and press Generate. Results appear here and are saved to disk. To train on sounds "
    "of yours first: Encode on the Data page, then start a run on the Runs page."
)


def list_cards(workspace: Workspace, groups: Sequence[Sequence[Result]]) -> list[dict[str, str]]:
    """List the cards of results for the page's script.

    Args:
        workspace: The studio's folders.
        groups: Results by comparison or batch.

    Returns:
        `key` and `html` of each card.
    """
    if not groups:
        return [{"key": "nothing", "html": ui.render_placeholder(NO_RESULTS)}]
    return [{"key": group[0].group, "html": render_card(workspace, group)} for group in groups]


def render_card(workspace: Workspace, group: Sequence[Result]) -> str:
    """Render a result, or those of a comparison or batch side by side.

    Args:
        workspace: The studio's folders.
        group: The results.

    Returns:
        HTML.
    """
    first = group[0]
    prompt = first.record["settings"]["prompt"][first.record["item"]]
    takes = "".join(_render_take(workspace, result, many=len(group) > 1) for result in group)
    warnings = dict.fromkeys(text for result in group for text in _list_warnings(result))
    return (
        f'<article class="card" aria-label="result {escape(first.group)}">'
        f"<h3>{escape(prompt)}</h3>"
        f'<p class="facts">{escape(describe_result(first))}</p>{_open_grid(group)}{takes}</div>'
        f"{''.join(ui.render_notice(text, 'warning') for text in warnings)}</article>"
    )


def _open_grid(group: Sequence[Result]) -> str:
    """The element around the results: a comparison has a row per model, a batch flows."""
    rows = len({result.record["model"]["source"] for result in group})
    if "cell" not in group[0].studio or len(group) % rows:
        return '<div class="takes">'
    return f'<div class="takes grid" style="--columns: {len(group) // rows}">'


def describe_result(result: Result) -> str:
    """Describe in one line how a result was generated.

    Args:
        result: The result.

    Returns:
        Plain text.
    """
    record, settings, studio = result.record, result.record["settings"], result.studio
    mode = MODE_NAMES.get(str(studio.get("mode", "text")), "")
    facts = [studio.get("created", ""), mode, _describe_length(record), f"seed {record['seed']}"]
    if "cell" not in studio:
        facts.insert(1, record["model"]["source"])
        facts.append(f"{settings['steps']} steps, {settings['sampler_type']}, CFG scale {settings['cfg_scale']:g}")
        for each in record["adapters"]:
            ends = each["strength"] if isinstance(each["strength"], list) else [each["strength"]]
            facts.append(f"{shorten_name(each['path'] or 'an adapter')} ×{'..'.join(f'{end:g}' for end in ends)}")
    facts += [f"from {start:g} s: {text}" for start, text in settings.get("prompt_at") or ()]
    facts += describe_measured(record.get("measured", {}))
    if settings["negative_prompt"]:
        facts.append(f"negative prompt: {settings['negative_prompt'][record['item']]}")
    return " · ".join(str(fact) for fact in facts if fact)


def _describe_length(record: Mapping[str, Any]) -> str:
    settings, seconds = record["settings"], f"{record['seconds']:.1f} s"
    bars = f"{settings['bars']} bars at {settings['bpm']:g} BPM, {seconds}" if settings.get("bars") else seconds
    return f"loop of {bars}" if settings.get("loop") else bars


def _render_take(workspace: Workspace, result: Result, many: bool) -> str:
    label = str(result.studio.get("cell") or (f"item {result.record['item']}" if many else ""))
    heading, name = f"<b>{escape(label)}</b>" if label else "", escape(result.name)
    buttons = "".join(
        f'<button type="button" data-action="{action}" data-name="{name}" title="{title}">{text}</button>'
        for action, text, title in ACTIONS
    )
    audio, picture = escape(workspace.get_url(result.audio)), escape(workspace.get_url(result.picture))
    alt, loop = escape(label or "the result"), " loop" if result.record["settings"].get("loop") else ""
    command = build_command(result.record, f"{result.name}.wav")
    return (
        f'<div class="take" data-group="{escape(result.group)}">{heading}'
        f'<div class="picture"><img alt="mel spectrogram of {alt}" src="{picture}">'
        f'<span class="playhead"></span></div>'
        f'<audio controls{loop} preload="metadata" aria-label="{alt}" src="{audio}"></audio>'
        f"<small>{escape(describe_levels(result))}</small>"
        f'<div class="actions">{buttons}<a href="{audio}" download="{name}.wav">Download</a></div>'
        f"{_render_adapters(result)}{ui.render_command(command)}</div>"
    )


def describe_levels(result: Result) -> str:
    """Describe loudness and true peak of a result.

    Args:
        result: The result.

    Returns:
        Plain text.
    """
    measures, item = result.studio.get("measures") or [], result.record["item"]
    levels = measures[item] if item < len(measures) else {}
    loudness, peak = levels.get("loudness_lufs"), levels.get("true_peak_db")
    return "silent" if loudness is None or peak is None else f"{loudness:.1f} LUFS · true peak {peak:.1f} dBTP"


def _render_adapters(result: Result) -> str:
    """The summary of each adapter's load report."""
    reports = result.studio.get("reports") or []
    if not reports:
        return ""
    names = [shorten_name(adapter["path"] or "") for adapter in result.record["adapters"]]
    lines = [f"<li>{escape(name)}: {escape(one['summary'])}</li>" for name, one in zip(names, reports, strict=False)]
    return render_details("Adapters", f"<ul>{''.join(lines)}</ul>")


def _list_warnings(result: Result) -> list[str]:
    reports = result.studio.get("reports") or []
    notes = [str(result.studio["note"])] if result.studio.get("note") else []
    return [*notes, *result.record.get("warnings", []), *(text for report in reports for text in report["warnings"])]


def render_status(jobs: Sequence[Job]) -> str:
    """Render running and waiting jobs, and the last one where it failed.

    Args:
        jobs: The jobs in order.

    Returns:
        HTML.
    """
    lines = [_render_job(job, ahead) for ahead, job in enumerate(job for job in jobs if job.is_pending)]
    last = jobs[-1] if jobs else None
    if last is not None and last.state == "failed":
        dismiss = f'<button type="button" class="small" data-cancel="{last.number}">Dismiss</button>'
        lines.append(ui.render_notice(f"{last.title}: {last.message}", "error", dismiss))
    return "".join(lines)


def _render_job(job: Job, ahead: int) -> str:
    title = escape(job.title)
    message, bar = f"waits for {ahead} others" if ahead > 1 else "next to start", ""
    if job.state != "waiting":
        message = job.message or "starting"
        bar = f'<progress max="1" value="{job.progress:.3f}" aria-label="progress of {title}"></progress>'
    return (
        f'<div class="job" data-state="{job.state}"><div><b>{title}</b> <span>{escape(message)}</span></div>'
        f'<button type="button" class="small" data-cancel="{job.number}" aria-label="Cancel {title}">Cancel</button>'
        f"{bar}</div>"
    )


def render_load_reports(reports: Sequence[LoadReport]) -> str:
    """Render load reports of adapters.

    Args:
        reports: The reports.

    Returns:
        HTML.
    """
    return "".join(render_load_report(report.to_dict(), report.summary) for report in reports)


def render_load_report(report: dict[str, Any], summary: str, refused: str | None = None) -> str:
    """Render a load report: matched layers, base model, change of each group of layers.

    Args:
        report: What `LoadReport.to_dict` returned.
        summary: Its summary.
        refused: Why the adapter cannot be loaded; None where it can.

    Returns:
        HTML.
    """
    base, loaded = report["base"], report["base_loaded"]
    bases = [
        [key, base.get(key, "not recorded")[:16], loaded.get(key, "-")[:16]] for key in ("name", "architecture", "hash")
    ]
    effects = [[group, format_share(value)] for group, value in report["effect"].items()]
    counts = [str(len(report[name])) for name in LAYER_COUNTS]
    parts = [
        ui.render_notice(refused, "error") if refused else "",
        *(ui.render_notice(text, "warning") for text in report["warnings"]),
        ui.render_text_table("Layers of the adapter", LAYER_COUNTS, [counts]),
        ui.render_text_table("Base model", ["", "trained on", "loaded"], bases),
        ui.render_text_table("Change of the weights at strength 1", ["group", "‖W' − W‖ / ‖W‖"], effects),
    ]
    head = f'<h3>{escape(shorten_name(report["source"]))}</h3><p class="facts">{escape(summary)}</p>'
    return ui.render_panel(f'<div class="card">{head}{"".join(parts)}</div>')
