"""The form that starts a run: the request is checked, planned, tried for a few steps, and started."""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import gradio as gr

from sa3train.core.text import list_few
from sa3train.data.shards.index import summarize_data
from sa3train.reports import runs
from sa3train.reports.html import render_facts
from sa3train.studio.runs import estimate, view
from sa3train.studio.runs.estimate import RunRequest
from sa3train.studio.server import folders
from sa3train.studio.server import widgets as ui
from sa3train.studio.server.workspace import StudioError, Workspace
from sa3train.training.settings import TrainerSettings

RENEW = "(...values) => { sa3.outdate('run-plan-shown', false); return values; }"
OUTDATE = "() => { sa3.outdate('run-plan-shown', true); return []; }"
RUNS = "runs"
DATA_HINT = "Made on the Data page, by Encode."
PLAN_HINT = "Plan shows what the run trains on, and estimates time and memory from a few real steps."


def parse_request(
    workspace: Workspace,
    recipe: str,
    data: str,
    model: str,
    steps: float | str | None,
    folder: str,
    settings: str,
    adapter: str,
) -> RunRequest:
    """Check the values of the form.

    Args:
        workspace: The workspace.
        recipe: Name of the recipe.
        data: Folder of latents.
        model: Name or folder of the model.
        steps: Optimizer steps; empty or None for the recipe's.
        folder: The run folder, below `runs` if it is a name alone; empty for a new one there.
        settings: Lines of further `key=value` settings.
        adapter: Adapter to continue from, for recipe=continue.

    Returns:
        What to train.

    Raises:
        StudioError: Something is missing, unknown, or outside the roots.
    """
    if recipe not in estimate.list_recipes():
        raise StudioError(f"There is no recipe {recipe!r}. Choose from: {', '.join(estimate.list_recipes())}.")
    if not data:
        raise StudioError("Latents are missing. To create some, encode a folder of audio on the Data page.")
    count = _parse_steps(steps)
    if count is not None and "trainer.max_steps=" in (settings or ""):
        raise StudioError("The steps are set twice: in the field Steps and among the further settings. Remove one.")
    if recipe == "continue" and not adapter:
        raise StudioError("Start from adapter is empty, which the recipe continue needs. Choose its file.")
    return RunRequest(
        recipe,
        workspace.resolve_folder(data, "folder of latents"),
        folders.resolve_model_name(workspace, model),
        workspace.resolve_output(folder or f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}", RUNS),
        count,
        estimate.parse_settings(settings or ""),
        folders.resolve_adapter(workspace, adapter) if recipe == "continue" else None,
    )


def build_start_form(workspace: Workspace, chosen: gr.Radio) -> None:
    """Build the form inside the Runs page.

    Args:
        workspace: The workspace.
        chosen: The list of runs, in which a started run is selected.
    """
    recipes, usual = estimate.list_recipes(), estimate.get_default_recipe()
    models = [choice for choice in folders.list_models(workspace) if choice[1] != workspace.model]
    recipe = gr.Dropdown(list(recipes), value=usual, label="Recipe", info=recipes[usual])
    data = gr.Dropdown([], label="Latents", info=DATA_HINT, allow_custom_value=True)
    base = _get_trainable_model(workspace)
    model = gr.Dropdown(models, value=base, label="Base model", allow_custom_value=True)
    with gr.Row():
        steps = ui.build_optional_number(
            "Steps", info="Empty: recipe", placeholder=_format_steps(usual), elem_id="run-steps"
        )
        ui.explain_value(steps, _parse_steps)
        folder = gr.Textbox(
            "", label="Run folder", info="In the workspace.", placeholder="runs/RECIPE-TIME", max_lines=1, min_width=90,
            scale=2,
        )  # fmt: skip
    adapter = gr.Dropdown([], label="Start from adapter", allow_custom_value=True, visible=False)
    settings = gr.Textbox(
        "", lines=2, label="Further settings, one per line", placeholder="optimizer.lr=1e-3\nadapter.rank=8"
    )
    with gr.Row():
        plan = gr.Button("Plan", elem_id="run-plan", min_width=90)
        start = gr.Button("Start", variant="primary", elem_id="run-start", min_width=90)
    told = gr.HTML("", elem_id="run-start-told")  # apart from the plan, which may still be under way
    shown = gr.HTML(ui.render_placeholder(PLAN_HINT), elem_id="run-plan-shown")
    fields: list[Any] = [recipe, data, model, steps, folder, settings, adapter]
    known = gr.State(())

    def on_recipe(name: str) -> tuple[Any, ...]:
        is_continue = name == "continue"
        adapters = folders.list_adapters(workspace) if is_continue else []
        hint, choices = gr.update(info=recipes.get(name, "")), gr.update(visible=is_continue, choices=adapters)
        return hint, choices, gr.update(placeholder=_format_steps(name))

    recipe.change(on_recipe, recipe, [recipe, adapter, steps], show_progress="hidden")
    on_plan = ui.keep_error(functools.partial(stream_plan, workspace), 2, at=1)
    busy = plan.click(
        lambda: (gr.update(value="Planning…", interactive=False), ""), None, [plan, told], js=RENEW, **ui.QUIET
    )
    planned = busy.then(on_plan, fields, [folder, shown], show_progress="hidden")
    for end in (planned.success, planned.failure):
        end(lambda: gr.update(value="Plan", interactive=True), None, plan, **ui.QUIET)
    on_start = ui.keep_error(functools.partial(stream_start, workspace), 5, at=1)
    start.click(on_start, [known, *fields], [folder, told, shown, chosen, known], show_progress="hidden", js=RENEW)
    # Not of the folder: the plan fills it in, and does not depend on it.
    gr.on([field.change for field in fields if field is not folder], None, None, None, js=OUTDATE)

    def list_latents() -> list[Any]:
        return folders.name_folders(workspace, folders.find_folders(workspace).latents)

    data.choices = list_latents()  # on the page from its start
    data.value = data.choices[0][1] if data.choices else None
    ui.refresh_choices(data, list_latents)


def stream_plan(workspace: Workspace, *values: Any) -> Iterator[tuple[Any, ...]]:
    """Plan a run, and yield what the page shows meanwhile.

    Args:
        workspace: The workspace.
        *values: Values of the form, as for `parse_request`.

    Yields:
        (run folder, HTML).
    """
    request = parse_request(workspace, *values)
    command, once = ui.render_command(request.build_command()), iter([workspace.shorten(request.run_dir)])
    show = lambda html: (next(once, gr.skip()), html)  # noqa: E731  a run that is started meanwhile empties the field
    config = yield from ui.show_wait(lambda: estimate.compose_config(request), "Checking the settings", show)
    data = summarize_data(request.data)
    rows = estimate.describe_plan(config, data, estimate.count_uncaptioned(request.data))
    if others := _find_running(workspace):
        rows.append(("Note", f"Time and memory are measured beside {list_few([*others])}."))
    plan = ui.render_panel(render_facts(rows))
    text = f"Running {estimate.TRIAL_STEPS} trial steps, after loading libraries and model"
    trial = yield from ui.show_wait(lambda: estimate.run_trial(request), text, lambda line: show(plan + line + command))
    rows += estimate.describe_trial(config, data, trial)
    yield show(ui.render_panel(render_facts(rows)) + command)


def stream_start(workspace: Workspace, known: Sequence[str], *values: Any) -> Iterator[tuple[Any, ...]]:
    """Start a run, and yield what the page shows meanwhile.

    Args:
        workspace: The workspace.
        known: Running runs that the user knows of. Others are told of, and nothing is started.
        *values: Values of the form, as for `parse_request`.

    Yields:
        (run folder, message, plan, update of the list of runs, running runs that the user knows of).
    """
    request = parse_request(workspace, *values)
    folder, command = workspace.shorten(request.run_dir), ui.render_command(request.build_command())
    config = yield from ui.show_wait(  # a setting that is refused should be refused here, not in a log
        lambda: estimate.compose_config(request),
        "Checking the settings",
        lambda line: (folder, line, gr.skip(), gr.skip(), gr.skip()),
    )
    data = summarize_data(request.data)
    rows = estimate.describe_plan(config, data, estimate.count_uncaptioned(request.data))
    if trial := estimate.find_trial(request):
        rows += estimate.describe_trial(config, data, trial)[:1]
    plan, others = ui.render_panel(render_facts(rows)) + command, _find_running(workspace)
    if not others.keys() <= set(known):
        running = list_few([f"{name} ({state})" for name, state in others.items()])
        text = f"Already running: {running}. Runs at the same time share processor and memory, and each takes longer. "
        text += "Press Start again to start this one too."
        yield gr.skip(), ui.render_notice(text, "warning"), plan, gr.skip(), tuple(others)
        return
    runs.start_run(request.run_dir, request.build_command())
    folders.forget_folders()
    started = ui.render_notice(f"Started {folder}. It continues when this page is closed.")
    choices = [(view.format_label(workspace, run), str(run.path)) for run in folders.find_runs(workspace)]
    update = gr.update(value=str(request.run_dir), choices=choices, visible=True)
    yield "", started, plan, update, ()  # the next run gets a folder of its own


def _find_running(workspace: Workspace) -> dict[str, str]:
    """Find the runs that are going on: what each does, by its name."""
    alive = [run for run in folders.find_runs(workspace) if run.is_alive]
    return dict(view.format_label(workspace, run).rsplit("\n", 1) for run in alive)


def _format_steps(recipe: str) -> str:
    return f"{estimate.get_recipe_steps(recipe):,}"


def _parse_steps(value: Any) -> int | None:
    return cast("int | None", ui.parse_setting(TrainerSettings, "max_steps", value))


def _get_trainable_model(workspace: Workspace) -> str:
    """Return the base model of the studio's model, which is its own if it is a base or has none."""
    try:
        sibling = folders.get_sibling(workspace.model)
    except StudioError:
        return workspace.model
    return workspace.model if workspace.model.endswith("-base") else sibling
