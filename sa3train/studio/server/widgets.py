"""Widgets and error handling that several pages of the studio share."""

import dataclasses
import functools
import hashlib
import inspect
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import gradio as gr

from sa3train.core.config import list_settings
from sa3train.core.errors import GenerationError, SA3Error
from sa3train.core.log import get_logger
from sa3train.core.text import format_command, shorten
from sa3train.data.encode.settings import EncodeSettings
from sa3train.data.loading.prompts import PromptSettings
from sa3train.inference.settings import GenerationSettings, check_number
from sa3train.reports.html import render_table
from sa3train.studio.server.workspace import StudioError

logger = get_logger(__name__)
Handler = TypeVar("Handler", bound=Callable[..., Any])
Result = TypeVar("Result")
SHOW_SECONDS = 1.0
"""Interval at which a wait is told of."""
REFRESH_SECONDS = 2.0
"""Interval at which a page looks for changes on the server."""
QUIET: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
"""Options of events that answer at once."""
TOOL_LABELS = {
    "rank": "Rank", "explained_variance": "Explained variance", "dtype": "Dtype", "dense": "Full weight deltas",
    "allow_loss": "Allow loss", "allow_partial": "Allow partial", "overwrite": "Overwrite", "to": "To",
    "model": "Base model",
}  # fmt: skip
"""Labels of the fields for parameters of `sa3train.adapters.tools`."""
LABELS = {
    "keep_tags": "Keep first N tags",
    "trigger": "Trigger word",
    "split": "Validation split",
    "max_steps": "Steps",
}
"""Labels of settings whose own name says too little."""


def show_errors(handler: Handler) -> Handler:
    """Wrap an event handler so that its errors appear on the page as toasts.

    Args:
        handler: Function or generator function that handles a Gradio event.

    Returns:
        The wrapped handler. It raises `gr.Error` with the message of an `SA3Error`, or with the type and text of any
        other exception, which it also logs.
    """
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def run_generator(*arguments: Any, **named: Any) -> Iterator[Any]:
            with _convert_errors():
                yield from handler(*arguments, **named)

        return cast(Handler, run_generator)

    return _convert_errors()(handler)


def keep_error(handler: Callable[..., Any], outputs: int, at: int = 0) -> Callable[..., Iterator[tuple[Any, ...]]]:
    """Wrap an event handler so that its errors are toasts and also replace what stands at one of its outputs.

    Args:
        handler: Function, or generator function, that returns a value per output.
        outputs: Number of outputs.
        at: Which of them shows messages.

    Returns:
        The wrapped handler.
    """

    @show_errors
    def run(*arguments: Any) -> Iterator[tuple[Any, ...]]:
        try:
            found = handler(*arguments)
            yield from found if inspect.isgenerator(found) else [found]
        except SA3Error as error:
            kept: list[Any] = [gr.skip()] * outputs
            kept[at] = render_notice(str(error), "error")
            yield tuple(kept)
            raise

    return run


def show_wait(
    work: Callable[[], Result], text: str, show: Callable[[str], tuple[Any, ...]]
) -> Generator[Any, None, Result]:
    """Run something in a thread, and show from its start on that and how long it has been going on.

    Args:
        work: What to do.
        text: What it is, such as "Checking the settings".
        show: Makes the values of an event's outputs from a message.

    Yields:
        Those values.

    Returns:
        What `work` returned.
    """
    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        while True:
            yield show(render_notice(f"{text}… {time.monotonic() - started:.0f} s"))
            if wait([future], SHOW_SECONDS).done:
                return future.result()


@contextmanager
def _convert_errors() -> Iterator[None]:
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        if not isinstance(error, SA3Error):
            logger.exception("unexpected error in the studio")
        text = escape(get_error_message(error))  # `assets/studio.js` closes it
        raise gr.Error(text, duration=None, print_exception=False) from error


def get_error_message(error: BaseException) -> str:
    """Return the text to show for an error.

    Args:
        error: What was raised.

    Returns:
        The message of an `SA3Error`, by `name_fields`; for anything else its type and text, and that it is a bug.
    """
    if isinstance(error, SA3Error):
        return name_fields(str(error))
    return f"{type(error).__name__}: {error}. This is a bug in the studio. See the server's log for details."


def render_notice(text: str, kind: str = "note", action: str = "") -> str:
    """Render a message inside the page.

    Args:
        text: Plain text; `name_fields` applies to all but a note.
        kind: `note`, `warning` or `error`.
        action: HTML after the text, such as a button.

    Returns:
        HTML.
    """
    text, role = text if kind == "note" else name_fields(text), "alert" if kind == "error" else "status"
    return f'<div class="notice {kind}" role="{role}">{escape(text)}{action and " " + action}</div>'


def render_placeholder(text: str) -> str:
    """Render a hint that stands where nothing is shown yet.

    Args:
        text: Plain text.

    Returns:
        HTML.
    """
    return f'<div class="empty">{escape(text)}</div>'


def render_command(command: str | Sequence[str | Path], label: str = "Copy as command") -> str:
    """Render a command line inside a closed `<details>`, with a button that copies it (see `assets/studio.js`).

    Args:
        command: Arguments, which are quoted for a shell, or text to copy as it is.
        label: Text of the summary.

    Returns:
        HTML.
    """
    line = escape(command if isinstance(command, str) else format_command(command))
    return (
        f'<details class="command"><summary>{escape(label)}</summary><div class="line"><code>{line}</code>'
        f'<button type="button" class="copy" data-copy="{line}">Copy</button></div></details>'
    )


def render_panel(body: str) -> str:
    """Wrap HTML in the element that `assets/views.css` styles.

    Args:
        body: HTML.

    Returns:
        HTML.
    """
    return f'<div class="run-view">{body}</div>'


def render_text_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Render a table of texts with a heading.

    Args:
        title: Text of the heading.
        head: Names of the columns.
        rows: Cells of each row.

    Returns:
        HTML; empty without rows.
    """
    cells = [[escape(cell) for cell in row] for row in rows]
    return f"<h4>{escape(title)}</h4>{render_table(head, cells)}" if cells else ""


def build_optional_number(label: str, **options: Any) -> gr.Textbox:
    """Build a text field for a number that may be empty, which `gr.Number` turns into 0.

    Args:
        label: Label of the field.
        **options: Further options of the field.

    Returns:
        The field. `parse_optional_number` reads its value.
    """
    return gr.Textbox("", label=label, max_lines=1, min_width=90, **options)


def build_field(schema: type, name: str, widget: Any = None, **options: Any) -> Any:
    """Build the field of a setting: label, help, range, choices and default are those that its dataclass declares.

    Args:
        schema: The dataclass.
        name: Name of the setting.
        widget: Class of the field. None: by the kind of the default.
        **options: Options of the field that differ from the declared ones.

    Returns:
        The field.
    """
    declared, default = list_settings(schema)[name], _get_default(schema, name)
    common = {"value": default, "label": get_label(schema, name), "info": name_fields(declared.help)} | options
    if declared.choices:
        widget = widget or (gr.CheckboxGroup if isinstance(default, list) else gr.Radio)
        return widget(**{"choices": list(declared.choices)} | common)
    if widget is gr.Slider:
        return gr.Slider(**{"minimum": declared.min, "maximum": declared.max} | common)
    if widget is not None or isinstance(default, bool | str):
        return (widget or (gr.Checkbox if isinstance(default, bool) else gr.Textbox))(**common)
    # Without Gradio's own limits, whose message does not name the field.
    return explain_value(gr.Number(**{"min_width": 90} | common), functools.partial(parse_setting, schema, name))


def _get_default(schema: type, name: str) -> Any:
    (field,) = (field for field in dataclasses.fields(schema) if field.name == name)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return None if default is dataclasses.MISSING else default


def get_label(schema: type, name: str) -> str:
    """Get the label of a setting's field.

    Args:
        schema: The dataclass that declares it.
        name: Name of the setting.

    Returns:
        The declared label, or the name as words.
    """
    return list_settings(schema)[name].label or LABELS.get(name) or name.replace("_", " ").capitalize()


def name_fields(text: str) -> str:
    """Name the pages and fields of the studio in a message that names commands, their flags and settings.

    Args:
        text: The message.

    Returns:
        The message with labels instead.
    """

    def replace(found: re.Match[str]) -> str:
        label, value = _LABELS_BY_NAME[found[1]], found[2]
        if value and not value.isupper():  # NAME stands for a value
            return f"{label}: {value}"
        return label if value or "_" in found[1] else found[0]

    def replace_tool(found: re.Match[str]) -> str:
        flags = [(TOOL_LABELS.get(flag.replace("-", "_")), value) for flag, value in _FLAGS.findall(found[2])]
        fields = ", ".join(f"{label}: {value}" if value else label for label, value in flags if label)
        return f"{found[1].capitalize()} on the Adapters page{fields and f', with {fields}'}"

    return _NAMES.sub(replace, _TOOLS.sub(replace_tool, text)).replace("sa3-data caption", "on the Captions tab")


_LABELS_BY_NAME = TOOL_LABELS | {
    name: get_label(schema, name)
    for schema in (EncodeSettings, PromptSettings, GenerationSettings)
    for name in list_settings(schema)
}
_NAMES = re.compile(rf"(?<![\w./-])({'|'.join(_LABELS_BY_NAME)})(?![\w.-]*[\w/-])(?:=(\[[^]]*\]|[\w-]+(?:\.\d+)?))?")

_TOOLS = re.compile(r"sa3-adapter (inspect|convert|merge|resize)\b([^\n(]*?)(?=\.?$|\. |\.\n| \(|\n)")
_FLAGS = re.compile(r"--([a-z-]+)(?: ([a-z]\w*))?")


def explain_value(field: Any, check: Callable[[Any], Any]) -> Any:
    """Make a field say below its label what is wrong with its value, as soon as it is left.

    Args:
        field: The field.
        check: Function of its value that raises an `SA3Error` for a wrong one.

    Returns:
        The field.
    """

    def explain(value: Any) -> Any:
        try:
            check(value)
        except SA3Error as error:
            return gr.update(info=str(error))
        return gr.update(info=field.info or "")  # Gradio keeps the text when it is None

    field.blur(explain, field, field, **QUIET)
    return field


def parse_setting(schema: type, name: str, value: str | float | None) -> Any:
    """Parse the field of a number that a settings dataclass declares, and check it against the declared range.

    Args:
        schema: The dataclass.
        name: Name of the setting.
        value: Value of the field.

    Returns:
        The number, or None for an empty field.

    Raises:
        StudioError: The number is not allowed.
    """
    label = get_label(schema, name)
    number = parse_optional_number(label, value, get_type_hints(schema)[name] in (int, int | None))
    problem = None if number is None else list_settings(schema)[name].find_problem(number)
    if problem:
        raise StudioError(f"{label} must {problem}, not {number:g}.")
    return number


def parse_optional_number(name: str, text: str | float | None, is_integer: bool = False) -> Any:
    """Parse the value of an optional number field.

    Args:
        name: Label of the field, for the error message.
        text: Value of the field.
        is_integer: Whether it must be an integer.

    Returns:
        The number, or None for an empty field.

    Raises:
        GenerationError: The text is not a number, or not an integer.
    """
    if text is None or str(text).strip() == "":
        return None
    try:
        number = check_number(name, float(text) if isinstance(text, str) else text)
    except ValueError as error:
        raise GenerationError(
            f"{name} must be a number, not {shorten(repr(text))}. Correct it or leave it empty."
        ) from error
    if is_integer and number != int(number):
        raise GenerationError(f"{name} must be an integer, not {number:g}.")
    return int(number) if is_integer else number


def parse_numbers(text: str) -> list[float]:
    """Parse a list of numbers.

    Args:
        text: Numbers with commas or semicolons between them.

    Returns:
        The numbers in order.

    Raises:
        StudioError: A part is not a number.
    """
    if ";" in text and re.search(r"\d,\d", text):  # 0,5; 1 may be two numbers or three
        raise StudioError(f"{shorten(repr(text))} has commas inside numbers. Write 0.5 with a point: 0, 0.5, 1.")
    try:
        return [check_number("each part", float(part)) for part in re.split("[,;]", text) if part.strip()]
    except ValueError as error:
        message = f"{shorten(repr(text))} is not a list of numbers. Write them with commas, such as 0, 0.5, 1."
        raise StudioError(message) from error


def refresh_choices(box: gr.Dropdown, list_choices: Callable[[], list[tuple[str, str]]]) -> None:
    """Keep the choices of a dropdown up to date; while nothing is chosen, one that is new is, or else the first.

    Args:
        box: The dropdown.
        list_choices: Lists (label, value) of each choice.
    """
    known = gr.State([])

    def refresh(before: list[Any], chosen: str | None) -> tuple[Any, Any]:
        choices = list_choices()
        if choices == before and (chosen or not choices):
            return gr.skip(), gr.skip()
        # A choice is not sent again: the user may have made another meanwhile.
        new = [choice for choice in choices if before and choice not in before] or choices
        first: dict[str, Any] = {} if chosen or not choices else {"value": new[0][1]}
        return gr.update(choices=choices, **first), choices

    keep_fresh(list_choices, refresh, [known, box], [box, known])


def watch_state(read: Callable[[], Any], seconds: float = REFRESH_SECONDS) -> gr.HTML:
    """Build an element whose event `tick` tells that something on the server has changed.

    The page asks for the state by a plain request while the element is shown, and hears of no change by no event: each
    event of Gradio costs the browser tens of milliseconds.

    Args:
        read: Returns the state, of which the text is compared.
        seconds: Interval of the requests while the state changes; it grows to `REFRESH_SECONDS` while it does not.

    Returns:
        The element.
    """

    def get_state(_: Any) -> str:
        return hashlib.sha256(repr(read()).encode(errors="replace")).hexdigest()

    script = f"sa3.poll(element, server, trigger, {seconds}, {REFRESH_SECONDS});"
    return gr.HTML("", js_on_load=script, server_functions=[get_state], elem_classes="watch", apply_default_css=False)


def in_order(name: str) -> dict[str, Any]:
    """Return options of events that write to the same components: the answer that is made last arrives last.

    Args:
        name: What the events share.

    Returns:
        The options.
    """
    return QUIET | {"concurrency_limit": 1, "concurrency_id": name}


def keep_fresh(
    read: Callable[[], Any], refresh: Callable[..., Any], inputs: Any, outputs: Any, *more: Any, **options: Any
) -> None:
    """Call a function when a state changes, soon after a click too, such as on a tab that holds the place being built.

    Args:
        read: Returns the state, as for `watch_state`.
        refresh: The function.
        inputs: Its inputs.
        outputs: Its outputs.
        *more: Further events that call it.
        **options: Options of the event, such as those of `in_order`.
    """
    triggers = [watch_state(read).tick, *more]
    gr.on(triggers, refresh, inputs, outputs, **{"show_progress": "hidden"} | options, trigger_mode="always_last")
