"""The studio touches its folders and nothing else."""

import os
from pathlib import Path
from urllib.parse import unquote

import pytest

from helpers.audio import tone, write_clip
from sa3train.models.nano import ensure_nano_folder
from sa3train.studio.server.workspace import (
    StudioError,
    Workspace,
    describe_model,
    iterate_folders,
    list_adapters,
    list_audio,
    list_models,
    resolve_model_name,
)


@pytest.fixture
def two(tmp_path: Path) -> Workspace:
    for name in ("first", "second", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.txt").write_text("x")
    return Workspace.create([tmp_path / "first", tmp_path / "second"])


def test_its_home_lies_in_the_first_folder(two: Workspace) -> None:
    assert two.home == two.roots[0] / ".sa3-studio"
    assert two.history.is_dir()
    assert two.uploads.is_dir()


def test_paths_inside_are_resolved(two: Workspace) -> None:
    assert two.resolve("file.txt") == two.roots[0] / "file.txt"
    assert two.resolve(two.roots[1] / "file.txt") == two.roots[1] / "file.txt"
    assert two.resolve(f"../{two.roots[1].name}/new/file.wav") == two.roots[1] / "new" / "file.wav"
    assert two.shorten(two.resolve("file.txt")) == "file.txt"


@pytest.mark.parametrize("path", ["../elsewhere/file.txt", "/etc/passwd", "a/../../elsewhere", "~/file.txt", "/"])
def test_paths_outside_are_refused_with_the_folders_named(two: Workspace, path: str) -> None:
    with pytest.raises(StudioError, match="outside the folders") as error:
        two.resolve(path)
    assert str(two.roots[0]) in str(error.value)


def test_links_that_lead_out_are_refused(two: Workspace, tmp_path: Path) -> None:
    (two.roots[0] / "link").symlink_to(tmp_path / "elsewhere")
    (two.roots[0] / "loop").symlink_to(two.roots[0] / "loop")
    with pytest.raises(StudioError, match="outside"):
        two.resolve("link/file.txt")
    assert not two.is_served(two.roots[0] / "link" / "file.txt")
    assert not two.is_served(two.roots[0] / "loop" / "x") or not (two.roots[0] / "loop" / "x").exists()


@pytest.mark.parametrize(
    "name", [" a ", "~tilde", "a, b", "${oc.env:HOME}", "*", "[a]", "a\nb", "C:\\clips", "-a", "ü"]
)
def test_a_folder_that_exists_is_found_by_its_name(two: Workspace, name: str) -> None:
    write_clip(two.roots[0] / name / "x.wav", tone(0.1))
    folder = two.resolve_folder(name)
    assert folder == two.roots[0] / name == two.resolve(str(folder))
    assert list_audio(two) == [f"{name}/x.wav"]
    assert two.is_served(folder / "x.wav")
    assert unquote(two.get_url(f"{name}/x.wav")).endswith(f"{name}/x.wav")


def test_what_no_page_can_show_is_left_out(two: Workspace) -> None:
    write_clip(two.roots[0] / "x.wav", tone(0.1))
    (two.roots[0] / "x.wav").rename(os.fsdecode(os.fsencode(two.roots[0]) + b"/\xff.wav"))
    assert list_audio(two) == []
    os.mkfifo(two.roots[0] / "pipe.wav")
    assert not two.is_served(two.roots[0] / "pipe.wav")
    (two.roots[0] / "loop").symlink_to(two.roots[0] / "loop")
    for path in ("\udcff.wav", "a" * 300, "loop/x", "~nobody-of-that-name/x"):
        with pytest.raises(StudioError, match="Cannot resolve"):
            two.resolve(path)


@pytest.mark.parametrize("path", ["", "  ", "a\0b"])
def test_no_path_is_refused(two: Workspace, path: str) -> None:
    with pytest.raises(StudioError, match="path of a file"):
        two.resolve(path)


def test_hidden_files_are_not_served_but_the_studios_own(two: Workspace) -> None:
    assert two.is_served(two.roots[0] / "file.txt")
    assert two.is_served(two.history / "take.wav")
    assert not two.is_served(two.roots[0] / ".env")
    assert not two.is_served(two.roots[1] / ".git" / "config")


def test_a_missing_file_is_refused(two: Workspace) -> None:
    with pytest.raises(StudioError, match="no adapter"):
        two.resolve_file("nothing.safetensors", "adapter")
    with pytest.raises(StudioError, match="no run"):
        two.resolve_folder("file.txt", "run")


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudioError, match="is not a folder"):
        Workspace.create([tmp_path / "none"])
    with pytest.raises(StudioError, match="needs a folder"):
        Workspace.create([])


def test_addresses_are_quoted(two: Workspace) -> None:
    assert two.get_url(two.roots[0] / "a b#?.wav").endswith("/a%20b%23%3F.wav")


def test_adapters_and_audio_are_found_but_nothing_hidden(workspace: Workspace) -> None:
    hidden = workspace.roots[0] / ".cache"
    hidden.mkdir()
    (hidden / "x.safetensors").write_bytes(b"")
    (workspace.roots[0] / "peft").mkdir()
    (workspace.roots[0] / "peft" / "adapter_config.json").write_text("{}")
    found = list_adapters(workspace)
    assert sorted(found) == ["adapters/one.safetensors", "adapters/two.safetensors", "peft"]
    assert list_audio(workspace) == ["audio/tone.wav"]


def test_what_is_not_a_file_is_not_offered(workspace: Workspace) -> None:
    root = workspace.roots[0]
    before = list_audio(workspace), list_adapters(workspace)
    for name in ("pipe.wav", "pipe.safetensors"):
        os.mkfifo(root / name)
    for name in ("zero.wav", "zero.safetensors"):
        (root / name).symlink_to("/dev/zero")
    assert (list_audio(workspace), list_adapters(workspace)) == before


def test_model_folders_are_offered_beside_the_names(workspace: Workspace) -> None:
    mine = workspace.roots[0] / "mine"
    mine.mkdir()
    for file in ensure_nano_folder("nano").iterdir():
        if file.is_file():
            (mine / file.name).write_bytes(file.read_bytes())
    values = {value: label for label, value in list_models(workspace)}
    assert values[str(mine)] == "mine"
    assert values["nano"] == "nano"
    assert "not downloaded" in values["medium"]
    assert resolve_model_name(workspace, str(mine)) == str(mine)
    assert not any("mine" in name for name in list_adapters(workspace))


def test_a_model_is_described(workspace: Workspace) -> None:
    assert "post-trained model" in describe_model(workspace, "nano")
    assert "50 steps" in describe_model(workspace, "nano-base")
    assert "license" in describe_model(workspace, "medium").lower()
    assert "outside the folders" in describe_model(workspace, "/etc")


def test_a_huge_folder_is_not_walked_to_its_end(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        (workspace.roots[0] / f"d{number:02d}").mkdir()
    monkeypatch.setattr("sa3train.studio.server.workspace.MAX_FOLDERS", 10)
    assert len(list(iterate_folders(workspace))) == 10
