"""What is entered on a page outlives a reload: the browser keeps it, for each workspace and page."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import gradio as gr

from sa3train.studio.server.widgets import QUIET
from sa3train.studio.server.workspace import Workspace

FIELDS = (gr.Textbox, gr.Number, gr.Slider, gr.Radio, gr.Checkbox, gr.CheckboxGroup, gr.Dropdown)


def keep_form(workspace: Workspace, page: gr.Blocks, tab: gr.Tab, reset: gr.Button) -> None:
    """Keep the fields of a page in the browser: they return after a reload, until the button resets them.

    Args:
        workspace: The studio's folders.
        page: The whole page.
        tab: The tab whose fields are kept.
        reset: Button that sets the fields to their defaults.
    """
    places = list(_list_fields(tab))
    fields = [field for field, _ in places]
    closed = {box: None for _, box in places if box is not None and not box.open}
    # A form of other fields, as after an update, starts anew.
    about = json.dumps([str(workspace.folder), tab.label, [str(field.label) for field in fields]])
    key = f"sa3-studio-{hashlib.sha256(about.encode()).hexdigest()[:16]}"
    kept = gr.BrowserState(None, storage_key=key, secret=key)  # with a secret drawn by the server it would end with it

    def restore(values: list[Any] | None) -> list[Any]:
        if values is None:
            return [gr.skip()] * (len(fields) + len(closed))
        known = [_can_show(field, value) for field, value in zip(fields, values, strict=True)]
        # What is set must not be hidden.
        used = {
            box for (field, box), value, can in zip(places, values, known, strict=True) if can and value != field.value
        }
        shown = [value if can else gr.skip() for value, can in zip(values, known, strict=True)]
        return shown + [gr.update(open=True) if box in used else gr.skip() for box in closed]

    # Fields also change while the page is built, before what was kept is back.
    ready = f"sa3.kept_{key.rpartition('-')[2]}"
    save = f"(kept, ...values) => [{ready} ? values.slice(0, {len(fields)}) : kept]"
    page.load(restore, kept, [*fields, *closed], **QUIET).then(None, None, None, js=f"() => {{ {ready} = true; }}")
    gr.on([field.change for field in fields], None, [kept, *fields], kept, js=save)
    reset.click(lambda: [field.value for field in fields], None, fields, **QUIET)


def _list_fields(block: Any, box: gr.Accordion | None = None) -> Iterator[tuple[Any, gr.Accordion | None]]:
    """List what a user fills in inside a block, widgets and elements that a script draws, with the accordion around."""
    for child in getattr(block, "children", []):
        if isinstance(child, FIELDS) or (isinstance(child, gr.HTML) and isinstance(child.value, dict)):
            yield child, box
        else:
            yield from _list_fields(child, child if isinstance(child, gr.Accordion) else box)


def _can_show(field: Any, value: Any) -> bool:
    """Check whether a kept value is still one of the choices, where nothing else may be entered."""
    choices = [choice for _, choice in getattr(field, "choices", None) or []]
    is_free = not hasattr(field, "choices") or getattr(field, "allow_custom_value", False)
    return is_free or all(each in choices for each in (value if isinstance(value, list) else [value]))
