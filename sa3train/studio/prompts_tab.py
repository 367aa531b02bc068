"""The Prompts tab: how captions and tags become prompts, seen on the clips themselves."""

from pathlib import Path
from typing import Any

import gradio as gr

from sa3train.data.index import INDEX
from sa3train.studio import prompts_view
from sa3train.studio.messages import command_box, empty, told
from sa3train.studio.survey import survey
from sa3train.studio.workplace import StudioError, Workplace

CLIPS = 12
HINT = "Templates are made of fixed text and fields: {caption}, any tag such as {genre}, {folder}, {stem}, {path[0]}."


def prompts_tab(place: Workplace, folder: gr.Dropdown, tick: gr.Timer) -> None:
    """Build the tab."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=330):
            latents = gr.Dropdown(
                choices_of(place), value="", label="Latents (none: the folder of audio above)", allow_custom_value=True
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
        where, settings = place.folder(path), prompts_view.settings_of(*values)
        html = prompts_view.preview(prompts_view.records_of(place, where), settings, CLIPS)
        return html, commands(place, where, settings)

    def refreshed(before: list[Any]) -> tuple[Any, Any]:
        choices = choices_of(place)
        return (gr.skip(), gr.skip()) if choices == before else (gr.update(choices=choices), choices)

    fields = [templates, trigger, chance, position, shuffle, dropout, keep, empties]
    show.click(previewed, [latents, folder, *fields], [shown, line], show_progress="hidden")
    tick.tick(refreshed, known, [latents, known], show_progress="hidden")


def choices_of(place: Workplace) -> list[tuple[str, str]]:
    """No latents, and every folder of them."""
    return [("none", ""), *((place.shown(path), str(path)) for path in survey(place).latents)]


def commands(place: Workplace, folder: Path, settings: prompts_view.PromptSettings) -> str:
    """HTML of the command that previews, for latents, and of the settings that train so."""
    found = ""
    if (folder / INDEX).is_file():
        found = command_box(place.command(prompts_view.preview_command(folder, settings, CLIPS)))
    wanted = prompts_view.training_settings(settings)
    return found + (command_box("\n".join(wanted), "Settings for a run, one a line") if wanted else "")
