"""The Prompts tab: preview the prompts of some clips, built by the same code as in training."""

import random
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from sa3train.core.errors import DataError
from sa3train.core.overrides import format_override
from sa3train.data.loading.prompts import PromptBuilder, PromptSettings, Template, list_distinct_prompts
from sa3train.data.shards.index import INDEX_FILE
from sa3train.data.shards.reader import LatentStore
from sa3train.data.sources.captions import read_clip_text
from sa3train.reports.html import render_table
from sa3train.studio.data.captions import list_clips
from sa3train.studio.server import widgets as ui
from sa3train.studio.server.folders import find_folders, name_folders
from sa3train.studio.server.workspace import StudioError, Workspace

CLIPS = 12
DRAWS = 3
MAX_READ = 2000
"""Number of clips that are read for a preview."""
EMPTY = "The prompts of some clips appear here."
ABOVE = ("the folder of audio above", "")
HINT = "Templates consist of text and fields: {caption}, any tag such as {genre}, {folder}, {stem}, {path[0]}."


FIELDS: dict[str, dict[str, Any]] = {
    "trigger": {}, "trigger_probability": {"widget": gr.Slider, "step": 0.05}, "trigger_position": {},
    "shuffle_tags": {}, "tag_dropout": {"widget": gr.Slider, "step": 0.05}, "keep_tags": {},
    "caption_dropout": {"widget": gr.Slider, "step": 0.05},
}  # fmt: skip
"""Settings with a field each, and what their fields differ in from the usual ones."""
NEEDS = {
    "trigger_probability": ("trigger",),
    "trigger_position": ("trigger",),
    "keep_tags": ("shuffle_tags", "tag_dropout"),
}
"""Settings that stay at their default, as long as none of these is set."""


def build_settings(templates: str, **values: Any) -> PromptSettings:
    """Build prompt settings from the page's fields.

    Args:
        templates: One per line, each `TEXT` or `TEXT=WEIGHT`.
        **values: Values of `FIELDS`.

    Returns:
        The settings; those without effect keep their default.
    """
    lines = [line.strip() for line in templates.splitlines() if line.strip()] or ["{caption}"]
    given = values | {"trigger": str(values.get("trigger", "")).strip()}
    keep = ui.parse_setting(PromptSettings, "keep_tags", given.get("keep_tags"))
    given = {name: value for name, value in (given | {"keep_tags": keep or 0}).items()
             if any(given.get(needed) for needed in NEEDS.get(name, (name,)))}  # fmt: skip
    return PromptSettings(tuple(map(Template.parse, lines)), **given)


def read_records(workspace: Workspace, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Read the records of up to `MAX_READ` clips.

    Args:
        workspace: The studio's folders.
        folder: Folder of latents, or of audio (clips without a caption are left out, as in encoding).

    Returns:
        The records, and what becomes of clips that are left out.

    Raises:
        DataError: When no clip has a caption.
    """
    if (folder / INDEX_FILE).is_file():
        records = LatentStore(folder).iterate_records()
        return [record for _, (_, record) in zip(range(MAX_READ), records, strict=False)], ""
    found, clips = [], list_clips(workspace, folder)[:MAX_READ]
    for clip in clips:
        text = read_clip_text(clip)
        if text.caption:
            found.append({"source": clip.source, "caption": text.caption, "tags": text.tags})
    if not found:
        raise DataError(f"no clip in {folder} has a caption: write some on the Captions tab.")
    left = len(clips) - len(found)
    note = (
        f"{left:,} of {len(clips):,} clips have no caption. Encode rejects them, and training never sees them, unless "
    )
    note += "its field Captions is auto (it composes captions) or optional (they train on the empty prompt)."
    return found, note if left else ""


def render_preview(records: Sequence[Mapping[str, Any]], settings: PromptSettings, count: int, seed: int = 0) -> str:
    """Render prompts of some clips: a few as drawn in training, and the one for validation.

    Args:
        records: Records of clips.
        settings: How prompts are built.
        count: Number of clips to show.
        seed: Seed of the drawn prompts.

    Returns:
        HTML. A `SA3Error` is raised for settings without effect, and for clips without a prompt.
    """
    builder = PromptBuilder(settings)
    builder.check(records)
    spread = records[:: max(1, len(records) // max(1, count))][:count]
    rows = []
    for number, record in enumerate(spread):
        rng = random.Random(f"{seed} {number}")
        drawn = dict.fromkeys(builder.build(record, rng) for _ in range(DRAWS))
        shown = "<br>".join(escape(prompt) or "<i>(empty prompt)</i>" for prompt in drawn)
        rows.append([f"<code>{escape(str(record['source']))}</code>", shown, escape(builder.build_fixed(record))])
    prompts = list_distinct_prompts(builder, records)
    total = "too many to list" if prompts is None else f"{len(prompts):,}"
    empty = sum(not builder.build_fixed(record) for record in records)
    bare = f"; {empty:,} of them train on the empty prompt" if empty else ""
    return ui.render_panel(
        render_table(("clip", f"training ({DRAWS} draws)", "validation"), rows)
        + f'<p class="soft">{len(records):,} clips read, distinct prompts: {total}{bare}</p>'
    )


def build_preview_command(folder: Path, settings: PromptSettings, count: int) -> list[str]:
    """Build the command that prints the prompts of latents.

    Args:
        folder: Folder of latents.
        settings: How prompts are built.
        count: Number of clips.

    Returns:
        The arguments.
    """
    argv = ["sa3-data", "preview", str(folder), "-n", str(count)]
    for name, value in _list_changes(settings).items():
        if name == "templates":
            argv += [f"--template={item.text}={item.weight}" for item in value]
        else:
            argv.append(f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}"))
    return argv


def list_training_settings(settings: PromptSettings) -> list[str]:
    """List the settings of `sa3-train` for the same prompts.

    Args:
        settings: How prompts are built.

    Returns:
        `key=value` arguments.
    """
    changes = _list_changes(settings)
    if "templates" in changes:
        changes["templates"] = [{"text": item.text, "weight": item.weight} for item in settings.templates]
    return [format_override(f"data.prompts.{name}", value) for name, value in changes.items()]


def _list_changes(settings: PromptSettings) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    return {name: value for name, value in vars(settings).items() if value != getattr(PromptSettings(), name)}


def build_prompts_tab(workspace: Workspace, folder: gr.Dropdown) -> None:
    """Build the tab.

    Args:
        workspace: The studio's folders.
        folder: The chosen folder of audio.

    Raises:
        StudioError: In its event handlers, when no folder is chosen.
    """
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=330):
            latents = gr.Dropdown(
                [ABOVE],
                value="",
                label="Prompts of",
                info=describe_choice(""),
                allow_custom_value=True,
                elem_id="prompts-latents",
            )
            templates = gr.Textbox(
                "{caption}", lines=3, label="Templates, one per line: TEXT or TEXT=WEIGHT", info=HINT
            )
            fields = {
                name: ui.build_field(PromptSettings, name, info=None, **options) for name, options in FIELDS.items()
            }
            show = gr.Button("Show prompts", variant="primary", elem_id="prompts-show")
        with gr.Column(scale=4, min_width=420):
            shown = gr.HTML(ui.render_placeholder(EMPTY), elem_id="prompts-shown")
            line = gr.HTML("", elem_id="prompts-command")

    @ui.show_errors
    def preview(chosen: str | None, source: str | None, text: str, *values: Any) -> Iterator[tuple[str, str]]:
        yield ui.render_placeholder(EMPTY), ""  # an error does not leave the prompts of another folder
        path = chosen or source
        if not path:
            raise StudioError("choose latents, or a folder of audio above.")
        where = workspace.resolve_folder(path)
        settings = build_settings(text, **dict(zip(fields, values, strict=True)))
        records, note = read_records(workspace, where)
        head = f"<h3>{escape(workspace.shorten(where))}</h3>{note and ui.render_notice(note, 'warning')}"
        html = ui.render_panel(head) + render_preview(records, settings, CLIPS)
        yield html, render_commands(workspace, where, settings)

    show.click(preview, [latents, folder, templates, *fields.values()], [shown, line], show_progress_on=shown)
    latents.change(lambda chosen: gr.update(info=describe_choice(chosen)), latents, latents, **ui.QUIET)
    ui.refresh_choices(latents, lambda: [ABOVE, *name_folders(workspace, find_folders(workspace).latents)])


def describe_choice(latents: str | None) -> str:
    """Describe which folder the prompts are of.

    Args:
        latents: The chosen folder of latents; empty for the folder of audio.

    Returns:
        A sentence or two.
    """
    if latents:
        return "These latents. The folder of audio above has no effect on this tab."
    return "The folder of audio above, or latents made of one."


def render_commands(workspace: Workspace, folder: Path, settings: PromptSettings) -> str:
    """Render the command that prints the same prompts, and the settings that train with them.

    Args:
        workspace: The studio's folders.
        folder: Folder of latents or audio.
        settings: How prompts are built.

    Returns:
        HTML.
    """
    is_data = (folder / INDEX_FILE).is_file()
    found = ui.render_command(build_preview_command(folder, settings, CLIPS)) if is_data else ""
    wanted = list_training_settings(settings)
    return found + (ui.render_command("\n".join(wanted), "Settings for a run, one per line") if wanted else "")
