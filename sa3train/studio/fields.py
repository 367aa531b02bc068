"""Fields that several pages have, and how their values are read."""

import gradio as gr

from sa3train.errors import RequestError
from sa3train.inference.checks import number


def optional_number(label: str, elem_id: str | None = None, placeholder: str = "") -> gr.Textbox:
    """A field for a number that may be left empty, which Gradio's own fields for numbers turn into 0."""
    return gr.Textbox("", label=label, placeholder=placeholder, max_lines=1, min_width=90, elem_id=elem_id)


def number_or_none(name: str, text: str | float | None) -> float | None:
    """What `optional_number` says; None when empty. Raises `RequestError` for anything but a number."""
    if text is None or str(text).strip() == "":
        return None
    try:
        value = float(text)
    except ValueError as error:
        raise RequestError(f"{name} must be a number, not {text!r}; or leave it empty.") from error
    return number(name, value)


def whole_or_none(name: str, text: str | float | None) -> int | None:
    """As `number_or_none`, for whole numbers."""
    value = number_or_none(name, text)
    if value is None:
        return None
    if value != int(value):
        raise RequestError(f"{name} must be a whole number, not {value:g}.")
    return int(value)


def shown_number(value: float | None) -> str:
    """A number as `optional_number` shows it."""
    return "" if value is None else f"{value:.10g}"
