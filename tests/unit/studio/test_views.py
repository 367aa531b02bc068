"""What the Runs and Data pages show: of files as they are, with nothing in them taken for the page's own HTML."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.audio import tone, write_clip
from sa3train.core.errors import SA3Error
from sa3train.data.audit.checks import make_finding
from sa3train.studio.data import captions_tab, jobs_tabs, prompts_tab
from sa3train.studio.runs import estimate
from sa3train.studio.server.workspace import Workspace

EVIL = '<img src=x onerror="alert(1)">'


@pytest.fixture
def audit_file(tmp_path: Path) -> Path:
    from sa3train.data.audit.report import write_audit_report

    facts = {"seconds": 1.0, "sample_rate": 44100, "channels": 2, "lufs": -14.0, "peak_db": -1.0, "thumb": "0az"}
    rows: list[dict[str, Any]] = [
        {"source": f"{number}.wav", "findings": [], "caption": EVIL, **facts} for number in range(5)
    ]
    findings = [make_finding("quiet"), make_finding("no_caption")]
    rows.append({"source": "bad.wav", "findings": findings, "caption": "", **facts})
    write_audit_report(tmp_path, "audio", rows)
    return tmp_path / "audit.json"


def test_an_audit_shows_the_gravest_first(workspace: Workspace, audit_file: Path) -> None:
    audit = jobs_tabs.read_audit(audit_file, max_rows=3)
    assert [row["source"] for row in audit[1]] == ["bad.wav", "0.wav", "1.wav"]
    write_clip(workspace.sources[0] / "audio" / "0.wav", tone(0.1))
    html = jobs_tabs.render_audit(workspace, audit, workspace.sources[0] / "audio")
    assert html.index("no caption") < html.index("very quiet", html.index("Clips, worst first"))
    assert html.count("<audio") == 1, "only files that are there can be played"
    assert re.search(r"and 3 more: all are in \S+/audit\.json", html)
    broken = {**audit[1][1], "findings": [make_finding("unreadable")]}
    assert "<audio" not in jobs_tabs.render_audit(workspace, (audit[0], [broken]), workspace.sources[0] / "audio")
    assert "<img src=x" not in html
    audit_file.write_text(audit_file.read_text()[:-20])
    with pytest.raises(SA3Error, match="audit the folder again"):
        jobs_tabs.read_audit(audit_file)


def test_a_clip_is_heard_and_measured(workspace: Workspace) -> None:
    html = captions_tab.render_clip(workspace, workspace.sources[0] / "audio", "tone.wav")
    assert "2.00 s · 44100 Hz · 2 ch" in html
    assert "<audio" in html
    with pytest.raises(SA3Error, match="outside the folders"):
        captions_tab.render_clip(workspace, workspace.sources[0], "../../x.wav")


RECORDS = [{"source": f"{n}.wav", "caption": f"kick, dry, {n}", "tags": {"genre": "dub"}} for n in range(4)]


def test_prompts_are_those_of_training() -> None:
    settings = prompts_tab.build_settings("{caption}\n{genre}: {caption}=3", trigger="zap", keep_tags=2)
    html = prompts_tab.render_preview(RECORDS, settings, 2)
    assert "zap, dub: kick, dry, 0" in html
    assert html.count("<tr>") == 3
    assert "distinct prompts: 8" in html
    with pytest.raises(SA3Error, match="no effect"):
        prompts_tab.render_preview(RECORDS, prompts_tab.build_settings("{caption}\n{mood}"), 2)
    with pytest.raises(SA3Error, match="single"):
        prompts_tab.build_settings("{caption")


def test_prompt_settings_reach_the_trainer_as_they_were_previewed(workspace: Workspace) -> None:
    templates = 'say "{caption}", = loud\n{genre}=2'
    values = ("zap's, ${oc.env:HOME} C:\\x", 0.5, "back", True, 0.25, 1)
    settings = prompts_tab.build_settings(templates, **dict(zip(prompts_tab.FIELDS, values, strict=False)))
    lines = prompts_tab.list_training_settings(settings)
    choice = estimate.RunRequest("instrument", workspace.sources[0], "nano-base", workspace.sources[0] / "run", 2,
                         estimate.parse_settings("\n".join(lines)))  # fmt: skip
    prompts = estimate.compose_config(choice)["data"]["prompts"]
    assert prompts["templates"] == [
        {"text": 'say "{caption}", = loud', "weight": 1.0}, {"text": "{genre}", "weight": 2.0}
    ]  # fmt: skip
    assert prompts["trigger"] == "zap's, ${oc.env:HOME} C:\\x"
    names = ("trigger_probability", "trigger_position", "shuffle_tags", "tag_dropout", "keep_tags")
    assert [prompts[name] for name in names] == [0.5, "back", True, 0.25, 1]
    command = prompts_tab.build_preview_command(Path("x"), settings, 3)
    assert json.dumps(command).count("--template") == 2
    assert "--shuffle-tags" in command


def test_prompts_of_a_folder_of_audio_before_it_is_encoded(workspace: Workspace) -> None:
    with pytest.raises(SA3Error, match="has a caption"):
        prompts_tab.read_records(workspace, workspace.sources[0] / "audio")
    (workspace.sources[0] / "audio" / "tone.txt").write_text("a tone")
    (record,), note = prompts_tab.read_records(workspace, workspace.sources[0] / "audio")
    assert (record["source"], record["caption"], note) == ("tone.wav", "a tone", "")
    write_clip(workspace.sources[0] / "audio" / "bare.wav", tone(1.0))
    records, note = prompts_tab.read_records(workspace, workspace.sources[0] / "audio")
    assert len(records) == 1 and note.startswith("1 of 2 clips have no caption. Encode rejects them")


def test_clips_that_train_on_the_empty_prompt_are_counted() -> None:
    bare = {"source": "bare.wav", "caption": "", "tags": {}}
    html = prompts_tab.render_preview([*RECORDS, bare], prompts_tab.build_settings(""), 2)
    assert "5 clips read, distinct prompts: 5; 1 of them train on the empty prompt" in html
