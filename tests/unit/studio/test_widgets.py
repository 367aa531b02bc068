"""Errors reach the page, text stays text, and what changes on the server is shown."""

from pathlib import Path

import gradio as gr
import pytest

from sa3train.data.loading.prompts import PromptSettings
from sa3train.studio.server.widgets import (
    explain_value,
    get_error_message,
    keep_error,
    keep_fresh,
    parse_setting,
    refresh_choices,
    render_command,
    render_notice,
    show_errors,
)
from sa3train.studio.server.workspace import StudioError


def test_errors_reach_the_page_as_text() -> None:
    def refuses() -> None:
        raise StudioError("no <b>file</b>")

    def breaks() -> None:
        raise KeyError("x")

    with pytest.raises(gr.Error, match="no &lt;b&gt;file"):
        show_errors(refuses)()
    with pytest.raises(gr.Error, match="KeyError"):
        show_errors(breaks)()
    named = get_error_message(StudioError("cfg_scale=1: set allow_loss or captions=optional, not loss.cfg_dropout"))
    assert named == "CFG scale: 1: set Allow loss or Captions: optional, not loss.cfg_dropout"
    for message, shown in (
        ("Convert it: sa3-adapter convert a/b.pt NEW.safetensors --to comfy --model NAME --rank R",
         "Convert it: Convert on the Adapters page, with To: comfy, Base model, Rank"),
        ("See which it is with sa3-adapter inspect. Set to=native, model=NAME.",
         "See which it is with Inspect on the Adapters page. Set To: native, Base model."),
    ):  # fmt: skip
        assert shown in render_notice(message, "error")
    assert 'role="alert"' in render_notice("x", "error")
    assert "&quot;" in render_command('echo "a"')
    assert "sa3-generate -p &#x27;a b&#x27; x" in render_command(["sa3-generate", "-p", "a b", Path("x")])


def test_a_generator_of_steps_shows_its_errors_too() -> None:
    def steps() -> object:
        yield 1
        raise StudioError("stopped")

    found = show_errors(steps)()
    assert next(found) == 1  # type: ignore[call-overload]
    with pytest.raises(gr.Error, match="stopped"):
        next(found)  # type: ignore[call-overload]


def test_a_wrong_number_is_explained_at_its_field() -> None:
    with gr.Blocks() as blocks:
        field = explain_value(
            gr.Number(1, label="n", info="help"), lambda value: parse_setting(PromptSettings, "keep_tags", value)
        )
    (handler,) = [block.fn for block in blocks.fns.values() if field in block.outputs]
    assert handler is not None
    for value in (-1, "x", "nan", float("nan"), float("inf"), "1e400", 10**400, [], True):
        assert "Keep first N tags" in handler(value)["info"]
    assert [handler(value)["info"] for value in (0, "7", "", " ", None)] == ["help"] * 5


def test_what_is_kept_fresh_is_so_from_the_first_look() -> None:
    with gr.Blocks() as blocks:
        box = gr.Textbox()
        keep_fresh(lambda: "state", lambda: "now", None, box, box.change)
    (event,) = [block for block in blocks.fns.values() if box in block.outputs]
    (watch,) = [
        block._id for block in blocks.blocks.values() if "watch" in (getattr(block, "elem_classes", None) or ())
    ]
    assert {(watch, "tick"), (box._id, "change")} == set(event.targets)


def test_while_nothing_is_chosen_a_new_choice_is() -> None:
    choices = [("none", "")]
    with gr.Blocks() as blocks:
        box = gr.Dropdown(choices, value="")
        refresh_choices(box, lambda: list(choices))
    (refresh,) = [block.fn for block in blocks.fns.values() if box in block.outputs]
    assert refresh is not None
    update, known = refresh([], "")
    assert update["value"] == ""
    choices += [("a", "/a")]
    assert refresh(known, "")[0]["value"] == "/a"
    assert "value" not in refresh(known, "/b")[0]


def test_an_error_takes_the_place_of_an_old_message() -> None:
    def run(is_wrong: bool) -> tuple[str, str]:
        if is_wrong:
            raise StudioError("Name is empty.")
        return "rows", "Saved a."

    handle = keep_error(run, 2, at=-1)
    assert list(handle(False)) == [("rows", "Saved a.")]
    updates = handle(True)
    kept, message = next(updates)
    assert "Name is empty." in message and kept == gr.skip()
    with pytest.raises(gr.Error, match="Name is empty"):
        next(updates)
