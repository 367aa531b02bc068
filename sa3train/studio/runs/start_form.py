"""Starting a run from the page: the choice is checked, planned, tried for a few steps, and begun."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from sa3train.core.errors import SA3Error
from sa3train.data.shards.index import summarise
from sa3train.studio.runs import estimate, runs, view
from sa3train.studio.runs.estimate import Choice
from sa3train.studio.server.widgets import command_box, empty, notice, told
from sa3train.studio.server.workspace import (
    StudioError,
    Workspace,
    list_adapters,
    list_models,
    resolve_model_name,
    survey_folders,
)

RUNS = "runs"
PLAN_HINT = "A plan tells what a run would train on and, from a few real steps, how long it takes and what memory."


def wish(
    workspace: Workspace,
    recipe: str,
    data: str,
    model: str,
    steps: float | None,
    folder: str,
    further: str,
    adapter: str,
) -> Choice:
    """What was chosen, checked. Raises `StudioError` for what is missing, unknown, or outside the studio's folders."""
    if recipe not in estimate.recipes():
        raise StudioError(f"there is no recipe {recipe!r}. Choose from: {', '.join(estimate.recipes())}.")
    if not data:
        raise StudioError("choose the latents to train on. Encode a folder of audio on the Data page to make some.")
    if steps and (steps < 1 or steps != int(steps)):
        raise StudioError(f"{steps:g} steps are not possible: give a whole number from 1, or 0 for the recipe's.")
    if recipe == "continue" and not adapter:
        raise StudioError("the recipe continue goes on from an adapter: choose its file.")
    return Choice(
        recipe,
        workspace.folder(data, "folder of latents"),
        resolve_model_name(workspace, model),
        run_folder(workspace, folder, recipe),
        int(steps) if steps else None,
        estimate.further_settings(further or ""),
        workspace.file(adapter, "adapter") if recipe == "continue" else None,
    )


def run_folder(workspace: Workspace, folder: str, recipe: str) -> Path:
    """Where the run goes: as given, or below `runs` by recipe and time."""
    return workspace.inside(folder or f"{RUNS}/{recipe}-{time.strftime('%Y%m%d-%H%M%S')}")


def start_form(workspace: Workspace, chosen: gr.Radio, tick: gr.Timer) -> None:
    """Build the form; a run that is started becomes the `chosen` one."""
    offered, trainable = (
        estimate.recipes(),
        [choice for choice in list_models(workspace) if choice[1] != workspace.model],
    )
    recipe = gr.Dropdown(list(offered), value="instrument", label="Recipe", info=offered["instrument"])
    with gr.Row():
        data = gr.Dropdown(_latents(workspace), label="Latents", allow_custom_value=True, min_width=130)
        model = gr.Dropdown(
            trainable, value=base_of(workspace), label="Base model", allow_custom_value=True, min_width=130
        )
    with gr.Row():
        steps = gr.Number(0, label="Steps (0: recipe)", minimum=0, precision=0, min_width=130)
        folder = gr.Textbox("", label="Run folder", placeholder="runs/RECIPE-TIME", min_width=130)
    adapter = gr.Dropdown([], label="Adapter to go on from", allow_custom_value=True, visible=False)
    further = gr.Textbox(
        "", lines=2, label="Further settings, one a line", placeholder="optimizer.lr=1e-3\nadapter.rank=8"
    )
    with gr.Row():
        plan_it = gr.Button("Plan", elem_id="run-plan")
        start_it = gr.Button("Start", variant="primary", elem_id="run-start")
    shown = gr.HTML(empty(PLAN_HINT), elem_id="run-plan-shown")
    fields = [recipe, data, model, steps, folder, further, adapter]

    @told
    def planned(*values: Any) -> Iterator[tuple[Any, ...]]:
        yield from kept_on_the_page(plan_steps(workspace, *values), 2)

    @told
    def started(*values: Any) -> Iterator[tuple[Any, ...]]:
        yield from kept_on_the_page(start_steps(workspace, *values), 3)

    def explained(name: str) -> tuple[Any, Any]:
        listed = gr.update(visible=name == "continue", choices=list_adapters(workspace) if name == "continue" else [])
        return gr.update(info=offered.get(name, "")), listed

    recipe.change(explained, recipe, [recipe, adapter], show_progress="hidden")
    plan_it.click(planned, fields, [folder, shown], show_progress="hidden")
    start_it.click(started, fields, [folder, shown, chosen], show_progress="hidden")
    known = gr.State([value for _, value in _latents(workspace)])

    def refreshed(before: list[str], now: str | None) -> tuple[Any, Any]:
        choices = _latents(workspace)
        values = [value for _, value in choices]
        if values == before:
            return gr.skip(), gr.skip()
        # A choice is not said again: by now there may be another.
        first: dict[str, Any] = {} if now or not values else {"value": values[0]}
        return gr.update(choices=choices, **first), values

    tick.tick(refreshed, [known, data], [data, known], show_progress="hidden")


def plan_steps(workspace: Workspace, *values: Any) -> Iterator[tuple[Any, ...]]:
    """What the page shows while a plan is made, as (run folder, HTML). Raises `SA3Error`."""
    choice = wish(workspace, *values)
    where, command = workspace.shown(choice.run_dir), command_box(workspace.command(choice.command()))
    yield where, notice("Composing the settings …")
    config, found = estimate.compose(choice), summarise(choice.data)
    known = estimate.outlook(config, found)
    trying = notice(f"Running {estimate.TRIAL_STEPS} steps to see what they take …")
    yield where, view.plan_table(known) + trying + command
    trial = estimate.measure(choice)
    yield where, view.plan_table([*known, *estimate.expected(config, found, trial)]) + command


def start_steps(workspace: Workspace, *values: Any) -> Iterator[tuple[Any, ...]]:
    """What the page shows while a run is started, as (run folder, HTML, chosen run). Raises `SA3Error`."""
    choice = wish(workspace, *values)
    where = workspace.shown(choice.run_dir)
    yield where, notice("Composing the settings …"), gr.skip()
    estimate.compose(choice)  # a setting that is refused should be refused here, not in a log
    summarise(choice.data)
    runs.begin(choice.run_dir, choice.command())
    said = notice(f"{where} is started. It goes on when this page is closed.")
    found = [(view.label(workspace, run), str(run.path)) for run in runs.find_runs(workspace, choice.run_dir)]
    listed = gr.update(value=str(choice.run_dir), choices=found)
    yield where, said + command_box(workspace.command(choice.command())), listed


def kept_on_the_page(steps: Iterator[tuple[Any, ...]], outputs: int) -> Iterator[tuple[Any, ...]]:
    """`steps`, of which an error is left standing where they are shown, besides being raised."""
    try:
        yield from steps
    except SA3Error as error:
        yield gr.skip(), notice(str(error), "error"), *(gr.skip(),) * (outputs - 2)
        raise


def base_of(workspace: Workspace) -> str:
    """The model to train on: the twin, which is the base, of a post-trained one."""
    from sa3train.models.hub import REGISTRY

    entry = REGISTRY.get(workspace.model)
    post_trained = entry is not None and not entry.name.endswith("-base")
    return entry.sibling if entry is not None and post_trained and entry.sibling else workspace.model


def _latents(workspace: Workspace) -> list[tuple[str, str]]:
    return [(workspace.shown(path), str(path)) for path in survey_folders(workspace).latents]
