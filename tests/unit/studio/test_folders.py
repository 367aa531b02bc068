"""Runs, latents and audio as the studio finds them in its folders."""

from pathlib import Path

import pytest

from helpers.run_dirs import make_run, write_record
from sa3train.core.errors import SA3Error
from sa3train.studio.runs.evaluate_tab import resolve_run_dir
from sa3train.studio.server import folders
from sa3train.studio.server.folders import find_folders, find_runs, forget_folders, list_adapters, resolve_adapter
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


def test_a_run_that_began_after_the_search_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "CACHE_SECONDS", 1e9)
    workspace = Workspace.create(tmp_path / "studio", [tmp_path])
    assert find_runs(workspace) == []
    run = make_run(tmp_path / "new", "finished")
    assert find_runs(workspace) == []
    forget_folders()
    assert [found.path for found in find_runs(workspace)] == [run]


def test_a_part_of_a_folder_adapter_is_no_adapter_of_its_own(tmp_path: Path) -> None:
    for folder in ("whole", "whole/duration_embedder", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter_config.json").write_text("{}")
    workspace = Workspace.create(tmp_path / "studio", [tmp_path])
    assert {Path(found).name for found in list_adapters(workspace)} == {"whole", "other"}


def test_a_run_whose_files_are_links_out_shows_nothing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "root" / "borrowed")
    workspace = Workspace.create(tmp_path / "studio", [tmp_path / "root"])
    (tmp_path / "secret.yaml").write_text("token: hidden")
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").symlink_to(tmp_path / "secret.yaml")
    assert find_folders(workspace).runs == [folder] and find_runs(workspace) == []
    with pytest.raises(SA3Error, match="link out of"):
        resolve_run_dir(workspace, str(folder))


def test_a_checkpoint_of_a_run_in_any_folder_is_found_and_a_missing_one_named_as_entered(tmp_path: Path) -> None:
    checkpoints = make_run(tmp_path / "one", "finished") / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "step-00000005.safetensors").touch()
    workspace = Workspace.create(tmp_path / "studio", [tmp_path])
    for path in ("one@5", " one@5 ", f"{tmp_path.name}/one@5"):
        assert resolve_adapter(workspace, path) == Path(f"{tmp_path}/one@5")
    with pytest.raises(SA3Error, match=r"^one@7: There is no checkpoint of step 7 .*has: 5"):
        resolve_adapter(workspace, "one@7")
