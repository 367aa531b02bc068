"""What the form asks for is checked before anything is loaded, and a request fills the form."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa3train.core.errors import GenerationError, SA3Error
from sa3train.inference.settings import SETTING_NAMES, GenerationSettings
from sa3train.studio.play.form import FORM_SETTINGS, MAX_VARIATIONS, describe_waveform, fill_form, read_form
from sa3train.studio.play.settings import AdapterSettings, PlaySettings, parse_regions, parse_strengths, round_seconds
from sa3train.studio.server.widgets import get_label
from sa3train.studio.server.workspace import StudioError, Workspace

PLAIN = PlaySettings("nano", GenerationSettings("a tone", duration=1.0))
TONE = "audio/tone.wav"
REGIONS = {"inpaint_mask_start_seconds": (0.1, 0.6), "inpaint_mask_end_seconds": (0.4, 0.9)}


def ask(mode: str = "text", changes: dict[str, Any] | None = None, **settings: Any) -> PlaySettings:
    return replace(PLAIN, mode=mode, settings=replace(PLAIN.settings, **settings), **(changes or {}))


def test_a_row_of_the_rack_is_an_adapter() -> None:
    row = {
        "path": "a.safetensors", "strength": 0.5, "conditioner_strength": "", "low": 0.2, "high": 0.8,
        "exclude_layers": "ff", "allow_partial": True,
    }  # fmt: skip
    adapter = AdapterSettings.from_row(row)
    assert adapter == AdapterSettings("a.safetensors", 0.5, None, (0.2, 0.8), "ff", True)
    assert AdapterSettings.from_row(adapter.to_row()) == adapter


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"path": ""}, "no file"),
        ({"path": "a", "strength": "loud"}, "Adapter 1: Strength must be a number"),
        ({"path": "a", "strength": ""}, "Adapter 1: Strength is empty"),
        ({"path": "a", "low": True}, "number"),
        ({"path": "a", "low": 0.9, "high": 0.2}, "Adapter 1: Min noise level 0.9"),
        ({"path": "a", "high": 1.5}, "between 0 and 1"),
    ],
)
def test_unusable_rows_are_refused(row: dict[str, object], message: str) -> None:
    with pytest.raises((StudioError, GenerationError), match=message):
        AdapterSettings.from_row(row)


def test_a_request_is_resolved(workspace: Workspace) -> None:
    resolved = replace(PLAIN, adapters=(AdapterSettings("adapters/one.safetensors"),)).resolve(workspace)
    assert resolved.settings.seed >= 0
    assert resolved.adapters[0].path == str(workspace.sources[0] / "adapters" / "one.safetensors")
    with pytest.raises(StudioError, match="Adapter 2: .*There is no"):
        replace(resolved, adapters=(*resolved.adapters, AdapterSettings("nowhere"))).resolve(workspace)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask(prompt="  "), "Prompt"),
        (ask("restyle"), "Source audio"),
        (ask("restyle", init_audio="../x.wav"), "outside"),
        (ask("inpaint", inpaint_audio="audio/none.wav"), "audio file"),
        (ask("inpaint", inpaint_audio=TONE), "region"),
        (ask("continue", inpaint_audio=TONE), "duration"),
        (ask(changes={"adapters": (AdapterSettings("/etc/passwd"),)}), "outside"),
        (ask(changes={"adapters": (AdapterSettings("adapters/none.safetensors"),)}), "no adapter"),
        (ask(changes={"model": "../models/mine"}), "outside"),
        (ask(changes={"model": "medum"}), "model folder .* Did you mean medium"),
    ],
)
def test_impossible_requests_are_refused(workspace: Workspace, request_: PlaySettings, message: str) -> None:
    with pytest.raises(SA3Error, match=message):
        request_.resolve(workspace)


def test_a_continuation_starts_where_the_audio_ends(workspace: Workspace) -> None:
    settings = ask("continue", inpaint_audio=TONE, duration=3.0).resolve(workspace).settings
    assert (settings.inpaint_mask_start_seconds, settings.inpaint_mask_end_seconds) == (2.0, 3.0)


def test_source_audio_gets_its_full_path(workspace: Workspace) -> None:
    full = str(workspace.sources[0] / TONE)
    assert ask("restyle", init_audio=TONE).resolve(workspace).settings.init_audio == full
    settings = ask("inpaint", inpaint_audio=TONE, **REGIONS).resolve(workspace).settings
    assert (settings.inpaint_audio, settings.inpaint_mask_start_seconds) == (full, (0.1, 0.6))


def test_strengths_are_scaled_together() -> None:
    request = replace(PLAIN, adapters=(AdapterSettings("a", 0.8, 0.4), AdapterSettings("b")))
    half = request.scale_adapters(0.5).adapters
    assert [(each.strength, each.conditioner_strength) for each in half] == [(0.4, 0.2), (0.5, None)]
    assert request.scale_adapters(0).adapters == ()


def test_the_sibling_uses_its_own_sampling() -> None:
    sibling = ask(steps=3, cfg_scale=4.0, negative_prompt="noise").switch_to_sibling()
    assert (sibling.model, sibling.settings) == ("nano-base", PLAIN.settings)
    with pytest.raises(StudioError, match="sibling"):
        replace(PLAIN, model="/some/folder").switch_to_sibling()


@given(st.integers(1, 44100 * 400))
def test_a_length_has_no_sample_less_and_none_more(samples: int) -> None:
    seconds = round_seconds(samples / 44100)
    assert int(seconds * 44100) == samples
    assert len(f"{seconds:.10g}".partition(".")[2]) <= 6


def test_lists_of_strengths_are_parsed() -> None:
    assert parse_strengths("1, 0; 0.5 ,1") == [0.0, 0.5, 1.0]
    for text in ("", "loud", ",".join(map(str, range(9))), "1e9"):
        with pytest.raises(StudioError, match="list of numbers" if text == "loud" else "Strength multipliers"):
            parse_strengths(text)


def test_regions_must_be_numbers() -> None:
    assert parse_regions([[0, "1.5"]]) == ((0.0, 1.5),)
    with pytest.raises(StudioError, match="^Start of region 1 is empty"):
        parse_regions([[None, 1]])
    with pytest.raises(StudioError, match="^End of region 2 is empty"):
        parse_regions([[0, 1], [2, ""]])
    with pytest.raises(GenerationError, match="^End of region 1 must be a number"):
        parse_regions([[0, "x"]])


def test_every_setting_has_a_field() -> None:
    elsewhere = {"cfg_interval", "init_audio", "inpaint_audio", *REGIONS}
    assert {*FORM_SETTINGS, *elsewhere} == set(SETTING_NAMES)


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("text", {}),
        ("restyle", {"init_audio": TONE, "init_noise_level": 0.7}),
        ("inpaint", {"inpaint_audio": TONE, "keep_exact": True, **REGIONS}),
        ("continue", {"inpaint_audio": TONE, "keep_exact": True}),
    ],
)
def test_the_form_holds_every_setting(workspace: Workspace, mode: str, settings: dict[str, Any]) -> None:
    all_settings = GenerationSettings(
        "a tone", negative_prompt="noise", duration=1.5, seed=7, batch_size=2, steps=3, cfg_scale=2.5,
        sampler_type="dpmpp", cfg_interval=(0.1, 0.9), cfg_norm_threshold=1.0, scale_phi=0.2, apg_scale=0.5,
        chunked_decode=True, tail=2.0, loudness=-14.0, peak=-1.0, window=8.0, loop=True, meter="3/4",
        prompt_at=[(1.0, "drums")], **settings,
    )  # fmt: skip
    adapter = AdapterSettings("adapters/one.safetensors", 0.5, 0.2, (0.1, 0.6), "ff", True, 0.9)
    request = PlaySettings("nano-base", all_settings, mode, "fp32", (adapter,))
    assert read_form(fill_form(workspace, request)) == request


def test_bars_take_the_place_of_the_duration_and_later_prompts_are_lines(workspace: Workspace) -> None:
    bars = fill_form(workspace, PLAIN) | {"bars": "4", "bpm": "97.3", "prompt_at": "8: a choir\n\n4 : drums: loud"}
    settings = read_form(bars).settings
    assert (settings.bars, settings.bpm, settings.duration) == (4, 97.3, GenerationSettings.duration)
    assert settings.prompt_at == ((4.0, "drums: loud"), (8.0, "a choir"))
    for wrong in ("a choir", "ten: a choir", ": a choir", "8:", "nan: a choir"):
        with pytest.raises(SA3Error, match="Later prompts"):
            read_form(bars | {"prompt_at": wrong})


@pytest.mark.parametrize("value", [-9, 1.5, "x", "nan", float("nan"), float("inf"), 1e308, "1e400", True])
@pytest.mark.parametrize("name", ["steps", "batch_size", "seed"])
def test_a_wrong_number_names_its_field(workspace: Workspace, name: str, value: Any) -> None:
    with pytest.raises(SA3Error, match=rf"{name}|{get_label(GenerationSettings, name)[:4]}"):
        read_form(fill_form(workspace, PLAIN) | {name: value})


def test_more_variations_than_the_form_allows_start_nothing(workspace: Workspace) -> None:
    values, field = fill_form(workspace, PLAIN), get_label(GenerationSettings, "batch_size")
    assert read_form(values | {"batch_size": MAX_VARIATIONS}).settings.batch_size == MAX_VARIATIONS
    with pytest.raises(StudioError, match=rf"{field} must be at most {MAX_VARIATIONS}, not 10,000"):
        read_form(values | {"batch_size": 10_000})


def test_the_waveform_says_what_is_generated(workspace: Workspace) -> None:
    def get_note(mode: str, duration: float) -> str:
        return str(describe_waveform(workspace, TONE, mode, duration)["note"])

    assert "marked region" in get_note("continue", 3.0)
    assert "above 2.00 s" in get_note("continue", 1.0)
    assert "All of the audio" in get_note("restyle", 3.0)
    assert "marked regions are regenerated" in get_note("inpaint", 3.0)


def test_empty_numbers_are_defaults(workspace: Workspace) -> None:
    values = fill_form(workspace, PLAIN) | {"seed": None, "cfg_interval_min": None, "apg_scale": None, "steps": ""}
    assert read_form(values) == PLAIN
