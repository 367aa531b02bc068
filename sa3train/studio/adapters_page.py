"""The Adapters page: look into adapter files, compare them, and make others of them."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from sa3train.studio import adapter_views as views
from sa3train.studio import adapter_work as work
from sa3train.studio import listing
from sa3train.studio.fields import number_or_none, optional_number, whole_or_none
from sa3train.studio.messages import empty, told
from sa3train.studio.workplace import Workplace

NO_MODEL = "no model"
NOTHING_YET = "Choose an adapter on the left. What it holds, how it fits, or what was written appears here."


def adapters_page(place: Workplace) -> None:
    """Build the page inside the open context."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=380), gr.Tabs(elem_id="adapter-tools"):
            tools = [build(place) for build in (_inspect, _diff, _convert, _merge, _resize)]
        with gr.Column(scale=7, min_width=420):
            gr.HTML("<h2>What was found</h2>", elem_classes="studio-title", apply_default_css=False)
            result = gr.HTML(empty(NOTHING_YET), elem_id="adapters-result", apply_default_css=False)
    choosers = [chooser for _, _, _, own in tools for chooser in own]

    def listed() -> list[Any]:
        found = listing.adapters(place)
        return [gr.update(choices=found) for _ in choosers]

    quiet: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "adapter-tools"}
    for button, run, inputs, _ in tools:
        button.click(told(run), inputs, result, **quiet).success(
            listed, None, choosers, show_progress="hidden", **quiet
        )
    gr.on(None, listed, None, choosers, show_progress="hidden", **quiet)


Tool = tuple[gr.Button, Callable[..., str], list[Any], list[gr.Dropdown]]


def _inspect(place: Workplace) -> Tool:
    with gr.Tab("Inspect"):
        path, model = _adapter(), _model(place, "Hold it against a model")
        button = gr.Button("Inspect", variant="primary", elem_id="inspect-run")

    def run(path: str | None, model: str) -> str:
        return views.examination(place, work.inspect(place, path or "", _named(model)))

    return button, run, [path, model], [path]


def _diff(place: Workplace) -> Tool:
    with gr.Tab("Compare"):
        first, second = _adapter("First adapter", "first"), _adapter("Second adapter", "second")
        model = _model(place, "Compare whole changes of a model's weights")
        button = gr.Button("Compare", variant="primary", elem_id="diff-run")

    def run(first: str | None, second: str | None, model: str) -> str:
        found, command = work.diff(place, first or "", second or "", _named(model))
        return views.comparison(place, found, (str(first), str(second)), command)

    return button, run, [first, second, model], [first, second]


def _convert(place: Workplace) -> Tool:
    with gr.Tab("Convert"):
        path = _adapter("Adapter, or a pickle (.ckpt, .pt)", "convert")
        to = gr.Radio(list(work.FORMATS), value=next(iter(work.FORMATS)), label="To", elem_id="convert-to")
        target, overwrite = _target("convert", "such as adapters/style_comfy.safetensors; a folder for PEFT")
        model = _model(place, "Its base model: measures the error, and is needed for some kinds")
        size, dtype = _size("convert", "Where the format cannot hold it as it is: approximate by a lora of")
        button = gr.Button("Convert", variant="primary", elem_id="convert-run")

    def run(path: Any, to: str, target: str, tick: bool, model: str, rank: Any, energy: Any, dtype: str) -> str:
        done = work.convert_file(
            place, path or "", target, work.FORMATS[to], _named(model), _cut(rank, energy), dtype, bool(tick)
        )
        return views.made(place, done)

    return button, run, [path, to, target, overwrite, model, *size, dtype], [path]


def _merge(place: Workplace) -> Tool:
    with gr.Tab("Merge"):
        paths = gr.Dropdown([], multiselect=True, label="Adapters", allow_custom_value=True, elem_id="merge-paths")
        strengths = gr.Textbox(
            "", label="Strengths in the same order, with commas (empty: 1 each)", elem_id="merge-strengths"
        )
        target, overwrite = _target("merge", "a .safetensors file for one adapter; a folder for a checkpoint")
        size, dtype = _size("merge", "Into one adapter of this size; left empty: into a whole checkpoint")
        model = _model(place, "The checkpoint, or the adapters' base")
        button = gr.Button("Merge", variant="primary", elem_id="merge-run")

    def run(paths: Any, strengths: str, target: str, tick: bool, rank: Any, energy: Any, dtype: str, model: str) -> str:
        chosen = list(paths or [])
        items = list(zip(chosen, work.strengths_of(strengths, len(chosen)), strict=True))
        return views.made(
            place, work.merge_files(place, items, target, _named(model), _cut(rank, energy), dtype, bool(tick))
        )

    return button, run, [paths, strengths, target, overwrite, *size, dtype, model], [paths]


def _resize(place: Workplace) -> Tool:
    with gr.Tab("Resize"):
        path = _adapter("Adapter", "resize")
        target, overwrite = _target("resize", "such as adapters/style_r4.safetensors")
        size, dtype = _size("resize", "New size")
        model = _model(place, "Its base model (needed for kinds other than lora, dora and bora)")
        button = gr.Button("Resize", variant="primary", elem_id="resize-run")

    def run(path: Any, target: str, tick: bool, rank: Any, energy: Any, dtype: str, model: str) -> str:
        done = work.resize_file(place, path or "", target, _named(model), _cut(rank, energy), dtype, bool(tick))
        return views.made(place, done)

    return button, run, [path, target, overwrite, *size, dtype, model], [path]


def _adapter(label: str = "Adapter", name: str = "inspect") -> gr.Dropdown:
    """Its choices come when the page is loaded."""
    return gr.Dropdown([], value=None, label=label, allow_custom_value=True, elem_id=f"{name}-adapter")


def _model(place: Workplace, label: str) -> gr.Dropdown:
    return gr.Dropdown([(NO_MODEL, NO_MODEL), *listing.models(place)], value=NO_MODEL, label=label, filterable=False)


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
