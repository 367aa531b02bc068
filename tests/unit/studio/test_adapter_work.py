"""The Adapters page: the library's tools inside the studio's folders, nothing overwritten unasked."""

import pytest

from sa3train.adapters.formats.io import load_adapter
from sa3train.cli.adapter import build_parser
from sa3train.studio.adapters import actions as work
from sa3train.studio.adapters import page as views
from sa3train.studio.adapters.actions import Size
from sa3train.studio.server.workspace import StudioError, Workspace

ONE, TWO = "adapters/one.safetensors", "adapters/two.safetensors"


def understood(command: list[str]) -> None:
    """The command is one that `sa3-adapter` takes."""
    assert command[0] == "sa3-adapter"
    build_parser().parse_args(command[1:])


def test_an_adapter_is_looked_into(workspace: Workspace) -> None:
    seen = work.inspect(workspace, ONE, "nano-base")
    shown = views.examination(workspace, seen)
    assert seen.refused is None
    assert "matched" in shown
    assert "trained on" in shown
    assert seen.plot is not None
    assert seen.plot.is_relative_to(workspace.home)
    understood(seen.command)
    assert "Change of the weights" not in views.examination(workspace, work.inspect(workspace, ONE))


def test_two_are_compared(workspace: Workspace) -> None:
    found, command = work.diff(workspace, ONE, TWO)
    shown = views.comparison(workspace, found, (ONE, TWO), command)
    assert "relative difference" in shown
    understood(command)
    same, command = work.diff(workspace, ONE, ONE)
    assert "bit for bit" in views.comparison(workspace, same, (ONE, ONE), command)


@pytest.mark.parametrize(
    ("to", "target"), [("native", "out/n.safetensors"), ("comfy", "out/c.safetensors"), ("peft", "out/p")]
)
def test_an_adapter_is_converted_with_its_error(workspace: Workspace, to: str, target: str) -> None:
    done = work.convert_file(workspace, ONE, target, to, "nano-base", Size(), "f16", False)
    assert load_adapter(workspace.inside(target)).tensors
    assert any("error" in name for name in done.facts)
    assert "Written: out/" in views.made(workspace, done)
    understood(done.command)
    with pytest.raises(StudioError, match="tick Overwrite"):
        work.convert_file(workspace, ONE, target, to, None, Size(), "f16", False)
    work.convert_file(workspace, TWO, target, to, None, Size(), "f16", True)


def test_adapters_are_merged(workspace: Workspace) -> None:
    items = [(ONE, 1.0), (TWO, 0.5)]
    done = work.merge_files(workspace, items, "both.safetensors", None, Size(rank=3), "f32", False)
    assert load_adapter(done.target).spec.rank == 3
    assert "lost by the cut" in done.facts
    understood(done.command)
    whole = work.merge_files(workspace, items, "merged", "nano-base", Size(), "f16", False)
    assert (whole.target / "model.safetensors").is_file()
    understood(whole.command)


def test_an_adapter_is_resized_with_its_error(workspace: Workspace) -> None:
    done = work.resize_file(workspace, ONE, "small.safetensors", None, Size(rank=1), "f16", False)
    assert load_adapter(done.target).spec.rank == 1
    assert "%" in done.facts["lost by the cut"]
    understood(done.command)
    with pytest.raises(StudioError, match="say how far"):
        work.resize_file(workspace, ONE, "other.safetensors", None, Size(), "f16", False)


@pytest.mark.parametrize(
    ("path", "target", "told"),
    [
        ("/etc/passwd", "a.safetensors", "outside"),
        ("", "a.safetensors", "choose an adapter"),
        ("adapters/none.safetensors", "a.safetensors", "there is no adapter"),
        (ONE, "../a.safetensors", "outside"),
        (ONE, "", "say where"),
        (ONE, ONE, "the adapter itself"),
        (ONE, ".", "folder of the studio"),
        (ONE, TWO, "exists already"),
    ],
)
def test_bad_places_are_refused(workspace: Workspace, path: str, target: str, told: str) -> None:
    with pytest.raises(StudioError, match=told):
        work.resize_file(workspace, path, target, None, Size(rank=1), "f16", False)
    assert load_adapter(workspace.inside(ONE)).spec.rank == 2


def test_links_that_lead_out_are_refused(workspace: Workspace) -> None:
    (workspace.roots[0] / "out").symlink_to(workspace.roots[0].parent)
    with pytest.raises(StudioError, match="outside"):
        work.resize_file(workspace, ONE, "out/a.safetensors", None, Size(rank=1), "f16", False)


def test_strengths_are_read() -> None:
    assert work.strengths_of("", 2) == [1.0, 1.0]
    assert work.strengths_of("0.5, 2", 2) == [0.5, 2.0]
    for text in ("1", "a, b"):
        with pytest.raises(StudioError):
            work.strengths_of(text, 2)
