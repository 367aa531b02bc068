"""The Adapters page: inspect adapter files, compare, convert, merge and resize them."""

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from sa3train.adapters.tools import CheckpointResult, EditResult, Truncation
from sa3train.adapters.tools.inspect import Comparison, Inspection
from sa3train.core.dtypes import DTYPES
from sa3train.core.errors import SA3Error
from sa3train.core.text import format_number, list_few
from sa3train.reports.html import render_details, render_facts
from sa3train.studio.adapters import actions
from sa3train.studio.play.cards import render_load_report
from sa3train.studio.server import widgets as ui
from sa3train.studio.server.folders import list_adapters, list_models, name_adapter
from sa3train.studio.server.workspace import StudioError, Workspace

SHOWN_LAYERS = 15
FORMATS = [
    ("native (.safetensors)", "native"), ("ComfyUI (.safetensors)", "comfy"), ("sa3.cpp (.gguf)", "gguf"),
    ("PEFT (a folder)", "peft"), ("diffusers (a folder)", "diffusers"),
]  # fmt: skip
NOTHING_YET = "Choose an adapter. What it holds, how it fits, or what was written appears here."
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
        *(ui.render_notice(text, "warning") for text in inspection.problems),
        _render_facts(inspection.settings, "Settings"),
        _render_facts(inspection.list_provenance(), "Provenance"),
        ui.render_text_table("Groups of layers", ["group", "layers", "norm of the change"], groups),
    ]
    if plot is not None:
        url = escape(workspace.get_url(plot), quote=True)
        image = f'<img class="plot" alt="change by layer" src="{url}">'
        parts.append(render_details("Every layer", image))
    card = _render_card(escape(name_adapter(workspace.shorten(inspection.source))), parts, command)
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
    changed = comparison.list_changes()
    only = zip(names, (comparison.only_in_first, comparison.only_in_second), strict=True)
    layers = [] if comparison.identical else comparison.list_differences(SHOWN_LAYERS)
    title = f"{comparison.compared}: the {len(layers)} most different of {len(comparison.layers)} shared layers"
    parts = [
        *(ui.render_notice(text, "warning") for text in comparison.warnings),
        ui.render_notice("The two have the same type, scales and tensors, bit for bit.")
        if comparison.identical
        else "",
        ui.render_text_table("Settings and provenance", ["differs", *names], changed),
        *(
            ui.render_notice(f"only in {name}: {len(paths)} layers, such as {list_few(paths)}")
            for name, paths in only
            if paths
        ),
        ui.render_text_table(title, ["layer", "relative difference", "cosine"], layers),
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
        *(ui.render_notice(text, "warning") for text in result.warnings),
        *(ui.render_notice(ui.name_fields(text)) for text in result.notes),
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
            for name, build in TABS.items():
                with gr.Tab(name.capitalize()):
                    tool = build(workspace)
                    button = gr.Button(name.capitalize(), variant="primary", elem_id=f"{name}-run")
                tools.append((button, *tool))
        with gr.Column(scale=7, min_width=420):
            gr.HTML("<h2>Result</h2>", elem_classes="studio-title", apply_default_css=False)
            result = gr.HTML(ui.render_placeholder(NOTHING_YET), elem_id="adapters-result", apply_default_css=False)
    choosers = [chooser for *_, own in tools for chooser in own]

    def refresh() -> list[Any]:
        found = list_adapters(workspace)
        return [gr.update(choices=found) for _ in choosers]

    quiet: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "adapter-tools"}
    for button, run, inputs, own in tools:
        button.click(ui.keep_error(_require(run, inputs, own), 1), inputs, result, **quiet).success(
            refresh, None, choosers, show_progress="hidden", **quiet
        )
    ui.keep_fresh(lambda: list_adapters(workspace), ui.show_errors(refresh), None, choosers)


def _require(run: Callable[..., str], inputs: list[Any], choosers: list[gr.Dropdown]) -> Callable[..., str]:
    """Make a tool's handler name the first field that should choose an adapter and does not."""

    def run_chosen(*values: Any) -> str:
        for field, value in zip(inputs, values, strict=True):
            if field in choosers and not value:
                name = str(field.label).partition(",")[0]
                raise StudioError(f"{name}: choose one first, from the list or by its path.")
        return run(*values)

    return run_chosen


def _choose_inspection(workspace: Workspace) -> Tool:
    inputs = [
        _choose_adapter("inspect"),
        _choose_model(workspace, "Shows whether the adapter fits, and how much it changes."),
    ]

    def run(path: str | None, model: str) -> str:
        return render_inspection(workspace, *actions.inspect(workspace, path or "", model))

    return run, inputs, inputs[:1]


def _choose_comparison(workspace: Workspace) -> Tool:
    choosers = [_choose_adapter("first", "First adapter"), _choose_adapter("second", "Second adapter")]
    model = _choose_model(workspace, "Compares the changes of its weights, whatever the types.")

    def run(first: str | None, second: str | None, model: str) -> str:
        compared = actions.compare(workspace, first or "", second or "", model)
        return render_comparison(*compared, (str(first), str(second)))

    return run, [*choosers, model], choosers


def _choose_conversion(workspace: Workspace) -> Tool:
    source = _choose_adapter("convert", "Adapter, or a pickle (.ckpt, .pt)")
    to = gr.Radio(FORMATS, value="native", label="To", elem_id="convert-to")
    target = _choose_target("convert", "such as adapters/style_comfy.safetensors; a folder for PEFT and diffusers")
    model = _choose_model(workspace, "Measures the error, and is needed for some types.")
    rank = _choose_rank("convert", "If the format cannot carry the type: approximate by a lora of", "q8_0")
    dense = gr.Checkbox(label=ui.TOOL_LABELS["dense"], info="For any version of ComfyUI. Needs the base model.")
    return _build_writer(
        workspace, "convert", {"sources": source, "to": to, **target, "model": model, **rank, "dense": dense}
    )


def _choose_merge(workspace: Workspace) -> Tool:
    sources = gr.Dropdown([], multiselect=True, label="Adapters", allow_custom_value=True, elem_id="merge-paths")
    strengths = gr.Textbox(
        "", label=f"{actions.STRENGTHS_LABEL}, with commas (empty: 1 each)", elem_id="merge-strengths"
    )
    target = _choose_target("merge", "a .safetensors file for one adapter; a folder for a checkpoint")
    model = _choose_model(workspace, "The checkpoint to merge into, or what the adapters were trained on.")
    rank = _choose_rank("merge", "Rank of the one adapter; without it ranks add up, and a folder gets a checkpoint")
    loss = gr.Checkbox(
        label=ui.TOOL_LABELS["allow_loss"], info="Accept what one adapter cannot hold of types with magnitudes."
    )
    partial = gr.Checkbox(
        label=ui.TOOL_LABELS["allow_partial"], info="Merge adapters of which only some layers fit the checkpoint."
    )
    fields = {"sources": sources, "strengths": strengths, **target, "model": model, **rank}
    return _build_writer(workspace, "merge", fields | {"allow_loss": loss, "allow_partial": partial})


def _choose_resize(workspace: Workspace) -> Tool:
    source = _choose_adapter("resize")
    target = _choose_target("resize", "such as adapters/style_r4.safetensors")
    model = _choose_model(workspace, "Needed for types other than lora, dora and bora.")
    return _build_writer(
        workspace, "resize", {"sources": source, **target, "model": model, **_choose_rank("resize", "New rank")}
    )


TABS: dict[str, Callable[[Workspace], Tool]] = {
    "inspect": _choose_inspection, "compare": _choose_comparison, "convert": _choose_conversion, "merge": _choose_merge,
    "resize": _choose_resize,
}  # fmt: skip


def _build_writer(workspace: Workspace, tool: str, fields: dict[str, Any]) -> Tool:
    """Make the handler of a tool that writes: the fields have the names of the flags of `sa3-adapter`."""

    def run(*values: Any) -> str:
        given = dict(zip(fields, values, strict=True))
        chosen = given.pop("sources") or []
        paths = [chosen] if isinstance(chosen, str) else chosen
        strengths = actions.parse_strengths(given.pop("strengths", ""), len(paths))
        given |= {name: parse(given[name]) for name, parse in NUMBERS.items()}
        adapters = list(zip(paths, strengths, strict=True))
        return render_result(workspace, *actions.write(workspace, tool, adapters, given.pop("target"), **given))

    return run, list(fields.values()), [fields["sources"]]


def _choose_adapter(name: str, label: str = "Adapter") -> gr.Dropdown:
    """Its choices come when the page is loaded."""
    return gr.Dropdown([], value=None, label=label, allow_custom_value=True, elem_id=f"{name}-adapter")


def _choose_model(workspace: Workspace, info: str) -> gr.Dropdown:
    choices = [("no model", ""), *list_models(workspace)]
    return gr.Dropdown(choices, value="", label=ui.TOOL_LABELS["model"], info=info, filterable=False)


def _choose_target(name: str, example: str) -> dict[str, Any]:
    target = gr.Textbox(label="Write to", placeholder=example, elem_id=f"{name}-target")
    return {
        "target": target,
        "overwrite": gr.Checkbox(label=ui.TOOL_LABELS["overwrite"], elem_id=f"{name}-overwrite"),
    }


def _choose_rank(name: str, label: str, *dtypes: str) -> dict[str, Any]:
    gr.Markdown(label, elem_classes="soft")
    with gr.Row():
        rank = ui.build_optional_number(ui.TOOL_LABELS["rank"], elem_id=f"{name}-rank")
        variance = ui.build_optional_number(ui.TOOL_LABELS["explained_variance"], placeholder="such as 0.95")
        dtype = gr.Dropdown(
            [("default", ""), *DTYPES, *dtypes],
            value="",
            label=ui.TOOL_LABELS["dtype"],
            filterable=False,
            min_width=90,
        )
    both = [rank, variance]
    for field in both:
        field.blur(lambda *texts: [gr.update(info=info) for info in explain_rank(*texts)], both, both, **ui.QUIET)
    return {"rank": rank, "explained_variance": variance, "dtype": dtype}


def explain_rank(rank: str, variance: str) -> list[str]:
    """Explain what is wrong with the two fields of which only one is to be filled.

    Args:
        rank: Value of the first.
        variance: Value of the second.

    Returns:
        A text for each field; empty where nothing is wrong.
    """
    given, problems = 0, dict.fromkeys(NUMBERS, "")
    for (name, parse), text in zip(NUMBERS.items(), (rank, variance), strict=True):
        try:
            given += parse(text) is not None
        except SA3Error as error:
            problems[name] = str(error)
    return ["Give only one of the two."] * 2 if given > 1 else list(problems.values())


def _parse_rank(text: str | None) -> int | None:
    rank: int | None = ui.parse_optional_number("Rank", text, is_integer=True)
    return None if rank is None else Truncation(rank).rank


def _parse_variance(text: str | None) -> float | None:
    variance: float | None = ui.parse_optional_number("Explained variance", text)
    return None if variance is None else Truncation(explained_variance=variance).explained_variance


NUMBERS: dict[str, Callable[[str | None], Any]] = {"rank": _parse_rank, "explained_variance": _parse_variance}


def _render_card(title: str, parts: list[str], command: list[str], attributes: str = "") -> str:
    body = "".join((*parts, ui.render_command(command)))
    return ui.render_panel(f'<article class="card"><h3{attributes}>{title}</h3>{body}</article>')


def _render_facts(facts: Mapping[str, str], title: str) -> str:
    rows = [(name, value) for name, value in facts.items() if value]
    return f"<h4>{title}</h4>{render_facts(rows)}" if rows else ""
