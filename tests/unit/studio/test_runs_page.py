"""What the Runs page shows: of files as they are, with nothing in them taken for the page's own HTML."""

import pytest

from helpers.run_dirs import make_run, write_record
from sa3train.core import processes
from sa3train.reports import runs
from sa3train.reports.html import render_facts
from sa3train.reports.run_files import DemoFile, RunFiles
from sa3train.reports.runs import Run
from sa3train.studio.runs import page, view
from sa3train.studio.server.workspace import Workspace

EVIL = '<img src=x onerror="alert(1)">'


def make_demo(step: int, strength: float, prompt: str = "koto") -> DemoFile:
    name = f"demos/step-{step:08d}/nano-{strength:g}"
    return DemoFile(f"{name}.wav", f"{name}.png", "prompt0", "text", prompt, "nano", strength, 0, step,
                  {"loudness_lufs": -14.0})  # fmt: skip


def test_names_and_prompts_are_text(workspace: Workspace) -> None:
    folder = workspace.sources[0] / "runs" / EVIL.replace("/", "")
    files = RunFiles(folder, demos=[make_demo(0, 0.0, EVIL), make_demo(10, 1.0, EVIL)], data={
        "manifest": EVIL, "prompts": [EVIL],
        "sources": [{"path": EVIL, "role": EVIL, "model": EVIL, "card": EVIL, "splits": {}}],
    })  # fmt: skip
    run = Run(folder, "crashed", 1, 2, None, 1.0, "", EVIL)
    shown = [
        view.render_head(workspace, run, files), view.render_demos(workspace, files), view.render_data(files),
        view.render_differences([(EVIL, EVIL, EVIL)], EVIL, EVIL), render_facts([(EVIL, EVIL)]),
        view.render_log(EVIL), view.render_report_frame(EVIL, EVIL),
    ]  # fmt: skip
    assert all("<img src=x" not in html and "&lt;img" in html for html in shown)


@pytest.mark.parametrize(
    ("state", "log", "shown"),
    [
        ("starting", "", "starting: loading libraries"),
        (
            "running",
            '{"stage": "validating", "done": 0, "total": null}',
            "running: validating · 20 of 100 steps, 40 s left",
        ),
        ("running", '{"stage": "validating"}\n{"stage": ""}\nstep 3 of 9', "running · 20 of 100 steps, 40 s left"),
        ("stopped", '{"stage": "validating"}', "stopped · 40 of 100 steps"),
    ],
)
def test_a_run_says_what_it_does_beside_its_steps(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, state: str, log: str, shown: str
) -> None:
    folder = workspace.sources[0] / "run"
    write_record(folder) if state == "starting" else make_run(folder)
    (folder / processes.LOG_FILE).write_text(f"$ sa3-train\n{log}\n")
    monkeypatch.setattr(runs, "detect_state", lambda *_: state)
    run = runs.load_run(folder)
    assert run is not None
    assert view.format_label(workspace, run).splitlines()[1] == shown


def test_a_run_after_its_last_step_tells_of_what_is_left(workspace: Workspace) -> None:
    run = Run(workspace.folder / "runs" / "a", "running", 100, 100, speed=2.0, stage="generating demos")
    label = view.format_label(workspace, run).splitlines()[1]
    assert label == "running: all steps done, generating demos · 100 of 100 steps"
    stopping = Run(run.path, "stopping", 100, 100)
    assert view.describe_state(stopping) == "saving, then stopping: all steps done, ending the run"


def test_base_stands_beside_the_adapter_and_the_newest_step_first(workspace: Workspace) -> None:
    files = RunFiles(
        workspace.sources[0], demos=[make_demo(0, 0.0), *(make_demo(step, s) for step in (10, 20) for s in (0.5, 1.0))]
    )
    html = view.render_demos(workspace, files)
    assert html.index("Step 20") < html.index("Step 10")
    assert html.count("<b>base model</b>") == 2
    assert html.count("<audio") == 6
    assert 'src="/gradio_api/file=' in html
    assert "No demos" in view.render_demos(workspace, RunFiles(workspace.sources[0]))


def test_a_part_is_rendered_again_only_when_its_files_change(workspace: Workspace) -> None:
    folder = workspace.sources[0] / "run"
    folder.mkdir()
    run = Run(folder, "running", 1, 2)
    seen, shown = page.render_parts(workspace, run, {})
    assert {"head", "curves", "demos", "data", "config", "log"} <= shown.keys()
    assert page.render_parts(workspace, run, seen) == (seen, {})
    (folder / "metrics.csv").write_text("step,train/loss\n1,0.5\n2,0.4\n")
    after, shown = page.render_parts(workspace, run, seen)
    assert shown.keys() == {"head", "curves", "commands"}
    assert "Training loss" in shown["curves"]
    (folder / "demos" / "step-00000000").mkdir(parents=True)
    (folder / "demos" / "step-00000000" / "demos.json").write_text("[")
    assert "is damaged" in page.render_parts(workspace, run, after)[1]["head"]
