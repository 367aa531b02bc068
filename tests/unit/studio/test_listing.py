"""What the page offers to choose from."""

from pathlib import Path

import pytest

from sa3train.models.nano import nano_folder
from sa3train.studio.server.widgets import command_box, message_of, notice, told
from sa3train.studio.server.workspace import (
    StudioError,
    Workspace,
    describe_model,
    list_adapters,
    list_audio,
    list_models,
    resolve_model_name,
    walk_folders,
)


def test_adapters_and_audio_are_found_but_nothing_hidden(workspace: Workspace) -> None:
    hidden = workspace.roots[0] / ".cache"
    hidden.mkdir()
    (hidden / "x.safetensors").write_bytes(b"")
    (workspace.roots[0] / "peft").mkdir()
    (workspace.roots[0] / "peft" / "adapter_config.json").write_text("{}")
    found = list_adapters(workspace)
    assert sorted(found) == ["adapters/one.safetensors", "adapters/two.safetensors", "peft"]
    assert list_audio(workspace) == ["audio/tone.wav"]


def test_model_folders_are_offered_beside_the_names(workspace: Workspace) -> None:
    mine = workspace.roots[0] / "mine"
    mine.mkdir()
    for file in nano_folder("nano").iterdir():
        if file.is_file():
            (mine / file.name).write_bytes(file.read_bytes())
    values = {value: label for label, value in list_models(workspace)}
    assert values[str(mine)] == "mine"
    assert values["nano"] == "nano"
    assert "not downloaded" in values["medium"]
    assert resolve_model_name(workspace, str(mine)) == str(mine)
    assert not any("mine" in name for name in list_adapters(workspace))


def test_a_model_says_what_it_is(workspace: Workspace) -> None:
    assert "post-trained model" in describe_model(workspace, "nano")
    assert "50 steps" in describe_model(workspace, "nano-base")
    assert "licence" in describe_model(workspace, "medium").lower()
    assert "outside the folders" in describe_model(workspace, "/etc")


def test_a_huge_folder_is_not_walked_to_its_end(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        (workspace.roots[0] / f"d{number:02d}").mkdir()
    monkeypatch.setattr("sa3train.studio.server.workspace.MOST_FOLDERS", 10)
    assert len(list(walk_folders(workspace))) == 10


def test_errors_reach_the_page_as_text() -> None:
    import gradio as gr

    def refuses() -> None:
        raise StudioError("no <b>file</b>")

    def breaks() -> None:
        raise KeyError("x")

    with pytest.raises(gr.Error, match="no &lt;b&gt;file"):
        told(refuses)()
    with pytest.raises(gr.Error, match="KeyError"):
        told(breaks)()
    assert message_of(StudioError("plain")) == "plain"
    assert 'role="alert"' in notice("x", "error")
    assert "&quot;" in command_box('echo "a"')


def test_a_generator_of_steps_is_told_too(tmp_path: Path) -> None:
    import gradio as gr

    def steps() -> object:
        yield 1
        raise StudioError("stopped")

    found = told(steps)()
    assert next(found) == 1  # type: ignore[call-overload]
    with pytest.raises(gr.Error, match="stopped"):
        next(found)  # type: ignore[call-overload]
