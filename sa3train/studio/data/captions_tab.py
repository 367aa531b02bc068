"""The Captions tab: a folder's captions in a table, a clip to listen to beside it."""

import shlex
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from sa3train.data.sources.listing import Clip
from sa3train.studio.data import captions
from sa3train.studio.data.captions import Change, Edit, caption_of, clips_of
from sa3train.studio.data.jobs_tabs import player
from sa3train.studio.server.widgets import command_box, empty, notice, told, view
from sa3train.studio.server.workspace import StudioError, Workspace

PAGE = 40
MOST_SEARCHED = 2000
"""In larger folders the search looks at names alone: captions would all have to be read."""
LISTEN = "Choose a row to hear its clip."
HELD = '["captions", "data-folder"]'
HOLD = f"(...values) => {{ sa3.hold({HELD}, 1); return values; }}"
FREE = f"() => {{ sa3.hold({HELD}, -1); }}"

Rows = list[list[str]]
Shown = tuple[str, dict[str, str]]
"""The folder that the table is of, and its captions as they were shown."""
NOTHING: Shown = ("", {})


def captions_tab(workspace: Workspace, folder: gr.Dropdown) -> None:
    """Build the tab."""
    shown = gr.State(NOTHING)
    with gr.Row(equal_height=False, elem_id="captions"):
        with gr.Column(scale=5, min_width=420):
            with gr.Row():
                words = gr.Textbox("", label="Search clips and captions", scale=3, min_width=160)
                page = gr.Number(1, label="Page", precision=0, minimum=1, scale=1, min_width=80)
                bare = gr.Checkbox(False, label="Only without caption", scale=1, min_width=150)
            count = gr.HTML(empty("Choose a folder of audio above."), elem_id="captions-count")
            table = gr.Dataframe(
                [],
                headers=["clip", "caption"],
                column_count=2,
                static_columns=[0],
                type="array",
                datatype="str",
                wrap=True,
                interactive=True,
                max_height=520,
                column_widths=["32%", "68%"],
                label="Captions",
                elem_id="captions-table",
            )
        with gr.Column(scale=2, min_width=280):
            with gr.Row():
                save = gr.Button("Save", variant="primary", elem_id="captions-save", min_width=80)
                undo = gr.Button("Undo", elem_id="captions-undo", min_width=80)
                again = gr.Button("Reload", elem_id="captions-reload", min_width=80)
            said = gr.HTML("", elem_id="captions-said")
            heard = gr.HTML(empty(LISTEN), elem_id="captions-heard")
    looking = [folder, words, bare, page]

    def look(path: str | None, text: str, only: bool, number: float) -> tuple[Any, ...]:
        if not path:
            return NOTHING, [], empty("Choose a folder of audio above."), 1, empty(LISTEN)
        rows, total, number = rows_of(workspace, workspace.folder(path), text, only, int(number or 1))
        pages = max(1, -(-total // PAGE))
        undoable = captions.saves(workspace, workspace.folder(path))
        line = f"{total:,} clips, page {number} of {pages}; {undoable} saves can be undone"
        return (path, dict(rows)), rows, view(f'<p class="soft">{line}</p>'), number, empty(LISTEN)

    @told
    def turned(path: str, text: str, only: bool, number: float, before: Shown, rows: Rows) -> tuple[Any, ...]:
        if edits_of(before[1], rows):
            raise StudioError("changed captions are not saved yet: save them, or drop them (Reload).")
        return look(path, text, only, number)

    @told
    def saved(path: str, text: str, only: bool, number: float, before: Shown, rows: Rows) -> tuple[Any, ...]:
        folder_shown = shown_folder(workspace, before)
        changes = captions.save(workspace, folder_shown, edits_of(before[1], rows))
        if not changes:
            return *(gr.skip(),) * 5, notice("Nothing to save: no caption was changed.")
        names = ", ".join(workspace.shown(change.path) for change in changes[:5])
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        box = command_box(commands_of(changes))
        return *look(path, text, only, number), notice(f"Saved {names}{more}.") + box

    @told
    def undone(path: str, text: str, only: bool, number: float, before: Shown, rows: Rows) -> tuple[Any, ...]:
        folder_shown = shown_folder(workspace, before)
        if edits_of(before[1], rows):
            raise StudioError("changed captions are not saved yet: save them, or drop them (Reload), before an undo.")
        names = captions.undo(workspace, folder_shown)
        return *look(path, text, only, number), notice(f"As before: {', '.join(names[:5])}.")

    @told
    def listened(before: Shown, chosen: gr.SelectData) -> str:
        row = chosen.row_value or []
        return listening(workspace, shown_folder(workspace, before), str(row[0])) if row else empty(LISTEN)

    outputs = [shown, table, count, page, heard]
    both = [*looking, shown, table]
    held: dict[str, Any] = {"js": HOLD, "show_progress": "hidden"}
    asked = [event(turned, both, outputs, **held) for event in (folder.change, words.submit, bare.input, page.submit)]
    asked.append(again.click(told(look), looking, outputs, **held))
    asked += [button.click(act, both, [*outputs, said], **held) for button, act in ((save, saved), (undo, undone))]
    for answer in asked:
        answer.success(None, None, None, js=FREE)
        answer.failure(None, None, None, js=FREE)
    # One after another and none left out: the clip that is shown in the end is the one that was chosen last.
    table.select(listened, shown, heard, show_progress="hidden", trigger_mode="multiple", concurrency_limit=1)


def shown_folder(workspace: Workspace, shown: Shown) -> Path:
    """The folder that the table is of, whatever has been chosen since. Raises `StudioError` when it is of none."""
    if not shown[0]:
        raise StudioError("choose a folder of audio first.")
    return workspace.folder(shown[0])


def rows_of(workspace: Workspace, folder: Path, text: str, bare: bool, page: int) -> tuple[Rows, int, int]:
    """A page of (clip, caption) that match, how many match, and the page's number after all. Raises `SA3Error`."""
    clips, words = clips_of(workspace, folder), text.strip().lower()
    if len(clips) <= MOST_SEARCHED:
        pairs = [(clip, caption_of(clip)) for clip in clips] if words or bare else []
        found = [clip for clip, caption in pairs if _fits(clip, caption, words, bare)] if pairs else clips
    elif bare:
        raise StudioError(f"{folder} has {len(clips):,} clips: audit it to find those without a caption.")
    else:
        found = [clip for clip in clips if words in clip.source.lower()]
    page = min(max(1, page), max(1, -(-len(found) // PAGE)))
    there = found[(page - 1) * PAGE : page * PAGE]
    return [[clip.source, caption_of(clip)] for clip in there], len(found), page


def edits_of(before: dict[str, str], rows: Rows) -> list[Edit]:
    """What was changed in the table. Raises `StudioError` for rows that were not there."""
    found = []
    for row in rows or []:
        source, caption = str(row[0]), " ".join(str(row[1] or "").split())
        if source not in before and (source or caption):
            raise StudioError(f"{source or 'an empty row'} is no clip of this folder: reload the table.")
        if source in before and caption != before[source]:
            found.append(Edit(source, before[source], caption))
    return found


def commands_of(changes: list[Change]) -> str:
    """Shell lines that write what was written."""
    lines = [["printf", "%s", change.after.decode()] for change in changes]
    return "\n".join(
        f"{shlex.join(line)} > {shlex.quote(str(change.path))}" for line, change in zip(lines, changes, strict=True)
    )


def listening(workspace: Workspace, folder: Path, source: str) -> str:
    """HTML of one clip: its waveform, a player, and what is measured of it. Raises `SA3Error`."""
    from sa3train.audio.io import read_audio
    from sa3train.data.audit.checks import measure
    from sa3train.data.audit.report import waveform

    path = workspace.file(folder / source, "clip")
    audio_CN, rate = read_audio(path)
    row = measure(audio_CN.numpy(), rate)
    loud = f", {row['lufs']} LUFS" if row["lufs"] is not None else ""
    facts = f"{row['seconds']:.2f} s, {rate} Hz, {row['channels']} channels{loud}"
    return view(
        f'<div class="tile"><b>{escape(Path(source).name)}</b>'
        f'<div class="wave wide">{waveform(row["thumb"])}</div>{player(workspace, path)}<span>{facts}</span></div>'
    )


def _fits(clip: Clip, caption: str, words: str, bare: bool) -> bool:
    return (not bare or not caption) and (words in clip.source.lower() or words in caption.lower())
