"""Runs, latents and audio as the studio finds them in its folders."""

from pathlib import Path

import pytest

from helpers.run_dirs import make_run, write_record
from sa3train.core.errors import SA3Error
from sa3train.studio.runs.page import resolve_run_dir
from sa3train.studio.server import folders
from sa3train.studio.server.folders import FoundFolders, find_folders, find_runs
from sa3train.studio.server.workspace import Workspace


def test_runs_latents_and_audio_are_found_under_the_roots_alone(tmp_path: Path) -> None:
    root = tmp_path / "root"
    make_run(root / "runs" / "one", "finished")
    (root / "runs" / "one" / "demos").mkdir()
    (root / "runs" / "one" / "demos" / "a.wav").touch()
    write_record(root / "runs" / "two")
    (root / "latents").mkdir()
    (root / "latents" / "index.json").write_text('{"format": "sa3train-latents"}')
    (root / "audio" / "deep").mkdir(parents=True)
    (root / "audio" / "deep" / "a.wav").touch()
    make_run(tmp_path / "outside" / "three")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "a.wav").touch()
    workspace = Workspace.create(tmp_path / "studio", [root])
    found = find_folders(workspace)
    assert found.runs == [root / "runs" / "one", root / "runs" / "two"]
    assert found.latents == [root / "latents"]
    assert found.audio == [root, root / "audio" / "deep"]
    assert [run.path.name for run in find_runs(workspace)] == ["one", "two"]


def test_a_run_that_began_after_the_survey_is_found_when_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make_run(tmp_path / "old", "finished"), make_run(tmp_path / "new", "finished")
    workspace = Workspace.create(tmp_path / "studio", [tmp_path])
    monkeypatch.setattr(folders, "find_folders", lambda workspace: FoundFolders(runs=[old]))
    assert [run.path for run in find_runs(workspace)] == [old]
    assert {run.path for run in find_runs(workspace, new)} == {old, new}
    assert [run.path for run in find_runs(workspace, old)] == [old]
    assert [run.path for run in find_runs(workspace, tmp_path / "gone")] == [old]


def test_a_run_whose_files_are_links_out_shows_nothing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "root" / "borrowed")
    workspace = Workspace.create(tmp_path / "studio", [tmp_path / "root"])
    (tmp_path / "secret.yaml").write_text("token: hidden")
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").symlink_to(tmp_path / "secret.yaml")
    assert find_runs(workspace, folder) == []
    with pytest.raises(SA3Error, match="link out of"):
        resolve_run_dir(workspace, str(folder))
