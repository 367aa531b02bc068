"""The studio touches its folders and nothing else."""

import os
from pathlib import Path
from urllib.parse import unquote

import pytest

from helpers.audio import tone, write_clip
from sa3train.core.errors import SA3Error
from sa3train.models.nano import ensure_nano_folder
from sa3train.studio.data.captions import list_clips
from sa3train.studio.server.folders import (
    describe_model,
    find_folders,
    iterate_folders,
    list_adapters,
    list_audio,
    list_models,
    name_adapter,
    resolve_adapter,
    resolve_model_name,
)
from sa3train.studio.server.workspace import StudioError, Workspace


@pytest.fixture
def two(tmp_path: Path) -> Workspace:
    for name in ("first", "second", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.txt").write_text("x")
    return Workspace.create(tmp_path / "studio", [tmp_path / "first", tmp_path / "second"])


def test_all_that_it_makes_is_in_the_workspace(two: Workspace) -> None:
    assert two.home == two.folder / ".sa3-studio"
    assert two.history.is_dir() and two.history.is_relative_to(two.folder)
    assert two.uploads.is_dir() and two.uploads.is_relative_to(two.home)
    assert two.resolve_output("runs/a") == two.folder / "runs" / "a"
    for path in ("a", " a ", "runs"):
        assert two.resolve_output(path, "runs") == two.folder / "runs" / path.strip(), "a name alone"
    (two.folder / "old").mkdir()
    for path in ("mine/a", "old"):
        assert two.resolve_output(path, "runs") == two.folder / path
    for path in ("..", "~", "/", "../a"):
        with pytest.raises(StudioError, match="inside the workspace"):
            two.resolve_output(path, "runs")
    for path in ("file.txt", "first/file.txt"):
        assert two.resolve_output(path) == two.folder / path, "whatever the sources hold"
    for path in (two.sources[0] / "runs", "../first/x", "/etc/x", ".", ".sa3-studio/x"):
        with pytest.raises(StudioError, match="inside the workspace") as error:
            two.resolve_output(path)
        assert str(two.folder) in str(error.value)


def test_paths_inside_are_resolved(two: Workspace) -> None:
    first, second = two.sources
    assert two.resolve("file.txt") == two.resolve("first/file.txt") == first / "file.txt"
    assert two.resolve(second / "file.txt") == two.resolve("second/file.txt") == second / "file.txt"
    assert two.resolve("../second/new/file.wav") == second / "new" / "file.wav"
    assert two.shorten(first / "file.txt") == "first/file.txt"
    assert two.shorten(first) == "first"
    assert two.shorten(two.folder / "runs" / "a") == "runs/a"
    (two.folder / "first").mkdir()
    (two.folder / "first" / "file.txt").touch()
    assert two.shorten(first / "file.txt") == str(first / "file.txt"), "the short path is another file's"


def test_a_workspace_inside_a_source_is_no_source(tmp_path: Path) -> None:
    write_clip(tmp_path / "pack" / "kicks" / "a.wav", tone(0.1))
    workspace = Workspace.create(tmp_path / "sa3-studio", [tmp_path])
    for path in ("results/b.wav", "mine/c.wav"):
        write_clip(workspace.folder / path, tone(0.1))
    (workspace.folder / "latents").mkdir()
    (workspace.folder / "latents" / "index.json").write_text('{"format": "sa3train-latents"}')
    found = find_folders(workspace)
    assert found.audio == [tmp_path, tmp_path / "pack" / "kicks"]
    assert found.latents == [workspace.folder / "latents"]
    assert [clip.source for clip in list_clips(workspace, tmp_path)] == ["pack/kicks/a.wav"]
    with pytest.raises(StudioError, match="is no source"):
        list_clips(workspace, workspace.folder / "mine")
    with pytest.raises(StudioError, match="in the workspace"):
        Workspace.create(tmp_path, [tmp_path / "pack"])


@pytest.mark.parametrize("path", ["../elsewhere/file.txt", "/etc/passwd", "a/../../elsewhere", "~/file.txt", "/"])
def test_paths_outside_are_refused_with_the_folders_named(two: Workspace, path: str) -> None:
    with pytest.raises(StudioError, match="outside the folders") as error:
        two.resolve(path)
    assert str(two.sources[0]) in str(error.value)


def test_links_that_lead_out_are_refused(two: Workspace, tmp_path: Path) -> None:
    (two.sources[0] / "link").symlink_to(tmp_path / "elsewhere")
    (two.sources[0] / "loop").symlink_to(two.sources[0] / "loop")
    with pytest.raises(StudioError, match="outside"):
        two.resolve("link/file.txt")
    assert not two.is_served(two.sources[0] / "link" / "file.txt")
    assert not two.is_served(two.sources[0] / "loop" / "x") or not (two.sources[0] / "loop" / "x").exists()


@pytest.mark.parametrize(
    "name", [" a ", "~tilde", "a, b", "${oc.env:HOME}", "*", "[a]", "a\nb", "C:\\clips", "-a", "ü"]
)
def test_a_folder_that_exists_is_found_by_its_name(two: Workspace, name: str) -> None:
    write_clip(two.sources[0] / name / "x.wav", tone(0.1))
    folder = two.resolve_folder(name)
    assert folder == two.sources[0] / name == two.resolve(str(folder))
    assert list_audio(two) == [f"first/{name}/x.wav"]
    assert two.is_served(folder / "x.wav")
    assert unquote(two.get_url(f"{name}/x.wav")).endswith(f"{name}/x.wav")


def test_what_no_page_can_show_is_left_out(two: Workspace) -> None:
    write_clip(two.sources[0] / "x.wav", tone(0.1))
    (two.sources[0] / "x.wav").rename(os.fsdecode(os.fsencode(two.sources[0]) + b"/\xff.wav"))
    assert list_audio(two) == []
    os.mkfifo(two.sources[0] / "pipe.wav")
    assert not two.is_served(two.sources[0] / "pipe.wav")
    (two.folder / "loop").symlink_to(two.folder / "loop")
    for path in ("\udcff.wav", "a" * 300, "loop/x", "~nobody-of-that-name/x"):
        with pytest.raises(StudioError, match="Cannot resolve"):
            two.resolve(path)


@pytest.mark.parametrize("path", ["", "  ", "a\0b"])
def test_no_path_is_refused(two: Workspace, path: str) -> None:
    with pytest.raises(StudioError, match="path of a file"):
        two.resolve(path)


def test_hidden_files_are_not_served_but_the_studios_own(two: Workspace) -> None:
    assert two.is_served(two.sources[0] / "file.txt")
    assert two.is_served(two.history / "take.wav")
    assert not two.is_served(two.sources[0] / ".env")
    assert not two.is_served(two.sources[1] / ".git" / "config")


def test_a_missing_file_is_refused(two: Workspace) -> None:
    with pytest.raises(StudioError, match="no adapter"):
        two.resolve_file("nothing.safetensors", "adapter")
    with pytest.raises(StudioError, match="no run"):
        two.resolve_folder("file.txt", "run")


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudioError, match="is not a folder"):
        Workspace.create(tmp_path / "studio", [tmp_path / "none"])
    (tmp_path / "file").touch()
    with pytest.raises(StudioError, match="has file: as a workspace"):
        Workspace.create(tmp_path)
    (tmp_path / "made" / "latents").mkdir(parents=True)
    assert Workspace.create(tmp_path / "made").history.is_dir()
    with pytest.raises(StudioError, match="Cannot write to"):
        Workspace.create(tmp_path / "file")


def test_addresses_are_quoted(two: Workspace) -> None:
    assert two.get_url(two.sources[0] / "a b#?.wav").endswith("/a%20b%23%3F.wav")


def test_adapters_and_audio_are_found_but_nothing_hidden(workspace: Workspace) -> None:
    hidden = workspace.sources[0] / ".cache"
    hidden.mkdir()
    (hidden / "x.safetensors").write_bytes(b"")
    (workspace.sources[0] / "peft").mkdir()
    (workspace.sources[0] / "peft" / "adapter_config.json").write_text("{}")
    found = list_adapters(workspace)
    assert sorted(found) == ["root/adapters/one.safetensors", "root/adapters/two.safetensors", "root/peft"]
    assert list_audio(workspace) == ["root/audio/tone.wav"]


def test_a_run_is_offered_with_its_checkpoints(workspace: Workspace) -> None:
    run = workspace.folder / "runs" / "x"
    state = run / "checkpoints" / "step-00000020.safetensors"
    state.parent.mkdir(parents=True)
    (run / "run.json").write_text('{"identity": {}}')
    for path in (run / "config.yaml", run / "adapter.safetensors", state):
        path.touch()
    assert list_adapters(workspace)[:2] == ["runs/x", "runs/x@20"]
    assert str(resolve_adapter(workspace, "runs/x@20")) == f"{run}@20" == name_adapter(str(state))
    with pytest.raises(SA3Error, match="it has: 20"):
        resolve_adapter(workspace, "runs/x@30")


def test_what_is_not_a_file_is_not_offered(workspace: Workspace) -> None:
    root = workspace.sources[0]
    before = list_audio(workspace), list_adapters(workspace)
    for name in ("pipe.wav", "pipe.safetensors"):
        os.mkfifo(root / name)
    for name in ("zero.wav", "zero.safetensors"):
        (root / name).symlink_to("/dev/zero")
    assert (list_audio(workspace), list_adapters(workspace)) == before


def test_model_folders_are_offered_beside_the_names(workspace: Workspace) -> None:
    mine = workspace.sources[0] / "mine"
    mine.mkdir()
    for file in ensure_nano_folder("nano").iterdir():
        if file.is_file():
            (mine / file.name).write_bytes(file.read_bytes())
    values = {value: label for label, value in list_models(workspace)}
    assert values[str(mine)] == "root/mine"
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
        (workspace.sources[0] / f"d{number:02d}").mkdir()
    monkeypatch.setattr("sa3train.data.sources.own_folders.MAX_FOLDERS", 10)
    assert len(list(iterate_folders(workspace.roots))) == 10
