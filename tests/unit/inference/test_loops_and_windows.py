"""Loops whose end joins their start, and pieces of several windows: exact lengths, no seams, resumable, bounded."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.audio import tone
from helpers.golden import GOLDEN
from sa3train.audio.edit import FADE, blend_region
from sa3train.audio.metrics import measure_seam
from sa3train.core.errors import GenerationError
from sa3train.diffusion.samplers import SAMPLERS
from sa3train.inference import Generator, windows
from sa3train.inference.lengths import plan_windows
from sa3train.inference.outputs import GenerationOutput, describe_measured
from sa3train.inference.replay import build_command, prepare_replay, replay
from sa3train.inference.windows import remove_work_dir

QUICK: dict[str, Any] = {"steps": 2, "seed": 4, "cfg_scale": 1.0}
PIECE: dict[str, Any] = {**QUICK, "prompt": "hum", "duration": 4.0, "window": 2.0, "prompt_at": [(1.5, "bells")]}
LORA = GOLDEN / "plain" / "adapters" / "lora.safetensors"


class Stopped(Exception):
    pass


def repeat(
    generator: Generator, record: dict[str, Any], folder: Path, changes: dict[str, Any] | None = None
) -> GenerationOutput:
    return replay(generator, prepare_replay(record, folder, generator.facts, changes))


def test_a_loop_has_its_bars_to_the_sample_and_says_how_it_joins(gen: Generator) -> None:
    output = gen.generate(["hum", "bells"], bars=1, bpm=143.7, loop=True, tail=1.0, **QUICK)
    assert [audio_CN.shape[1] for audio_CN in output.audio] == [73653, 73653]
    assert all(found["seam_rank"] <= 1 for found in output.measured)
    assert "other joins" in describe_measured(output.measured[1])[0]
    again = gen.generate(["hum", "bells"], bars=1, bpm=143.7, loop=True, tail=1.0, **QUICK)
    assert torch.equal(output.audio[1], again.audio[1])


def test_a_loop_is_the_first_pass_but_for_the_join(gen: Generator) -> None:
    """It plays on behind the end, so that the first pass is a clip of its length and tail."""
    loop = gen.generate("hum", duration=2.0, loop=True, tail=1.0, **QUICK).audio[0]
    first = gen.generate("hum", duration=3.0, tail=0.0, **QUICK).audio[0]
    inside = slice(25_000, 62_000)
    assert torch.equal(loop[:, inside], first[:, inside])
    assert not torch.equal(loop[:, :5000], first[:, :5000])


@pytest.mark.parametrize("likeness", [1.0, 0.0])
def test_a_region_is_blended_in_without_a_step_or_a_dip(likeness: float) -> None:
    torch.manual_seed(0)
    audio_CN = torch.randn(2, 20_000)
    made_CN = audio_CN.clone() if likeness else torch.randn(2, 20_000)
    blended_CN = blend_region(audio_CN, made_CN, 8000, 12_000)
    assert torch.equal(blended_CN[:, 8000:12_000], made_CN[:, 8000:12_000])
    assert torch.equal(blended_CN[:, : 8000 - FADE], audio_CN[:, : 8000 - FADE])
    fade_CN = blended_CN[:, 8000 - FADE : 8000]
    assert float(fade_CN.square().mean()) == pytest.approx(1.0, abs=0.12)
    if likeness:
        assert torch.allclose(blended_CN, audio_CN, atol=1e-5)


def test_the_seam_is_measured_beside_the_other_joins() -> None:
    whole = torch.from_numpy(tone(1.0, 441.0, 44100, peak=0.5).T.copy())
    assert measure_seam(whole, 44100)["seam_click"] == pytest.approx(
        measure_seam(whole, 44100)["usual_click"], rel=0.01
    )
    cut = measure_seam(whole[:, :-30], 44100)
    assert cut["seam_click"] > 10 * cut["usual_click"]
    assert cut["seam_rank"] == 1
    faded = measure_seam(whole * torch.linspace(1, 0.001, whole.shape[1]), 44100)
    assert faded["seam_change_db"] > 3 * faded["usual_change_db"]


@pytest.mark.parametrize("done", [1, 2])
def test_an_interrupted_piece_is_continued_with_the_same_audio(gen: Generator, tmp_path: Path, done: int) -> None:
    whole, steps = gen.generate(**PIECE), list[tuple[int, int]]()

    def stop(step: int, total: int, *_: Any) -> None:
        steps.append((step, total))
        if step == 2 * done + 1:
            raise Stopped

    with pytest.raises(Stopped):
        gen.generate(**PIECE, callback=stop, work_dir=tmp_path / "x.wav.work")
    assert len(list(tmp_path.rglob("window*"))) == done
    assert gen.stack.position == 0
    steps.clear()
    again = gen.generate(
        **PIECE | {"seed": -1}, work_dir=tmp_path / "x.wav.work", callback=lambda *step: steps.append(step[:2])
    )
    assert steps == [(step, 6) for step in range(2 * done, 6)]
    assert torch.equal(again.audio[0], whole.audio[0])
    assert again.seeds == [4]
    with pytest.raises(GenerationError, match="another piece"):
        gen.generate(**PIECE | {"duration": 3.0}, work_dir=tmp_path / "x.wav.work")
    remove_work_dir(tmp_path / "x.wav.work", gen.generate("hum", duration=1.0, **QUICK).record)
    assert list(tmp_path.rglob("window*")), "the windows of another piece stay"
    remove_work_dir(tmp_path / "x.wav.work", again.record)
    assert not list(tmp_path.iterdir())


def test_windows_of_another_version_are_not_continued(tmp_path: Path) -> None:
    (tmp_path / windows.RECORD).write_text(json.dumps({"settings": {"seed": 4}}))
    with pytest.raises(GenerationError, match="another version"):
        windows.open_work_dir(tmp_path, dict.fromkeys(("model", "precision", "settings", "adapters")), has_seed=True)


@pytest.mark.parametrize(
    ("longest", "cuts", "turn"),
    [
        (1000, [300, 800], 43),  # no longer than some seconds
        (1000, [300, 340], 20),  # half of what the window before has of its own
        (1000, [300, 301], 0),
        (80, [300], 10),  # half of what is repeated
        (8, [300], 1),
    ],
)
def test_a_window_turns_into_the_next_one_but_leaves_it_time_of_its_own(
    longest: int, cuts: list[int], turn: int
) -> None:
    last = next(window for window in plan_windows(2000, longest, longest // 4, cuts) if window.new == cuts[-1])
    assert last.new - last.release == turn


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_piece_has_its_prompts_and_strengths_window_by_window(
    gen: Generator, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    asked = list[tuple[str, float, float]]()
    sample = windows.sample_latents

    def watch(generation: Any, stack: Any, start: Any, *rest: Any) -> Any:
        strength = stack._loaded[0].strengths(None, stack.position)[0]
        asked.append((generation.settings.prompt[0], strength, float(start.kept_B1T.mean())))
        made_BCT = sample(generation, stack, start, *rest)
        if start.held_BCT is not None:
            levels_T, moved_T = start.held_B1T[0, 0], (made_BCT - start.held_BCT)[0].abs().amax(dim=0)
            turn_T = (levels_T > 0) & (levels_T < 1)
            assert (levels_T.diff() >= 0).all()
            assert int(turn_T.sum()) == 2
            assert (levels_T[turn_T].diff() > 0).all()
            assert moved_T[levels_T == 0].max() == 0  # the end of the window before stays
            assert moved_T[turn_T].max() > 1e-3  # and turns into this one before the join
        return made_BCT

    monkeypatch.setattr(windows, "sample_latents", watch)
    gen.load_adapter(LORA, strength=(0.2, 1.0))
    output = gen.generate(**PIECE, sampler_type=sampler, return_latents=True)
    assert [(prompt, round(strength, 6)) for prompt, strength, _ in asked] == [
        ("hum", 0.2),
        ("bells", round(0.2 + 0.8 * 16 / 30, 6)),  # by time: its first new frame among those of all windows
        ("bells", 1.0),
    ]
    assert asked[0][2] == 0
    assert all(0 < kept < 0.3 for _, _, kept in asked[1:])
    assert output.record["adapters"][0]["strength"] == [0.2, 1.0]
    assert output.audio[0].shape == (2, 176_400)
    assert output.latents is not None
    assert output.latents.shape[-1] == 44
    with pytest.raises(GenerationError, match="changes from window to window.*window=1"):
        gen.generate("hum", duration=4.0, **QUICK)


def test_a_piece_is_decoded_in_blocks_without_steps(gen: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gen.generate(**PIECE).audio[0]
    monkeypatch.setattr(windows, "BLOCK_FRAMES", 20)
    blocks = gen.generate(**PIECE).audio[0]
    assert blocks.shape == whole.shape
    edge = (blocks - whole)[:, 20 * 4096 - 200 : 20 * 4096 + 2000]
    assert float(edge.diff(dim=1).abs().max()) <= 2 * float(whole.diff(dim=1).abs().max())


def test_bars_loops_and_pieces_are_made_again_from_their_sidecars(
    make: Callable[..., Generator], tmp_path: Path
) -> None:
    bars = {**QUICK, "bars": 1, "bpm": 143.7, "loop": True, "tail": 1.0, "peak": -3.0, "loudness": -20.0}
    for given in ({"prompt": "hum", **bars}, PIECE):
        output = make().generate(**given)
        output.save(tmp_path / "a.wav", overwrite=True)
        record = json.loads((tmp_path / "a.wav.json").read_text())
        again = repeat(make(), record, tmp_path)
        assert torch.equal(again.audio[0], output.audio[0])
        command = build_command(record, "b.wav")
        assert ("--bars" in command) != ("--duration" in command)
    assert command[command.index("--prompt-at") :][:3] == ["--prompt-at", "1.5", "bells"]
    longer = repeat(make(), record, tmp_path, {"bars": 2, "bpm": 240.0, "prompt_at": None, "window": 1.0})
    assert longer.audio[0].shape[1] == 88_200


def test_a_shorter_one_of_a_long_piece_is_generated_at_once(make: Callable[..., Generator], tmp_path: Path) -> None:

    def make_short() -> Generator:
        generator = make()
        generator.facts = replace(generator.facts, max_frames=48)
        return generator

    make_short().generate("hum", duration=7.0, tail=1.0, **QUICK).save(tmp_path / "a.wav")
    record = json.loads((tmp_path / "a.wav.json").read_text())
    assert record["settings"]["window"] is not None
    shorter = repeat(make_short(), record, tmp_path, {"duration": 2.0})
    assert torch.equal(shorter.audio[0], make_short().generate("hum", duration=2.0, tail=1.0, **QUICK).audio[0])
    assert repeat(make_short(), record, tmp_path, {"tail": 2.0}).audio[0].shape[1] == 7 * 44_100
