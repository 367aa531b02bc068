"""The Adapters page: inspect adapter files, compare, convert, merge and resize them."""

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from sa3train.adapters.tools import CheckpointResult, EditResult, Truncation
from sa3train.adapters.tools.inspect import Comparison, Inspection
from sa3train.core.dtypes import DTYPES
from sa3train.core.text import format_number, list_few
from sa3train.studio.adapters import actions
from sa3train.studio.adapters.actions import Output
from sa3train.studio.play.cards import render_load_report, render_table
from sa3train.studio.server.folders import list_adapters, list_models
from sa3train.studio.server.widgets import (
    build_optional_number,
    explain_value,
    fill_when_shown,
    parse_optional_int,
    parse_optional_number,
    render_command,
    render_notice,
    render_placeholder,
    show_errors,
)
from sa3train.studio.server.workspace import Workspace

SHOWN_LAYERS = 15
NO_MODEL = "no model"
NOTHING_YET = "Choose an adapter on the left. What it holds, how it fits, or what was written appears here."
Tool = tuple[Callable[..., str], list[Any], list[gr.Dropdown]]
"""A tool's handler, inputs, and the inputs that choose adapters."""


def render_inspection(workspace: Workspace, inspection: Inspection, plot: Path | None, command: list[str]) -> str:
    """Render what an adapter holds, and how it fits the model.

    Args:
        workspace: The studio's folders.
        inspection: The inspected adapter.
        plot: Its plot by layer.
        command: The command that does the same.

    Returns:
        HTML.
    """
    report = inspection.load_report
    groups = [[name, str(group.layers), format_number(group.norm)] for name, group in inspection.groups.items()]
    parts = [
        *(render_notice(text, "warning") for text in inspection.problems),
        _render_facts(inspection.settings, "Settings"),
        _render_facts(inspection.provenance, "Provenance"),
        render_table(["group", "layers", "norm of the change"], groups, "Groups of layers"),
    ]
    if plot is not None:
        url = escape(workspace.get_url(plot), quote=True)
        image = f'<img class="plot" alt="change by layer" src="{url}">'
        parts.append(f"<details><summary>Every layer</summary>{image}</details>")
    card = _render_card(escape(workspace.shorten(inspection.source)), parts, command)
    return card + ("" if report is None else render_load_report(report.to_dict(), report.summary, report.refusal))


def render_comparison(comparison: Comparison, command: list[str], names: tuple[str, str]) -> str:
    """Render where two adapters differ.

    Args:
        comparison: The compared adapters.
        command: The command that does the same.
        names: Their names.

    Returns:
        HTML.
    """
    changed = comparison.changed
    only = zip(names, (comparison.only_in_first, comparison.only_in_second), strict=True)
    layers = comparison.list_differences(SHOWN_LAYERS)
    title = f"{comparison.compared}: the {len(layers)} most different of {len(comparison.layers)} shared layers"
    parts = [
        *(render_notice(text, "warning") for text in comparison.warnings),
        render_notice("The two have the same type, scales and tensors, bit for bit.") if comparison.identical else "",
        render_table(["differs", *names], changed, "Settings and provenance") if changed else "",
        *(
            render_notice(f"only in {name}: {len(paths)} layers, such as {list_few(paths)}")
            for name, paths in only
            if paths
        ),
        render_table(["layer", "relative difference", "cosine"], layers, title) if layers else "",
    ]
    return _render_card(" and ".join(escape(name) for name in names), parts, command)


def render_result(workspace: Workspace, result: EditResult | CheckpointResult, command: list[str]) -> str:
    """Render what a tool wrote.

    Args:
        workspace: The studio's folders.
        result: What was written.
        command: The command that does the same.

    Returns:
        HTML.
    """
    parts = [
        _render_facts(result.facts, "Written"),
        *(render_notice(text, "warning") for text in result.warnings),
        *(render_notice(text) for text in result.notes),
    ]
    title = f"Written: {escape(workspace.shorten(result.target))}"
    return _render_card(title, parts, command, ' role="status"')


def build_adapters_page(workspace: Workspace) -> None:
    """Build the page inside the open Gradio context.

    Args:
        workspace: The studio's folders.
    """
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=380), gr.Tabs(elem_id="adapter-tools"):
            tools = []
            for build in (_inspect, _compare, _convert, _merge, _resize):
                name = build.__name__.strip("_")
                with gr.Tab(name.capitalize()):
                    tool = build(workspace)
                    button = gr.Button(name.capitalize(), variant="primary", elem_id=f"{name}-run")
                tools.append((button, *tool))
        with gr.Column(scale=7, min_width=420):
            gr.HTML("<h2>Result</h2>", elem_classes="studio-title", apply_default_css=False)
            result = gr.HTML(render_placeholder(NOTHING_YET), elem_id="adapters-result", apply_default_css=False)
    choosers = [chooser for *_, own in tools for chooser in own]

    def refresh() -> list[Any]:
        found = list_adapters(workspace)
        return [gr.update(choices=found) for _ in choosers]

    quiet: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "adapter-tools"}
    for button, run, inputs, _ in tools:
        button.click(show_errors(run), inputs, result, **quiet).success(
            refresh, None, choosers, show_progress="hidden", **quiet
        )
    fill_when_shown(refresh, choosers)


def _inspect(workspace: Workspace) -> Tool:
    inputs = [_choose_adapter("inspect"), _choose_model(workspace, "Check against a model")]

    def run(path: str | None, model: str) -> str:
        return render_inspection(workspace, *actions.inspect(workspace, path or "", _get_model(model)))

    return run, inputs, inputs[:1]


def _compare(workspace: Workspace) -> Tool:
    choosers = [_choose_adapter("first", "First adapter"), _choose_adapter("second", "Second adapter")]
    model = _choose_model(workspace, "Compare changes of a model's weights")

    def run(first: str | None, second: str | None, model: str) -> str:
        compared = actions.compare(workspace, first or "", second or "", _get_model(model))
        return render_comparison(*compared, (str(first), str(second)))

    return run, [*choosers, model], choosers


def _convert(workspace: Workspace) -> Tool:
    path = _choose_adapter("convert", "Adapter, or a pickle (.ckpt, .pt)")
    to = gr.Radio(list(actions.FORMATS), value=next(iter(actions.FORMATS)), label="To", elem_id="convert-to")
    output = [
        *_choose_target("convert", "such as adapters/style_comfy.safetensors; a folder for PEFT"),
        _choose_model(workspace, "Base model: measures the error, and is needed for some types"),
        *_choose_rank("convert", "If the format cannot carry the type: approximate by a lora of"),
    ]

    def run(path: Any, to: str, *output: Any) -> str:
        form = actions.FORMATS[to]
        return render_result(workspace, *actions.convert(workspace, path or "", form, _build_output(*output)))

    return run, [path, to, *output], [path]


def _merge(workspace: Workspace) -> Tool:
    paths = gr.Dropdown([], multiselect=True, label="Adapters", allow_custom_value=True, elem_id="merge-paths")
    strengths = gr.Textbox(
        "", label="Strengths in the same order, with commas (empty: 1 each)", elem_id="merge-strengths"
    )
    output = [
        *_choose_target("merge", "a .safetensors file for one adapter; a folder for a checkpoint"),
        _choose_model(workspace, "The checkpoint, or the adapters' base model"),
        *_choose_rank("merge", "Merge into one adapter of this rank; leave empty to merge into a checkpoint"),
    ]

    def run(paths: list[str] | None, strengths: str, *output: Any) -> str:
        chosen = paths or []
        adapters = list(zip(chosen, actions.parse_strengths(strengths, len(chosen)), strict=True))
        return render_result(workspace, *actions.merge(workspace, adapters, _build_output(*output)))

    return run, [paths, strengths, *output], [paths]


def _resize(workspace: Workspace) -> Tool:
    path = _choose_adapter("resize")
    output = [
        *_choose_target("resize", "such as adapters/style_r4.safetensors"),
        _choose_model(workspace, "Base model (needed for types other than lora, dora and bora)"),
        *_choose_rank("resize", "New rank"),
    ]

    def run(path: Any, *output: Any) -> str:
        return render_result(workspace, *actions.resize(workspace, path or "", _build_output(*output)))

    return run, [path, *output], [path]


def _choose_adapter(name: str, label: str = "Adapter") -> gr.Dropdown:
    """Its choices come when the page is loaded."""
    return gr.Dropdown([], value=None, label=label, allow_custom_value=True, elem_id=f"{name}-adapter")


def _choose_model(workspace: Workspace, label: str) -> gr.Dropdown:
    return gr.Dropdown([(NO_MODEL, NO_MODEL), *list_models(workspace)], value=NO_MODEL, label=label, filterable=False)


def _choose_target(name: str, example: str) -> tuple[gr.Textbox, gr.Checkbox]:
    target = gr.Textbox(label="Write to", placeholder=example, elem_id=f"{name}-target")
    return target, gr.Checkbox(label="Overwrite", elem_id=f"{name}-overwrite")


def _choose_rank(name: str, label: str) -> tuple[gr.Textbox, gr.Textbox, gr.Dropdown]:
    gr.Markdown(label, elem_classes="soft")
    with gr.Row():
        rank = build_optional_number("Rank", elem_id=f"{name}-rank")
        explain_value(rank, lambda text: _parse_truncation(text, None))
        variance = build_optional_number("or explained variance", placeholder="such as 0.95")
        explain_value(variance, lambda text: _parse_truncation(None, text))
        dtype = gr.Dropdown(list(DTYPES), value="fp16", label="Dtype", filterable=False, min_width=90)
    return rank, variance, dtype


def _get_model(model: str | None) -> str | None:
    return None if model in (None, "", NO_MODEL) else model


def _build_output(target: str, tick: bool, model: str, rank: str | None, variance: str | None, dtype: str) -> Output:
    return Output(target, _get_model(model), _parse_truncation(rank, variance), dtype, bool(tick))


def _parse_truncation(rank: str | None, variance: str | None) -> Truncation | None:
    settings = parse_optional_int("rank", rank), parse_optional_number("explained variance", variance)
    return None if settings == (None, None) else Truncation(*settings)


def _render_card(title: str, parts: list[str], command: list[str], attributes: str = "") -> str:
    body = "".join((*parts, render_command(command)))
    return f'<article class="card"><h3{attributes}>{title}</h3>{body}</article>'


def _render_facts(facts: Mapping[str, str], caption: str) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in facts.items()
        if value
    )
    table = f"<table><caption>{escape(caption)}</caption><tbody>{rows}</tbody></table>"
    return f'<div class="studio-table">{table}</div>' if rows else ""
