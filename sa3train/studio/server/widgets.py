"""What went wrong, as the page shows it: users' errors in their own words, anything else by its type and in the log.

Fields that several pages have, and how their values are read.

A timer that ticks while its tab is looked at, and rests otherwise.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, TypeVar, cast

import gradio as gr
from gradio.context import Context

from sa3train.core.errors import RequestError, SA3Error
from sa3train.core.log import get_logger
from sa3train.inference.request import number

logger = get_logger(__name__)
Handler = TypeVar("Handler", bound=Callable[..., Any])
SECONDS_SHOWN = 20.0


def told(handler: Handler) -> Handler:
    """`handler`, an event's function or generator, with its errors shown on the page instead of lost."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def steps(*arguments: Any, **named: Any) -> Iterator[Any]:
            with shown():
                yield from handler(*arguments, **named)

        return cast(Handler, steps)

    @functools.wraps(handler)
    def once(*arguments: Any, **named: Any) -> Any:
        with shown():
            return handler(*arguments, **named)

    return cast(Handler, once)


@contextmanager
def shown() -> Iterator[None]:
    """Turn what is raised inside into a message on the page."""
    try:
        yield
    except gr.Error:
        raise
    except SA3Error as error:
        raise gr.Error(escape(str(error)), duration=SECONDS_SHOWN, print_exception=False) from error
    except Exception as error:
        logger.exception("the studio met an unexpected error")
        raise gr.Error(escape(unexpected(error)), duration=SECONDS_SHOWN, print_exception=False) from error


def unexpected(error: BaseException) -> str:
    """What to tell about an error that no user can have caused."""
    return f"{type(error).__name__}: {error}. This is a fault of the studio; its log says more."


def message_of(error: BaseException) -> str:
    """The text to show for `error` where it is kept, such as beside a failed job."""
    return str(error) if isinstance(error, SA3Error) else unexpected(error)


def notice(text: str, kind: str = "note") -> str:
    """HTML of a message inside the page; `kind` is note, warning or error. `text` is plain text."""
    role = "alert" if kind == "error" else "status"
    return f'<div class="notice {kind}" role="{role}">{escape(text)}</div>'


def empty(text: str) -> str:
    """HTML that says what will appear here, as long as nothing does. `text` is plain text."""
    return f'<div class="empty">{escape(text)}</div>'


def command_box(command: str, label: str = "Copy as command") -> str:
    """HTML of a command line, folded away, with a button that copies it (the page's script gives it its work)."""
    return (
        f'<details class="command"><summary>{escape(label)}</summary><div class="line"><code>{escape(command)}</code>'
        f'<button type="button" class="copy" data-copy="{escape(command, quote=True)}">Copy</button></div></details>'
    )


def view(body: str) -> str:
    """HTML in the look of this page's parts (`views.css`)."""
    return f'<div class="run-view">{body}</div>'


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


def ticking(seconds: float) -> gr.Timer:
    """A timer for the tab that is being built. Outside of tabs it always ticks."""
    tab = Context.block
    while tab is not None and not isinstance(tab, gr.Tab):
        tab = tab.parent
    tabs = tab.parent if tab is not None else None
    if tab is None or not isinstance(tabs, gr.Tabs):
        return gr.Timer(seconds)
    timer = gr.Timer(seconds, active=False)
    name = tab.label

    def looked_at(chosen: gr.SelectData) -> gr.Timer:
        return gr.Timer(active=chosen.value == name)

    # One after another and none left out, however fast tabs are changed: the last one decides.
    tabs.select(looked_at, None, timer, show_progress="hidden", trigger_mode="multiple", concurrency_limit=1)
    return timer
