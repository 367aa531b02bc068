"""The studio's web page, with a tab for each of its pages, and its server. Nothing is fetched from elsewhere."""

import contextlib
import hmac
import os
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
from starlette.middleware import Middleware

from sa3train.core.processes import get_running_pid
from sa3train.core.text import format_command
from sa3train.studio.adapters.page import build_adapters_page
from sa3train.studio.data.jobs import list_jobs
from sa3train.studio.data.page import build_data_page
from sa3train.studio.play.page import build_play_page
from sa3train.studio.runs.page import build_runs_page
from sa3train.studio.server.access import LOCAL_NAMES, AccessMiddleware, AccessSettings
from sa3train.studio.server.folders import find_runs
from sa3train.studio.server.kept_forms import keep_form
from sa3train.studio.server.workspace import StudioError, Workspace

MAX_UPLOAD = "512mb"
PAGES: dict[str, Callable[[Workspace], None]] = {
    "Play": build_play_page,
    "Runs": build_runs_page,
    "Data": build_data_page,
    "Adapters": build_adapters_page,
}
ASSETS = Path(__file__).parent / "assets"


def build_app(workspace: Workspace) -> gr.Blocks:
    """Build the web page of a studio.

    Args:
        workspace: The folders it may touch and its initial choices.

    Returns:
        The page, to pass to `serve`.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(workspace.uploads)  # components read it when they are built
    sources = ", ".join(map(str, workspace.sources)) or "no folder"
    places = f"Reads {sources}. Writes to its workspace, {workspace.folder}."
    start: list[str | Path] = ["sa3-studio", *workspace.sources, "--workspace", workspace.folder]
    start += ["--model", workspace.model]
    start += ["--device", workspace.device] if workspace.device else []
    head = f'<h1 data-start="{escape(format_command(start))}">sa3train studio</h1><p>{escape(places)}</p>'
    with gr.Blocks(title="sa3train studio", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(head, elem_id="studio-head", apply_default_css=False)
        forms = []
        with gr.Tabs(elem_id="studio-tabs", overflow_behavior="wrap"):
            for name, build in PAGES.items():
                with gr.Tab(name, id=name.lower(), elem_id=f"tab-{name.lower()}") as tab:
                    reset = gr.Button("Reset this page's fields", size="sm", elem_classes="reset-form", scale=0)
                    build(workspace)
                forms.append((tab, reset))
        page.load(None, None, None, js="() => sa3.restoreTab()")
        for tab, reset in forms:
            keep_form(workspace, page, tab, reset)
    for event in page.fns.values():
        if event.show_progress == "hidden":  # else each event makes the browser update the outputs of all events so far
            event.show_progress_on = []
    return page


def describe_work(workspace: Workspace) -> list[str]:
    """Describe what goes on when the studio ends: runs, audits and encodes that it started.

    Args:
        workspace: The studio's folders.

    Returns:
        One line each, with the process ID.
    """
    going = [(f"training run {run.path}", run.path) for run in find_runs(workspace)]
    going += [(f"{job.kind} of {job.source}", job.folder) for job in list_jobs(workspace)]
    pids = [(name, get_running_pid(folder)) for name, folder in going]
    return [f"{name} (PID {pid})" for name, pid in pids if pid is not None]


def serve(page: gr.Blocks, workspace: Workspace, access: AccessSettings, max_upload: str = MAX_UPLOAD) -> str:
    """Start the server in its own threads; `page.close()` stops it.

    Args:
        page: What `build_app` returned.
        workspace: The folders whose files may be served.
        access: Where to listen, and the password.
        max_upload: Largest file that the page may upload, such as "512mb".

    Returns:
        The address.

    Raises:
        StudioError: The server is open without a proper password, or cannot listen there.
    """
    access.check()
    hosts = None if access.is_open else LOCAL_NAMES
    password = access.password
    try:
        _, address, shared = page.queue(default_concurrency_limit=8).launch(
            server_name=access.host,
            server_port=access.port,
            share=access.share,
            auth=None if password is None else lambda _, given: hmac.compare_digest(given.encode(), password.encode()),
            auth_message="Enter any user name and the studio's password.",
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            allowed_paths=[str(root) for root in workspace.roots],
            max_file_size=max_upload,
            ssr_mode=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            theme=_theme(),
            head=_build_page_head(),
            app_kwargs={"middleware": [Middleware(AccessMiddleware, workspace=workspace, hosts=hosts)]},
        )
    except OSError as error:
        raise StudioError(f"Cannot listen on {access.host}: {error}. Choose another --port.") from error
    return str(shared or address)


@contextlib.contextmanager
def run_studio(
    workspace: Workspace, access: AccessSettings | None = None, max_upload: str = MAX_UPLOAD
) -> Iterator[str]:
    """Run a studio as long as the `with` block lasts.

    Args:
        workspace: The folders it may touch and its initial choices.
        access: Where to listen, and the password. None: on this machine only.
        max_upload: Largest file that the page may upload.

    Yields:
        The address.
    """
    page = build_app(workspace)
    try:
        yield serve(page, workspace, access or AccessSettings(), max_upload)
    finally:
        page.close(verbose=False)


def _build_page_head() -> str:
    """Put the page's own styles and scripts into its head: nothing is fetched, and Gradio leaves the styles alone."""
    styles = "".join(path.read_text(encoding="utf-8") for path in sorted(ASSETS.glob("*.css")))
    # studio.js comes first: the others add to the object that it creates.
    paths = sorted(ASSETS.glob("*.js"), key=lambda path: (path.name != "studio.js", path.name))
    scripts = "".join(path.read_text(encoding="utf-8") for path in paths)
    return f"<style>{styles}</style><script>{scripts}</script>"


def _theme() -> gr.themes.Base:
    """Return a theme with system fonts and the run report's colors, with enough contrast."""
    accent = gr.themes.Color(
        c50="#eef7fa", c100="#d6ebf2", c200="#aed7e5", c300="#7dbdd3", c400="#3f97b6", c500="#0b6e8f",
        c600="#0a6280", c700="#08506a", c800="#073f53", c900="#052e3d", c950="#031f2a",
    )  # fmt: skip
    theme = gr.themes.Base(
        primary_hue=accent,
        secondary_hue=accent,
        neutral_hue="zinc",
        spacing_size="sm",
        radius_size="md",
        text_size="md",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return theme.set(
        body_background_fill="#fbfaf8",
        body_background_fill_dark="#16171a",
        body_text_color="#1f2023",
        body_text_color_subdued="#5a5c63",
        body_text_color_subdued_dark="#b3b5bd",
        block_label_text_color="#3a3c42",
        block_title_text_color="#1f2023",
        block_info_text_color="#5a5c63",
        block_info_text_color_dark="#b3b5bd",
        button_primary_background_fill="#0b6e8f",
        button_primary_background_fill_hover="#08506a",
        button_primary_background_fill_dark="#0b6e8f",
        button_primary_background_fill_hover_dark="#0a6280",
        button_primary_text_color="#ffffff",
        input_placeholder_color="#6b6d75",
        input_placeholder_color_dark="#a3a5ad",
    )
