"""Tabs that start a command in a process of its own and show its progress and result; the Audit and Encode tabs."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from sa3train.core import processes
from sa3train.core.errors import DataError, SA3Error
from sa3train.core.user_files import read_file
from sa3train.data.audit.checks import FINDING_TYPES, SEVERITIES, rank_clip
from sa3train.data.audit.report import draw_waveform, format_measurements
from sa3train.data.encode.settings import EncodeSettings
from sa3train.data.shards.index import INDEX_FILE, summarize_data
from sa3train.reports.html import format_duration, render_details, render_table, render_tile
from sa3train.studio.data import jobs
from sa3train.studio.data.captions import list_clips
from sa3train.studio.data.jobs import STATES, DataJob
from sa3train.studio.server import widgets as ui
from sa3train.studio.server.folders import list_models, resolve_model_name
from sa3train.studio.server.workspace import StudioError, Workspace

MAX_ROWS = 60
"""Clips shown of an audit, worst first."""
LOG_LINES = 12
ENCODE_FIELDS: dict[str, dict[str, Any]] = {
    "captions": {},
    "fixes": {"info": "Applied while encoding, never to your files. loudness: -14 LUFS, peaks at most -1 dBFS."},
    "augmentations": {},
    "split": {"widget": gr.Slider, "maximum": 0.5, "step": 0.01, "info": "Share of the clips to hold out."},
    "duplicates": {},
    "max_rejected": {"widget": gr.Slider, "step": 0.01, "info": "Stop if more than this share is rejected."},
    "allow_promotional": {"elem_classes": "tick"},
    "overwrite": {"elem_classes": "tick"},
}
"""Settings of an encode with a field each, and what their fields differ in from the usual ones."""


Audit = tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]
"""The counts of an audit, and the rows of its worst clips."""


def read_audit(path: Path, max_rows: int = MAX_ROWS) -> Audit:
    """Read an `audit.json`.

    Args:
        path: Path of the file.
        max_rows: Number of clips to keep, worst first.

    Returns:
        The audit.

    Raises:
        DataError: When the file is damaged.
    """
    try:
        found = json.loads(read_file(path))
        return found["summary"], sorted(found["clips"], key=rank_clip)[:max_rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): audit the folder again.") from error


def render_audit(workspace: Workspace, audit: Audit, source: Path) -> str:
    """Render an audit.

    Args:
        workspace: The studio's folders.
        audit: The audit.
        source: Folder of audio.

    Returns:
        HTML.
    """
    summary, clips = audit
    tiles = [
        render_tile(f"{summary['clips']:,}", "clips"),
        render_tile(f"{summary['rejected']:,}", "rejected", "bad" if summary["rejected"] else "good"),
        render_tile(format_duration(summary["seconds"]), "usable audio"),
    ]
    findings = [
        [f'<span class="{item["severity"]}">{escape(item["severity"])}</span>', f"{item['clips']:,}",
         escape(FINDING_TYPES[code].title), escape(ui.name_fields(item["fix"]))]
        for code, item in summary["findings"].items()
    ]  # fmt: skip
    table = render_table(("", "clips", "finding", "fix"), findings, numbers=(1,))
    rows = [_render_row(workspace, source, row) for row in clips]
    listed = render_table(("waveform", "clip", "findings", "listen"), rows)
    left = summary["clips"] - len(rows)
    where = workspace.shorten(jobs.get_audit_dir(workspace, source) / jobs.AUDIT_FILE)
    more = f'<p class="soft">and {left:,} more: all are in {escape(where)}.</p>' if left > 0 else ""
    return ui.render_panel(
        f'<div class="tiles">{"".join(tiles)}</div>{table if findings else ui.render_notice("No problems found.")}'
        f"<h3>Clips, worst first</h3>{listed}{more}"
    )


def _render_row(workspace: Workspace, source: Path, row: Mapping[str, Any]) -> list[str]:
    findings = "<br>".join(
        f'<span class="{item["severity"]}">{escape(FINDING_TYPES[item["code"]].title)}</span> {escape(item["detail"])}'
        for item in sorted(row["findings"], key=lambda item: SEVERITIES.index(item["severity"]))
    )
    about = f"<b>{escape(row['source'])}</b><br><small>{format_measurements(row)}</small>"
    caption = f"<br>{escape(row['caption'][:200])}" if row.get("caption") else ""
    picture = f'<div class="wave">{draw_waveform(str(row.get("thumb", "")))}</div>'
    is_read = all(item["code"] != "unreadable" for item in row["findings"])
    player = render_player(workspace, source / row["source"]) if is_read else ""
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


@dataclass(frozen=True)
class JobTab:
    """What one of the tabs has of its own.

    Attributes:
        kind: Key of `jobs.RESULTS`.
        hint: What is shown while there is no result.
        build_fields: Builds the fields, by name.
        build_command: Makes the output folder and the command, from the folder of audio and the fields' values.
        find_result: The file that shows a result, which need not exist.
        render_result: Renders it.
        resolve: Checks the chosen folder.
        retry: A field and its value, with which a job whose error advises it is started again by a button.
    """

    kind: str
    hint: str
    build_fields: Callable[[Workspace], dict[str, Any]]
    build_command: Callable[[Workspace, Path, Mapping[str, Any]], tuple[Path, list[str]]]
    find_result: Callable[[Workspace, Path, DataJob | None], Path | None]
    render_result: Callable[[Workspace, Path, Path], str]
    resolve: Callable[[Workspace, str | None], Path]
    retry: tuple[str, str] = ("", "")

    def can_retry(self, job: DataJob | None) -> bool:
        """Check whether a job failed for what `retry` helps with.

        Args:
            job: The job; None for none.

        Returns:
            Whether it did.
        """
        return job is not None and bool(self.retry[0]) and "=".join(self.retry) in (job.error or "")


def build_job_tab(workspace: Workspace, folder: Any, tab: JobTab) -> None:
    """Build a tab that starts jobs.

    Args:
        workspace: The studio's folders.
        folder: Component that chooses the folder that jobs are for.
        tab: What it has of its own.
    """
    kind = tab.kind
    with gr.Row():
        fields = tab.build_fields(workspace)
    begin, stop, retry, dismiss = _build_buttons(tab)
    status = gr.HTML("", elem_id=f"{kind}-status")
    result = gr.HTML(ui.render_placeholder(tab.hint), elem_id=f"{kind}-result")
    seen, outputs = gr.State(None), [status, retry, dismiss, stop]
    order = ui.in_order(kind)

    def show(path: str | None) -> tuple[Any, ...]:
        job = _find_job(workspace, kind, path)
        is_over = job is not None and job.state in ("failed", "stopped")
        shown = [gr.update(visible=visible) for visible in (tab.can_retry(job), is_over)]
        return render_job(job), *shown, gr.update(interactive=job is not None and job.is_running)

    def on_start(path: str | None, *values: Any) -> tuple[Any, ...]:
        source = tab.resolve(workspace, path)
        out, command = tab.build_command(workspace, source, dict(zip(fields, values, strict=True)))
        jobs.start_job(workspace, kind, source, out, command)
        return show(path)

    def make_handler(act: Callable[[DataJob], None]) -> Callable[[str | None], tuple[Any, ...]]:
        def on_click(path: str | None) -> tuple[Any, ...]:
            if (job := _find_job(workspace, kind, path)) is not None:
                act(job)
            return show(path)

        return on_click

    def refresh(path: str | None, before: Any) -> tuple[Any, ...]:
        source, job = _resolve_known(workspace, path), _find_job(workspace, kind, path)
        file = tab.find_result(workspace, source, job) if source else None
        stamp = file.stat().st_mtime_ns if file is not None and file.is_file() else 0
        now = (path, stamp, job)
        if now == before:
            return (gr.skip(),) * 6
        if before is not None and before[:2] == now[:2]:  # what plays goes on
            return *show(path), gr.skip(), now
        if source is None or file is None or not stamp:
            return *show(path), ui.render_placeholder(tab.hint), now
        return *show(path), tab.render_result(workspace, file, source), now

    start = ui.keep_error(on_start, len(outputs))
    begin.click(start, [folder, *fields.values()], outputs, **order)
    if tab.retry[0]:
        set_field = retry.click(lambda: tab.retry[1], None, fields[tab.retry[0]], **order)
        set_field.then(start, [folder, *fields.values()], outputs, **order)
    stop.click(ui.show_errors(make_handler(jobs.stop_job)), folder, outputs, **order)
    dismiss.click(ui.show_errors(make_handler(jobs.dismiss_job)), folder, outputs, **order)
    read = functools.partial(jobs.read_state, workspace, kind)
    ui.keep_fresh(read, ui.show_errors(refresh), [folder, seen], [*outputs, result, seen], folder.change, **order)


def _build_buttons(tab: JobTab) -> list[gr.Button]:
    title = tab.kind.capitalize()
    buttons: dict[str, dict[str, Any]] = {
        "start": {"value": title, "variant": "primary", "min_width": 160},
        "stop": {"value": "Stop", "interactive": False, "min_width": 100},
        "retry": {"value": f"{title} with {ui.name_fields('='.join(tab.retry))}", "variant": "primary",
                  "visible": False, "min_width": 300},
        "dismiss": {"value": "Dismiss", "visible": False, "min_width": 100},
    }  # fmt: skip
    with gr.Row():
        return [gr.Button(elem_id=f"{tab.kind}-{name}", scale=0, **options) for name, options in buttons.items()]


def _build_audit_fields(workspace: Workspace) -> dict[str, Any]:
    choices = [("any model", ""), *list_models(workspace)]
    return {
        "captions": ui.build_field(EncodeSettings, "captions", info="Whether a clip without a caption is an error."),
        "model": gr.Dropdown(choices, value="", label="Check against model", info="Its maximum duration."),
    }


def _build_audit_command(workspace: Workspace, source: Path, values: Mapping[str, Any]) -> tuple[Path, list[str]]:
    model = resolve_model_name(workspace, values["model"]) if values["model"] else None
    command = jobs.build_audit_command(workspace, source, values["captions"], model)
    return jobs.get_audit_dir(workspace, source), command


def _build_encode_fields(workspace: Workspace) -> dict[str, Any]:
    fields = {
        "model": gr.Dropdown(
            list_models(workspace), value=workspace.model, label="Autoencoder of", allow_custom_value=True,
            info="A model and its base share one.",
        ),
        "out": gr.Textbox("", label="Folder for the latents", placeholder="latents/NAME", info="In the workspace."),
    }  # fmt: skip
    return fields | {
        name: ui.build_field(EncodeSettings, name, **{"min_width": 260} | options)
        for name, options in ENCODE_FIELDS.items()
    }


def _build_encode_command(workspace: Workspace, source: Path, values: Mapping[str, Any]) -> tuple[Path, list[str]]:
    typed = (values["out"] or "").strip()
    out = workspace.resolve_output(typed, "latents") if typed else workspace.resolve_output(f"latents/{source.name}")
    settings = EncodeSettings(**{name: values[name] for name in ENCODE_FIELDS})
    return out, jobs.build_encode_command(source, out, resolve_model_name(workspace, values["model"]), settings)


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
        raise StudioError("Folder of audio is empty. Choose one first.")
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
        return ui.render_notice(str(error), "error")


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
    error = ui.render_notice(job.error, "error") if job.error else ""
    log = processes.read_log_tail(job.folder, LOG_LINES)
    details = render_details("Log", f'<pre tabindex="0" aria-label="log">{escape(log)}</pre>') if log else ""
    mark = {"finished": "done", "failed": "bad"}.get(job.state, "work" if job.is_running else "rest")
    state = f'<p><span class="state {mark}" role="status">{escape(line)}</span></p>'
    return ui.render_panel(state + bar + error + details) + ui.render_command(job.command)


def render_latents(workspace: Workspace, index: Path, source: Path) -> str:
    """Render the latents that an encode has made.

    Args:
        workspace: The studio's folders.
        index: Path of their `index.json`.
        source: Folder of audio.

    Returns:
        HTML.
    """
    found, card = summarize_data(index.parent), index.with_name("README.md")
    heldout = f", {found.heldout} held out" if found.heldout else ""
    rejected = f"; {found.rejected} rejected (rejected.jsonl)" if found.rejected else ""
    clips = f"{found.clips} training clips of {source.name}, {format_duration(found.seconds)}"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return ui.render_panel(
        f"<p><b>{escape(workspace.shorten(index.parent))}</b>: {escape(clips)}{heldout}{rejected}.</p>"
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


AUDIT = JobTab(
    "audit",
    "An audit decodes and measures every clip, and lists problems with their fixes. It changes nothing.",
    _build_audit_fields,
    _build_audit_command,
    lambda workspace, source, job: jobs.get_audit_dir(workspace, source) / jobs.AUDIT_FILE,
    render_audit_file,
    resolve_source,
)
ENCODE = JobTab(
    "encode",
    "Encoding turns each clip, at its own length, into latents for training. It can be stopped and resumed.",
    _build_encode_fields,
    _build_encode_command,
    lambda workspace, source, job: None if job is None or job.is_running else job.out / INDEX_FILE,
    render_latents,
    resolve_source,
    ("captions", "auto"),
)
