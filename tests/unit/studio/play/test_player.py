"""The page's generations: all modes with adapters, comparisons, and the command that repeats each."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sa3train.cli import generate
from sa3train.core.errors import AdapterError, GenerationError
from sa3train.core.files import relate_path
from sa3train.inference.outputs import GenerationOutput
from sa3train.inference.replay import build_command
from sa3train.inference.resolve import ModelFacts, resolve_settings
from sa3train.inference.settings import GenerationSettings
from sa3train.studio.play import cards, history, page
from sa3train.studio.play.player import Player, find_missing_contrast, plan_comparison
from sa3train.studio.play.settings import SIBLING_LABEL, STRENGTHS_LABEL, AdapterSettings, PlaySettings
from sa3train.studio.server.jobs import Cancelled, Job, Worker
from sa3train.studio.server.workspace import StudioError, Workspace

BOTH = (
    AdapterSettings("adapters/one.safetensors", 0.8, 0.4),
    AdapterSettings("adapters/two.safetensors", 0.5, None, (0.0, 0.9)),
)
SETTINGS = GenerationSettings("a <b>tone</b>", duration=1.0, seed=3, steps=2)
REQUEST = PlaySettings("nano", SETTINGS, precision="fp32", adapters=BOTH)
BARE = replace(REQUEST, adapters=())


def ask(base: PlaySettings = REQUEST, mode: str = "text", **settings: Any) -> PlaySettings:
    return replace(base, mode=mode, settings=replace(SETTINGS, **settings))


TONE = "audio/tone.wav"
REGIONS = {"inpaint_mask_start_seconds": (0.2, 0.6), "inpaint_mask_end_seconds": (0.5, 0.9)}
MODES = {
    "text": REQUEST,
    "restyle": ask(mode="restyle", prompt="-dark", init_audio=TONE, init_noise_level=0.6),
    "inpaint": ask(mode="inpaint", inpaint_audio=TONE, keep_exact=True, **REGIONS),
    "continue": ask(mode="continue", inpaint_audio=TONE, duration=2.5),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_plays_with_two_adapters_and_its_command_repeats_it(
    workspace: Workspace, player: Player, job: Job, mode: str, tmp_path: Path
) -> None:
    (result,) = player.play(MODES[mode], job)
    assert result.audio.is_file()
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    assert result.studio["mode"] == mode
    assert len(result.record["adapters"]) == 2
    again = tmp_path / "again.wav"
    command = build_command(result.record, str(again))
    assert command[0] == "sa3-generate"
    assert generate.main([*command[1:], "--device", "cpu"]) == 0
    assert again.read_bytes() == result.audio.read_bytes()


def test_the_sidecar_is_one_of_sa3_generate(workspace: Workspace, player: Player, job: Job, tmp_path: Path) -> None:
    (result,) = player.play(REQUEST, job)
    sidecar, again = workspace.history / f"{result.name}.wav.json", tmp_path / "again.wav"
    assert generate.main(["--from", str(sidecar), "-o", str(again), "--device", "cpu"]) == 0
    assert again.read_bytes() == result.audio.read_bytes()


@pytest.mark.parametrize("mode", ["restyle", "inpaint"])
def test_a_record_is_the_same_request(workspace: Workspace, player: Player, job: Job, mode: str) -> None:
    (result,) = player.play(MODES[mode], job)
    for entry in filter(None, result.record["inputs"].values()):  # as a command gives them, in another folder
        entry["path"] = relate_path(entry["path"], result.audio.parents[2])
    record = result.record | {"directory": "../.."}
    (repeated,) = player.play(PlaySettings.from_record(record, result.audio.parent), job)
    assert repeated.audio.read_bytes() == result.audio.read_bytes()


@pytest.mark.slow
def test_a_comparison_keeps_its_seed(workspace: Workspace, player: Player, job: Job) -> None:
    found = player.compare(ask(seed=-1), [0.0, 1.0], True, job)
    assert [result.studio["cell"] for result in found] == [
        *("nano, no adapter", "nano, strength ×1", "nano-base, no adapter", "nano-base, strength ×1")
    ]
    assert len({result.record["seed"] for result in found}) == 1
    assert len({result.audio.read_bytes() for result in found}) == 4
    (group,) = history.group_results(history.list_results(workspace))
    assert [result.name for result in group] == [result.name for result in found]
    assert "--columns: 2" in cards.render_card(workspace, group)


def test_a_comparison_is_checked_once_per_model_and_with_its_adapters(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, sent = list[PlaySettings](), list[str]()
    monkeypatch.setattr(page, "check_request", lambda _, request: checked.append(request))
    monkeypatch.setattr(Worker, "submit", lambda _, title, run: sent.append(title))
    page.PlayPage(workspace, Player(workspace), Worker()).compare(REQUEST, "-1, 0, 1", True)
    assert [(each.model, len(each.adapters)) for each in checked] == [("nano", 2), ("nano-base", 2)]
    assert len(sent) == 1


def test_comparisons_without_a_difference_are_refused() -> None:
    assert SIBLING_LABEL in (find_missing_contrast(BARE, [0.0, 1.0], False) or "")
    assert STRENGTHS_LABEL in (find_missing_contrast(REQUEST, [1.0], False) or "")
    assert find_missing_contrast(BARE, [1.0], True) is None
    assert len(plan_comparison(BARE, [0.0, 1.0], True)) == 2


def test_a_comparison_notes_what_it_does_not_use() -> None:
    cells = plan_comparison(ask(batch_size=2, cfg_scale=3.0), [0.0, 1.0], True)
    assert "variation" in cells[0].note
    assert "nano-base uses its own steps, cfg scale" in cells[3].note
    assert plan_comparison(REQUEST, [1.0], False)[0].note == ""


def test_a_batch_is_saved_item_by_item(workspace: Workspace, player: Player, job: Job, tmp_path: Path) -> None:
    found = player.play(ask(BARE, batch_size=2), job)
    assert [result.record["item"] for result in found] == [0, 1]
    assert cards.describe_levels(found[0]) != cards.describe_levels(found[1])
    settings = found[0].record["settings"] | {"bars": 4, "bpm": 97.5, "loop": True, "prompt_at": [[2.0, "choir"]]}
    looped = cards.render_card(workspace, [replace(found[0], record=found[0].record | {"settings": settings})])
    assert all(part in looped for part in ("loop of 4 bars at 97.5 BPM", "<audio controls loop", "from 2 s: choir"))
    command = build_command(found[1].record, str(tmp_path / "again.wav"))
    assert generate.main([*command[1:], "--device", "cpu"]) == 0
    assert (tmp_path / "again_1.wav").read_bytes() == found[1].audio.read_bytes()


def test_adapters_stay_loaded_and_leave_without_a_trace(workspace: Workspace, player: Player, job: Job) -> None:
    (before,) = player.play(BARE, job)
    reports = player.check_adapters(REQUEST, job)
    assert [len(report.matched) > 0 for report in reports] == [True, True]
    assert "one" in cards.render_load_reports(reports)
    (loaded,) = player.play(REQUEST, job)
    (after,) = player.play(BARE, job)
    assert before.audio.read_bytes() == after.audio.read_bytes() != loaded.audio.read_bytes()


def test_a_refused_adapter_leaves_none_behind(workspace: Workspace, player: Player, job: Job) -> None:
    (before,) = player.play(BARE, job)
    (workspace.sources[0] / "adapters" / "text.safetensors").write_text("no adapter at all")
    with pytest.raises(AdapterError):
        player.play(replace(REQUEST, adapters=(*BOTH, AdapterSettings("adapters/text.safetensors"))), job)
    (after,) = player.play(BARE, job)
    assert before.audio.read_bytes() == after.audio.read_bytes()


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"duration": 1e6}, {"negative_prompt": "x"}, {"cfg_interval": (1.0, 0.0)}]
)
def test_settings_out_of_range_are_the_librarys_errors(player: Player, job: Job, changes: dict[str, Any]) -> None:
    with pytest.raises(GenerationError):
        player.play(ask(**changes), job)


def test_a_wrong_file_as_source_is_refused(workspace: Workspace, player: Player, job: Job) -> None:
    (workspace.sources[0] / "audio" / "text.wav").write_text("no audio at all")
    with pytest.raises(ValueError, match=r"text\.wav"):
        player.play(ask(mode="restyle", init_audio="audio/text.wav"), job)


def test_a_cancelled_generation_leaves_nothing(workspace: Workspace, player: Player) -> None:
    messages: list[str] = []

    class Watched(Job):
        def report_progress(self, message: str, progress: float) -> None:
            messages.append(message)
            if message.startswith("step 1 "):
                self.state = "cancelled"
            super().report_progress(message, progress)

    with pytest.raises(Cancelled):
        player.play(ask(steps=50), Watched("test", lambda job: None, state="running"))
    assert not any(message.startswith("step 2 ") for message in messages)
    assert history.list_results(workspace) == []


def save(workspace: Workspace, *audio: torch.Tensor) -> list[history.Result]:
    prompt = ["<script>alert(1)</script>"] * len(audio)
    settings = GenerationSettings(
        prompt, duration=[clip.shape[1] / 44100 for clip in audio], steps=2, sampler_type="euler", cfg_scale=1.0, seed=1
    )
    record = {
        "model": {"name": "nano", "source": "nano", "fingerprint": "", "autoencoder": ""}, "precision": "fp32",
        "settings": resolve_settings(settings, ModelFacts("nano", "rf_denoiser", 44100, 4096, 64)).to_dict(),
        "inputs": {"init_audio": None, "inpaint_audio": None}, "adapters": [], "environment": {"threads": 1},
    }  # fmt: skip
    seeds, shares, warnings = [1] * len(audio), [0.0] * len(audio), ["<i>a warning</i>"]
    output = GenerationOutput(list(audio), 44100, seeds, None, shares, warnings, record)
    return history.save_results(workspace, output, {"mode": "text", "reports": []})


def test_texts_from_files_are_escaped(workspace: Workspace) -> None:
    (result,) = save(workspace, torch.zeros(2, 44100))
    shown = cards.render_card(workspace, [result])
    assert "<script>" not in shown
    assert "<i>" not in shown
    assert "silent" in shown


def test_the_history_skips_what_is_no_result(workspace: Workspace) -> None:
    saved = save(workspace, torch.rand(2, 44100), torch.rand(2, 44100))
    (workspace.history / "99999999-000000-ffff.wav.json").write_text("{")
    (workspace.history / "99999999-000001-ffff.wav.json").write_text(json.dumps({"made_by": "someone"}))
    names = sorted(result.name for result in history.list_results(workspace))
    assert names == sorted(result.name for result in saved)
    saved[0].audio.unlink()
    assert [result.name for result in history.list_results(workspace)] == [saved[1].name]
    with pytest.raises(StudioError, match="no result"):
        history.find_result(workspace, "../adapters/one")


def test_the_state_changes_with_the_results(workspace: Workspace) -> None:
    before = history.compute_state(workspace)
    save(workspace, torch.rand(2, 4410))
    assert history.compute_state(workspace) != before


@pytest.mark.parametrize("facts", [None, [], {"mode": "dance"}, {"measures": [1]}, {"reports": {}}, {"steps": 1}])
def test_a_damaged_result_leaves_the_others_on_the_page(workspace: Workspace, facts: Any) -> None:
    first, second = save(workspace, torch.rand(2, 4410), torch.rand(2, 4410))
    sidecar = workspace.history / f"{first.name}.wav.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"studio": facts}))
    results = history.list_results(workspace)
    assert [result.name for result in results] == [second.name, *([first.name] if facts is None else [])]
    assert cards.list_cards(workspace, history.group_results(results))
