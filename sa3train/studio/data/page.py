"""The Data page: a folder of audio is looked at, captioned, audited and encoded; prompts are seen before training."""

from typing import Any

import gradio as gr

from sa3train.studio.data.captions_tab import captions_tab
from sa3train.studio.data.jobs_tabs import audit_tab, encode_tab
from sa3train.studio.data.prompts_tab import prompts_tab
from sa3train.studio.server.widgets import ticking
from sa3train.studio.server.workspace import Workspace, survey_folders

SECONDS = 2.0
CHOOSE = "Folders of audio below the studio's roots; a path may be typed too."


def data_page(workspace: Workspace) -> None:
    """Build the page inside an open tab."""
    tick = ticking(SECONDS)
    folder = gr.Dropdown(
        audio_folders(workspace),
        value=None,
        label="Folder of audio",
        info=CHOOSE,
        allow_custom_value=True,
        elem_id="data-folder",
    )
    known = gr.State([])
    with gr.Tabs():
        with gr.Tab("Captions"):
            captions_tab(workspace, folder)
        with gr.Tab("Audit"):
            audit_tab(workspace, folder, tick)
        with gr.Tab("Encode"):
            encode_tab(workspace, folder, tick)
        with gr.Tab("Prompts"):
            prompts_tab(workspace, folder, tick)

    def refreshed(before: list[Any], chosen: str | None) -> tuple[Any, Any]:
        choices = audio_folders(workspace)
        if choices == before:
            return gr.skip(), gr.skip()
        # A choice is not said again: by now there may be another.
        first: dict[str, Any] = {} if chosen or not choices else {"value": choices[0][1]}
        return gr.update(choices=choices, **first), choices

    tick.tick(refreshed, [known, folder], [folder, known], show_progress="hidden")


def audio_folders(workspace: Workspace) -> list[tuple[str, str]]:
    """Folders that hold audio, as a choice."""
    return [(workspace.shown(path), str(path)) for path in survey_folders(workspace).audio]
