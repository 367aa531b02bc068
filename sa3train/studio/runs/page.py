"""The Runs page: every run under the studio's folders as it goes, and a form that starts another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from sa3train.core.errors import SA3Error
from sa3train.reports.run_files import RunFiles, read_run
from sa3train.studio.runs import runs, view
from sa3train.studio.runs.start_form import start_form
from sa3train.studio.server import processes
from sa3train.studio.server.widgets import command_box, empty, notice, ticking, told
from sa3train.studio.server.workspace import StudioError, Workspace

SECONDS = 2.0
LOG_LINES = 60
VIEWS = Path(__file__).parents[1] / "assets" / "views.css"
PARTS = {
    "curves": ("metrics.csv", "heldout.json", "generated.json", "machine.json"),
    "demos": ("demos",),
    "data": ("data.json",),
    "config": ("config.yaml",),
}
"""What each part is made from: it is shown anew when one of these has changed."""

Values = dict[Any, Any]


def runs_page(workspace: Workspace) -> None:
    """Build the page inside an open tab."""
    tick = ticking(SECONDS)
    seen = gr.State({})
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=330):
            gr.HTML(f'<style>{VIEWS.read_text(encoding="utf-8")}</style><h2 class="studio">Runs</h2>')
            chosen = gr.Radio([], label="Run", elem_classes="run-list", elem_id="run-list", show_label=False)
            none = gr.HTML(empty("No runs in the studio's folders yet. Start one below."), elem_id="run-none")
            with gr.Accordion("Start a run", open=True, elem_id="run-form"):
                start_form(workspace, chosen, tick)
        with gr.Column(scale=5, min_width=480):
            head = gr.HTML(view.head(workspace, None, RunFiles(Path())), elem_id="run-head")
            with gr.Row(visible=False, elem_id="run-actions") as actions:
                stop = gr.Button("Stop", elem_id="run-stop", min_width=90, scale=0)
                kill = gr.Button("Stop at once", variant="stop", elem_id="run-kill", min_width=120, scale=0)
                resume = gr.Button("Resume", variant="primary", elem_id="run-resume", min_width=90, scale=0)
            line = gr.HTML("", elem_id="run-command")
            with gr.Tabs():
                with gr.Tab("Curves"):
                    curves = gr.HTML(elem_id="run-curves")
                with gr.Tab("Listen"):
                    demos = gr.HTML(elem_id="run-demos")
                with gr.Tab("Data"):
                    data = gr.HTML(elem_id="run-data")
                with gr.Tab("Settings"):
                    other = gr.Dropdown([], label="Differences from run", elem_id="run-other")
                    settings = gr.HTML(elem_id="run-differences")
                    config = gr.HTML(elem_id="run-config")
                with gr.Tab("Log"):
                    log = gr.HTML(elem_id="run-log")
                with gr.Tab("Report"):
                    open_report = gr.Button("Show the report", elem_id="run-report-open", scale=0)
                    report = gr.HTML(elem_id="run-report")
    boxes = {"head": head, "line": line, "curves": curves, "demos": demos, "data": data, "config": config, "log": log}
    outputs = [chosen, other, none, actions, stop, kill, resume, *boxes.values(), seen]

    @told
    def refreshed(path: str | None, before: dict[str, Any]) -> Values:
        found = runs.find_runs(workspace, Path(path) if path else None)
        labels, given = [(view.label(workspace, run), str(run.path)) for run in found], path
        path = path if path in [value for _, value in labels] else (labels[0][1] if labels else None)
        run = next((run for run in found if str(run.path) == path), None)
        after, changed = parts_of(workspace, run, before)
        values: Values = {boxes[name]: html for name, html in changed.items()}
        after["list"], after["path"] = labels, path
        if after["list"] != before.get("list") or path != before.get("path"):
            # A choice is not said again: by now there may be another.
            first: dict[str, Any] = {} if path == given else {"value": path}
            values[chosen] = gr.update(choices=labels, **first)
            values[none] = gr.update(visible=not labels)
            values[other] = gr.update(choices=[(workspace.shown(run.path), str(run.path)) for run in found])
        state = run.state if run else None
        if state != before.get("state") or path != before.get("path"):
            values |= buttons(run, actions, stop, kill, resume)
        return values | {seen: after | {"state": state}}

    def acting(act: Callable[[Path], Any]) -> Callable[..., Values]:
        @told
        def acted(path: str | None, before: dict[str, Any]) -> Values:
            act(folder_of(workspace, path))
            values: Values = refreshed(path, before)
            return values

        return acted

    shown: dict[str, Any] = {"inputs": [chosen, seen], "outputs": outputs, "show_progress": "hidden"}
    tick.tick(refreshed, **shown)
    chosen.input(refreshed, **shown)
    stop.click(acting(runs.stop), **shown)
    kill.click(acting(lambda folder: runs.stop(folder, at_once=True)), **shown)
    resume.click(acting(runs.resume), **shown)
    other.input(told(lambda path, second: compared(workspace, path, second)), [chosen, other], settings)
    open_report.click(told(lambda path: report_of(workspace, path)), chosen, report)


def folder_of(workspace: Workspace, path: str | None) -> Path:
    """The chosen run's folder. Raises `StudioError` when none is chosen, or it is outside the studio's folders."""
    if not path:
        raise StudioError("choose a run first.")
    folder = workspace.folder(path, "run folder")
    if not runs.is_run(folder):
        raise StudioError(f"{workspace.shown(folder)} holds no run.")
    return folder


def parts_of(
    workspace: Workspace, run: runs.Run | None, before: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What was seen by now, and the HTML of each part that has changed since `before`."""
    if run is None:
        return {}, {} if "run" not in before else {"head": view.head(workspace, None, RunFiles(Path())), "line": ""}
    after: dict[str, Any] = {"run": run}
    after |= {part: (str(run.path), *(_stamp(run.path / name) for name in names)) for part, names in PARTS.items()}
    after["log"] = (str(run.path), _stamp(run.path / processes.LOG))
    changed = {part for part in after if after[part] != before.get(part)}
    html: dict[str, str] = {}
    if changed & {"curves", "demos", "data", "run"}:
        try:
            files, wrong = read_files(run.path), ""
        except SA3Error as error:  # said on the page, once: raised, it would come back with every tick
            files, wrong = RunFiles(run.path), notice(str(error), "error")
        html["head"] = view.head(workspace, run, files) + wrong
        html["line"] = command_line(workspace, run)
        html["curves"] = view.curves(files) if "curves" in changed else ""
        html["demos"] = view.listening(workspace, files) if "demos" in changed else ""
        html["data"] = view.data_card(files) if "data" in changed else ""
    if "config" in changed:
        html["config"] = view.config(run.path)
    if "log" in changed:
        html["log"] = view.log(processes.log_tail(run.path, LOG_LINES))
    return after, {name: text for name, text in html.items() if text}


def read_files(folder: Path) -> RunFiles:
    """A run's files. Raises `StudioError` when one of them is damaged."""
    try:
        return read_run(folder)
    except SA3Error:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudioError(f"a file in {folder} is damaged ({error}).") from error


def command_line(workspace: Workspace, run: runs.Run) -> str:
    """What does in a shell what the buttons do."""
    pid, started = processes.running(run.path), processes.record_of(run.path).get("command")
    found = command_box(workspace.command(started), "Started as command") if started else ""
    if pid is not None:
        return found + command_box(f"kill -TERM {pid}", "Stop as command")
    if run.alive or run.state == "finished":
        return found
    return found + command_box(workspace.command(runs.resume_command(run.path)), "Resume as command")


def buttons(run: runs.Run | None, actions: Any, stop: Any, kill: Any, resume: Any) -> Values:
    """Which actions a run in its state allows."""
    state = run.state if run else ""
    own = state in ("starting", "running", "stopping")
    again = run is not None and not run.alive and state != "finished"
    return {
        actions: gr.update(visible=own or again),
        stop: gr.update(visible=own, interactive=state != "stopping"),
        kill: gr.update(visible=state == "stopping"),
        resume: gr.update(visible=again),
    }


def compared(workspace: Workspace, path: str | None, second: str | None) -> str:
    """HTML of the settings in which two runs differ, and the command that shows it."""
    one, other = folder_of(workspace, path), folder_of(workspace, second)
    names = workspace.shown(one), workspace.shown(other)
    command = command_box(workspace.command(["diff", one / "config.yaml", other / "config.yaml"]))
    return view.between(runs.settings_between(one, other), *names) + command


def report_of(workspace: Workspace, path: str | None) -> str:
    """HTML that shows the run's report, written from its files when there is none yet."""
    from sa3train.reports.run_report import REPORT, write_report

    folder = folder_of(workspace, path)
    if not (folder / REPORT).is_file():
        if not (folder / "run.json").is_file():
            return notice("There is nothing to report yet.")
        write_report(folder)
    return view.report(workspace.url(folder / REPORT), workspace.shown(folder / REPORT))


def _stamp(path: Path) -> tuple[int, int]:
    """Changes when the file does, or when something comes into the folder."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    entries = sum(1 for _ in path.glob("step-*/demos.json")) if path.is_dir() else found.st_size
    return found.st_mtime_ns, entries
