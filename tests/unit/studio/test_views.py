"""What the Runs and Data pages show: of files as they are, with nothing in them taken for the page's own HTML."""

import json
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from helpers.audio import tone, write_clip
from sa3train.core.errors import SA3Error
from sa3train.reports.run_files import Played, RunFiles
from sa3train.studio.data import captions_tab, jobs_tabs, prompts_tab
from sa3train.studio.runs import estimate, page, view
from sa3train.studio.runs.runs import Run
from sa3train.studio.server.widgets import ticking
from sa3train.studio.server.workspace import Workspace

EVIL = '<img src=x onerror="alert(1)">'


def played(step: int, strength: float, prompt: str = "koto") -> Played:
    name = f"demos/step-{step:08d}/nano-{strength:g}"
    return Played(f"{name}.wav", f"{name}.png", "prompt0", "text", prompt, "nano", strength, 0, step,
                  {"loudness_lufs": -14.0})  # fmt: skip


def test_names_and_prompts_are_text(workspace: Workspace) -> None:
    folder = workspace.roots[0] / "runs" / EVIL.replace("/", "")
    files = RunFiles(folder, played=[played(0, 0.0, EVIL), played(10, 1.0, EVIL)], data={
        "manifest": EVIL, "prompts": [EVIL],
        "sources": [{"path": EVIL, "role": EVIL, "model": EVIL, "card": EVIL, "splits": {}}],
    })  # fmt: skip
    run = Run(folder, "crashed", 1, 2, None, 1.0, "", EVIL)
    shown = [
        view.head(workspace, run, files), view.listening(workspace, files), view.data_card(files),
        view.between([(EVIL, EVIL, EVIL)], EVIL, EVIL), view.plan_table([(EVIL, EVIL)]), view.log(EVIL),
        view.report(EVIL, EVIL),
    ]  # fmt: skip
    assert all("<img src=x" not in html and "&lt;img" in html for html in shown)


def test_base_stands_beside_the_adapter_and_the_newest_step_first(workspace: Workspace) -> None:
    files = RunFiles(
        workspace.roots[0], played=[played(0, 0.0), *(played(step, s) for step in (10, 20) for s in (0.5, 1.0))]
    )
    html = view.listening(workspace, files)
    assert html.index("Step 20") < html.index("Step 10")
    assert html.count("<b>base</b>") == 2
    assert html.count("<audio") == 6
    assert 'src="/gradio_api/file=' in html
    assert "No demos yet" in view.listening(workspace, RunFiles(workspace.roots[0]))


def test_a_part_is_shown_anew_only_when_its_files_change(workspace: Workspace) -> None:
    folder = workspace.roots[0] / "run"
    folder.mkdir()
    run = Run(folder, "running", 1, 2)
    seen, shown = page.parts_of(workspace, run, {})
    assert {"head", "curves", "demos", "data", "config", "log"} <= shown.keys()
    assert page.parts_of(workspace, run, seen) == (seen, {})
    (folder / "metrics.csv").write_text("step,train/loss\n1,0.5\n2,0.4\n")
    after, shown = page.parts_of(workspace, run, seen)
    assert shown.keys() == {"head", "curves", "line"} - ({"line"} if not shown.get("line") else set())
    assert "Training loss" in shown["curves"]
    (folder / "demos" / "step-00000000").mkdir(parents=True)
    (folder / "demos" / "step-00000000" / "demos.json").write_text("[")
    assert "is damaged" in page.parts_of(workspace, run, after)[1]["head"]


@pytest.fixture
def audit_file(tmp_path: Path) -> Path:
    from sa3train.data.audit.checks import finding
    from sa3train.data.audit.report import write_audit

    facts = {"seconds": 1.0, "sample_rate": 44100, "channels": 2, "lufs": -14.0, "peak_db": -1.0, "thumb": "0az"}
    rows: list[dict[str, Any]] = [
        {"source": f"{number}.wav", "findings": [], "caption": EVIL, **facts} for number in range(5)
    ]
    rows.append({"source": "bad.wav", "findings": [finding("quiet"), finding("no_caption")], "caption": "", **facts})
    write_audit(tmp_path, "audio", rows)
    return tmp_path / "audit.json"


def test_an_audit_shows_the_gravest_first(workspace: Workspace, audit_file: Path) -> None:
    audit = jobs_tabs.read_audit(audit_file, most=3)
    assert [row["source"] for row in audit.rows] == ["bad.wav", "0.wav", "1.wav"]
    write_clip(workspace.roots[0] / "audio" / "0.wav", tone(0.1))
    html = jobs_tabs.audit_view(workspace, audit, workspace.roots[0] / "audio")
    assert html.index("no caption") < html.index("very quiet", html.index("Clips, the gravest"))
    assert html.count("<audio") == 1, "only files that are there can be played"
    assert "and 3 less grave ones" in html
    assert "<img src=x" not in html
    audit_file.write_text(audit_file.read_text()[:-20])
    with pytest.raises(SA3Error, match="audit the folder again"):
        jobs_tabs.read_audit(audit_file)


def test_a_clip_is_heard_and_measured(workspace: Workspace) -> None:
    html = captions_tab.listening(workspace, workspace.roots[0] / "audio", "tone.wav")
    assert "2.00 s, 44100 Hz, 2 channels" in html
    assert "<audio" in html
    with pytest.raises(SA3Error, match="outside the folders"):
        captions_tab.listening(workspace, workspace.roots[0], "../../x.wav")


RECORDS = [{"source": f"{n}.wav", "caption": f"kick, dry, {n}", "tags": {"genre": "dub"}} for n in range(4)]


def test_prompts_are_those_of_training() -> None:
    settings = prompts_tab.settings_of("{caption}\n{genre}: {caption}=3", trigger="zap", keep=2)
    html = prompts_tab.preview(RECORDS, settings, 2)
    assert "zap, dub: kick, dry, 0" in html
    assert html.count("<tr>") == 3
    assert "distinct prompts: 8" in html
    with pytest.raises(SA3Error, match="no effect"):
        prompts_tab.preview(RECORDS, prompts_tab.settings_of("{caption}\n{mood}"), 2)
    with pytest.raises(SA3Error, match="lone"):
        prompts_tab.settings_of("{caption")


def test_prompt_settings_reach_the_trainer_as_they_were_previewed(workspace: Workspace) -> None:
    settings = prompts_tab.settings_of('say "{caption}", = loud\n{genre}=2', "zap's, word", 0.5, "back", True, 0.25, 1)
    lines = prompts_tab.training_settings(settings)
    choice = estimate.Choice("instrument", workspace.roots[0], "nano-base", workspace.roots[0] / "run", 2,
                         estimate.further_settings("\n".join(lines)))  # fmt: skip
    prompts = estimate.compose(choice)["data"]["prompts"]
    assert prompts["templates"] == [
        {"text": 'say "{caption}", = loud', "weight": 1.0}, {"text": "{genre}", "weight": 2.0}
    ]  # fmt: skip
    assert prompts["trigger"] == "zap's, word"
    names = ("trigger_probability", "trigger_position", "shuffle_tags", "tag_dropout", "keep_tags")
    assert [prompts[name] for name in names] == [0.5, "back", True, 0.25, 1]
    command = prompts_tab.preview_command(Path("x"), settings, 3)
    assert json.dumps(command).count("--template") == 2
    assert "--shuffle-tags" in command


def test_prompts_of_a_folder_of_audio_before_it_is_encoded(workspace: Workspace) -> None:
    with pytest.raises(SA3Error, match="has a caption"):
        prompts_tab.records_of(workspace, workspace.roots[0] / "audio")
    (workspace.roots[0] / "audio" / "tone.txt").write_text("a tone")
    (record,) = prompts_tab.records_of(workspace, workspace.roots[0] / "audio")
    assert (record["source"], record["caption"]) == ("tone.wav", "a tone")


def test_a_timer_rests_while_its_tab_is_not_looked_at() -> None:
    with gr.Blocks() as blocks:
        with gr.Tabs():
            with gr.Tab("Play"):
                pass
            with gr.Tab("Runs"), gr.Row():
                timer = ticking(2.0)
        free = ticking(2.0)
    assert (timer.active, free.active) == (False, True)
    (handler,) = [block.fn for block in blocks.fns.values() if timer in block.outputs]
    assert handler is not None
    active = [
        handler(gr.SelectData(None, {"index": number, "value": name})).active
        for number, name in enumerate(("Play", "Runs"))
    ]
    assert active == [False, True]
