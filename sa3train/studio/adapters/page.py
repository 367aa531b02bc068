"""The Adapters page: look into adapter files, compare them, and make others of them.

What the Adapters page shows, as HTML.
"""

from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

from sa3train.studio.adapters import actions as work
from sa3train.studio.adapters.actions import Examination, Made
from sa3train.studio.play.cards import load_report, table
from sa3train.studio.server.widgets import (
    command_box,
    empty,
    notice,
    number_or_none,
    optional_number,
    told,
    whole_or_none,
)
from sa3train.studio.server.workspace import Workspace, list_adapters, list_models

OF_LAYERS = 15


def examination(workspace: Workspace, seen: Examination) -> str:
    """What an adapter holds, and how it fits."""
    found = seen.found
    settings = {
        "kind": found["kind"],
        "rank, alpha": f"{found['rank']}, {found['alpha']}{' (rsLoRA)' if found['rslora'] else ''}",
        "layers": f"{len(found['layers'])}, {found['parameters']:,} numbers in {', '.join(found['dtypes'])}",
        "include": _few(found["include"]) or "every Linear and Conv1d",
        "exclude": _few(found["exclude"]) or "nothing",
        "dropout": f"{found['dropout']:g}" if found["dropout"] else "",
        "fingerprint": found["fingerprint"][:16],
    }
    known = {key: _short(str(value)) for key, value in found["metadata"].items() if key != "sa3train_history"}
    steps = {f"step {number}": _short(str(entry)) for number, entry in enumerate(found["history"], 1)}
    damage = [f"{len(found['not_finite'])} tensors hold NaN or infinity"] if found["not_finite"] else []
    damage += ["every tensor is zero: it has no effect"] if found["all_zero"] else []
    groups = [[name, str(row["layers"]), _number(row["norm"])] for name, row in found["groups"].items()]
    parts = [
        *(notice(text, "warning") for text in damage),
        _facts(settings, "Settings"),
        _facts(known | steps, "Where it comes from") if known or steps else "",
        table(["group", "layers", "norm of the change"], groups, "Groups of layers"),
        _picture(workspace, seen),
        command_box(workspace.command(seen.command)),
    ]
    report = "" if seen.report is None else load_report(seen.report, seen.summary, seen.refused)
    head = f"<h3>{escape(workspace.shown(found['source']))}</h3>"
    return f'<article class="card">{head}{"".join(parts)}</article>{report}'


def comparison(workspace: Workspace, found: dict[str, Any], names: tuple[str, str], command: list[str]) -> str:
    """Two adapters side by side."""
    same = "The two have the same kind, scales and tensors, bit for bit."
    changed = found["settings"] | found["metadata"]
    rows = [[name, _short(str(one)), _short(str(other))] for name, (one, other) in changed.items()]
    layers = sorted(found["layers"].items(), key=lambda item: -(item[1]["relative_difference"] or 0.0))
    shown = [[path, _number(row["relative_difference"]), _number(row["cosine"])] for path, row in layers[:OF_LAYERS]]
    only = [
        notice(f"only in {name}: {len(found[key])} layers, such as {_few(found[key])}")
        for name, key in zip(names, ("only_in_first", "only_in_second"), strict=True)
        if found[key]
    ]
    title = f"{found['compared']}: the {len(shown)} most different of {len(layers)} shared layers"
    parts = [
        notice(same) if found["identical"] else "",
        table(["differs", *names], rows, "Settings and provenance") if rows else "",
        *only,
        table(["layer", "relative difference", "cosine"], shown, title) if shown else "",
        command_box(workspace.command(command)),
    ]
    heads = " and ".join(escape(name) for name in names)
    return f'<article class="card"><h3>{heads}</h3>{"".join(parts)}</article>'


def made(workspace: Workspace, done: Made) -> str:
    """What a tool wrote, with its error."""
    parts = [
        _facts(done.facts, "What was written"),
        *(notice(text, "warning" if text.startswith(("LEFT OUT", "not carried")) else "note") for text in done.notes),
        command_box(workspace.command(done.command)),
    ]
    head = f'<h3 role="status">Written: {escape(workspace.shown(done.target))}</h3>'
    return f'<article class="card">{head}{"".join(parts)}</article>'


def _facts(facts: dict[str, str], caption: str) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in facts.items()
        if value
    )
    return f'<div class="studio-table"><table><caption>{escape(caption)}</caption><tbody>{rows}</tbody></table></div>'


def _picture(workspace: Workspace, seen: Examination) -> str:
    if seen.plot is None:
        return ""
    url = escape(workspace.url(seen.plot), quote=True)
    return (
        f'<details><summary>Every layer</summary><img class="plot" alt="change of every layer" src="{url}"></details>'
    )


def _few(names: list[str] | None, count: int = 3) -> str:
    if not names:
        return ""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}…"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


NO_MODEL = "no model"
NOTHING_YET = "Choose an adapter on the left. What it holds, how it fits, or what was written appears here."


def adapters_page(workspace: Workspace) -> None:
    """Build the page inside the open context."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=380), gr.Tabs(elem_id="adapter-tools"):
            tools = [build(workspace) for build in (_inspect, _diff, _convert, _merge, _resize)]
        with gr.Column(scale=7, min_width=420):
            gr.HTML("<h2>What was found</h2>", elem_classes="studio-title", apply_default_css=False)
            result = gr.HTML(empty(NOTHING_YET), elem_id="adapters-result", apply_default_css=False)
    choosers = [chooser for _, _, _, own in tools for chooser in own]

    def listed() -> list[Any]:
        found = list_adapters(workspace)
        return [gr.update(choices=found) for _ in choosers]

    quiet: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "adapter-tools"}
    for button, run, inputs, _ in tools:
        button.click(told(run), inputs, result, **quiet).success(
            listed, None, choosers, show_progress="hidden", **quiet
        )
    gr.on(None, listed, None, choosers, show_progress="hidden", **quiet)


Tool = tuple[gr.Button, Callable[..., str], list[Any], list[gr.Dropdown]]


def _inspect(workspace: Workspace) -> Tool:
    with gr.Tab("Inspect"):
        path, model = _adapter(), _model(workspace, "Hold it against a model")
        button = gr.Button("Inspect", variant="primary", elem_id="inspect-run")

    def run(path: str | None, model: str) -> str:
        return examination(workspace, work.inspect(workspace, path or "", _named(model)))

    return button, run, [path, model], [path]


def _diff(workspace: Workspace) -> Tool:
    with gr.Tab("Compare"):
        first, second = _adapter("First adapter", "first"), _adapter("Second adapter", "second")
        model = _model(workspace, "Compare whole changes of a model's weights")
        button = gr.Button("Compare", variant="primary", elem_id="diff-run")

    def run(first: str | None, second: str | None, model: str) -> str:
        found, command = work.diff(workspace, first or "", second or "", _named(model))
        return comparison(workspace, found, (str(first), str(second)), command)

    return button, run, [first, second, model], [first, second]


def _convert(workspace: Workspace) -> Tool:
    with gr.Tab("Convert"):
        path = _adapter("Adapter, or a pickle (.ckpt, .pt)", "convert")
        to = gr.Radio(list(work.FORMATS), value=next(iter(work.FORMATS)), label="To", elem_id="convert-to")
        target, overwrite = _target("convert", "such as adapters/style_comfy.safetensors; a folder for PEFT")
        model = _model(workspace, "Its base model: measures the error, and is needed for some kinds")
        size, dtype = _size("convert", "Where the format cannot hold it as it is: approximate by a lora of")
        button = gr.Button("Convert", variant="primary", elem_id="convert-run")

    def run(path: Any, to: str, target: str, tick: bool, model: str, rank: Any, energy: Any, dtype: str) -> str:
        done = work.convert_file(
            workspace, path or "", target, work.FORMATS[to], _named(model), _cut(rank, energy), dtype, bool(tick)
        )
        return made(workspace, done)

    return button, run, [path, to, target, overwrite, model, *size, dtype], [path]


def _merge(workspace: Workspace) -> Tool:
    with gr.Tab("Merge"):
        paths = gr.Dropdown([], multiselect=True, label="Adapters", allow_custom_value=True, elem_id="merge-paths")
        strengths = gr.Textbox(
            "", label="Strengths in the same order, with commas (empty: 1 each)", elem_id="merge-strengths"
        )
        target, overwrite = _target("merge", "a .safetensors file for one adapter; a folder for a checkpoint")
        size, dtype = _size("merge", "Into one adapter of this size; left empty: into a whole checkpoint")
        model = _model(workspace, "The checkpoint, or the adapters' base")
        button = gr.Button("Merge", variant="primary", elem_id="merge-run")

    def run(paths: Any, strengths: str, target: str, tick: bool, rank: Any, energy: Any, dtype: str, model: str) -> str:
        chosen = list(paths or [])
        items = list(zip(chosen, work.strengths_of(strengths, len(chosen)), strict=True))
        return made(
            workspace, work.merge_files(workspace, items, target, _named(model), _cut(rank, energy), dtype, bool(tick))
        )

    return button, run, [paths, strengths, target, overwrite, *size, dtype, model], [paths]


def _resize(workspace: Workspace) -> Tool:
    with gr.Tab("Resize"):
        path = _adapter("Adapter", "resize")
        target, overwrite = _target("resize", "such as adapters/style_r4.safetensors")
        size, dtype = _size("resize", "New size")
        model = _model(workspace, "Its base model (needed for kinds other than lora, dora and bora)")
        button = gr.Button("Resize", variant="primary", elem_id="resize-run")

    def run(path: Any, target: str, tick: bool, rank: Any, energy: Any, dtype: str, model: str) -> str:
        done = work.resize_file(workspace, path or "", target, _named(model), _cut(rank, energy), dtype, bool(tick))
        return made(workspace, done)

    return button, run, [path, target, overwrite, *size, dtype, model], [path]


def _adapter(label: str = "Adapter", name: str = "inspect") -> gr.Dropdown:
    """Its choices come when the page is loaded."""
    return gr.Dropdown([], value=None, label=label, allow_custom_value=True, elem_id=f"{name}-adapter")


def _model(workspace: Workspace, label: str) -> gr.Dropdown:
    return gr.Dropdown([(NO_MODEL, NO_MODEL), *list_models(workspace)], value=NO_MODEL, label=label, filterable=False)


def _target(name: str, example: str) -> tuple[gr.Textbox, gr.Checkbox]:
    target = gr.Textbox(label="Write to", placeholder=example, elem_id=f"{name}-target")
    return target, gr.Checkbox(label="Overwrite what is there", elem_id=f"{name}-overwrite")


def _size(name: str, label: str) -> tuple[tuple[gr.Textbox, gr.Textbox], gr.Dropdown]:
    gr.Markdown(label, elem_classes="soft")
    with gr.Row():
        rank = optional_number("Rank", elem_id=f"{name}-rank")
        energy = optional_number("or energy kept", placeholder="such as 0.95")
        dtype = gr.Dropdown(list(work.DTYPES), value="f16", label="Written in", filterable=False, min_width=90)
    return (rank, energy), dtype


def _named(model: str | None) -> str | None:
    return None if model in (None, "", NO_MODEL) else model


def _cut(rank: str | None, energy: str | None) -> work.Size:
    return work.Size(whole_or_none("rank", rank), number_or_none("energy", energy))
