"""The Audit and Encode tabs: each starts a command in a process of its own, and shows how far it is."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from sa3train.data.fixes import FIXES
from sa3train.data.index import INDEX
from sa3train.data.plan import VIEWS
from sa3train.errors import SA3Error
from sa3train.studio import data_jobs, processes
from sa3train.studio.audit_view import audit_view, read_audit
from sa3train.studio.data_jobs import STATES, Work
from sa3train.studio.listing import model_name, models
from sa3train.studio.messages import command_box, empty, notice, told
from sa3train.studio.plan import summarise
from sa3train.studio.runs_view import view
from sa3train.studio.workplace import StudioError, Workplace
from sa3train.training.report import duration
from sa3train.training.report_page import folded

ANY_MODEL = "any"
LOG_LINES = 12
NO_AUDIT = (
    "An audit decodes and measures every clip, and says what is wrong with it and what to do. It changes nothing."
)
NO_ENCODE = "Encoding turns each clip, at its own length, into latents to train on. It can be stopped and gone on with."


def audit_tab(place: Workplace, folder: gr.Dropdown, tick: gr.Timer) -> None:
    """Build the Audit tab."""
    with gr.Row():
        captions = gr.Radio(["required", "optional"], value="required", label="Captions", scale=2)
        choices = [("any model", ANY_MODEL), *models(place)]
        model = gr.Dropdown(choices, value=ANY_MODEL, label="Limits of", allow_custom_value=True, scale=2)
        begin = gr.Button("Audit", variant="primary", elem_id="audit-start", min_width=100)
        stop = gr.Button("Stop", elem_id="audit-stop", min_width=80)
    said = gr.HTML("", elem_id="audit-said")
    result = gr.HTML(empty(NO_AUDIT), elem_id="audit-result")
    seen = gr.State(None)

    @told
    def started(path: str | None, wanted: str, name: str) -> str:
        source = source_of(place, path)
        limits = None if name in ("", ANY_MODEL) else model_name(place, name)
        command = data_jobs.audit_command(place, source, wanted, limits)
        data_jobs.begin(place, "audit", source, data_jobs.audit_folder(place, source), command)
        return working(place, _of(place, "audit", path))

    @told
    def refreshed(path: str | None, before: Any) -> tuple[Any, ...]:
        source, work = _known(place, path), _of(place, "audit", path)
        file = data_jobs.audit_folder(place, source) / data_jobs.AUDIT if source else None
        stamp = file.stat().st_mtime_ns if file is not None and file.is_file() else 0
        now = (path, stamp, work)
        if now == before:
            return gr.skip(), gr.skip(), gr.skip()
        if source is None or file is None or not stamp:
            return working(place, work), empty(NO_AUDIT), now
        same = before is not None and before[:2] == now[:2]
        return working(place, work), gr.skip() if same else audited(place, file, source), now

    begin.click(started, [folder, captions, model], said, show_progress="hidden")
    stop.click(told(lambda path: _stop(place, "audit", path)), folder, said, show_progress="hidden")
    tick.tick(refreshed, [folder, seen], [said, result, seen], show_progress="hidden")


def encode_tab(place: Workplace, folder: gr.Dropdown, tick: gr.Timer) -> None:
    """Build the Encode tab."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=360):
            with gr.Row():
                model = gr.Dropdown(models(place), value=place.model, label="Autoencoder of", allow_custom_value=True)
                out = gr.Textbox("", label="Folder for the latents", placeholder="latents/NAME")
            with gr.Row():
                fix = gr.CheckboxGroup(list(FIXES), label="Mend on the way")
                views = gr.CheckboxGroup(list(VIEWS), label="Further takes")
            with gr.Row():
                split = gr.Slider(0, 0.5, value=0.05, step=0.01, label="Share held out")
                rejected = gr.Slider(0, 1, value=0.1, step=0.01, label="Rejected at most")
            with gr.Row():
                captions = gr.Radio(["required", "optional"], value="required", label="Captions")
                duplicates = gr.Radio(["keep", "drop"], value="keep", label="Duplicates")
            with gr.Row():
                begin = gr.Button("Encode", variant="primary", elem_id="encode-start")
                stop = gr.Button("Stop", elem_id="encode-stop")
        with gr.Column(scale=3, min_width=320):
            said = gr.HTML("", elem_id="encode-said")
            result = gr.HTML(empty(NO_ENCODE), elem_id="encode-result")
    seen = gr.State(None)

    @told
    def started(path: str | None, name: str, target: str, mends: Any, takes: Any, *values: Any) -> tuple[str, str]:
        source = source_of(place, path)
        where = place.inside(target or f"latents/{source.name}")
        names = ("split", "max_rejected", "captions", "duplicates")
        options = dict(zip(names, values, strict=True))
        command = data_jobs.encode_command(source, where, model_name(place, name), fix=mends, views=takes, **options)
        data_jobs.begin(place, "encode", source, where, command)
        return place.shown(where), working(place, _of(place, "encode", path))

    @told
    def refreshed(path: str | None, before: Any) -> tuple[Any, ...]:
        work = _of(place, "encode", path)
        now = (path, work)
        if now == before:
            return gr.skip(), gr.skip(), gr.skip()
        shown = empty(NO_ENCODE) if work is None else made(place, work)
        return working(place, work), shown, now

    fields = [folder, model, out, fix, views, split, rejected, captions, duplicates]
    begin.click(started, fields, [out, said], show_progress="hidden")
    stop.click(told(lambda path: _stop(place, "encode", path)), folder, said, show_progress="hidden")
    tick.tick(refreshed, [folder, seen], [said, result, seen], show_progress="hidden")


def source_of(place: Workplace, path: str | None) -> Path:
    """The chosen folder of audio, none of it outside of the studio. Raises `SA3Error`."""
    from sa3train.studio.captions_table import clips_of

    if not path:
        raise StudioError("choose a folder of audio first.")
    folder = place.folder(path, "folder of audio")
    clips_of(place, folder)
    return folder


def audited(place: Workplace, file: Path, source: Path) -> str:
    """HTML of an audit, or of what is wrong with its file."""
    try:
        return audit_view(place, read_audit(file), source)
    except SA3Error as error:
        return notice(str(error), "error")


def working(place: Workplace, work: Work | None) -> str:
    """HTML of how a command fares, and the command."""
    if work is None:
        return ""
    share = f' value="{work.share:.4f}"' if work.share is not None else ""
    bar = f'<progress max="1"{share} aria-label="{work.kind} progress"></progress>' if work.alive else ""
    line = f"{work.kind}: {STATES[work.state]}" + (f"; {work.said}" if work.said else "")
    error = notice(work.error, "error") if work.error else ""
    log = processes.log_tail(work.folder, LOG_LINES)
    told_log = folded("Log", f'<pre tabindex="0" aria-label="log">{escape(log)}</pre>') if log else ""
    mark = {"finished": "done", "failed": "bad"}.get(work.state, "work" if work.alive else "rest")
    state = f'<p><span class="state {mark}" role="status">{escape(line)}</span></p>'
    return view(state + bar + error + told_log) + command_box(place.command(work.command))


def made(place: Workplace, work: Work) -> str:
    """HTML of the latents that an encode has made so far."""
    if work.alive or not (work.out / INDEX).is_file():
        return view(f'<p class="soft">writes to {escape(place.shown(work.out))}</p>')
    found = summarise(work.out)
    heldout = f", {found.heldout} held out" if found.heldout else ""
    rejected = f"; {found.rejected} rejected, see rejected.jsonl there" if found.rejected else ""
    card = work.out / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return view(
        f"<p><b>{escape(place.shown(work.out))}</b>: {found.clips} clips to train on, {duration(found.seconds)}"
        f"{heldout}{rejected}.</p><p>Train on it on the Runs page.</p>"
        + (folded("Card", f"<pre>{escape(text)}</pre>") if text else "")
    )


def _known(place: Workplace, path: str | None) -> Path | None:
    """The chosen folder, or None while none of the studio's is chosen: that is said when it is chosen."""
    try:
        return place.folder(path) if path else None
    except StudioError:
        return None


def _of(place: Workplace, kind: str, path: str | None) -> Work | None:
    """The latest work of a kind on the chosen folder."""
    found: Sequence[Work] = data_jobs.works(place)
    source = _known(place, path)
    return next((work for work in found if work.kind == kind and work.source == source), None)


def _stop(place: Workplace, kind: str, path: str | None) -> str:
    work = _of(place, kind, path)
    if work is None:
        raise StudioError(f"no {kind} of this folder is at work.")
    data_jobs.stop(work)
    return working(place, data_jobs.read(work.folder))
