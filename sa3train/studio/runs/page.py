"""The Runs page: every run in the studio's folders as it goes, and a form that starts another."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from sa3train.core import processes
from sa3train.core.files import write_text
from sa3train.reports import comparison, run_files, runs
from sa3train.reports.run_files import RunFiles
from sa3train.studio.data.jobs_tabs import build_job_tab
from sa3train.studio.runs import view
from sa3train.studio.runs.evaluate_tab import EVALUATE, resolve_run_dir
from sa3train.studio.runs.start_form import build_start_form
from sa3train.studio.server import widgets as ui
from sa3train.studio.server.folders import find_runs, name_folders
from sa3train.studio.server.workspace import Workspace

LOG_LINES = 60
PARTS = {
    "curves": (run_files.METRICS_FILE, run_files.VALIDATION_FILE, run_files.MEMORIZATION_FILE, run_files.SYSTEM_FILE),
    "demos": (run_files.DEMOS_DIR,),
    "data": (run_files.DATA_FILE,),
    "config": (run_files.CONFIG_FILE,),
    "log": (processes.LOG_FILE,),
}
"""Files that each part of the page is made from: it is rendered again when one of them has changed."""

ACTIONS: dict[str, tuple[Any, Callable[[Path], Any]]] = {
    "stop": ("secondary", runs.stop_run),
    "kill": ("stop", partial(runs.stop_run, at_once=True)),
    "resume": ("primary", runs.resume_run),
    "dismiss": ("secondary", runs.dismiss_run),
}
"""Variant of each button, and what it does to the folder of the chosen run."""
TABS = {"curves": "Curves", "demos": "Listen", "data": "Data", "config": "Settings", "log": "Log"}


def build_runs_page(workspace: Workspace) -> None:
    """Build the page inside an open tab.

    Args:
        workspace: The workspace.
    """
    seen = gr.State({})
    widgets = _build_widgets(workspace)

    @ui.show_errors
    def on_refresh(path: str | None, before: dict[str, Any]) -> dict[Any, Any]:
        values, after = _refresh(workspace, path, before)
        return {widgets[name]: value for name, value in values.items()} | {seen: after}

    def make_handler(act: Callable[[Path], Any]) -> Callable[..., dict[Any, Any]]:
        @ui.show_errors
        def on_click(path: str | None, before: dict[str, Any]) -> Any:
            act(resolve_run_dir(workspace, path))
            return on_refresh(path, before)

        return on_click

    chosen = widgets["chosen"]
    inputs, outputs, order = [chosen, seen], [*widgets.values(), seen], ui.in_order("runs")
    read = lambda: [(run, get_stamps(run)) for run in find_runs(workspace)]  # noqa: E731
    ui.keep_fresh(read, on_refresh, inputs, outputs, chosen.input, **order)
    for name, (_, act) in ACTIONS.items():
        widgets[name].click(make_handler(act), inputs, outputs, **order)


def _build_widgets(workspace: Workspace) -> dict[str, Any]:
    """Build the widgets that `_refresh` updates, by name, and those that compare runs and show the report."""
    widgets: dict[str, Any] = {}
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=330):
            form = gr.Accordion("Start a run", open=True, elem_id="run-form")
            gr.HTML("<h2>Runs</h2>", elem_classes="studio-title", apply_default_css=False)
            # The list, or the hint that it is empty, is shown once runs have been looked for.
            chosen = gr.Radio(
                [], label="Run", elem_classes="run-list", elem_id="run-list", show_label=False, visible=False
            )
            hint = ui.render_placeholder("No runs yet. Start one above.")
            widgets |= {"chosen": chosen, "none": gr.HTML(hint, elem_id="run-none", visible=False)}
            with form:
                build_start_form(workspace, chosen)
        with gr.Column(scale=5, min_width=480):
            widgets["head"] = gr.HTML(view.render_head(workspace, None, RunFiles(Path())), elem_id="run-head")
            with gr.Row(visible=False, elem_id="run-actions") as widgets["actions"]:
                for name, (variant, _) in ACTIONS.items():
                    title = name.capitalize()
                    widgets[name] = gr.Button(title, variant=variant, elem_id=f"run-{name}", min_width=90, scale=0)
            widgets["commands"] = gr.HTML("", elem_id="run-command")
            with gr.Tabs():
                for name, title in TABS.items():
                    with gr.Tab(title):
                        if name == "config":
                            other = gr.Dropdown([], label="Compare with run", elem_id="run-other")
                            differences = gr.HTML(elem_id="run-differences")
                        widgets[name] = gr.HTML(elem_id=f"run-{name}")
                with gr.Tab("Evaluate"):
                    build_job_tab(workspace, chosen, EVALUATE)
                with gr.Tab("Report"):
                    open_report = gr.Button("Show report", elem_id="run-report-open", scale=0)
                    report = gr.HTML(elem_id="run-report")
    compare = ui.show_errors(lambda path, second: render_comparison(workspace, path, second))
    other.input(compare, [chosen, other], differences)
    chosen.change(lambda: ("", "", None), None, [report, differences, other], **ui.QUIET)  # they are another run's
    open_report.click(ui.show_errors(lambda path: render_report(workspace, path)), chosen, report)
    return widgets | {"other": other}


def _refresh(workspace: Workspace, path: str | None, before: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return updates of the widgets whose content has changed since `before`, and what the page has seen now."""
    found = find_runs(workspace)
    labels, selected = [(view.format_label(workspace, run), str(run.path)) for run in found], path
    path = path if path in [value for _, value in labels] else (labels[0][1] if labels else None)
    run = next((run for run in found if str(run.path) == path), None)
    after, changed = render_parts(workspace, run, before)
    after |= {"list": labels, "path": path, "state": run.state if run else None}
    differing = {name for name in ("list", "path", "state") if after[name] != before.get(name, ...)}
    values: dict[str, Any] = dict(changed)
    if differing & {"list", "path"}:
        # The choice is only set when it must change: the user may have made another meanwhile.
        choice: dict[str, Any] = {} if path == selected else {"value": path}
        values["chosen"] = gr.update(choices=labels, visible=bool(labels), **choice)
        values["none"] = gr.update(visible=not labels)
        others = [one.path for one in found if str(one.path) != path]
        values["other"] = gr.update(choices=name_folders(workspace, others))
    if differing & {"state", "path"}:
        is_own = run is not None and run.state in ("starting", "running", "stopping")
        is_stopping = run is not None and run.state == "stopping"
        is_resumable = run is not None and run.is_resumable
        values |= {
            "actions": gr.update(visible=is_own or is_resumable),
            "stop": gr.update(visible=is_own, interactive=not is_stopping),
            "kill": gr.update(visible=is_stopping),
            "resume": gr.update(visible=is_resumable),
            "dismiss": gr.update(visible=run is not None and run.state == "failed"),
        }
    return values, after


def render_parts(
    workspace: Workspace, run: runs.Run | None, before: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Render the parts of the page that have changed.

    Args:
        workspace: The workspace.
        run: The chosen run, or None.
        before: What the page has seen.

    Returns:
        (what it has seen now, HTML of each part that has changed).
    """
    if run is None:
        head = view.render_head(workspace, None, RunFiles(Path()))
        return {}, {"head": head, "commands": ""} if "run" in before else {}
    after: dict[str, Any] = {"run": run}
    after |= get_stamps(run)
    changed = {part for part in after if after[part] != before.get(part)}
    html: dict[str, str] = {}
    if changed & {"curves", "demos", "data", "run"}:
        try:
            files, problem = run_files.read_run(run.path), ""
        except (OSError, ValueError, KeyError, TypeError) as error:  # raised, it would come back with every tick
            text = f"A file in {run.path} is damaged ({error}). Restore or delete it."
            files, problem = RunFiles(run.path), ui.render_notice(text, "error")
        html["head"] = view.render_head(workspace, run, files) + problem
        html["commands"] = _render_commands(run)
        views: dict[str, Callable[[RunFiles], str]] = {
            "curves": view.render_curves,
            "demos": partial(view.render_demos, workspace),
            "data": view.render_data,
        }
        html |= {part: render(files) for part, render in views.items() if part in changed}
    if "config" in changed:
        html["config"] = view.render_config(run.path)
    if "log" in changed:
        html["log"] = view.render_log(processes.read_log_tail(run.path, LOG_LINES))
    return after, html


def _render_commands(run: runs.Run) -> str:
    """Render commands that do what the buttons do."""
    pid, command = processes.get_running_pid(run.path), processes.read_record(run.path).get("command")
    found = ui.render_command(command, "Start command") if command else ""
    if pid is not None and processes.SENDS_SIGNALS:
        found += ui.render_command(f"kill -TERM {pid}", "Stop command")
    elif pid is None and run.is_resumable:
        found += ui.render_command(runs.build_resume_command(run.path), "Resume command")
    return found


def render_comparison(workspace: Workspace, path: str | None, second: str | None) -> str:
    """Render the settings in which two runs differ, and a command that shows them.

    Args:
        workspace: The workspace.
        path: Folder of the chosen run.
        second: Folder of the other run.

    Returns:
        HTML.
    """
    one, other = resolve_run_dir(workspace, path), resolve_run_dir(workspace, second)
    differences = comparison.compare_settings(one, other)
    command = ui.render_command(["diff", one / run_files.CONFIG_FILE, other / run_files.CONFIG_FILE])
    return view.render_differences(differences, workspace.shorten(one), workspace.shorten(other)) + command


def render_report(workspace: Workspace, path: str | None) -> str:
    """Render the report of a run inside the page; one that has none gets it in the studio's home.

    Args:
        workspace: The workspace.
        path: Folder of the run.

    Returns:
        HTML.
    """
    from sa3train.reports.run_report import render_report as render_page

    folder = resolve_run_dir(workspace, path)
    report = folder / run_files.REPORT_FILE
    if not report.is_file():
        if not (folder / run_files.RECORD_FILE).is_file():
            return ui.render_notice("There is nothing to report yet.")
        report = workspace.home / "reports" / f"{folder.name}.html"
        write_text(report, render_page(run_files.read_run(folder)))
    return view.render_report_frame(workspace.get_url(report), workspace.shorten(report))


def get_stamps(run: runs.Run) -> dict[str, tuple[Any, ...]]:
    """Get what changes with the files of each part of the page.

    Args:
        run: The run.

    Returns:
        A value for each of `PARTS`.
    """
    return {part: (str(run.path), *(_get_stamp(run.path / name) for name in names)) for part, names in PARTS.items()}


def _get_stamp(path: Path) -> tuple[int, int]:
    """Return a value that changes when the file does, or when demos are added to the folder."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    entries = sum(1 for _ in path.glob(f"step-*/{run_files.DEMOS_FILE}")) if path.is_dir() else found.st_size
    return found.st_mtime_ns, entries
