"""What went wrong, as the page shows it: users' errors in their own words, anything else by its type and in the log."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, TypeVar, cast

import gradio as gr

from sa3train.errors import SA3Error
from sa3train.log import get_logger

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
