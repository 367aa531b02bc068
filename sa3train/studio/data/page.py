"""The Data page: caption, audit and encode a folder of audio, and preview prompts."""

from typing import Any

import gradio as gr

from sa3train.studio.data.captions_tab import build_captions_tab
from sa3train.studio.data.jobs_tabs import build_audit_tab, build_encode_tab
from sa3train.studio.data.prompts_tab import build_prompts_tab
from sa3train.studio.server.widgets import build_timer
from sa3train.studio.server.workspace import Workspace, find_folders

REFRESH_SECONDS = 2.0
CHOOSE = "Folders of audio below the studio's roots; you can also type a path."


def build_data_page(workspace: Workspace) -> None:
    """Build the page inside an open tab.

    Args:
        workspace: The studio's folders.
    """
    tick = build_timer(REFRESH_SECONDS)
    folder = gr.Dropdown(
        list_audio_folders(workspace),
        value=None,
        label="Folder of audio",
        info=CHOOSE,
        allow_custom_value=True,
        elem_id="data-folder",
    )
    known = gr.State([])
    with gr.Tabs():
        with gr.Tab("Captions"):
            build_captions_tab(workspace, folder)
        with gr.Tab("Audit"):
            build_audit_tab(workspace, folder, tick)
        with gr.Tab("Encode"):
            build_encode_tab(workspace, folder, tick)
        with gr.Tab("Prompts"):
            build_prompts_tab(workspace, folder, tick)

    def refresh(before: list[Any], chosen: str | None) -> tuple[Any, Any]:
        choices = list_audio_folders(workspace)
        if choices == before:
            return gr.skip(), gr.skip()
        # A choice is not sent again: it may have changed by now.
        first: dict[str, Any] = {} if chosen or not choices else {"value": choices[0][1]}
        return gr.update(choices=choices, **first), choices

    tick.tick(refresh, [known, folder], [folder, known], show_progress="hidden")


def list_audio_folders(workspace: Workspace) -> list[tuple[str, str]]:
    """List the folders that contain audio.

    Args:
        workspace: The studio's folders.

    Returns:
        (name, path) choices.
    """
    return [(workspace.shorten(path), str(path)) for path in find_folders(workspace).audio]
