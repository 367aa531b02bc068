"""Requests: defaults by model, lists per item, and every refusal with its message."""

from typing import Any

import pytest

from sa3train.core.errors import RequestError
from sa3train.diffusion.masks import regions_mask
from sa3train.inference.request import ModelFacts, build_request, generated_frames, real_frames

BASE = ModelFacts("nano-base", "rectified_flow", 44100, 4096, 1292)
POST = ModelFacts("nano", "rf_denoiser", 44100, 4096, 1292)


def ask(facts: ModelFacts = BASE, **settings: Any) -> Any:
    return build_request(facts, **{"prompt": "a", **settings})


def test_defaults_follow_the_model() -> None:
    base, post = ask(BASE), ask(POST)
    assert (base.steps, base.guidance.cfg_scale, base.sampler_type) == (50, 7.0, "euler")
    assert (post.steps, post.guidance.cfg_scale, post.sampler_type) == (8, 1.0, "pingpong")
    assert base.duration == (30.0,)


def test_thirty_seconds_are_388_frames_and_the_longest_is_the_cap() -> None:
    assert generated_frames(BASE, 30.0) == 388
    assert generated_frames(BASE, 120.0) == 1292
    assert real_frames(BASE, 2.0, 88) == 86
    assert real_frames(BASE, 120.0, 1292) == 1292


@pytest.mark.parametrize("given", [{"prompt": ["a", "b", "c"]}, {"duration": [1.0, 2.0, 3.0]}, {"batch_size": 3}])
def test_one_list_or_the_batch_size_says_how_many(given: dict[str, Any]) -> None:
    request = ask(**given)
    assert request.batch_size == len(request.prompt) == len(request.duration) == 3


def test_an_item_without_negative_prompt_gets_an_empty_one() -> None:
    assert ask(prompt=["a", "b"], negative_prompt=[None, "harsh"]).negative_prompt == ("", "harsh")


def test_a_random_seed_is_drawn_and_said() -> None:
    seeds = {ask().seed for _ in range(4)}
    assert len(seeds) > 1
    assert ask(seed=7).seed == 7
    assert ask(own_generator=True).seed is None


def test_regions_become_pairs() -> None:
    request = ask(with_inpaint_audio=True, inpaint_mask_start_seconds=[4, 16], inpaint_mask_end_seconds=[8.0, 20.0])
    assert request.regions == ((4.0, 8.0), (16.0, 20.0))


def test_settings_ask_for_the_same_again() -> None:
    request = ask(prompt=["a", "b"], negative_prompt="n", duration=[1.5, 2.25], seed=3, sampler_type="dpmpp")
    again = {name: value for name, value in request.settings().items() if value is not None}
    assert build_request(BASE, **again) == request


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"duration": 0}, "duration must be above 0"),
    ({"duration": -3}, "duration must be above 0"),
    ({"duration": float("nan")}, "duration must be a number"),
    ({"duration": "long"}, "duration must be a number"),
    ({"duration": 120.1}, r"beyond nano-base, whose longest is 120\.0 s"),
    ({"duration": [5, 500]}, "500 s is beyond nano-base"),
    ({"prompt": None}, "prompt must be text"),
    ({"prompt": []}, "prompt is an empty list"),
    ({"prompt": ["a", "b"], "batch_size": 3}, "prompt has 2 values for a batch of 3"),
    ({"prompt": ["a", "b"], "duration": [1, 2, 3]}, "duration has 3 values for a batch of 2"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"steps": 0}, "steps must be at least 1"),
    ({"steps": 2.5}, "steps must be a whole number"),
    ({"seed": -2}, "seed must be at least -1"),
    ({"seed": 1, "own_generator": True}, "seed 1 would do nothing beside a generator"),
    ({"cfg_scale": float("inf")}, "cfg_scale must be a number"),
    ({"cfg_scale": True}, "cfg_scale must be a number"),
    ({"sampler_type": "heun"}, "unknown sampler 'heun'; choose one of euler"),
    ({"cfg_scale": 1, "negative_prompt": "x"}, "negative_prompt would do nothing at cfg_scale 1"),
    ({"cfg_scale": 1, "cfg_interval": (0.2, 0.8)}, "cfg_interval would do nothing"),
    ({"cfg_scale": 1, "apg_scale": 0.5, "scale_phi": 0.5}, "apg_scale, scale_phi would do nothing"),
    ({"cfg_scale": 1, "cfg_norm_threshold": 3.0}, "cfg_norm_threshold would do nothing"),
    ({"cfg_interval": (0.8, 0.2)}, "the lower noise level comes first"),
    ({"cfg_interval": (0.8, 1.2)}, "cfg_interval must be from 0 to 1"),
    ({"cfg_interval": 0.5}, "cfg_interval must be two noise levels"),
    ({"cfg_norm_threshold": -1}, "cfg_norm_threshold must be at least 0"),
    ({"scale_phi": 2}, "scale_phi must be from 0 to 1"),
    ({"init_noise_level": 0.5}, "init_noise_level 0.5 would do nothing without init audio"),
    ({"init_noise_level": 1.5, "with_init_audio": True}, "init_noise_level must be from 0 to 1"),
    ({"inpaint_mask_start_seconds": 1, "inpaint_mask_end_seconds": 2}, "times would do nothing without audio"),
    (
        {
            "keep_exact": 1,
            "with_inpaint_audio": True,
            "inpaint_mask_start_seconds": 1,
            "inpaint_mask_end_seconds": 2,
        },
        "keep_exact must be true or false, not 1",
    ),
    ({"chunked_decode": "no"}, "chunked_decode must be true or false, not 'no'"),
    ({"prompt": "koto \udcff"}, "prompt holds what is no character"),
    ({"keep_exact": True}, "keep_exact would do nothing without audio to inpaint"),
    ({"with_inpaint_audio": True}, "needs the start and the end"),
    ({"with_inpaint_audio": True, "inpaint_mask_start_seconds": 1}, "needs the start and the end"),
]
REGIONS: list[tuple[Any, Any, str]] = [
    ([1, 2], [3], "2 starts and 1 ends"),
    (3, 2, "from 3 to 2 s ends before it starts"),
    (2, 2, "ends before it starts"),
    (-1, 2, "starts before the audio"),
    (2, 31, "ends after the duration of 30 s"),
    ([1, 5], [2, 40], "from 5 to 40 s ends after the duration"),
    (1.0, 1.001, "would generate nothing: it lies between two latent frames"),
    ("a", 2, "inpaint start must be a number"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_cannot_be_done_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ask(**settings)


@pytest.mark.parametrize(("start", "end", "message"), REGIONS)
def test_impossible_regions_are_refused(start: Any, end: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ask(with_inpaint_audio=True, inpaint_mask_start_seconds=start, inpaint_mask_end_seconds=end)


def test_a_region_must_lie_within_every_items_duration() -> None:
    with pytest.raises(RequestError, match="ends after the duration of 5 s"):
        ask(
            duration=[20, 5],
            with_inpaint_audio=True,
            inpaint_mask_start_seconds=4,
            inpaint_mask_end_seconds=8,
        )


def test_the_post_trained_default_is_named_where_guidance_is_missing() -> None:
    with pytest.raises(RequestError, match="nano is post-trained, where 1 is the default"):
        ask(POST, negative_prompt="x")


@pytest.mark.parametrize("start", [0.0, 0.5, 1.01, 2.05])
@pytest.mark.parametrize("length", [0.01, 0.05, 0.09, 0.1])
def test_a_region_is_accepted_exactly_when_it_has_a_frame(start: float, length: float) -> None:
    mask = regions_mask([(start, start + length)], 4.0, 44100, 4096 * 44, 44)
    settings = {"with_inpaint_audio": True, "inpaint_mask_start_seconds": start, "duration": 4.0}
    if (mask[:43] == 0).any():
        ask(**settings, inpaint_mask_end_seconds=start + length)
    else:
        with pytest.raises(RequestError, match="would generate nothing"):
            ask(**settings, inpaint_mask_end_seconds=start + length)
