"""The Captions tab: the captions of a folder in a table, and a player for the selected clip."""

import functools
import shlex
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from sa3train.core.text import list_few
from sa3train.data.captioning import files
from sa3train.data.captioning.files import Change, Edit
from sa3train.data.captioning.template import CAPTION_VALUES, DEFAULT_TEMPLATE
from sa3train.data.sources.listing import Clip
from sa3train.studio.data import captions
from sa3train.studio.data.captions import get_caption, list_clips
from sa3train.studio.data.jobs_tabs import render_player
from sa3train.studio.server import widgets as ui
from sa3train.studio.server.workspace import StudioError, Workspace

PAGE = 25
"""Rows of the table, which does not scroll by itself."""
MAX_SEARCHED = 2000
"""In larger folders only names are searched, since all captions would have to be read."""
CHOOSE = "Choose a folder of audio above."
LISTEN = "Select a row to listen to its clip."
HELD = '["captions", "data-folder"]'
HOLD = f"(...values) => {{ sa3.hold({HELD}, 1); return values; }}"
FREE = f"() => {{ sa3.hold({HELD}, -1); }}"
FREE_SAVED = f"() => {{ sa3.hold({HELD}, -1); sa3.markUnsaved(false); }}"

Rows = list[list[str]]
Shown = tuple[str, dict[str, str]]
"""The folder shown in the table, and its captions as they were shown."""
NOTHING: Shown = ("", {})


def _build_controls() -> dict[str, Any]:
    """Build the components of the tab, by name."""
    tab: dict[str, Any] = {}
    with gr.Row(equal_height=False, elem_id="captions"):
        with gr.Column(scale=5, min_width=420):
            with gr.Row():
                tab["words"] = gr.Textbox("", label="Search clips and captions", scale=3, min_width=160)
                tab["page"] = gr.Number(1, label="Page", scale=1, min_width=80)
            tab["bare"] = gr.Checkbox(False, label="Without caption only")
            tab["count"] = gr.HTML(ui.render_placeholder(CHOOSE), elem_id="captions-count")
            tab["table"] = gr.Dataframe(
                [], headers=["clip", "caption"], column_count=2, static_columns=[0], type="array", datatype="str",
                wrap=True, interactive=True, max_height=100_000, column_widths=["47%", "53%"], label="Captions",
                elem_id="captions-table",
            )  # fmt: skip
        with gr.Column(scale=2, min_width=280):
            with gr.Row():
                tab["save"] = gr.Button("Save", variant="primary", elem_id="captions-save", min_width=80)
                tab["undo"] = gr.Button("Undo", elem_id="captions-undo", min_width=80)
                tab["reload"] = gr.Button("Reload", elem_id="captions-reload", min_width=80)
            tab["status"] = gr.HTML("", elem_id="captions-status")
            fields = "Fields: " + ", ".join(f"{{{name}}}" for name in CAPTION_VALUES if name != "description")
            with gr.Accordion("Clips without a caption", open=False, elem_id="captions-compose"):
                tab["template"] = gr.Textbox(DEFAULT_TEMPLATE.partition(", ")[2], label="Template", info=fields)
                tab["compose"] = gr.Button("Caption and save them by the template", elem_id="captions-compose-all")
            with gr.Accordion("Search and replace", open=False, elem_id="captions-replace"):
                tab["old"] = gr.Textbox("", label="Replace", info="In the captions of all clips that the search finds.")
                tab["new"] = gr.Textbox("", label="With")
                tab["replace"] = gr.Button("Replace and save", elem_id="captions-replace-all")
            tab["player"] = gr.HTML(ui.render_placeholder(LISTEN), elem_id="captions-player")
    return tab


def build_captions_tab(workspace: Workspace, folder: gr.Dropdown) -> None:
    """Build the tab.

    Args:
        workspace: The studio's folders.
        folder: The chosen folder of audio.
    """
    shown, tab = gr.State(NOTHING), _build_controls()
    show_rows = functools.partial(_show_rows, workspace)

    @ui.show_errors
    def turn_page(path: str, text: str, only: bool, number: float, before: Shown, rows: Rows) -> tuple[Any, ...]:
        _refuse_unsaved(before, rows)
        return show_rows(path, text, only, number)

    def save_edits(path: str, text: str, only: bool, number: float, before: Shown, rows: Rows) -> tuple[Any, ...]:
        edits = find_edits(before[1], rows)
        changes = captions.save_captions(workspace, resolve_shown_folder(workspace, before), edits)
        if not changes:
            return *(gr.skip(),) * 5, ui.render_notice("Nothing to save: no caption was changed.")
        names = list_few([workspace.shorten(change.path) for change in changes], 5)
        box = ui.render_command(build_commands(changes))
        return *show_rows(path, text, only, number), ui.render_notice(f"Saved {names}.") + box

    def change_many(run: Callable[..., str], doing: str, *now: Any) -> Iterator[tuple[Any, ...]]:
        path, text, only, number, before, rows, *given = now
        _refuse_unsaved(before, rows)
        source = resolve_shown_folder(workspace, before)
        told = yield from ui.show_wait(
            lambda: run(workspace, source, text, *given), doing, lambda line: (*(gr.skip(),) * 5, line)
        )
        yield *show_rows(path, text, only, number), ui.render_notice(told)

    @ui.show_errors
    def select_clip(before: Shown, chosen: gr.SelectData) -> str:
        if not chosen.row_value:
            return ui.render_placeholder(LISTEN)
        return render_clip(workspace, resolve_shown_folder(workspace, before), str(chosen.row_value[0]))

    inputs = [folder, tab["words"], tab["bare"], tab["page"]]
    both, outputs = [*inputs, shown, tab["table"]], [shown, tab["table"], tab["count"], tab["page"], tab["player"]]
    told = [*outputs, tab["status"]]
    held: dict[str, Any] = {"js": HOLD, "show_progress": "hidden"}
    listeners = (folder.change, tab["words"].submit, tab["bare"].input, tab["page"].submit)
    events = [listen(turn_page, both, outputs, **held) for listen in listeners]
    events.append(tab["reload"].click(ui.show_errors(show_rows), inputs, outputs, **held))
    events.append(tab["save"].click(ui.keep_error(save_edits, len(told), at=-1), both, told, **held))
    for name, (run, given, doing) in _CHANGES.items():
        change = ui.keep_error(functools.partial(change_many, run, doing), len(told), at=-1)
        seen: dict[str, Any] = {"js": HOLD, "show_progress_on": tab["count"]}  # many clips take a while
        events.append(tab[name].click(change, [*both, *(tab[key] for key in given)], told, **seen))
    for event in events:
        event.success(None, None, None, js=FREE_SAVED)
        event.failure(None, None, None, js=FREE)
    tab["table"].input(None, None, None, js="() => { sa3.markUnsaved(true); }")
    # One after another and none left out: the clip that is shown in the end is the one that was chosen last.
    one_by_one: dict[str, Any] = {"trigger_mode": "multiple", "concurrency_limit": 1, "show_progress": "hidden"}
    tab["table"].select(select_clip, shown, tab["player"], **one_by_one)


def _show_rows(workspace: Workspace, path: str | None, text: str, only: bool, number: float) -> tuple[Any, ...]:
    if not path:
        return NOTHING, [], ui.render_placeholder(CHOOSE), 1, ui.render_placeholder(LISTEN)
    source, wanted = workspace.resolve_folder(path), ui.parse_optional_number("Page", number, is_integer=True)
    rows, total, number = list_rows(workspace, source, text, only, wanted or 1)
    pages, undoable = max(1, -(-total // PAGE)), files.count_saves(source)
    line = f"{total:,} clip{'s' * (total != 1)}, page {number} of {pages}; saves that can be undone: {undoable}"
    count = ui.render_panel(f'<p class="soft">{line}</p>')
    return (path, dict(rows)), rows, count, number, ui.render_placeholder(LISTEN)


def _undo(workspace: Workspace, folder: Path, _: str) -> str:
    return files.undo_save(folder, workspace.resolve).describe(folder)


def _compose(workspace: Workspace, folder: Path, _: str, template: str) -> str:
    changes, without = captions.caption_rest(workspace, folder, template)
    reasons = list_few([f"{one.source} ({one.problem})" for one in without], 5)
    return f"Captioned {_count(changes, 'clip')}; Undo takes it back." + (f" Without: {reasons}." if without else "")


def _replace(workspace: Workspace, folder: Path, words: str, old: str, new: str) -> str:
    changes = captions.replace_text(workspace, folder, words, old, new)
    return f"Replaced in {_count(changes, 'caption')}; Undo takes it back."


def _count(items: Sequence[Any], name: str) -> str:
    return f"{len(items):,} {name}{'s' * (len(items) != 1)}"


_CHANGES: dict[str, tuple[Callable[..., str], tuple[str, ...], str]] = {
    "undo": (_undo, (), "Undoing"),
    "compose": (_compose, ("template",), "Captioning and saving"),
    "replace": (_replace, ("old", "new"), "Replacing and saving"),
}
"""Buttons that change saved captions: what they run, the fields that it is given, and what is told meanwhile."""


def _refuse_unsaved(shown: Shown, rows: Rows) -> None:
    if find_edits(shown[1], rows):
        raise StudioError("unsaved captions: save them, or discard them with Reload.")


def resolve_shown_folder(workspace: Workspace, shown: Shown) -> Path:
    """Resolve the folder shown in the table, whatever has been chosen since.

    Args:
        workspace: The studio's folders.
        shown: What the table shows.

    Returns:
        The folder.

    Raises:
        StudioError: When the table is empty.
    """
    if not shown[0]:
        raise StudioError("Folder of audio is empty. Choose one first.")
    return workspace.resolve_folder(shown[0])


def list_rows(workspace: Workspace, folder: Path, text: str, bare: bool, page: int) -> tuple[Rows, int, int]:
    """List a page of the table.

    Args:
        workspace: The studio's folders.
        folder: Folder of audio.
        text: Words to search.
        bare: Only clips without a caption.
        page: Number of the page.

    Returns:
        (clip, caption) rows of the page, the number of matching clips, and the page's number within their range.

    Raises:
        StudioError: When the folder is too large to search captions.
    """
    clips, words = list_clips(workspace, folder), text.strip().lower()
    if len(clips) <= MAX_SEARCHED:
        pairs = [(clip, get_caption(clip)) for clip in clips] if words or bare else []
        found = [clip for clip, caption in pairs if _matches(clip, caption, words, bare)] if pairs else clips
    elif bare:
        raise StudioError(f"{folder} has {len(clips):,} clips: audit it to find those without a caption.")
    else:
        found = [clip for clip in clips if words in clip.source.lower()]
    page = min(max(1, page), max(1, -(-len(found) // PAGE)))
    there = found[(page - 1) * PAGE : page * PAGE]
    return [[clip.source, get_caption(clip)] for clip in there], len(found), page


def find_edits(before: dict[str, str], rows: Rows) -> list[Edit]:
    """Find the edited captions in the table.

    Args:
        before: Captions by clip as they were shown.
        rows: The table now.

    Returns:
        The edits.

    Raises:
        StudioError: For rows that were added.
    """
    found = []
    for row in rows or []:
        source, caption = str(row[0]), " ".join(str(row[1] or "").split())
        if source not in before and (source or caption):
            raise StudioError(f"{source or 'an empty row'} is not a clip of this folder: reload the table.")
        if source in before and caption != before[source]:
            found.append(Edit(source, before[source], caption))
    return found


def build_commands(changes: list[Change]) -> str:
    """Build shell commands that write the same files.

    Args:
        changes: The changed files.

    Returns:
        One command per line.
    """
    lines = [["printf", "%s", change.after.decode()] for change in changes]
    return "\n".join(
        f"{shlex.join(line)} > {shlex.quote(str(change.path))}" for line, change in zip(lines, changes, strict=True)
    )


def render_clip(workspace: Workspace, folder: Path, source: str) -> str:
    """Render one clip: waveform, player and measurements.

    Args:
        workspace: The studio's folders.
        folder: Folder of audio.
        source: The clip.

    Returns:
        HTML.
    """
    from sa3train.audio.io import read_whole
    from sa3train.data.audit.checks import measure
    from sa3train.data.audit.report import draw_waveform, format_measurements

    path = workspace.resolve_file(folder / source, "clip")
    decoded = read_whole(path)
    row = measure(decoded.audio_CN.numpy(), decoded.sample_rate, decoded.speakers)
    return ui.render_panel(
        f'<div class="tile"><b>{escape(Path(source).name)}</b>'
        f'<div class="wave wide">{draw_waveform(row["thumb"])}</div>{render_player(workspace, path)}'
        f"<span>{format_measurements(row)}</span></div>"
    )


def _matches(clip: Clip, caption: str, words: str, bare: bool) -> bool:
    return (not bare or not caption) and (words in clip.source.lower() or words in caption.lower())
