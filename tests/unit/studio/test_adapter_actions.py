"""The Adapters page: the library's tools inside the studio's folders; nothing is overwritten without consent."""

import shutil
from dataclasses import replace
from typing import Any

import pytest

from helpers.nano_adapters import write_adapters
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.cli.adapter import build_parser
from sa3train.core.errors import MissingBaseError, SA3Error
from sa3train.studio.adapters import actions, page
from sa3train.studio.server.workspace import StudioError, Workspace

ONE, TWO = "adapters/one.safetensors", "adapters/two.safetensors"


def assert_parses(command: list[str]) -> None:
    """The command is one that `sa3-adapter` accepts."""
    assert command[0] == "sa3-adapter"
    build_parser().parse_args(command[1:])


def test_an_adapter_is_inspected(workspace: Workspace) -> None:
    inspection, plot, command = actions.inspect(workspace, ONE, "nano-base")
    report = inspection.load_report
    assert report is not None
    assert report.refusal is None
    shown = page.render_inspection(workspace, inspection, plot, command)
    assert "matched" in shown
    assert "trained on" in shown
    assert plot is not None
    assert plot.is_relative_to(workspace.home)
    assert_parses(command)
    assert "trained on" not in page.render_inspection(workspace, *actions.inspect(workspace, ONE))


def test_two_are_compared(workspace: Workspace) -> None:
    comparison, command = actions.compare(workspace, ONE, TWO)
    assert "relative difference" in page.render_comparison(comparison, command, (ONE, TWO))
    assert_parses(command)
    assert "bit for bit" in page.render_comparison(*actions.compare(workspace, ONE, ONE), (ONE, ONE))


@pytest.mark.parametrize(
    ("to", "target"),
    [
        ("native", "out/n.safetensors"),
        ("comfy", "out/c.safetensors"),
        ("peft", "out/p"),
        ("diffusers", "out/d"),
        ("gguf", "out/g.gguf"),
    ],
)
def test_an_adapter_is_converted_with_its_error(workspace: Workspace, to: str, target: str) -> None:
    dense = to == "comfy"
    result, command = actions.write(workspace, "convert", [(ONE, 1.0)], target, to=to, model="nano-base", dense=dense)
    assert load_adapter(workspace.resolve(target)).tensors
    assert any("error" in name for name in result.facts)
    assert "Written: out/" in page.render_result(workspace, result, command)
    assert_parses(command)
    with pytest.raises(StudioError, match="Overwrite"):
        actions.write(workspace, "convert", [(ONE, 1.0)], target, to=to)
    actions.write(workspace, "convert", [(TWO, 1.0)], target, to=to, overwrite=True)


@pytest.mark.parametrize(
    ("tool", "target", "settings"),
    [
        ("convert", "out/c.safetensors", {"to": "comfy"}),
        ("merge", "out/m.safetensors", {"rank": 1}),
        ("resize", "out/r.safetensors", {"rank": 1}),
    ],
)
def test_a_tool_without_a_base_model_takes_the_one_that_the_adapter_names(
    workspace: Workspace, tool: str, target: str, settings: dict[str, Any]
) -> None:
    write_adapters(workspace.sources[0] / "adapters", {"kind": "lora-xs" if tool == "resize" else "dora-rows"})
    kind = ("adapters/kind.safetensors", 1.0)
    result, command = actions.write(workspace, tool, [kind], target, model="", allow_loss=tool == "merge", **settings)
    assert result.notes[0] == "base model: nano-base, which the adapter names"
    assert "base model: nano-base" in page.render_result(workspace, result, command)
    adapter = load_adapter(workspace.resolve("adapters/kind.safetensors"))
    save_adapter(workspace.sources[0] / "adapters" / "unnamed.safetensors", replace(adapter, metadata={}))
    unnamed = ("adapters/unnamed.safetensors", 1.0)
    with pytest.raises(MissingBaseError):
        actions.write(workspace, tool, [unnamed], f"{target}2.safetensors", allow_loss=tool == "merge", **settings)


def test_adapters_are_merged(workspace: Workspace) -> None:
    adapters = [(ONE, 1.0), (TWO, 0.5)]
    given = {"rank": 3, "explained_variance": None, "dtype": "fp32", "allow_loss": True, "model": ""}
    result, command = actions.write(workspace, "merge", adapters, "both.safetensors", **given)
    assert load_adapter(result.target).spec.rank == 3
    assert "truncation error" in result.facts
    assert_parses(command)
    _, command = actions.write(workspace, "merge", adapters, "merged", model="nano-base")
    assert (workspace.resolve("adapters/merged") / "model.safetensors").is_file()
    assert_parses(command)


def test_an_adapter_is_resized_with_its_error(workspace: Workspace) -> None:
    result, command = actions.write(workspace, "resize", [(ONE, 1.0)], "small.safetensors", rank=1)
    assert load_adapter(result.target).spec.rank == 1
    assert "%" in result.facts["truncation error"]
    assert_parses(command)
    with pytest.raises(ValueError, match="rank="):
        actions.write(workspace, "resize", [(ONE, 1.0)], "other.safetensors")


@pytest.mark.parametrize(
    ("path", "target", "message"),
    [
        ("/etc/passwd", "a.safetensors", "outside"),
        ("", "a.safetensors", "Choose an adapter"),
        ("adapters/none.safetensors", "a.safetensors", "no adapter"),
        (ONE, "../a.safetensors", "inside the workspace"),
        (ONE, "{source}/a.safetensors", "inside the workspace"),
        (ONE, "", "Write to is empty"),
        ("copy.safetensors", "copy.safetensors", "the adapter itself"),
        (ONE, ".", "inside the workspace"),
        (ONE, ".sa3-studio/a", "inside the workspace"),
        (ONE, "copy.safetensors", "exists already"),
    ],
)
def test_bad_paths_are_refused(workspace: Workspace, path: str, target: str, message: str) -> None:
    shutil.copy(workspace.resolve(ONE), workspace.folder / "copy.safetensors")
    target = target.replace("{source}", str(workspace.sources[0]))
    with pytest.raises(SA3Error, match=message):
        actions.write(workspace, "resize", [(path, 1.0)], target, rank=1)
    assert load_adapter(workspace.resolve(ONE)).spec.rank == 2


def test_links_that_lead_out_are_refused(workspace: Workspace) -> None:
    (workspace.folder / "out").symlink_to(workspace.sources[0])
    with pytest.raises(StudioError, match="inside the workspace"):
        actions.write(workspace, "resize", [(ONE, 1.0)], "out/a.safetensors", rank=1)


@pytest.mark.parametrize(
    ("rank", "variance", "told"),
    [
        ("4", "", ["", ""]),
        ("4", "0.9", ["Give only one of the two."] * 2),
        ("0", "0.9", ["rank must be from 1 to 16384, not 0.", ""]),
    ],
)
def test_rank_and_explained_variance_are_checked_together(rank: str, variance: str, told: list[str]) -> None:
    assert page.explain_rank(rank, variance) == told


def test_strengths_are_read() -> None:
    assert actions.parse_strengths("", 2) == [1.0, 1.0]
    assert actions.parse_strengths("0.5, 2", 2) == [0.5, 2.0]
    for text in ("1", "a, b"):
        with pytest.raises(StudioError):
            actions.parse_strengths(text, 2)
