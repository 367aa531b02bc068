"""Prompts: every setting has its effect, and one that could have none is an error."""

import random
import unicodedata
from collections import Counter
from typing import Any

import pytest

from sa3train.core.errors import ConfigError, DataError
from sa3train.data.loading.prompts import (
    PromptBuilder,
    PromptSettings,
    Template,
    fill_template,
    list_distinct_prompts,
    list_template_fields,
)

RECORD: dict[str, Any] = {
    "caption": "warm pad, slow, in A minor",
    "tags": {"genre": "ambient", "bpm": 90, "gain": -1.5},
    "source": "pack one/pads/warm_01.wav",
}
BARE: dict[str, Any] = {"caption": "a kick", "tags": {}, "source": "kick.wav"}


def builder(**settings: Any) -> PromptBuilder:
    texts = settings.pop("templates", None)
    if texts:
        settings["templates"] = tuple(Template(*text) if isinstance(text, tuple) else Template(text) for text in texts)
    return PromptBuilder(PromptSettings(**settings))


def many(make: PromptBuilder, record: dict[str, Any] = RECORD, count: int = 2000) -> Counter[str]:
    return Counter(make.build(record, random.Random(seed)) for seed in range(count))


def test_the_caption_as_it_is() -> None:
    assert many(builder()) == {RECORD["caption"]: 2000}


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("Genre: {genre}, BPM: {bpm}", "Genre: ambient, BPM: 90"),
        ("{ genre } {gain}", "ambient -1.5"),
        ("{folder}/{stem} of {path[0]}", "pads/warm_01 of pack one"),
        ("{path[-2]} {file} {path}", "pads warm_01.wav pack one/pads/warm_01.wav"),
        ("fixed {{text}}", "fixed {text}"),
    ],
)
def test_templates(text: str, prompt: str) -> None:
    assert many(builder(templates=[text]), count=3) == {prompt: 3}


def test_names_of_files_from_a_mac_are_composed() -> None:
    record = {"source": unicodedata.normalize("NFD", "pläne/café.wav"), "caption": "x", "tags": {}}
    assert many(builder(templates=["{stem}, {folder}"]), record, count=3) == {"café, pläne": 3}


def test_weights_are_kept() -> None:
    counts = many(builder(templates=[("{caption}", 3.0), ("{genre}", 1.0)]))
    assert 1400 < counts[RECORD["caption"]] < 1600
    assert counts["ambient"] == 2000 - counts[RECORD["caption"]]


def test_templates_that_a_clip_cannot_fill_are_left_to_others() -> None:
    make = builder(templates=["{caption}", "{genre} {bpm}"])
    assert many(make, BARE, 50) == {"a kick": 50}
    assert fill_template("{path[7]}", {"path": ("a",)}) is None
    assert fill_template("{genre[0]}", {"genre": "x"}) is None
    with pytest.raises(DataError, match=r"fits kick\.wav"):
        builder(templates=["{genre}"]).build(BARE, random.Random(0))


def test_the_trigger_has_its_probability_and_place() -> None:
    counts = many(builder(trigger="sks"))
    assert set(counts) == {"sks, warm pad, slow, in A minor"}
    counts = many(builder(trigger="sks", trigger_probability=0.25, trigger_position="back"))
    assert 430 < counts["warm pad, slow, in A minor, sks"] < 570
    assert counts["warm pad, slow, in A minor"] == 2000 - counts["warm pad, slow, in A minor, sks"]


def test_tags_are_shuffled_and_the_kept_ones_stay() -> None:
    counts = many(builder(shuffle_tags=True))
    assert len(counts) == 6
    assert min(counts.values()) > 250
    counts = many(builder(shuffle_tags=True, keep_tags=1))
    assert set(counts) == {"warm pad, slow, in A minor", "warm pad, in A minor, slow"}


def test_tags_are_dropped_with_their_probability() -> None:
    counts = many(builder(tag_dropout=0.3, keep_tags=1))
    assert set(counts) == {"warm pad, slow, in A minor", "warm pad, slow", "warm pad, in A minor", "warm pad"}
    assert 900 < counts["warm pad, slow, in A minor"] < 1060
    assert 130 < counts["warm pad"] < 230


def test_separators() -> None:
    record = {**RECORD, "caption": "a; b,c; d"}
    assert set(many(builder(tag_dropout=1.0, keep_tags=2, separator=";"), record, 5)) == {"a; b,c"}


def test_captions_are_dropped_whole() -> None:
    counts = many(builder(caption_dropout=0.1, trigger="sks"))
    assert set(counts) == {"", "sks, warm pad, slow, in A minor"}
    assert 150 < counts[""] < 250


def test_equal_seeds_give_equal_prompts() -> None:
    make = builder(shuffle_tags=True, tag_dropout=0.5, caption_dropout=0.1, trigger="x", trigger_probability=0.5)
    assert many(make, count=50) == many(make, count=50)


def test_held_out_clips_have_one_prompt() -> None:
    make = builder(
        templates=[("{genre}", 1.0), ("{caption}", 2.0)], shuffle_tags=True, trigger="x", trigger_probability=0.5
    )
    assert make.build_fixed(RECORD) == "x, warm pad, slow, in A minor"
    assert make.build_fixed(BARE) == "x, a kick"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"templates": (Template("{caption"),)}, "single '{'"),
        ({"templates": (Template("caption}"),)}, "single '}'"),
        ({"separator": ";"}, "separator has no effect"),
        ({"tag_dropout": 1.0}, "leaves no tag"),
        ({"trigger_probability": 0.5}, "without a trigger"),
        ({"trigger_position": "back"}, "without a trigger"),
        ({"trigger": "x", "trigger_probability": 0.0}, "no effect"),
        ({"keep_tags": 2}, "keep_tags"),
        ({"shuffle_tags": True, "separator": ""}, "separator must not be empty"),
        ({"shuffle_tags": True, "templates": (Template("{genre}"),)}, r"no template contains \{caption\}"),
    ],
)
def test_settings_without_effect_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"templates": ["{caption}", "{tempo}"]}, ConfigError, r"'{tempo}' has no effect: no clip has tempo. .*bpm"),
        ({"templates": ["{genre}"]}, DataError, r"1 of 2 clips fit no prompt template \(such as kick.wav\)"),
        ({"shuffle_tags": True, "separator": "|"}, ConfigError, "no caption has tags to shuffle"),
        ({"shuffle_tags": True, "keep_tags": 3}, ConfigError, "no caption has tags to shuffle"),
        ({"tag_dropout": 0.5, "keep_tags": 3}, ConfigError, "no caption has more than keep_tags"),
    ],
)
def test_settings_that_the_clips_give_no_effect(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        builder(**settings).check([RECORD, BARE])


def test_settings_with_effect_pass() -> None:
    builder(templates=["{caption}", "{genre}"], shuffle_tags=True, trigger="x").check([RECORD, BARE])
    builder(tag_dropout=0.5).check([RECORD, BARE])
    builder().check([])


def test_all_prompts_are_listed_when_they_are_finite() -> None:
    make = builder(templates=["{caption}", "{genre}"], trigger="x", trigger_probability=0.5, caption_dropout=0.1)
    listed = list_distinct_prompts(make, [RECORD, BARE])
    assert listed is not None
    drawn = set(many(make)) | set(many(make, BARE)) | {make.build_fixed(RECORD), make.build_fixed(BARE)}
    assert drawn == set(listed)
    assert list_distinct_prompts(builder(trigger="x"), [BARE]) == ["x, a kick"]
    assert list_distinct_prompts(builder(tag_dropout=0.1), [RECORD]) is None


def test_fields_are_found() -> None:
    assert list_template_fields("{{no}} {caption}, {path[0]} {big key}") == {"caption", "path", "big key"}


UNCAPTIONED: dict[str, Any] = {"caption": "", "tags": {}, "source": "snare.wav"}


def test_clips_without_captions_train_on_the_empty_prompt(caplog: pytest.LogCaptureFixture) -> None:
    make = builder(trigger="mystyle", templates=["{caption}", "{genre} music"])
    with caplog.at_level("INFO", "sa3train"):
        make.check([RECORD, UNCAPTIONED, BARE, UNCAPTIONED])
    assert caplog.text.count("2 of 4 clips, held out or not, have no caption") == 1
    assert many(make, UNCAPTIONED, 20) == {"": 20}
    assert make.build_fixed(UNCAPTIONED) == ""
    assert make.list_prompts(UNCAPTIONED) == [""]
    assert many(make, BARE, 20) == {"mystyle, a kick": 20}
    tagged = UNCAPTIONED | {"tags": {"genre": "house"}}
    assert many(make, tagged, 20) == {"mystyle, house music": 20}, "a template that fits is used"


def test_a_set_without_captions_trains() -> None:
    builder().check([UNCAPTIONED])
    with pytest.raises(ConfigError, match="trigger has no effect"):
        builder(trigger="mystyle").check([UNCAPTIONED])
