"""The page's generations: all modes with adapters, comparisons, the history, and the command for each."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sa3train.cli import generate
from sa3train.core.errors import AdapterError, RequestError
from sa3train.inference.outputs import GenerationOutput
from sa3train.studio.play import cards, history
from sa3train.studio.play.player import Player, comparison, without_effect
from sa3train.studio.play.request import AdapterWish, Wish
from sa3train.studio.server.commands import generate_command
from sa3train.studio.server.jobs import Cancelled, Job
from sa3train.studio.server.workspace import StudioError, Workspace

BOTH = (
    AdapterWish("adapters/one.safetensors", 0.8, 0.4),
    AdapterWish("adapters/two.safetensors", 0.5, None, (0.0, 0.6)),
)
WISH = Wish("nano", "a <b>tone</b>", duration=1.0, seed=3, steps=2, precision="fp32", adapters=BOTH)
MODES = {
    "text": WISH,
    "restyle": replace(WISH, mode="restyle", source="audio/tone.wav", init_noise_level=0.6),
    "inpaint": replace(
        WISH, mode="inpaint", source="audio/tone.wav", regions=((0.2, 0.5), (0.6, 0.9)), keep_exact=True
    ),
    "continue": replace(WISH, mode="continue", source="audio/tone.wav", duration=2.5),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_plays_with_two_adapters_and_its_command_makes_the_same(
    workspace: Workspace, player: Player, job: Job, mode: str, tmp_path: Path
) -> None:
    (entry,) = player.play(MODES[mode], job)
    assert entry.audio.is_file()
    assert entry.picture.read_bytes().startswith(b"\x89PNG")
    assert entry.studio["mode"] == mode
    assert len(entry.record["adapters"]) == 2
    again = tmp_path / "again.wav"
    words = shlex.split(workspace.command(generate_command(entry.record, str(again))))
    assert words[0] == "sa3-generate"
    assert generate.main([*words[1:], "--device", "cpu"]) == 0
    assert again.read_bytes() == entry.audio.read_bytes()


def test_the_sidecar_is_one_of_sa3_generate(workspace: Workspace, player: Player, job: Job, tmp_path: Path) -> None:
    (entry,) = player.play(WISH, job)
    sidecar, again = workspace.history / f"{entry.name}.json", tmp_path / "again.wav"
    assert generate.main(["--from", str(sidecar), "-o", str(again), "--device", "cpu"]) == 0
    assert again.read_bytes() == entry.audio.read_bytes()


def test_again_with_these_settings_is_the_same_wish(workspace: Workspace, player: Player, job: Job) -> None:
    for wish in (MODES["restyle"], MODES["inpaint"]):
        (entry,) = player.play(wish, job)
        again = Wish.of_record(entry.record)
        (repeated,) = player.play(again, job)
        assert repeated.audio.read_bytes() == entry.audio.read_bytes()


def test_a_comparison_keeps_its_seed(workspace: Workspace, player: Player, job: Job) -> None:
    found = player.compare(replace(WISH, seed=-1), [0.0, 1.0], True, job)
    assert [entry.studio["cell"] for entry in found] == [
        *("nano, no adapter", "nano, strength ×1", "nano-base, no adapter", "nano-base, strength ×1")
    ]
    assert len({entry.record["seed"] for entry in found}) == 1
    assert len({entry.audio.read_bytes() for entry in found}) == 4
    (group,) = history.grouped(history.entries(workspace))
    assert [entry.name for entry in group] == [entry.name for entry in found]
    assert "--columns: 2" in cards.card(workspace, group)


def test_comparisons_without_a_difference_are_told() -> None:
    bare = replace(WISH, adapters=())
    assert "add an adapter" in (without_effect(bare, [0.0, 1.0], False) or "")
    assert "two strengths" in (without_effect(WISH, [1.0], False) or "")
    assert without_effect(bare, [1.0], True) is None
    assert len(comparison(bare, [0.0, 1.0], True)) == 2


def test_a_comparison_says_what_it_leaves_out() -> None:
    cells = comparison(replace(WISH, batch_size=2, cfg_scale=3.0), [0.0, 1.0], True)
    assert "variations" in cells[0].note
    assert "nano-base uses its own steps, cfg scale" in cells[3].note
    assert comparison(WISH, [1.0], False)[0].note == ""


def test_a_batch_is_kept_item_by_item(workspace: Workspace, player: Player, job: Job, tmp_path: Path) -> None:
    found = player.play(replace(WISH, batch_size=2, adapters=()), job)
    assert [entry.record["item"] for entry in found] == [0, 1]
    assert cards.measures_of(found[0]) != cards.measures_of(found[1])
    words = generate_command(found[1].record, str(tmp_path / "again.wav"))
    assert generate.main([*words[1:], "--device", "cpu"]) == 0
    assert (tmp_path / "again_1.wav").read_bytes() == found[1].audio.read_bytes()


def test_adapters_stay_loaded_and_leave_without_a_trace(workspace: Workspace, player: Player, job: Job) -> None:
    bare = replace(WISH, adapters=())
    (before,) = player.play(bare, job)
    reports = player.check(WISH, job)
    assert [len(report.matched) > 0 for report in reports] == [True, True]
    assert "one" in cards.load_reports(reports)
    (loaded,) = player.play(WISH, job)
    (after,) = player.play(bare, job)
    assert before.audio.read_bytes() == after.audio.read_bytes() != loaded.audio.read_bytes()


def test_a_refused_adapter_leaves_none_behind(workspace: Workspace, player: Player, job: Job) -> None:
    bare = replace(WISH, adapters=())
    (before,) = player.play(bare, job)
    (workspace.roots[0] / "adapters" / "text.safetensors").write_text("no adapter at all")
    with pytest.raises(AdapterError):
        player.play(replace(WISH, adapters=(*BOTH, AdapterWish("adapters/text.safetensors"))), job)
    (after,) = player.play(bare, job)
    assert before.audio.read_bytes() == after.audio.read_bytes()


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"duration": 1e6}, {"negative_prompt": "x"}, {"cfg_interval": (1.0, 0.0)}]
)
def test_settings_out_of_range_are_the_librarys_errors(player: Player, job: Job, changes: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        player.play(replace(WISH, **changes), job)  # type: ignore[arg-type]


def test_a_wrong_file_as_source_is_told(workspace: Workspace, player: Player, job: Job) -> None:
    (workspace.roots[0] / "audio" / "text.wav").write_text("no audio at all")
    with pytest.raises(ValueError, match=r"text\.wav"):
        player.play(replace(WISH, mode="restyle", source="audio/text.wav"), job)


def test_a_cancelled_generation_leaves_nothing(workspace: Workspace, player: Player) -> None:
    job = Job("test", lambda job: None, state="running")
    told: list[str] = []

    class Watched(Job):
        def tell(self, message: str, share: float) -> None:
            told.append(message)
            if message.startswith("step 1 "):
                self.state = "cancelled"
            super().tell(message, share)

    job = Watched("test", lambda job: None, state="running")
    with pytest.raises(Cancelled):
        player.play(replace(WISH, steps=50), job)
    assert not any(message.startswith("step 2 ") for message in told)
    assert history.entries(workspace) == []


def output(audio: Sequence[torch.Tensor]) -> GenerationOutput:
    settings = {
        "prompt": ["<script>alert(1)</script>"] * len(audio), "negative_prompt": None, "duration": [1.0] * len(audio),
        "steps": 2, "cfg_scale": 1.0, "cfg_interval": [0.0, 1.0], "cfg_norm_threshold": 0.0, "apg_scale": 1.0,
        "scale_phi": 0.0, "sampler_type": "euler", "seed": 1, "batch_size": len(audio), "init_noise_level": None,
        "inpaint_mask_start_seconds": None, "inpaint_mask_end_seconds": None,
        "keep_exact": False, "chunked_decode": None,
    }  # fmt: skip
    record = {
        "model": {"name": "nano", "source": "nano"}, "precision": "fp32", "settings": settings,
        "inputs": {"init_audio": None, "inpaint_audio": None}, "adapters": [], "environment": {},
    }  # fmt: skip
    return GenerationOutput(list(audio), 44100, [1] * len(audio), None, [0.0] * len(audio), ["<i>told</i>"], record)


def test_texts_from_files_are_shown_as_texts(workspace: Workspace) -> None:
    (entry,) = history.keep(workspace, output([torch.zeros(2, 44100)]), {"mode": "text", "reports": []})
    shown = cards.card(workspace, [entry])
    assert "<script>" not in shown
    assert "<i>" not in shown
    assert "silent" in shown


def test_the_history_passes_over_what_is_no_result(workspace: Workspace) -> None:
    kept = history.keep(
        workspace, output([torch.rand(2, 44100), torch.rand(2, 44100)]), {"mode": "text", "reports": []}
    )
    (workspace.history / "99999999-000000-ffff.json").write_text("{")
    (workspace.history / "99999999-000001-ffff.json").write_text(json.dumps({"made_by": "someone"}))
    assert sorted(entry.name for entry in history.entries(workspace)) == sorted(entry.name for entry in kept)
    kept[0].audio.unlink()
    assert [entry.name for entry in history.entries(workspace)] == [kept[1].name]
    with pytest.raises(StudioError, match="no result"):
        history.entry(workspace, "../adapters/one")


def test_results_are_told_apart_by_state(workspace: Workspace) -> None:
    before = history.state_of(workspace)
    history.keep(workspace, output([torch.rand(2, 4410)]), {"mode": "text", "reports": []})
    assert history.state_of(workspace) != before
