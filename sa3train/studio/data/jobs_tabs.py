"""The Audit and Encode tabs: each starts a command in a process of its own, and shows its progress and result."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from sa3train.core.errors import DataError, SA3Error
from sa3train.core.user_files import stat_file
from sa3train.data.audit.checks import FINDING_TYPES, SEVERITIES, find_worst_severity
from sa3train.data.audit.report import draw_waveform, format_measurements
from sa3train.data.encode.settings import AUGMENTATIONS, FIX_NAMES, EncodeSettings
from sa3train.data.shards.index import INDEX_FILE, summarize_data
from sa3train.reports.html import format_duration, render_details, render_table, render_tile
from sa3train.studio.data import jobs
from sa3train.studio.data.captions import list_clips
from sa3train.studio.data.jobs import STATES, DataJob
from sa3train.studio.server.folders import list_models, resolve_model_name
from sa3train.studio.server.widgets import render_command, render_notice, render_panel, render_placeholder, show_errors
from sa3train.studio.server.workspace import StudioError, Workspace

MAX_ROWS = 60
"""Clips shown of an audit, worst first."""
ANY_MODEL = "any"
LOG_LINES = 12
NO_AUDIT = "An audit decodes and measures every clip, and lists problems with their remedies. It changes nothing."
NO_ENCODE = "Encoding turns each clip, at its own length, into latents for training. It can be stopped and resumed."


@dataclass(frozen=True)
class AuditReport:
    """An audit.

    Attributes:
        summary: Its counts.
        rows: The rows of its worst clips.
    """

    summary: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]


def read_audit(path: Path, max_rows: int = MAX_ROWS) -> AuditReport:
    """Read an `audit.json`, one line at a time.

    Args:
        path: Path of the file.
        max_rows: Number of clips to keep, worst first.

    Returns:
        The audit.

    Raises:
        DataError: When the file is damaged.
    """
    groups: list[list[dict[str, Any]]] = [[] for _ in range(len(SEVERITIES) + 1)]
    summary = ""
    try:
        stat_file(path)
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.startswith('{"source"'):
                    row = json.loads(line.rstrip().rstrip(","))
                    group = groups[find_worst_severity(row)]
                    if len(group) < max_rows:
                        group.append(row)
                elif summary or line.startswith('"summary"'):
                    summary += line
        # The file ends with the object that began on its first line.
        found = json.loads("{" + summary)["summary"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): audit the folder again.") from error
    return AuditReport(found, [row for group in groups for row in group][:max_rows])


def render_audit(workspace: Workspace, audit: AuditReport, source: Path) -> str:
    """Render an audit.

    Args:
        workspace: The studio's folders.
        audit: The audit.
        source: Folder of audio.

    Returns:
        HTML.
    """
    summary = audit.summary
    tiles = [
        render_tile(f"{summary['clips']:,}", "clips"),
        render_tile(f"{summary['rejected']:,}", "rejected", "bad" if summary["rejected"] else "good"),
        render_tile(format_duration(summary["seconds"]), "usable audio"),
    ]
    findings = [
        [f'<span class="{item["severity"]}">{escape(item["severity"])}</span>', f"{item['clips']:,}",
         escape(FINDING_TYPES[code].title), escape(item["remedy"])]
        for code, item in summary["findings"].items()
    ]  # fmt: skip
    table = render_table(("", "clips", "finding", "remedy"), findings, numbers=(1,))
    rows = [_render_row(workspace, source, row) for row in audit.rows]
    clips = render_table(("waveform", "clip", "findings", "listen"), rows)
    left = summary["clips"] - len(rows)
    more = f'<p class="soft">and {left:,} more: all are in audit.json.</p>' if left > 0 else ""
    return render_panel(
        f'<div class="tiles">{"".join(tiles)}</div>{table if findings else render_notice("No problems found.")}'
        f"<h3>Clips, worst first</h3>{clips}{more}"
    )


def _render_row(workspace: Workspace, source: Path, row: Mapping[str, Any]) -> list[str]:
    findings = "<br>".join(
        f'<span class="{item["severity"]}">{escape(FINDING_TYPES[item["code"]].title)}</span> {escape(item["detail"])}'
        for item in sorted(row["findings"], key=lambda item: SEVERITIES.index(item["severity"]))
    )
    about = f"<b>{escape(row['source'])}</b><br><small>{format_measurements(row)}</small>"
    caption = f"<br>{escape(row['caption'][:200])}" if row.get("caption") else ""
    picture = f'<div class="wave">{draw_waveform(str(row.get("thumb", "")))}</div>'
    player = render_player(workspace, source / row["source"])
    return [picture, about + caption, findings or "no problems found", player]


def render_player(workspace: Workspace, path: Path) -> str:
    """Render a player for a file.

    Args:
        workspace: The studio's folders.
        path: The file.

    Returns:
        HTML; a note when the clip is not a file of its own.
    """
    try:
        url = workspace.get_url(workspace.resolve_file(path))
    except StudioError:
        return "<small>not a separate file</small>"
    return f'<audio controls preload="none" src="{escape(url)}" aria-label="{escape(path.name)}"></audio>'


def build_audit_tab(workspace: Workspace, folder: gr.Dropdown, tick: gr.Timer) -> None:
    """Build the Audit tab.

    Args:
        workspace: The studio's folders.
        folder: The chosen folder of audio.
        tick: Refreshes the tab.
    """
    with gr.Row():
        captions = gr.Radio(["required", "optional"], value="required", label="Captions", scale=2)
        choices = [("any model", ANY_MODEL), *list_models(workspace)]
        model = gr.Dropdown(choices, value=ANY_MODEL, label="Check against model", allow_custom_value=True, scale=2)
        begin = gr.Button("Audit", variant="primary", elem_id="audit-start", min_width=100)
        stop = gr.Button("Stop", elem_id="audit-stop", min_width=80)
    status = gr.HTML("", elem_id="audit-status")
    dismiss = _build_dismiss("audit")
    result = gr.HTML(render_placeholder(NO_AUDIT), elem_id="audit-result")
    seen = gr.State(None)

    @show_errors
    def start_audit(path: str | None, rule: str, name: str) -> str:
        source = resolve_source(workspace, path)
        limits = None if name in ("", ANY_MODEL) else resolve_model_name(workspace, name)
        command = jobs.build_audit_command(workspace, source, rule, limits)
        jobs.start_job(workspace, "audit", source, jobs.get_audit_dir(workspace, source), command)
        return render_job(_find_job(workspace, "audit", path))

    @show_errors
    def refresh(path: str | None, before: Any) -> tuple[Any, ...]:
        source, job = _resolve_known(workspace, path), _find_job(workspace, "audit", path)
        file = jobs.get_audit_dir(workspace, source) / jobs.AUDIT_FILE if source else None
        stamp = file.stat().st_mtime_ns if file is not None and file.is_file() else 0
        now = (path, stamp, job)
        if now == before:
            return (gr.skip(),) * 4
        if source is None or file is None or not stamp:
            return render_job(job), _show_dismiss(job), render_placeholder(NO_AUDIT), now
        same = before is not None and before[:2] == now[:2]
        shown = gr.skip() if same else render_audit_file(workspace, file, source)
        return render_job(job), _show_dismiss(job), shown, now

    begin.click(start_audit, [folder, captions, model], status, show_progress="hidden")
    _connect_buttons(workspace, "audit", folder, stop, dismiss, status)
    tick.tick(refresh, [folder, seen], [status, dismiss, result, seen], show_progress="hidden")


def build_encode_tab(workspace: Workspace, folder: gr.Dropdown, tick: gr.Timer) -> None:
    """Build the Encode tab.

    Args:
        workspace: The studio's folders.
        folder: The chosen folder of audio.
        tick: Refreshes the tab.
    """
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=360):
            with gr.Row():
                model = gr.Dropdown(
                    list_models(workspace), value=workspace.model, label="Autoencoder of", allow_custom_value=True
                )
                out = gr.Textbox("", label="Folder for the latents", placeholder="latents/NAME")
            with gr.Row():
                fixes = gr.CheckboxGroup(list(FIX_NAMES), label="Fixes")
                augmentations = gr.CheckboxGroup(list(AUGMENTATIONS), label="Augmentations")
            with gr.Row():
                split = gr.Slider(0, 0.5, value=0.05, step=0.01, label="Validation split")
                rejected = gr.Slider(0, 1, value=0.1, step=0.01, label="Max rejected")
            with gr.Row():
                captions = gr.Radio(["required", "optional"], value="required", label="Captions")
                duplicates = gr.Radio(["keep", "drop"], value="keep", label="Duplicates")
            with gr.Row():
                begin = gr.Button("Encode", variant="primary", elem_id="encode-start")
                stop = gr.Button("Stop", elem_id="encode-stop")
        with gr.Column(scale=3, min_width=320):
            status = gr.HTML("", elem_id="encode-status")
            dismiss = _build_dismiss("encode")
            result = gr.HTML(render_placeholder(NO_ENCODE), elem_id="encode-result")
    seen = gr.State(None)

    @show_errors
    def start_encode(path: str | None, name: str, target: str, *values: Any) -> str:
        source = resolve_source(workspace, path)
        folder_out = workspace.resolve_output(target or f"latents/{source.name}")
        names = ("fixes", "augmentations", "split", "max_rejected", "captions", "duplicates")
        settings = EncodeSettings(**dict(zip(names, values, strict=True)))
        command = jobs.build_encode_command(source, folder_out, resolve_model_name(workspace, name), settings)
        jobs.start_job(workspace, "encode", source, folder_out, command)
        return render_job(_find_job(workspace, "encode", path))

    @show_errors
    def refresh(path: str | None, before: Any) -> tuple[Any, ...]:
        job = _find_job(workspace, "encode", path)
        now = (path, job)
        if now == before:
            return (gr.skip(),) * 4
        shown = render_placeholder(NO_ENCODE) if job is None else render_latents(workspace, job)
        return render_job(job), _show_dismiss(job), shown, now

    fields = [folder, model, out, fixes, augmentations, split, rejected, captions, duplicates]
    begin.click(start_encode, fields, status, show_progress="hidden")
    _connect_buttons(workspace, "encode", folder, stop, dismiss, status)
    tick.tick(refresh, [folder, seen], [status, dismiss, result, seen], show_progress="hidden")


def resolve_source(workspace: Workspace, path: str | None) -> Path:
    """Resolve the chosen folder of audio, and check that all of it is inside the studio's folders.

    Args:
        workspace: The studio's folders.
        path: The choice.

    Returns:
        The folder.

    Raises:
        StudioError: When none is chosen.
    """
    if not path:
        raise StudioError("choose a folder of audio first.")
    folder = workspace.resolve_folder(path, "folder of audio")
    list_clips(workspace, folder)
    return folder


def render_audit_file(workspace: Workspace, file: Path, source: Path) -> str:
    """Render an audit, or what is wrong with its file.

    Args:
        workspace: The studio's folders.
        file: Path of an `audit.json`.
        source: Folder of audio.

    Returns:
        HTML.
    """
    try:
        return render_audit(workspace, read_audit(file), source)
    except SA3Error as error:
        return render_notice(str(error), "error")


def render_job(job: DataJob | None) -> str:
    """Render the state and progress of a job, and its command.

    Args:
        job: The job.

    Returns:
        HTML; empty without a job.
    """
    if job is None:
        return ""
    share = f' value="{job.share:.4f}"' if job.share is not None else ""
    bar = f'<progress max="1"{share} aria-label="{job.kind} progress"></progress>' if job.is_running else ""
    line = f"{job.kind}: {STATES[job.state]}" + (f"; {job.progress}" if job.progress else "")
    error = render_notice(job.error, "error") if job.error else ""
    log = jobs.read_log(job.folder, LOG_LINES)
    details = render_details("Log", f'<pre tabindex="0" aria-label="log">{escape(log)}</pre>') if log else ""
    mark = {"finished": "done", "failed": "bad"}.get(job.state, "work" if job.is_running else "rest")
    state = f'<p><span class="state {mark}" role="status">{escape(line)}</span></p>'
    return render_panel(state + bar + error + details) + render_command(job.command)


def render_latents(workspace: Workspace, job: DataJob) -> str:
    """Render the latents that an encode has made.

    Args:
        workspace: The studio's folders.
        job: The encode.

    Returns:
        HTML.
    """
    if job.is_running or not (job.out / INDEX_FILE).is_file():
        return render_panel(f'<p class="soft">Output folder: {escape(workspace.shorten(job.out))}</p>')
    found = summarize_data(job.out)
    heldout = f", {found.heldout} held out" if found.heldout else ""
    rejected = f"; {found.rejected} rejected (rejected.jsonl)" if found.rejected else ""
    card = job.out / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    clips = f"{found.clips} training clips, {format_duration(found.seconds)}"
    return render_panel(
        f"<p><b>{escape(workspace.shorten(job.out))}</b>: {clips}{heldout}{rejected}.</p>"
        "<p>Start training on the Runs page.</p>"
        + (render_details("Card", f"<pre>{escape(text)}</pre>") if text else "")
    )


def _resolve_known(workspace: Workspace, path: str | None) -> Path | None:
    """The chosen folder; None for one outside of the studio, which is reported when it is chosen."""
    try:
        return workspace.resolve_folder(path) if path else None
    except StudioError:
        return None


def _find_job(workspace: Workspace, kind: str, path: str | None) -> DataJob | None:
    """The latest job of a kind for the chosen folder."""
    found: Sequence[DataJob] = jobs.list_jobs(workspace)
    source = _resolve_known(workspace, path)
    return next((job for job in found if job.kind == kind and job.source == source), None)


def _build_dismiss(kind: str) -> gr.Button:
    return gr.Button("Dismiss", size="sm", visible=False, elem_id=f"{kind}-dismiss", elem_classes="small-button")


def _show_dismiss(job: DataJob | None) -> Any:
    return gr.update(visible=job is not None and job.state in ("failed", "stopped"))


def _connect_buttons(
    workspace: Workspace, kind: str, folder: gr.Dropdown, stop: gr.Button, dismiss: gr.Button, status: gr.HTML
) -> None:
    def find(path: str | None) -> DataJob:
        job = _find_job(workspace, kind, path)
        if job is None:
            raise StudioError(f"no {kind} of this folder is running.")
        return job

    @show_errors
    def on_stop(path: str | None) -> str:
        job = find(path)
        jobs.stop_job(job)
        return render_job(jobs.read_job(job.folder))

    @show_errors
    def on_dismiss(path: str | None) -> tuple[str, Any]:
        jobs.dismiss_job(find(path))
        return "", _show_dismiss(None)

    stop.click(on_stop, folder, status, show_progress="hidden")
    dismiss.click(on_dismiss, folder, [status, dismiss], show_progress="hidden")
