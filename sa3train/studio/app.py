"""The studio's page and its server: every page in a tab, one look, nothing fetched from elsewhere."""

import contextlib
import hmac
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
from starlette.middleware import Middleware

from sa3train.studio.adapters.page import adapters_page
from sa3train.studio.data.page import data_page
from sa3train.studio.play.page import play_page
from sa3train.studio.runs.page import runs_page
from sa3train.studio.server.access import LOCAL_NAMES, Guard, Opening
from sa3train.studio.server.workspace import StudioError, Workspace

LARGEST_UPLOAD = "512mb"
PAGES: dict[str, Callable[[Workspace], None]] = {
    "Play": play_page,
    "Runs": runs_page,
    "Data": data_page,
    "Adapters": adapters_page,
}
ASSETS = Path(__file__).parent / "assets"


def build_app(workspace: Workspace) -> gr.Blocks:
    """The whole page of a studio in `workspace`."""
    os.environ["GRADIO_TEMP_DIR"] = str(workspace.uploads)  # components read it when they are made
    with gr.Blocks(title="sa3train studio", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(_head(workspace), elem_id="studio-head", apply_default_css=False)
        with gr.Tabs(elem_id="studio-tabs"):
            for name, build in PAGES.items():
                with gr.Tab(name, id=name.lower(), elem_id=f"tab-{name.lower()}"):
                    build(workspace)
    return page


def serve(page: gr.Blocks, workspace: Workspace, opening: Opening, largest_upload: str = LARGEST_UPLOAD) -> str:
    """Start the server in threads of its own and return its address; `page.close()` ends it. Raises `StudioError`."""
    opening.check()
    hosts = None if opening.is_open else LOCAL_NAMES
    password = opening.password
    try:
        _, address, shared = page.queue(default_concurrency_limit=8).launch(
            server_name=opening.host,
            server_port=opening.port,
            share=opening.share,
            auth=None if password is None else lambda name, given: _same(given, password),
            auth_message="Any name, and the studio's password.",
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            allowed_paths=[str(root) for root in workspace.roots],
            max_file_size=largest_upload,
            ssr_mode=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            theme=_theme(),
            head=page_head(),
            app_kwargs={"middleware": [Middleware(Guard, workspace=workspace, hosts=hosts)]},
        )
    except OSError as error:
        raise StudioError(f"cannot listen on {opening.host}: {error}. Choose another --port.") from error
    return str(shared or address)


@contextlib.contextmanager
def running(workspace: Workspace, opening: Opening | None = None, **settings: Any) -> Iterator[str]:
    """A studio for as long as the block lasts; gives its address."""
    page = build_app(workspace)
    try:
        yield serve(page, workspace, opening or Opening(), **settings)
    finally:
        page.close(verbose=False)


def page_head() -> str:
    """The page's own style and scripts, inside it: nothing is fetched, and Gradio leaves the style as it is."""
    styles = "".join(path.read_text(encoding="utf-8") for path in sorted(ASSETS.glob("*.css")))
    # studio.js comes first: the others hang their parts on what it makes.
    paths = sorted(ASSETS.glob("*.js"), key=lambda path: (path.name != "studio.js", path.name))
    scripts = "".join(path.read_text(encoding="utf-8") for path in paths)
    return f"<style>{styles}</style><script>{scripts}</script>"


def _same(given: str, password: str) -> bool:
    return hmac.compare_digest(given.encode(), password.encode())


def _head(workspace: Workspace) -> str:
    from html import escape

    folders = ", ".join(escape(str(root)) for root in workspace.roots)
    return f"<h1>sa3train studio</h1><p>Works in {folders}; results: {escape(workspace.shown(workspace.home))}.</p>"


def _theme() -> gr.themes.Base:
    """System fonts and the run report's colours, with contrast to spare."""
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
