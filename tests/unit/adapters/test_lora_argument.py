"""The grammar of `--lora`: what is parsed, what is refused, and that what is written is read back."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa3train.adapters.lora_argument import LoraArgument, format_lora, parse_lora
from sa3train.core.errors import AdapterError

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
PATHS = st.text(st.sampled_from("ab1.-_=@:/\\ é"), min_size=1, max_size=12) | st.sampled_from(
    ["C:\\loras\\style.safetensors", "D:/a=b/c@0.1-0.5.safetensors", "runs/style", "user/repository", "x@1e-05-1"]
)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@given(
    PATHS.filter(lambda path: not Path(path).exists()),
    NUMBERS | st.tuples(NUMBERS, NUMBERS),
    st.none() | st.tuples(NUMBERS, NUMBERS),
)
def test_what_is_written_is_read_back(
    path: str, strength: float | tuple[float, float], interval: tuple[float, float] | None
) -> None:
    argument = LoraArgument(path, strength, interval)
    assert parse_lora(format_lora(argument)) == argument


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", LoraArgument("a.safetensors")),
        ("a.safetensors=0.8", LoraArgument("a.safetensors", 0.8)),
        ("a=b/c.safetensors=-1", LoraArgument("a=b/c.safetensors", -1.0)),
        ("a.safetensors@0.2-0.8", LoraArgument("a.safetensors", interval=(0.2, 0.8))),
        ("a@b.safetensors=1.5@0-0.5", LoraArgument("a@b.safetensors", 1.5, (0.0, 0.5))),
        ("a@5e-05-1e-1", LoraArgument("a", interval=(5e-05, 0.1))),
        ("a=1_0@.5-1.", LoraArgument("a", 10.0, (0.5, 1.0))),
        ("C:\\a\\b.safetensors=5e-05@0.1-0.5", LoraArgument("C:\\a\\b.safetensors", 5e-05, (0.1, 0.5))),
        ("runs/style@300", LoraArgument("runs/style@300")),
        ("runs/style@300=0.2..1@0-0.5", LoraArgument("runs/style@300", (0.2, 1.0), (0.0, 0.5))),
        ("pack@v1-final.safetensors", LoraArgument("pack@v1-final.safetensors")),
    ],
)
def test_examples(text: str, expected: LoraArgument) -> None:
    assert parse_lora(text) == expected


@pytest.mark.parametrize("name", ["take=2", "take@300", "take@0.1-0.5", "take=1@0-1"])
def test_an_existing_path_is_taken_whole(name: str) -> None:
    Path(name).write_text("")
    assert parse_lora(name) == LoraArgument(name)
    assert parse_lora(f"{name}=0.5@0-0.5") == LoraArgument(name, 0.5, (0.0, 0.5))


@pytest.mark.parametrize("text", ["a=loud", "a=nan", "a=0.1..x", "a@x-1", "a@0.1-y", "a=0.5@0.1-inf", "=1", "a=1@300"])
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(AdapterError, match=r"strength|noise level|no adapter"):
        parse_lora(text)


def test_a_strength_that_changes_is_refused_where_it_must_not() -> None:
    assert parse_lora("a=0.2..1").to_settings() == {"adapter": "a", "strength": (0.2, 1.0)}
    with pytest.raises(AdapterError, match="is not available for"):
        parse_lora("a=0.2..1").require_strength()


def test_settings_are_those_of_load_adapter() -> None:
    assert parse_lora("a=0.5@0-1").to_settings() == {"adapter": "a", "strength": 0.5, "interval": (0.0, 1.0)}
    assert parse_lora("a").to_settings() == {"adapter": "a", "strength": 1.0}
