"""The Evaluate tab of a run: `sa3-eval` on its checkpoints, what it picks, and its page to listen."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from sa3train.core.processes import read_json
from sa3train.evaluation.evaluate import EvaluationSettings
from sa3train.reports import runs
from sa3train.reports.comparison import read_evaluation
from sa3train.reports.run_files import read_run
from sa3train.reports.verdict import describe_later
from sa3train.studio.data import jobs
from sa3train.studio.data.jobs_tabs import JobTab
from sa3train.studio.runs import view
from sa3train.studio.server import widgets as ui
from sa3train.studio.server.folders import leads_out, name_adapter
from sa3train.studio.server.workspace import StudioError, Workspace

HINT = (
    "An evaluation measures every checkpoint of the run at each strength, on clips that no training saw and on "
    "generated ones, and picks one to use. One that is stopped starts anew."
)
PAGE = "evaluation.html"


def resolve_run_dir(workspace: Workspace, path: str | None) -> Path:
    """Resolve the folder of the chosen run.

    Args:
        workspace: The workspace.
        path: Path of the folder, or None when no run is chosen.

    Returns:
        The absolute path.

    Raises:
        StudioError: No run is chosen, or the folder holds none or is outside the roots.
    """
    if not path:
        raise StudioError("Choose a run first.")
    folder = workspace.resolve_folder(path, "run folder")
    if leads_out(workspace, folder):
        raise StudioError(f"A file in {workspace.shorten(folder)} is a link out of the studio's folders. Remove it.")
    if not runs.is_run(folder):
        raise StudioError(f"{workspace.shorten(folder)} contains no run. Choose another.")
    return folder


def _build_fields(workspace: Workspace) -> dict[str, Any]:
    return {
        "strengths": gr.Textbox("0.5, 0.75, 1", label="Strengths", info="Each is measured with every checkpoint."),
        "generated": gr.Number(4, label="Generated clips", info="With each of them; 0 measures the loss alone."),
    }


def _build_command(workspace: Workspace, run: Path, values: Mapping[str, Any]) -> tuple[Path, list[str]]:
    count = ui.parse_optional_number("Generated clips", values["generated"], is_integer=True) or 0
    if count < 0:
        raise StudioError(f"Generated clips must be 0 or more, not {count}.")
    settings = EvaluationSettings(ui.parse_numbers(values["strengths"]), generated=count)
    out = jobs.get_evaluation_dir(workspace, run)
    out.mkdir(parents=True, exist_ok=True)
    strengths = ",".join(f"{strength:g}" for strength in settings.strengths)
    command = ["sa3-eval", str(run), f"--strengths={strengths}", "--generate", str(count), "--pick"]
    command += ["--json", str(out / jobs.EVALUATION_FILE), "--html", str(out / PAGE)]
    return out, [*command, *(["--device", workspace.device] if workspace.device else [])]


def render_evaluation(workspace: Workspace, file: Path, run: Path) -> str:
    """Render what an evaluation has picked, and its page.

    Args:
        workspace: The workspace.
        file: What `sa3-eval --json` has written.
        run: The run folder.

    Returns:
        HTML.
    """
    found = read_json(file)
    pick, later = found.get("pick") or {"is_base": True}, describe_later(found, read_run(run).step)
    if pick["is_base"]:
        head = "<h3>None is better than the base model beyond noise</h3>"
    else:
        adapter, strength = (read_evaluation(run, file) or {}).get("adapter"), pick["strength"]
        name = name_adapter(workspace.shorten(adapter or pick["adapter"]))
        if adapter:
            head = f"<h3>Use {escape(name)} at strength {strength:g}</h3>{view.render_play(name, strength)}"
        else:
            head = f"<h3>{escape(name)} was the best, and is gone</h3><p>Evaluate the run again.</p>"
    head += f"<p>{escape(later)}</p>" if later else ""
    frame = view.render_report_frame(workspace.get_url(file.with_name(PAGE)), f"evaluation of {workspace.shorten(run)}")
    return ui.render_panel(head) + frame


EVALUATE = JobTab(
    "evaluate",
    HINT,
    _build_fields,
    _build_command,
    lambda workspace, run, job: jobs.get_evaluation_dir(workspace, run) / jobs.EVALUATION_FILE,
    render_evaluation,
    resolve_run_dir,
)
