"""The Audit and Encode tabs: each starts a command in a process of its own, and shows how far it is.

An audit as the Data page shows it: what was found with its remedy, the gravest clips with waveform and player.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from sa3train.core.errors import DataError, SA3Error
from sa3train.data.audit.checks import KINDS, SEVERITIES, worst
from sa3train.data.audit.report import waveform
from sa3train.data.encode.fixes import FIXES
from sa3train.data.encode.plan import VIEWS
from sa3train.data.shards.index import INDEX, summarise
from sa3train.reports.html import folded, table, tile
from sa3train.reports.run_report import duration
from sa3train.studio.data import jobs
from sa3train.studio.data.jobs import STATES, Work
from sa3train.studio.server import processes
from sa3train.studio.server.widgets import command_box, empty, notice, told, view
from sa3train.studio.server.workspace import StudioError, Workspace, list_models, resolve_model_name

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


def audit_view(workspace: Workspace, audit: Audit, source: Path) -> str:
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
    rows = [_row(workspace, source, row) for row in audit.rows]
    clips = table(("waveform", "clip", "findings", "listen"), rows)
    left = summary["clips"] - len(rows)
    more = f'<p class="soft">and {left:,} less grave ones: all are in audit.json.</p>' if left > 0 else ""
    return view(f'<div class="tiles">{"".join(tiles)}</div>{findings}<h3>Clips, the gravest first</h3>{clips}{more}')


def _row(workspace: Workspace, source: Path, row: Mapping[str, Any]) -> list[str]:
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
    return [picture, about + caption, found or "nothing amiss", player(workspace, source / row["source"])]


def player(workspace: Workspace, path: Path) -> str:
    """HTML of a player for a file, or why there is none."""
    try:
        url = workspace.url(workspace.file(path))
    except StudioError:
        return "<small>not a file of its own</small>"
    return f'<audio controls preload="none" src="{escape(url)}" aria-label="{escape(path.name)}"></audio>'


ANY_MODEL = "any"
LOG_LINES = 12
NO_AUDIT = (
    "An audit decodes and measures every clip, and says what is wrong with it and what to do. It changes nothing."
)
NO_ENCODE = "Encoding turns each clip, at its own length, into latents to train on. It can be stopped and gone on with."


def audit_tab(workspace: Workspace, folder: gr.Dropdown, tick: gr.Timer) -> None:
    """Build the Audit tab."""
    with gr.Row():
        captions = gr.Radio(["required", "optional"], value="required", label="Captions", scale=2)
        choices = [("any model", ANY_MODEL), *list_models(workspace)]
        model = gr.Dropdown(choices, value=ANY_MODEL, label="Limits of", allow_custom_value=True, scale=2)
        begin = gr.Button("Audit", variant="primary", elem_id="audit-start", min_width=100)
        stop = gr.Button("Stop", elem_id="audit-stop", min_width=80)
    said = gr.HTML("", elem_id="audit-said")
    result = gr.HTML(empty(NO_AUDIT), elem_id="audit-result")
    seen = gr.State(None)

    @told
    def started(path: str | None, wanted: str, name: str) -> str:
        source = source_of(workspace, path)
        limits = None if name in ("", ANY_MODEL) else resolve_model_name(workspace, name)
        command = jobs.audit_command(workspace, source, wanted, limits)
        jobs.begin(workspace, "audit", source, jobs.audit_folder(workspace, source), command)
        return working(workspace, _of(workspace, "audit", path))

    @told
    def refreshed(path: str | None, before: Any) -> tuple[Any, ...]:
        source, work = _known(workspace, path), _of(workspace, "audit", path)
        file = jobs.audit_folder(workspace, source) / jobs.AUDIT if source else None
        stamp = file.stat().st_mtime_ns if file is not None and file.is_file() else 0
        now = (path, stamp, work)
        if now == before:
            return gr.skip(), gr.skip(), gr.skip()
        if source is None or file is None or not stamp:
            return working(workspace, work), empty(NO_AUDIT), now
        same = before is not None and before[:2] == now[:2]
        return working(workspace, work), gr.skip() if same else audited(workspace, file, source), now

    begin.click(started, [folder, captions, model], said, show_progress="hidden")
    stop.click(told(lambda path: _stop(workspace, "audit", path)), folder, said, show_progress="hidden")
    tick.tick(refreshed, [folder, seen], [said, result, seen], show_progress="hidden")


def encode_tab(workspace: Workspace, folder: gr.Dropdown, tick: gr.Timer) -> None:
    """Build the Encode tab."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=360):
            with gr.Row():
                model = gr.Dropdown(
                    list_models(workspace), value=workspace.model, label="Autoencoder of", allow_custom_value=True
                )
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
        source = source_of(workspace, path)
        where = workspace.inside(target or f"latents/{source.name}")
        names = ("split", "max_rejected", "captions", "duplicates")
        options = dict(zip(names, values, strict=True))
        command = jobs.encode_command(
            source, where, resolve_model_name(workspace, name), fix=mends, views=takes, **options
        )
        jobs.begin(workspace, "encode", source, where, command)
        return workspace.shown(where), working(workspace, _of(workspace, "encode", path))

    @told
    def refreshed(path: str | None, before: Any) -> tuple[Any, ...]:
        work = _of(workspace, "encode", path)
        now = (path, work)
        if now == before:
            return gr.skip(), gr.skip(), gr.skip()
        shown = empty(NO_ENCODE) if work is None else made(workspace, work)
        return working(workspace, work), shown, now

    fields = [folder, model, out, fix, views, split, rejected, captions, duplicates]
    begin.click(started, fields, [out, said], show_progress="hidden")
    stop.click(told(lambda path: _stop(workspace, "encode", path)), folder, said, show_progress="hidden")
    tick.tick(refreshed, [folder, seen], [said, result, seen], show_progress="hidden")


def source_of(workspace: Workspace, path: str | None) -> Path:
    """The chosen folder of audio, none of it outside of the studio. Raises `SA3Error`."""
    from sa3train.studio.data.captions import clips_of

    if not path:
        raise StudioError("choose a folder of audio first.")
    folder = workspace.folder(path, "folder of audio")
    clips_of(workspace, folder)
    return folder


def audited(workspace: Workspace, file: Path, source: Path) -> str:
    """HTML of an audit, or of what is wrong with its file."""
    try:
        return audit_view(workspace, read_audit(file), source)
    except SA3Error as error:
        return notice(str(error), "error")


def working(workspace: Workspace, work: Work | None) -> str:
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
    return view(state + bar + error + told_log) + command_box(workspace.command(work.command))


def made(workspace: Workspace, work: Work) -> str:
    """HTML of the latents that an encode has made so far."""
    if work.alive or not (work.out / INDEX).is_file():
        return view(f'<p class="soft">writes to {escape(workspace.shown(work.out))}</p>')
    found = summarise(work.out)
    heldout = f", {found.heldout} held out" if found.heldout else ""
    rejected = f"; {found.rejected} rejected, see rejected.jsonl there" if found.rejected else ""
    card = work.out / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return view(
        f"<p><b>{escape(workspace.shown(work.out))}</b>: {found.clips} clips to train on, {duration(found.seconds)}"
        f"{heldout}{rejected}.</p><p>Train on it on the Runs page.</p>"
        + (folded("Card", f"<pre>{escape(text)}</pre>") if text else "")
    )


def _known(workspace: Workspace, path: str | None) -> Path | None:
    """The chosen folder, or None while none of the studio's is chosen: that is said when it is chosen."""
    try:
        return workspace.folder(path) if path else None
    except StudioError:
        return None


def _of(workspace: Workspace, kind: str, path: str | None) -> Work | None:
    """The latest work of a kind on the chosen folder."""
    found: Sequence[Work] = jobs.works(workspace)
    source = _known(workspace, path)
    return next((work for work in found if work.kind == kind and work.source == source), None)


def _stop(workspace: Workspace, kind: str, path: str | None) -> str:
    work = _of(workspace, kind, path)
    if work is None:
        raise StudioError(f"no {kind} of this folder is at work.")
    jobs.stop(work)
    return working(workspace, jobs.read(work.folder))
