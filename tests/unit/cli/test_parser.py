"""A misused flag is one line that says what was meant, and exit code 2."""

from pathlib import Path

import pytest

from sa3train.cli import adapter, data, generate_args
from sa3train.cli.parser import name_flags


@pytest.mark.parametrize(
    ("parser", "words", "message"),
    [
        (adapter, ["convert", "a", "b", "--to", "comfi"], "Did you mean comfy?"),
        (adapter, ["fold"], "invalid choice"),
        (adapter, [], "required: COMMAND"),
        (adapter, ["resize", "a", "b", "--rank", "2", "--explained-variance", "0.5"], "not allowed with"),
        (adapter, ["scale", "a", "b", "loud"], "needs a number, not 'loud'"),
        (data, ["audit", "my", "new", "pack"], 'Quote a value with spaces: "my new pack"'),
        (data, ["audit", "x", "--capitons=optional"], "Did you mean --captions?"),
        (generate_args, ["-p", "warm", "pads"], '-p "warm pads", or for 2 prompts: -p warm -p pads'),
        (generate_args, ["-p", "x", "--chunked-decode", "--no-chunked-decode"], "not allowed with"),
        (generate_args, ["-p", "x", "--conditioner-strength", "1"], "applies to the --lora before it"),
        (generate_args, ["-p", "x", "--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_what_was_meant(
    parser: object, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("my new pack").mkdir()
    with pytest.raises(SystemExit) as stopped:
        parser.build_parser().parse_args(words)  # type: ignore[attr-defined]
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
    assert error.startswith("error: ") and "--help" in error


def test_several_prompts_of_words_are_several_prompts() -> None:
    words = ["-p", "warm pads", "rain", "-p", "kick", "--negative-prompt", "", "hiss"]
    found = generate_args.build_parser().parse_args(words)
    assert (found.prompt, found.negative_prompt) == (["warm pads", "rain", "kick"], ["", "hiss"])


def test_messages_name_flags() -> None:
    flags = {"model": "--model", "allow_loss": "--allow-loss", "rank": "--rank"}
    text = "Set model=NAME, rank=R and allow_loss=True, or leave rank and allow_loss out: see a/model=x."
    expected = "Set --model NAME, --rank R and --allow-loss, or leave rank and --allow-loss out: see a/model=x."
    assert name_flags(text, flags) == expected
    assert name_flags("Give overwrite=True.", {"overwrite": "--overwrite"}) == "Give --overwrite."


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("inpaint_mask_start_seconds=(4.0,) has no effect", "--inpaint-start 4 has no effect"),
        ("cfg_interval=(0.9, 0.05) must be", "--cfg-interval 0.9 0.05 must be"),
        ("interval=(0.0, 5e-05) of a would", "noise levels 0 to 5e-05 of a would"),
    ],
)
def test_messages_show_values_as_they_are_written_on_the_command_line(message: str, shown: str) -> None:
    assert name_flags(message, generate_args.FLAGS) == shown
