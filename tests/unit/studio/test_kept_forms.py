"""Forms that outlive a reload: what is kept of them, what returns, and what a reset leaves alone."""

import json
import re
from collections.abc import Callable
from typing import Any

import gradio as gr
import pytest

from helpers.run_dirs import make_run
from sa3train.studio.app import PAGES
from sa3train.studio.server.kept_forms import keep_form
from sa3train.studio.server.workspace import Workspace


def build(workspace: Workspace, fill: Callable[[], Any]) -> tuple[list[Any], Callable[..., list[Any]], list[Any], str]:
    """A page's kept fields, what restores them, the fields of a reset, and the script that keeps them."""
    with gr.Blocks() as blocks:
        with gr.Tabs(), gr.Tab("One") as tab:
            reset = gr.Button("Reset")
            fill()
        known = set(blocks.fns)
        keep_form(workspace, blocks, tab, reset)
        load, _, save, set_back = [one for number, one in blocks.fns.items() if number not in known]
    return save.inputs[1:], load.fn, set_back.outputs, str(save.js)


def test_what_was_kept_returns_unless_its_default_has_changed_or_it_is_gone(workspace: Workspace) -> None:
    make_run(workspace.folder / "runs" / "a", "finished").joinpath("checkpoints").mkdir()
    (workspace.folder / "runs" / "a" / "checkpoints" / "step-00000005.safetensors").touch()

    def fill() -> None:
        gr.Dropdown(["x", "y"], value="x", label="Model")
        with gr.Accordion("More", open=False):
            gr.Dropdown([], label="Adapters", multiselect=True, allow_custom_value=True)
            gr.Textbox("", label="Prompt")

    _, restore, _, _ = build(workspace, fill)
    for entries, shown in (
        (None, {}),
        ([[0, "x", "y"]], {0: "y"}),
        ([[0, "old", "y"]], {}),
        ([[0, "x", "gone"]], {}),
        ([[1, [], ["root/adapters/one.safetensors", "runs/a@5"]]], {1: ["root/adapters/one.safetensors", "runs/a@5"]}),
        ([[1, [], ["runs/a@7"]]], {}),
        ([[1, [], ["/etc/passwd"]]], {}),
        ([[2, "", "koto"]], {2: "koto"}),
    ):
        *values, box = restore(entries)
        assert values == [shown.get(at, gr.skip()) for at in range(3)]
        assert (box == gr.update(open=True)) is bool(shown.keys() & {1, 2})


def test_a_kept_folder_returns_under_its_short_name(workspace: Workspace) -> None:
    folder = str(workspace.sources[0] / "audio")
    _, restore, _, _ = build(workspace, lambda: gr.Dropdown([], label="Folder", allow_custom_value=True))
    assert restore([[0, None, folder]]) == [gr.update(value=folder, choices=[("root/audio", folder)])]


@pytest.mark.parametrize("name", PAGES)
def test_where_results_go_and_what_lifts_a_refusal_is_reset_but_not_kept(workspace: Workspace, name: str) -> None:
    kept, _, resettable, save = build(workspace, lambda: PAGES[name](workspace))
    labels = {str(field.label) for field in kept}
    once = {str(field.label) for field in resettable} - labels
    assert once == {
        "Play": set(), "Runs": {"Run folder"}, "Adapters": {"Write to", "Overwrite", "Allow loss", "Allow partial"},
        "Data": {"Folder for the latents", "Captions", "Overwrite", "Allow promotional"},
    }[name]  # fmt: skip
    assert not labels & {"Search clips and captions", "Template", "Replace"}, "captions may be unsaved"
    assert {field.elem_id for field in kept} - {field.elem_id for field in resettable} <= {"data-folder"}
    defaults = re.search(r"kept : (.*)\.flatMap", save)
    assert defaults is not None and len(json.loads(defaults[1])) == len(kept)
    assert ("at === -1" in save) is (name != "Runs")
