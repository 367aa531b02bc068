"""The Data page: caption, audit and encode a folder of audio, and preview prompts."""

import gradio as gr

from sa3train.studio.data.captions_tab import build_captions_tab
from sa3train.studio.data.jobs_tabs import AUDIT, ENCODE, build_job_tab
from sa3train.studio.data.prompts_tab import build_prompts_tab
from sa3train.studio.server.folders import find_folders, name_folders
from sa3train.studio.server.widgets import refresh_choices
from sa3train.studio.server.workspace import Workspace

CHOOSE = "A folder of yours, with all that is in it. It is only read, but for captions that you save."


def build_data_page(workspace: Workspace) -> None:
    """Build the page inside an open tab.

    Args:
        workspace: The studio's folders.
    """
    folder = gr.Dropdown([], label="Folder of audio", info=CHOOSE, allow_custom_value=True, elem_id="data-folder")
    with gr.Tabs():
        with gr.Tab("Captions"):
            build_captions_tab(workspace, folder)
        with gr.Tab("Audit"):
            build_job_tab(workspace, folder, AUDIT)
        with gr.Tab("Encode"):
            build_job_tab(workspace, folder, ENCODE)
        with gr.Tab("Prompts"):
            build_prompts_tab(workspace, folder)

    refresh_choices(folder, lambda: name_folders(workspace, find_folders(workspace).audio))
