"""The open packs are chosen by one setting of every command that names a model, and never for a model without them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sa3train.cli import encode, generate, studio, train


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (generate.main, ["--model", "nano", "--weights", "mlx", "-p", "x"]),
        (encode.main, ["source=in", "out=out", "model=nano", "weights=mlx"]),
        (train.main, ["recipe=style", "data=in", "model=nano", "weights=mlx"]),
        (studio.main, ["--model", "nano", "--weights", "mlx"]),
    ],
    ids=["generate", "encode", "train", "studio"],
)
def test_weights(
    command: Callable[[Sequence[str]], int],
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(arguments) == 1
    assert "there are no packs of nano for --weights mlx (weights=mlx)" in capsys.readouterr().err


def test_a_model_is_named_where_a_recording_names_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--from", "x.json", "--weights", "mlx"]) == 1
    assert "--weights with --from needs --model" in capsys.readouterr().err
