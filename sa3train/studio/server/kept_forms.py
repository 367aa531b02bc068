"""What is entered on a page outlives a reload: the browser keeps it, for each workspace and page."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import gradio as gr

from sa3train.core.errors import SA3Error
from sa3train.studio.server.folders import resolve_adapter
from sa3train.studio.server.widgets import QUIET
from sa3train.studio.server.workspace import Workspace

FIELDS = (gr.Textbox, gr.Number, gr.Slider, gr.Radio, gr.Checkbox, gr.CheckboxGroup, gr.Dropdown)
ASKED_AGAIN = ("Captions", "Overwrite", "Write to", "Folder for the latents", "Run folder")
"""Labels of what is not kept, like all that starts with Allow: where results go, and what lifts a refusal."""
UNTOUCHED, SUBJECT = "captions", "data-folder"
"""IDs of what is neither kept nor reset, as captions may be unsaved there, and of a field that is kept alone."""
SAVE = """(kept, ...values) => [!READY ? kept : USUAL.flatMap((usual, at) => {
    const given = values[at] ?? null;
    const value = at === SETTINGS ? given?.replace(/^.*(key|token|password|secret).*\\n?/gim, '') : given;
    return JSON.stringify(value) === JSON.stringify(usual) ? [] : [[at, usual, value]];
})]"""
"""Keeps what differs from the defaults, with the default of then; of further settings no line that may be a secret."""


def keep_form(workspace: Workspace, page: gr.Blocks, tab: gr.Tab, reset: gr.Button) -> None:
    """Keep the fields of a page in the browser: they return after a reload, until the button resets them.

    Args:
        workspace: The studio's folders.
        page: The whole page.
        tab: The tab whose fields are kept.
        reset: Button that sets the fields to their defaults.
    """
    found = list(_list_fields(tab))
    resettable = [field for field, _ in found if field.elem_id != SUBJECT]
    places = [(field, box) for field, box in found if not str(field.label).startswith(("Allow", *ASKED_AGAIN))]
    fields, labels = [field for field, _ in places], [str(field.label) for field, _ in places]
    closed = list(dict.fromkeys(box for _, box in places if box is not None and not box.open))
    usual = json.dumps([field.value for field in fields])
    defaults = json.loads(usual)
    # A form of other fields, as after an update, starts anew.
    about = json.dumps([str(workspace.folder), tab.label, labels])
    key = f"sa3-studio-form-{hashlib.sha256(about.encode()).hexdigest()[:16]}"
    kept = gr.BrowserState([], storage_key=key, secret=key)  # with a secret drawn by the server it would end with it

    def restore(entries: list[tuple[int, Any, Any]] | None) -> list[Any]:
        known = [entry for entry in entries or [] if entry[1] == defaults[entry[0]]]  # a new default is shown
        shown = {at: _show(workspace, fields[at], value) for at, _, value in known
                 if _can_show(workspace, fields[at], value)}  # fmt: skip
        used = {places[at][1] for at in shown}  # what is set must not be hidden
        boxes = [gr.update(open=True) if box in used else gr.skip() for box in closed]
        return [shown.get(at, gr.skip()) for at in range(len(fields))] + boxes

    # Fields also change while the page is built, before what was kept is back.
    ready = f"sa3.kept_{key.rpartition('-')[2]}"
    settings = next((at for at, label in enumerate(labels) if label.startswith("Further settings")), -1)
    save = SAVE.replace("READY", ready).replace("SETTINGS", str(settings)).replace("USUAL", usual)
    page.load(restore, kept, [*fields, *closed], **QUIET).then(None, None, None, js=f"() => {{ {ready} = true; }}")
    gr.on([field.change for field in fields], None, [kept, *fields], kept, js=save)
    reset.click(lambda: [field.value for field in resettable], None, resettable, **QUIET)


def _list_fields(block: Any, box: gr.Accordion | None = None) -> Iterator[tuple[Any, gr.Accordion | None]]:
    """List what a user fills in inside a block, widgets and elements that a script draws, with the accordion around."""
    for child in getattr(block, "children", []):
        if isinstance(child, FIELDS) or (isinstance(child, gr.HTML) and isinstance(child.value, dict)):
            yield child, box
        elif child.elem_id != UNTOUCHED:
            yield from _list_fields(child, child if isinstance(child, gr.Accordion) else box)


def _show(workspace: Workspace, field: Any, value: Any) -> Any:
    """Show a kept value; a path under its short name, also before the choices that hold it are listed."""
    choices = list(getattr(field, "choices", None) or [])
    if not getattr(field, "allow_custom_value", False) or not isinstance(value, str) or value in dict(choices).values():
        return value
    return gr.update(value=value, choices=[*choices, (workspace.shorten(value), value)])


def _can_show(workspace: Workspace, field: Any, value: Any) -> bool:
    """Check whether a kept value is still one of the choices or, where it may be entered, a file that is there."""
    if not hasattr(field, "choices"):
        return True
    choices = [choice for _, choice in field.choices or []]
    is_free = getattr(field, "allow_custom_value", False)
    values = value if isinstance(value, list) else [value]
    return all(each in choices or (is_free and _is_there(workspace, each)) for each in values)


def _is_there(workspace: Workspace, path: str | None) -> bool:
    """Check whether a file, a folder or a checkpoint of a run is in the studio's folders; nothing always is."""
    if not path:
        return True
    with contextlib.suppress(SA3Error):
        return workspace.resolve(path).exists() or bool(resolve_adapter(workspace, path))
    return False
