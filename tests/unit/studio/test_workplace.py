"""The studio touches its folders and nothing else."""

from pathlib import Path

import pytest

from sa3train.studio.server.workspace import StudioError, Workspace


@pytest.fixture
def two(tmp_path: Path) -> Workspace:
    for name in ("first", "second", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.txt").write_text("x")
    return Workspace.at([tmp_path / "first", tmp_path / "second"])


def test_its_home_lies_in_the_first_folder(two: Workspace) -> None:
    assert two.home == two.roots[0] / ".sa3-studio"
    assert two.history.is_dir()
    assert two.uploads.is_dir()


def test_paths_inside_are_taken(two: Workspace) -> None:
    assert two.inside("file.txt") == two.roots[0] / "file.txt"
    assert two.inside(two.roots[1] / "file.txt") == two.roots[1] / "file.txt"
    assert two.inside(f"../{two.roots[1].name}/new/file.wav") == two.roots[1] / "new" / "file.wav"
    assert two.shown(two.inside("file.txt")) == "file.txt"


@pytest.mark.parametrize("path", ["../elsewhere/file.txt", "/etc/passwd", "a/../../elsewhere", "~/file.txt", "/"])
def test_paths_outside_are_refused_with_the_folders_named(two: Workspace, path: str) -> None:
    with pytest.raises(StudioError, match="outside the folders") as error:
        two.inside(path)
    assert str(two.roots[0]) in str(error.value)


def test_links_that_lead_out_are_refused(two: Workspace, tmp_path: Path) -> None:
    (two.roots[0] / "link").symlink_to(tmp_path / "elsewhere")
    (two.roots[0] / "loop").symlink_to(two.roots[0] / "loop")
    with pytest.raises(StudioError, match="outside"):
        two.inside("link/file.txt")
    assert not two.served(two.roots[0] / "link" / "file.txt")
    assert not two.served(two.roots[0] / "loop" / "x") or not (two.roots[0] / "loop" / "x").exists()


@pytest.mark.parametrize("path", ["", "  ", "a\0b"])
def test_no_path_is_refused(two: Workspace, path: str) -> None:
    with pytest.raises(StudioError, match="give the path"):
        two.inside(path)


def test_hidden_files_are_not_served_but_the_studios_own(two: Workspace) -> None:
    assert two.served(two.roots[0] / "file.txt")
    assert two.served(two.history / "take.wav")
    assert not two.served(two.roots[0] / ".env")
    assert not two.served(two.roots[1] / ".git" / "config")


def test_a_missing_file_is_told(two: Workspace) -> None:
    with pytest.raises(StudioError, match="there is no adapter"):
        two.file("nothing.safetensors", "adapter")
    with pytest.raises(StudioError, match="there is no run"):
        two.folder("file.txt", "run")


def test_folders_that_cannot_be_are_told(tmp_path: Path) -> None:
    with pytest.raises(StudioError, match="is not a folder"):
        Workspace.at([tmp_path / "none"])
    with pytest.raises(StudioError, match="needs a folder"):
        Workspace.at([])


def test_addresses_and_commands_are_quoted(two: Workspace) -> None:
    assert two.url(two.roots[0] / "a b#?.wav").endswith("/a%20b%23%3F.wav")
    assert two.command(["sa3-generate", "-p", "a b", Path("x")]) == "sa3-generate -p 'a b' x"
