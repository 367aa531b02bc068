"""Paths and names of Windows, wherever a path is taken: with drives, backslashes, and what grammars give a meaning."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from helpers.sources import read_captions, write_files
from sa3train.adapters.formats.run_dir import locate_adapter
from sa3train.adapters.lora_argument import LoraArgument, parse_lora
from sa3train.cli.hydra_app import expand_argument
from sa3train.core import user_files
from sa3train.core.config import check_settings, setting
from sa3train.core.errors import AdapterError, SA3Error
from sa3train.core.files import write_files as write_together
from sa3train.core.files import write_text
from sa3train.core.user_files import find_name_problem
from sa3train.data.sources.listing import list_source
from sa3train.data.sources.storage import is_url, strip_file_scheme
from sa3train.inference.sidecar import list_places

NAMES = st.text(st.sampled_from("ab1.-_=@,;()[]{}'&$%+ é琴"), min_size=1, max_size=8).filter(
    lambda name: not find_name_problem(name) and name.strip() == name and name[0] not in ".'"
)
ROOTS = st.sampled_from(["C:\\", "d:/", "\\\\server\\share\\", "\\\\?\\C:\\", "C:", "..\\", ""])
PATHS = st.builds(
    lambda root, names, mark: root + mark.join(names),
    ROOTS,
    st.lists(NAMES, min_size=1, max_size=4),
    st.sampled_from("\\/"),
)
ABSOLUTE = st.builds(lambda names: "C:\\" + "\\".join(names), st.lists(NAMES, min_size=1, max_size=3))


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@given(PATHS)
@example("C:\\a\\b.safetensors")
@example("C:a=0.5@0-1.safetensors")
def test_an_adapter_with_strength_and_interval(path: str) -> None:
    assert parse_lora(f"{path}=0.8@0-0.5") == LoraArgument(path, 0.8, (0.0, 0.5))
    with pytest.raises(AdapterError, match=re.escape(f"There is no adapter at {path}@300")):
        locate_adapter(f"{path}@300")


@given(PATHS, st.sampled_from(["data", "source", "run_dir"]))
@example("C:\\clips", "data")
@example("C:\\new\\", "data")
def test_an_override(path: str, key: str) -> None:
    argument = expand_argument(f"{key}={path}", {"data": "data.dir"}, ("source", "run_dir"))
    if path[0] + path[-1] in ("''", '""') or "${" in path:
        return  # Hydra's, as `expand_argument` says
    parsed = OverridesParser.create().parse_override(argument)
    assert not parsed.is_sweep_override()
    config = OmegaConf.create({"a": None})
    OmegaConf.update(config, "a", parsed.value())
    assert OmegaConf.to_container(config, resolve=True) == {"a": path}


@given(PATHS, ABSOLUTE)
@example("C://clips", "C:\\clips\\100% a.wav")
def test_a_drive_is_no_scheme(path: str, absolute: str) -> None:
    assert not is_url(path) and strip_file_scheme(path) == path
    url = PureWindowsPath(absolute).as_uri()
    assert is_url(url) and PureWindowsPath(strip_file_scheme(url)) == PureWindowsPath(absolute)


@given(
    st.lists(NAMES, min_size=1, max_size=3),
    st.sampled_from(["C:\\set\\", "\\\\server\\share\\", ".\\", ""]),
    st.booleans(),
)
@settings(max_examples=40)
def test_a_row_of_a_list(tmp_path_factory: pytest.TempPathFactory, names: list[str], root: str, is_alone: bool) -> None:
    folder = tmp_path_factory.mktemp("set")
    audio = "/".join([*names, "a.wav"])
    row = {"file_name": root + audio.replace("/", "\\"), "caption": "808"}
    write_files(folder, {audio: "", "metadata.jsonl": json.dumps(row)})
    listing = list_source(str(folder / "metadata.jsonl" if is_alone else folder))
    assert read_captions(listing) == {audio: "808"} and not listing.problems


@given(NAMES, ABSOLUTE)
@settings(max_examples=40)
def test_an_input_of_a_sidecar_that_windows_wrote(
    tmp_path_factory: pytest.TempPathFactory, name: str, absolute: str
) -> None:
    folder = tmp_path_factory.mktemp("results")
    (folder / name).touch()
    for recorded in (f"{absolute}\\{name}", f"..\\{folder.name}\\{name}", name):
        assert list_places(recorded, {"directory": "C:\\then"}, folder)[0].samefile(folder / name)


@given(st.text(max_size=12) | NAMES | st.sampled_from(["CON", "nul.txt", "Com1.tar.gz", "a:b", "a.", "a ", "lpt9"]))
@example("console.txt")
@example("a.b c")
def test_names_that_windows_refuses(name: str) -> None:
    path = PureWindowsPath(name)
    if name and not name.isspace() and (path.is_reserved() or name != path.name or name != name.rstrip(". ")):
        assert find_name_problem(name)
    if name and all(letter.isalnum() and letter.isascii() for letter in name) and not path.is_reserved():
        assert not find_name_problem(name)


@pytest.mark.parametrize("name", ["take:1.wav", "NUL", "com1.wav", "what?.wav", "a.wav."])
def test_such_names_are_not_written_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_files, "IS_WINDOWS", True)
    with pytest.raises(SA3Error, match=r"cannot write .*indows.*Choose another name"):
        write_text(name, "")
    with pytest.raises(SA3Error, match="Choose another name"):
        write_together(lambda _: [Path(name)], lambda _: [b""], overwrite=False)
    assert not list(Path().iterdir())


def test_a_long_path_is_one_of_short_names() -> None:
    @dataclass(frozen=True)
    class Settings:
        source: str = setting("", help="A path.", text="path")

    check_settings(Settings("C:\\" + "\\".join(["a" * 100] * 4)))
    with pytest.raises(SA3Error, match="source"):
        check_settings(Settings("C:\\" + "a" * 256))


def test_output_that_the_encoding_of_the_terminal_has_not_is_escaped() -> None:
    script = "import sa3train.cli; print('≤ é'); print('→', file=__import__('sys').stderr)"
    environment = os.environ | {"PYTHONIOENCODING": "cp1252:strict"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert (done.stdout.split(), done.stderr.split()) == ([rb"\u2264", "é".encode("cp1252")], [rb"\u2192"])
