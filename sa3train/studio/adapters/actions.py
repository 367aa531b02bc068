"""Run the adapter tools inside the studio's folders; the work itself is `sa3train.adapters.tools`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sa3train.adapters import tools
from sa3train.adapters.formats.io import is_file_name
from sa3train.adapters.lora_argument import LoraArgument, format_lora
from sa3train.adapters.tools import CheckpointResult, EditResult, Truncation
from sa3train.adapters.tools.inspect import Comparison, Inspection
from sa3train.adapters.tools.service import load_base, run_with_named_base
from sa3train.models.checkpoint import StableAudio3
from sa3train.studio.server.folders import resolve_adapter, resolve_model_name
from sa3train.studio.server.widgets import parse_numbers
from sa3train.studio.server.workspace import StudioError, Workspace

STRENGTHS_LABEL = "Strengths in the same order"
TOOLS: dict[str, Any] = {
    "convert": tools.convert_adapter, "merge": tools.merge_adapters, "resize": tools.resize_adapter,
}  # fmt: skip
"""Tools that write something."""


def inspect(workspace: Workspace, path: str, model: str | None = None) -> tuple[Inspection, Path | None, list[str]]:
    """Inspect an adapter. Raises `AdapterError` for a file that holds none.

    Args:
        workspace: The studio's folders.
        path: The adapter.
        model: Name of a model to check it against.

    Returns:
        The inspection, its plot by layer (None where the change depends on a model that was not given), and the command
        that does the same.
    """
    source = resolve_adapter(workspace, path)
    inspection = tools.inspect_adapter(source, _load_model(workspace, model))
    report, plot = inspection.load_report, None
    is_measured = bool(report and report.layer_effect)
    if is_measured or any(layer.norm is not None for layer in inspection.layers.values()):
        plot = workspace.home / "plots" / f"{inspection.fingerprint[:16]}{'-on-model' if is_measured else ''}.png"
        tools.plot_layers(inspection, plot)
    return inspection, plot, _build_command("inspect", source, model=model)


def compare(workspace: Workspace, first: str, second: str, model: str | None = None) -> tuple[Comparison, list[str]]:
    """Compare two adapters. Raises `AdapterError` for one that does not fit the model.

    Args:
        workspace: The studio's folders.
        first: The first adapter.
        second: The second one.
        model: Name of their base model, to compare changes of its weights.

    Returns:
        The comparison, and the command that does the same.
    """
    paths = resolve_adapter(workspace, first), resolve_adapter(workspace, second)
    comparison = tools.compare_adapters(*paths, _load_model(workspace, model))
    return comparison, _build_command("diff", *paths, model=model)


def write(
    workspace: Workspace, tool: str, sources: Sequence[tuple[str, float]], target: str, **settings: Any
) -> tuple[EditResult | CheckpointResult, list[str]]:
    """Run a tool that writes something. Raises `AdapterError` where it cannot.

    Args:
        workspace: The studio's folders.
        tool: Key of `TOOLS`.
        sources: Adapters with their strengths; only `merge` uses these, and takes more than one.
        target: The file or folder to write.
        **settings: Flags of `sa3-adapter TOOL`, with underscores; empty ones are left out.

    Returns:
        What was written, and the command that does the same.

    Raises:
        StudioError: No adapter is given, or the target cannot be written.
    """
    if not sources:
        raise StudioError("Choose the adapters first.")
    flags = {name: value for name, value in settings.items() if value not in (None, "", False)}
    read = [(resolve_adapter(workspace, path), strength) for path, strength in sources]
    out = resolve_output(workspace, target, [path for path, _ in read], "overwrite" in flags)
    rank = {name: value for name, value in flags.items() if name in ("rank", "explained_variance")}
    given = {name: value for name, value in flags.items() if name not in rank}
    given["truncation"] = Truncation(rank.get("rank"), rank.get("explained_variance")) if rank else None
    in_memory = tool == "merge" and not rank and not is_file_name(out)
    given |= {"model": _load_model(workspace, flags.get("model"), in_memory), "target": out}
    given |= {"sources": read} if tool == "merge" else {"source": read[0][0]}
    result = run_with_named_base(TOOLS[tool], given)
    if tool != "merge":
        return result, _build_command(tool, read[0][0], out, **flags)
    adapters = [format_lora(LoraArgument(str(path), strength=strength)) for path, strength in read]
    return result, _build_command(tool, *adapters, output=out, **flags)


def resolve_output(workspace: Workspace, target: str, sources: Sequence[Path], overwrite: bool = False) -> Path:
    """Check where to write.

    Args:
        workspace: The studio's folders.
        target: The file or folder to write.
        sources: Paths that must not be replaced.
        overwrite: Whether to replace what exists.

    Returns:
        The path.

    Raises:
        StudioError: If it is outside, exists already, or is a source itself.
    """
    if not (target or "").strip():
        raise StudioError("Write to is empty. Enter a path inside the workspace, such as adapters/style.safetensors.")
    found = workspace.resolve_output(target, "adapters")
    if found in sources:
        raise StudioError(f"{found} is the adapter itself. Give another name to keep the original.")
    if found.exists() and not overwrite:
        raise StudioError(f"{found} exists already. Tick Overwrite, or give another name.")
    return found


def parse_strengths(text: str, count: int) -> list[float]:
    """Parse the strengths of several adapters.

    Args:
        text: Numbers with commas between them; empty means 1 each.
        count: Number of adapters.

    Returns:
        One strength per adapter.

    Raises:
        StudioError: If their number differs.
    """
    strengths = parse_numbers(text)
    if strengths and len(strengths) != count:
        raise StudioError(f"{STRENGTHS_LABEL}: {len(strengths)} for {count} adapters. Give one each.")
    return strengths or [1.0] * count


def _load_model(workspace: Workspace, name: str | None, in_memory: bool = False) -> StableAudio3 | None:
    """Load the parts of a model that adapters change, or read them as they are needed; None without a name."""
    return load_base(resolve_model_name(workspace, name) if name else None, in_memory)


def _build_command(tool: str, *arguments: str | Path, **flags: object) -> list[str]:
    """Build the `sa3-adapter` command; flags that are None are left out."""
    options: list[str] = []
    for name, value in flags.items():
        if value is not None:
            options += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return ["sa3-adapter", tool, *map(str, arguments), *options]
