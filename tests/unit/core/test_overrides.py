"""Whatever text people type comes back unchanged from Hydra's parser and OmegaConf."""

import os
from pathlib import PureWindowsPath
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sa3train.core.errors import ConfigError
from sa3train.core.overrides import (
    escape_interpolations,
    format_override,
    format_value,
    is_quoted,
    unescape_interpolations,
)

PARSER = OverridesParser.create()
TRICKY = st.text(st.sampled_from("\\${}\"'[]():=,# \t\n.~?*|@;&%+-/aé🙂01eE_"), max_size=30)
WORDS = st.sampled_from(
    ["???", "null", "true", "No", "nan", "-inf", "1e3", "0x1", "1_000", "", "${oc.env:HOME}", "${hydra:runtime.cwd}",
     "\\${x}", "$\\{x}", "C:\\clips", "\\\\server\\x\\", "~/x", "../x", "a,b", "choice(a,b)", "glob(*)", "x ", "[a]"]
)  # fmt: skip
TEXT = st.one_of(TRICKY, WORDS, st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none())
KEYS = st.from_regex(r"[a-z_][a-z0-9_.-]{0,6}", fullmatch=True).filter(
    lambda key: key not in ("true", "false", "null", "nan", "inf")
)
VALUES = st.recursive(
    st.one_of(TEXT, NUMBERS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=8,
)


def compose(override: str) -> Any:
    """Return what a configuration holds after an override, as the commands read it."""
    parsed = PARSER.parse_override(override)
    assert not parsed.is_sweep_override()
    config = OmegaConf.create({"a": None})
    OmegaConf.update(config, "a", parsed.value())
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return resolved["a"]


@given(VALUES)
@settings(max_examples=400, deadline=None)
@example(["a,b", {"text": 'say "x" \\', "weight": 0.5}])
@pytest.mark.slow
def test_every_value_comes_back_as_it_was(value: Any) -> None:
    back = compose(format_override("a", value))
    assert back == value and type(back) is type(value)


@given(TEXT)
@settings(max_examples=300, deadline=None)
def test_escaped_text_survives_a_file_of_settings(text: str) -> None:
    config = OmegaConf.create({"a": [escape_interpolations(text)]})
    assert OmegaConf.to_container(config, resolve=True) == {"a": [text]}
    assert unescape_interpolations(escape_interpolations(text)) == text


def test_plain_words_and_paths_stay_readable() -> None:
    assert format_override("model", "small-music") == "model=small-music"
    assert format_override("data", "/home/me/latents.v2") == "data=/home/me/latents.v2"
    assert format_value(["dc", "loudness"]) == "[dc,loudness]" and format_value(PureWindowsPath("C:/a")) == '"C:\\a"'
    assert is_quoted('"a \\" b"') and is_quoted("'a'") and not is_quoted('"a" b "c"') and not is_quoted('"a\\"')


def test_the_environment_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SA3_SECRET", "secret")
    for text in ("${oc.env:SA3_SECRET}", "\\${oc.env:SA3_SECRET}", "\\\\${oc.env:SA3_SECRET}", '"${oc.env:SA3_SECRET}'):
        assert os.environ["SA3_SECRET"] not in compose(format_override("a", text))


@pytest.mark.parametrize("value", [{"a b": 1}, {"null": 1}, {1: 2}, b"x", object()])
def test_what_the_grammar_cannot_say_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="setting"):
        format_value(value)
