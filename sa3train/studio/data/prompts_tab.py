"""The Prompts tab: how captions and tags become prompts, seen on the clips themselves.

What the model would be told: prompts of some clips, made by the very code that training uses.
"""

import json
import random
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from sa3train.core.errors import DataError
from sa3train.data.loading.prompts import PromptBuilder, PromptSettings, Template, distinct_prompts
from sa3train.data.shards.index import INDEX
from sa3train.data.shards.reader import LatentStore
from sa3train.data.sources.captions import describe
from sa3train.reports.html import table
from sa3train.studio.data.captions import clips_of
from sa3train.studio.server.widgets import command_box, empty, told, view
from sa3train.studio.server.workspace import StudioError, Workspace, survey_folders

DRAWS = 3
MOST_READ = 2000
"""Clips that are read for a preview."""


def settings_of(
    templates: str,
    trigger: str = "",
    probability: float = 1.0,
    position: str = "front",
    shuffle: bool = False,
    dropout: float = 0.0,
    keep: float = 0,
    caption_dropout: float = 0.0,
) -> PromptSettings:
    """Prompt settings from the page's fields; templates one a line, each `TEXT` or `TEXT=WEIGHT`.

    Raises `ConfigError` for settings that are wrong or without effect.
    """
    lines = [line.strip() for line in templates.splitlines() if line.strip()] or ["{caption}"]
    return PromptSettings(
        tuple(_template(line) for line in lines),
        trigger=trigger.strip(),
        trigger_probability=float(probability) if trigger.strip() else 1.0,
        trigger_position=position if trigger.strip() else "front",
        shuffle_tags=shuffle,
        tag_dropout=float(dropout),
        keep_tags=int(keep or 0) if shuffle or dropout else 0,
        caption_dropout=float(caption_dropout),
    )


def records_of(workspace: Workspace, folder: Path) -> list[dict[str, Any]]:
    """What is said of each clip, up to `MOST_READ`, in latents or in a folder of audio. Of the latter, clips without a
    caption are left out, as encoding leaves them out. Raises `SA3Error`.
    """
    if (folder / INDEX).is_file():
        return [record for _, record in zip(range(MOST_READ), _records(folder), strict=False)]
    found = []
    for clip in clips_of(workspace, folder)[:MOST_READ]:
        said = describe(clip)
        if said.caption:
            found.append({"source": clip.source, "caption": said.caption, "tags": said.tags})
    if not found:
        raise DataError(f"no clip in {folder} has a caption: write some on the Captions tab.")
    return found


def preview(records: Sequence[Mapping[str, Any]], settings: PromptSettings, count: int, seed: int = 0) -> str:
    """HTML: for `count` clips their caption, a few prompts as drawn, and that of held-out evaluation.

    Raises `SA3Error` for settings that give no clip any effect, and for clips that get no prompt.
    """
    builder = PromptBuilder(settings)
    builder.check(records)
    spread = records[:: max(1, len(records) // max(1, count))][:count]
    rows = []
    for number, record in enumerate(spread):
        chance = random.Random(f"{seed} {number}")
        drawn = dict.fromkeys(builder(record, chance) for _ in range(DRAWS))
        shown = "<br>".join(escape(prompt) or "<i>(empty prompt)</i>" for prompt in drawn)
        rows.append([f"<code>{escape(str(record['source']))}</code>", shown, escape(builder.fixed(record))])
    prompts = distinct_prompts(builder, records)
    total = "more than can be listed" if prompts is None else f"{len(prompts):,}"
    return view(
        table(("clip", f"as drawn, {DRAWS} times", "when judged"), rows)
        + f'<p class="soft">{len(records):,} clips read, distinct prompts: {total}</p>'
    )


def preview_command(folder: Path, settings: PromptSettings, count: int) -> list[str]:
    """The command that prints such prompts of latents."""
    argv = ["sa3-data", "preview", str(folder), "-n", str(count)]
    if settings.templates != PromptSettings().templates:
        argv += [part for item in settings.templates for part in ("--template", f"{item.text}={item.weight:g}")]
    for name in ("trigger", "trigger_probability", "trigger_position", "tag_dropout", "keep_tags", "caption_dropout"):
        if getattr(settings, name) != getattr(PromptSettings(), name):
            argv += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    return [*argv, *(["--shuffle-tags"] if settings.shuffle_tags else [])]


def training_settings(settings: PromptSettings) -> list[str]:
    """The settings for `sa3-train` that make such prompts."""
    found = []
    if settings.templates != PromptSettings().templates:
        items = ", ".join(f"{{text: {json.dumps(t.text)}, weight: {t.weight:g}}}" for t in settings.templates)
        found.append(f"data.prompts.templates=[{items}]")
    names = ("trigger_probability", "trigger_position", "shuffle_tags", "tag_dropout", "keep_tags", "caption_dropout")
    if settings.trigger:
        found.append(f"data.prompts.trigger={json.dumps(settings.trigger)}")
    for name in names:
        value = getattr(settings, name)
        if value != getattr(PromptSettings(), name):
            found.append(f"data.prompts.{name}={str(value).lower() if isinstance(value, bool) else value}")
    return found


def _records(folder: Path) -> Any:
    for _, record in LatentStore(folder, verify="size").records():
        yield record


def _template(line: str) -> Template:
    text, equals, weight = line.rpartition("=")
    try:
        return Template(text, float(weight)) if equals else Template(line)
    except ValueError:
        return Template(line)


CLIPS = 12
HINT = "Templates are made of fixed text and fields: {caption}, any tag such as {genre}, {folder}, {stem}, {path[0]}."


def prompts_tab(workspace: Workspace, folder: gr.Dropdown, tick: gr.Timer) -> None:
    """Build the tab."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=330):
            latents = gr.Dropdown(
                choices_of(workspace),
                value="",
                label="Latents (none: the folder of audio above)",
                allow_custom_value=True,
            )
            templates = gr.Textbox("{caption}", lines=3, label="Templates, one a line, TEXT or TEXT=WEIGHT", info=HINT)
            with gr.Row():
                trigger = gr.Textbox("", label="Trigger word", min_width=130)
                chance = gr.Slider(0, 1, value=1, step=0.05, label="Its probability", min_width=130)
            position = gr.Radio(["front", "back"], value="front", label="Its place")
            shuffle = gr.Checkbox(False, label="Shuffle the tags of a caption")
            with gr.Row():
                dropout = gr.Slider(0, 1, value=0, step=0.05, label="Tags left out", min_width=130)
                keep = gr.Number(0, label="First tags that stay", precision=0, minimum=0, min_width=130)
            empties = gr.Slider(0, 1, value=0, step=0.05, label="Share of empty prompts")
            show = gr.Button("Show prompts", variant="primary", elem_id="prompts-show")
        with gr.Column(scale=4, min_width=420):
            shown = gr.HTML(empty("Prompts appear here as training would make them."), elem_id="prompts-shown")
            line = gr.HTML("", elem_id="prompts-command")
    known = gr.State([])

    @told
    def previewed(chosen: str | None, source: str | None, *values: Any) -> tuple[str, str]:
        path = chosen or source
        if not path:
            raise StudioError("choose latents, or a folder of audio above.")
        where, settings = workspace.folder(path), settings_of(*values)
        html = preview(records_of(workspace, where), settings, CLIPS)
        return html, commands(workspace, where, settings)

    def refreshed(before: list[Any]) -> tuple[Any, Any]:
        choices = choices_of(workspace)
        return (gr.skip(), gr.skip()) if choices == before else (gr.update(choices=choices), choices)

    fields = [templates, trigger, chance, position, shuffle, dropout, keep, empties]
    show.click(previewed, [latents, folder, *fields], [shown, line], show_progress="hidden")
    tick.tick(refreshed, known, [latents, known], show_progress="hidden")


def choices_of(workspace: Workspace) -> list[tuple[str, str]]:
    """No latents, and every folder of them."""
    return [("none", ""), *((workspace.shown(path), str(path)) for path in survey_folders(workspace).latents)]


def commands(workspace: Workspace, folder: Path, settings: PromptSettings) -> str:
    """HTML of the command that previews, for latents, and of the settings that train so."""
    found = ""
    if (folder / INDEX).is_file():
        found = command_box(workspace.command(preview_command(folder, settings, CLIPS)))
    wanted = training_settings(settings)
    return found + (command_box("\n".join(wanted), "Settings for a run, one a line") if wanted else "")
