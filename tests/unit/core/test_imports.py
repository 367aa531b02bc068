"""A library that cannot be loaded is one line with the versions that belong together."""

import importlib
import sys
from pathlib import Path

import pytest

from sa3train.cli.hydra_app import run_job
from sa3train.core.errors import ConfigError, LibraryError
from sa3train.core.imports import explain_imports
from sa3train.core.log import get_rank

UNDEFINED = "raise OSError('/x/_torchaudio.abi3.so: undefined symbol: _ZN2at4_ops5zeros4callE')"


def break_library(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> None:
    """Put a library in front of the installed one that runs `code` when it is imported."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize(
    ("name", "code", "expected"),
    [
        ("torchaudio", UNDEFINED, r"undefined symbol.* torch \S+, torchaudio \S+\. .*belongs with torch 2\.14"),
        ("soundfile", "raise OSError('sndfile library not found')", r"Installed: soundfile \S+\. .*libsndfile"),
        ("peft", "import no_such_library", r"no_such_library.* needs peft<"),
        ("lightning", "raise ImportError('broken')", r"broken.* needs lightning<"),
        ("transformers", "from json import no_such_name", r"no_such_name.* needs transformers<"),
    ],
)
def test_versions_and_advice_are_in_one_line(
    name: str, code: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_library(tmp_path, monkeypatch, name, code)
    with pytest.raises(LibraryError, match=rf"^{name} cannot be loaded.*{expected}") as error, explain_imports():
        importlib.import_module(name)
    assert "\n" not in str(error.value)


def test_the_broken_library_is_named_and_not_the_one_that_imports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_library(tmp_path, monkeypatch, "torchaudio", UNDEFINED)
    break_library(tmp_path, monkeypatch, "peft", "import torchaudio")
    with pytest.raises(LibraryError, match="^torchaudio cannot be loaded"), explain_imports():
        importlib.import_module("peft")


def test_commands_print_it_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_library(tmp_path, monkeypatch, "torchaudio", UNDEFINED)
    assert run_job(lambda: importlib.import_module("torchaudio") and 0) == 1
    assert capsys.readouterr().err.startswith("error: torchaudio cannot be loaded")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("huggingface_hub.constants", ""),
        ("plain", "import os\ntimeout = int(os.environ['HF_HUB_DOWNLOAD_TIMEOUT'])"),
        ("joined", "import os\ntimeout = float(next(v for k, v in os.environ.items() if k.startswith('HF_HUB_DOWN')))"),
    ],
)
def test_a_variable_that_an_import_cannot_read_is_named(
    name: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code:
        break_library(tmp_path, monkeypatch, name, code)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "10 s")
    with pytest.raises(ConfigError, match=r"HF_HUB_DOWNLOAD_TIMEOUT='10 s' is not valid.*unset"), explain_imports():
        importlib.import_module(name)


def test_a_variable_that_a_rank_cannot_read_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "first")
    assert run_job(get_rank) == 1
    assert capsys.readouterr().err.startswith("error: the environment variable RANK='first' is not valid")


@pytest.mark.parametrize(
    "error", [FileNotFoundError("a.wav"), ImportError("of another library"), ValueError("not of the environment")]
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)), explain_imports():
        raise error
