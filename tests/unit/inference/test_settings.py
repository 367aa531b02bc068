"""Settings: defaults by model, lists per item, every refusal, and every place that is made from the declarations."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from sa3train.core.config import list_settings
from sa3train.core.errors import GenerationError
from sa3train.diffusion.masks import build_region_mask
from sa3train.diffusion.samplers import SAMPLERS
from sa3train.inference.generator import Generator
from sa3train.inference.resolve import (
    ModelFacts,
    ResolvedSettings,
    count_generated_frames,
    count_real_frames,
    resolve_settings,
)
from sa3train.inference.settings import PER_ITEM_SETTINGS, SAMPLER_NAMES, SETTING_NAMES, GenerationSettings

README = Path(__file__).parents[3] / "inference" / "README.md"
BASE = ModelFacts("nano-base", "rectified_flow", 44100, 4096, 1292)
POST = ModelFacts("nano", "rf_denoiser", 44100, 4096, 1292)
INPAINT = {"inpaint_audio": "a.wav"}


def ask(facts: ModelFacts = BASE, has_generator: bool = False, **settings: Any) -> ResolvedSettings:
    return resolve_settings(GenerationSettings(**{"prompt": "a", **settings}), facts, has_generator=has_generator)


def inpaint(start: Any, end: Any, **settings: Any) -> ResolvedSettings:
    return ask(**INPAINT, inpaint_mask_start_seconds=start, inpaint_mask_end_seconds=end, **settings)


def test_the_keywords_of_generate_are_the_settings() -> None:
    keywords = list(inspect.signature(Generator.generate).parameters.values())[1:]
    by_run = {"return_latents", "generator", "callback", "work_dir"}
    settings = {each.name: (each.annotation, each.default) for each in keywords if each.name not in by_run}
    declared = {field.name: (field.type, field.default) for field in dataclasses.fields(GenerationSettings)}
    declared["prompt"] = (declared["prompt"][0], inspect.Parameter.empty)
    assert settings == declared


def test_the_sampler_names_are_those_of_the_table() -> None:
    assert tuple(SAMPLERS) == SAMPLER_NAMES


def test_the_readme_lists_every_setting() -> None:
    rows = ["| setting | flag | default | range | meaning |", "|---|---|---|---|---|"]
    for name, declared in list_settings(GenerationSettings).items():
        default = getattr(GenerationSettings, name, None)
        flag = ", ".join(f"`{flag}`" for flag in declared.flags or [f"--{name.replace('_', '-')}"])
        each_value = default if isinstance(default, tuple) else [default or 0.0]
        values = " ".join(each if isinstance(each, str) else f"{each:g}" for each in each_value)
        shown = "" if default is None or default is False else values
        allowed = declared.describe_range() if name != "seed" else "at least -1"
        rows.append(f"| `{name}` | {flag} | {shown} | {', '.join(declared.choices) or allowed} | {declared.help} |")
    assert "\n".join(rows) in README.read_text(encoding="utf-8")


def test_defaults_follow_the_model() -> None:
    base, post = ask(BASE), ask(POST)
    assert (base.steps, base.cfg_scale, base.sampler_type) == (50, 7.0, "euler")
    assert (post.steps, post.cfg_scale, post.sampler_type) == (8, 1.0, "pingpong")
    assert base.duration == (30.0,)


def test_thirty_seconds_are_388_frames_and_the_longest_is_the_cap() -> None:
    assert count_generated_frames(BASE, 30.0) == 388
    assert count_generated_frames(BASE, 120.0) == 1292
    assert count_real_frames(BASE, 2.0, 88) == 86
    assert count_real_frames(BASE, 120.0, 1292) == 1292


@pytest.mark.parametrize("given", [{"prompt": ["a", "b", "c"]}, {"duration": [1.0, 2.0, 3.0]}, {"batch_size": 3}])
def test_one_list_or_the_batch_size_says_how_many(given: dict[str, Any]) -> None:
    settings = ask(**given)
    assert settings.batch_size == len(settings.prompt) == len(settings.duration) == 3


def test_an_item_without_negative_prompt_gets_an_empty_one() -> None:
    assert ask(prompt=["a", "b"], negative_prompt=[None, "harsh"]).negative_prompt == ("", "harsh")


def test_a_random_seed_is_drawn_and_recorded() -> None:
    seeds = {ask().seed for _ in range(4)}
    assert len(seeds) > 1
    assert ask(seed=7).seed == 7
    assert ask(has_generator=True).seed is None


def test_regions_become_pairs() -> None:
    assert inpaint([4, 16], [8.0, 20.0]).regions == ((4.0, 8.0), (16.0, 20.0))


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": ["a", "b"], "negative_prompt": "n", "duration": [1.5, 2.25], "sampler_type": "dpmpp"},
        {"bars": 3, "bpm": 97.3, "meter": "7/8", "loop": True},
        {"duration": 500, "prompt_at": {60: "b"}},
    ],
)
def test_recorded_settings_resolve_to_the_same(given: dict[str, Any]) -> None:
    settings = ask(**given, seed=3)
    assert resolve_settings(GenerationSettings.from_dict(settings.to_dict()), BASE) == settings
    with pytest.raises(GenerationError, match="cfg_rescale"):
        GenerationSettings.from_dict(settings.to_dict() | {"cfg_rescale": 0.5})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"duration": 0}, "duration=0.*above 0"),
    ({"duration": -3}, "duration=-3.*above 0"),
    ({"duration": 1e-9}, "duration"),
    ({"duration": float("nan")}, "duration must be a number"),
    ({"duration": "long"}, "duration must be a number"),
    ({"duration": 3600.1}, r"duration=3600\.1 .*at most 3600"),
    ({"duration": [5, 500]}, "duration=500 .*nano-base.*one item at a time"),
    ({"duration": 500, "init_audio": "a.wav"}, "duration=500 .*no init_audio"),
    ({"bars": 2}, "bars=2 needs a tempo"),
    ({"meter": "3/4"}, "meter=3/4 has no effect without bars"),
    ({"bars": 2, "bpm": 120, "duration": 5}, "both set the length"),
    ({"bars": 2, "bpm": 120, "meter": "4/5"}, "meter=4/5 must be"),
    ({"bars": 10_000, "bpm": 20}, "bars=10000 last"),
    ({"loop": True, "duration": 0.5}, "duration=0.5 is too short for loop"),
    ({"loop": True, "duration": 500}, "loop=True does not go with what is generated in windows"),
    ({"loop": True, **INPAINT, "inpaint_mask_start_seconds": 1, "inpaint_mask_end_seconds": 2}, "loop=True does not"),
    ({"tail": -1}, "tail=-1.*from 0 to 60"),
    ({"window": 119}, "window=119 must be from"),
    ({"prompt_at": [(0, "b")]}, "time 0"),
    ({"prompt_at": [(4, "b"), (4, "c")]}, "4 s twice"),
    ({"prompt_at": "b"}, "prompt_at must be pairs"),
    ({"prompt_at": [(4, "b"), (4.01, "c")]}, "4 and 4.01 lie in the same 0.093 s"),
    ({"prompt_at": [(40, "b")]}, "prompt_at=40 lies outside"),
    ({"peak": 1}, "peak=1.*from -40 to 0"),
    ({"prompt": None}, "prompt must be text"),
    ({"prompt": ["a", None]}, "prompt must be text"),
    ({"prompt": []}, "prompt is an empty list"),
    ({"prompt": ["a", "b"], "batch_size": 3}, "prompt has 2 values for 3 items"),
    ({"prompt": ["a", "b", "c"], "batch_size": 2}, "batch_size=2"),
    ({"prompt": ["a", "b"], "duration": [1, 2, 3]}, "prompt has 2 values for 3 items"),
    ({"batch_size": 0}, "batch_size=0 must be from 1 to 10000"),
    ({"steps": 0}, "steps=0 must be from 1 to 1000"),
    ({"steps": 2.5}, "steps must be a whole number"),
    ({"seed": -2}, "seed=-2 must be from -1"),
    ({"seed": 1, "has_generator": True}, "seed=1 has no effect"),
    ({"cfg_scale": float("inf")}, "cfg_scale must be a number"),
    ({"cfg_scale": True}, "cfg_scale must be a number"),
    ({"sampler_type": "heun"}, "sampler_type=heun.*euler"),
    ({"cfg_scale": 1, "negative_prompt": "x"}, "negative_prompt has no effect with cfg_scale=1"),
    ({"cfg_scale": 1, "cfg_interval": (0.2, 0.8)}, "cfg_interval has no effect"),
    ({"cfg_scale": 1, "apg_scale": 0.5, "scale_phi": 0.5}, "apg_scale, scale_phi have no effect"),
    ({"cfg_scale": 1, "cfg_norm_threshold": 3.0}, "cfg_norm_threshold has no effect"),
    ({"cfg_interval": (0.8, 0.2)}, "cfg_interval.*lower one first"),
    ({"cfg_interval": (0.8, 1.2)}, "cfg_interval.*from 0 to 1"),
    ({"cfg_interval": 0.5}, "cfg_interval.*two noise levels"),
    ({"cfg_norm_threshold": -1}, "cfg_norm_threshold=-1.*from 0"),
    ({"scale_phi": 2}, "scale_phi=2.*from 0 to 1"),
    ({"init_noise_level": 0.5}, "init_noise_level=0.5 has no effect without init_audio"),
    ({"init_noise_level": 1.5, "init_audio": "a.wav"}, "init_noise_level=1.5.*from 0 to 1"),
    ({"inpaint_mask_start_seconds": 1, "inpaint_mask_end_seconds": 2}, "no effect without inpaint_audio"),
    ({"keep_exact": 1, **INPAINT}, "keep_exact must be true or false, not 1"),
    ({"chunked_decode": "no"}, "chunked_decode must be true or false, not 'no'"),
    ({"prompt": "koto \udcff"}, "prompt.*valid text"),
    ({"keep_exact": True}, "keep_exact.*no effect without inpaint_audio"),
    (INPAINT, "inpaint_mask_start_seconds and inpaint_mask_end_seconds"),
    ({**INPAINT, "inpaint_mask_start_seconds": 1}, "inpaint_mask_start_seconds and inpaint_mask_end_seconds"),
]
REFUSED += [
    ({"steps": 1001}, "steps=1001.*from 1 to 1000"),
    ({"batch_size": 10**9}, "batch_size=1000000000.*from 1 to"),
    ({"seed": 2**63}, "seed=9223372036854775808.*from -1"),
    ({"seed": 10**400}, "seed="),
    ({"duration": 1e308}, "duration"),
    ({"duration": 10**400}, "duration must be a number"),
    ({"duration": [1.0, float("inf")]}, "duration must be a number"),
    ({"cfg_scale": -1e30}, "cfg_scale=-1e.30.*from -1000 to 1000"),
    ({"apg_scale": 1e4}, "apg_scale=10000.*from -1000 to 1000"),
    ({"cfg_interval": (0.5,)}, "cfg_interval=.*2 items"),
    ({"init_audio": ""}, "init_audio= must not be empty"),
    ({"init_audio": "x" * 300}, "init_audio=.*must be a path"),
    ({"inpaint_audio": "a/" * 3000}, "inpaint_audio=.*must be a path"),
    ({"prompt": "x" * 10_001}, "prompt=.*10000 characters"),
    ({"prompt": "a\0b"}, "prompt=.*NUL"),
    ({**INPAINT, "inpaint_mask_start_seconds": 1e12, "inpaint_mask_end_seconds": 2e12}, "inpaint_mask_start_seconds="),
]
REGIONS: list[tuple[Any, Any, str]] = [
    ([1, 2], [3], "2 values of inpaint_mask_start_seconds and 1"),
    ([], [], "0 values"),
    (3, 2, "from 3 to 2 s ends before it starts"),
    (2, 2, "ends before it starts"),
    (-1, 2, "inpaint_mask_start_seconds=-1"),
    (2, 31, "ends after the duration of 30 s"),
    ([1, 5], [2, 40], "from 5 to 40 s ends after the duration"),
    (1.0, 1.001, "between two latent frames"),
    ("a", 2, "inpaint_mask_start_seconds must be a number"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        ask(**settings)


@pytest.mark.parametrize(("start", "end", "message"), REGIONS)
def test_impossible_regions_are_refused(start: Any, end: Any, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        inpaint(start, end)


def test_a_region_must_lie_within_every_items_duration() -> None:
    with pytest.raises(GenerationError, match="ends after the duration of 5 s"):
        inpaint(4, 8, duration=[20, 5])


def test_the_post_trained_default_is_named_where_guidance_is_missing() -> None:
    with pytest.raises(GenerationError, match="the default of nano, which is post-trained"):
        ask(POST, negative_prompt="x")


@pytest.mark.parametrize("name", [name for name in SETTING_NAMES if name not in PER_ITEM_SETTINGS])
def test_settings_are_kept_as_given(name: str) -> None:
    """Every setting reaches the resolved settings and, but for audio, the sidecar."""
    values: dict[str, Any] = {
        "batch_size": 2, "seed": 9, "steps": 3, "sampler_type": "rk4", "cfg_scale": 4.0, "cfg_interval": (0.1, 0.9),
        "cfg_norm_threshold": 2.0, "scale_phi": 0.5, "apg_scale": 0.5, "init_audio": "i.wav", "init_noise_level": 0.5,
        "inpaint_audio": "a.wav", "inpaint_mask_start_seconds": (1.0,), "inpaint_mask_end_seconds": (2.0,),
        "keep_exact": True, "chunked_decode": False, "loudness": -14.0, "peak": -1.0, "tail": 2.0,
    }  # fmt: skip
    if name in ("prompt_at", "window"):
        values = {"prompt_at": ((2.0, "b"), (4.0, "c")), "window": 9.0}
    if name in ("bars", "bpm", "meter", "loop"):
        values = {"bars": 3, "bpm": 97.3, "meter": "7/8", "loop": True}
    resolved = ask(**values)
    assert getattr(resolved, name) == values[name]
    recorded = resolved.to_dict().get(name)
    assert recorded == json.loads(json.dumps(values[name])) or "audio" in name


@pytest.mark.parametrize("start", [0.0, 0.5, 1.01, 2.05])
@pytest.mark.parametrize("length", [0.01, 0.05, 0.09, 0.1])
def test_a_region_is_accepted_exactly_when_it_has_a_frame(start: float, length: float) -> None:
    mask = build_region_mask([(start, start + length)], 4.0, 44100, 4096 * 44, 44)
    if (mask[:43] == 0).any():
        inpaint(start, start + length, duration=4.0)
    else:
        with pytest.raises(GenerationError, match="between two latent frames"):
            inpaint(start, start + length, duration=4.0)
