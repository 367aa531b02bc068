"""Run the adapter tools inside the studio's folders; the work itself is `sa3train.adapters.tools`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sa3train.adapters import tools
from sa3train.adapters.lora_argument import LoraArgument, format_lora
from sa3train.adapters.tools import CheckpointResult, EditResult, Truncation
from sa3train.adapters.tools.inspect import Comparison, Inspection
from sa3train.models.checkpoint import StableAudio3, load_checkpoint
from sa3train.studio.server.folders import resolve_model_name
from sa3train.studio.server.widgets import parse_numbers
from sa3train.studio.server.workspace import StudioError, Workspace

FORMATS = {
    "native (.safetensors)": "native",
    "ComfyUI (.safetensors)": "comfy",
    "sa3.cpp (.gguf)": "gguf",
    "PEFT (a folder)": "peft",
    "diffusers (a folder)": "diffusers",
}


@dataclass(frozen=True)
class Output:
    """Where and how a tool writes.

    Attributes:
        target: The file or folder.
        model: Name of the base model.
        truncation: The rank to truncate to; None keeps the rank.
        dtype: Dtype of the written file.
        overwrite: Whether to replace what exists.
    """

    target: str
    model: str | None = None
    truncation: Truncation | None = None
    dtype: str = "fp16"
    overwrite: bool = False

    @property
    def flags(self) -> dict[str, object]:
        """The flags of `sa3-adapter` for these settings."""
        rank = self.truncation.describe() if self.truncation else {}
        flags = {"model": self.model, **rank, "dtype": None if self.dtype == "fp16" else self.dtype}
        return flags | ({"overwrite": True} if self.overwrite else {})


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


def convert(workspace: Workspace, path: str, to: str, output: Output) -> tuple[EditResult, list[str]]:
    """Convert an adapter to another format. Raises `AdapterError` where the format cannot carry it.

    Args:
        workspace: The studio's folders.
        path: The adapter.
        to: A value of `FORMATS`.
        output: Where and how to write it.

    Returns:
        What was written, and the command that does the same.
    """
    source, out = resolve_adapter(workspace, path), resolve_output(workspace, output, path)
    model = _load_model(workspace, output.model)
    dtype = None if output.dtype == "fp16" else output.dtype  # fp32 for GGUF, as on the command line
    result = tools.convert_adapter(source, out, to, model, output.truncation, dtype, output.overwrite)
    return result, _build_command("convert", source, out, to=to, **output.flags)


def merge(
    workspace: Workspace, adapters: Sequence[tuple[str, float]], output: Output
) -> tuple[EditResult | CheckpointResult, list[str]]:
    """Merge adapters into one, or into a checkpoint. Raises `AdapterError` as `merge_adapters` does.

    Args:
        workspace: The studio's folders.
        adapters: Adapters with their strengths.
        output: Where and how to write it; without a rank the ranks add up in a .safetensors file, and for a folder its
            model is the checkpoint to merge into.

    Returns:
        What was written, and the command that does the same.

    Raises:
        StudioError: If no adapter is given.
    """
    if not adapters:
        raise StudioError("Choose the adapters to merge.")
    sources = [(resolve_adapter(workspace, path), strength) for path, strength in adapters]
    out = resolve_output(workspace, output, *(path for path, _ in adapters))
    into_checkpoint = output.truncation is None and out.suffix.lower() != ".safetensors"
    model = _load_model(workspace, output.model, in_memory=into_checkpoint)
    dtype = None if output.dtype == "fp16" else output.dtype
    result = tools.merge_adapters(sources, out, model, output.truncation, dtype, overwrite=output.overwrite)
    arguments = [format_lora(LoraArgument(str(path), strength=strength)) for path, strength in sources]
    return result, _build_command("merge", *arguments, output=out, **output.flags)


def resize(workspace: Workspace, path: str, output: Output) -> tuple[EditResult, list[str]]:
    """Resize an adapter to another rank. Raises `AdapterError` without a rank.

    Args:
        workspace: The studio's folders.
        path: The adapter.
        output: Where and how to write it.

    Returns:
        What was written, and the command that does the same.
    """
    source, out = resolve_adapter(workspace, path), resolve_output(workspace, output, path)
    model = _load_model(workspace, output.model)
    result = tools.resize_adapter(source, out, output.truncation, model, output.dtype, output.overwrite)
    return result, _build_command("resize", source, out, **output.flags)


def resolve_adapter(workspace: Workspace, path: str | None) -> Path:
    """Find an adapter inside the studio's folders.

    Args:
        workspace: The studio's folders.
        path: File or PEFT folder.

    Returns:
        Its path. One that is missing or outside is refused as by `Workspace.resolve_existing`.

    Raises:
        StudioError: If none is chosen.
    """
    if not (path or "").strip():
        raise StudioError("Choose an adapter: a file from the list, or its path.")
    return workspace.resolve_existing(path or "", "adapter")


def resolve_output(workspace: Workspace, output: Output, *sources: str) -> Path:
    """Check where to write.

    Args:
        workspace: The studio's folders.
        output: Where to write.
        *sources: Paths that must not be replaced.

    Returns:
        The path.

    Raises:
        StudioError: If it is outside, exists already, or is a source itself.
    """
    if not (output.target or "").strip():
        raise StudioError("Set where to write: a path inside the workspace.")
    found = workspace.resolve_output(output.target)
    if found in [workspace.resolve(source) for source in sources]:
        raise StudioError(f"{found} is the adapter itself. Give another name to keep the original.")
    if found.exists() and not output.overwrite:
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
        raise StudioError(f"Got {len(strengths)} strengths for {count} adapters. Give one each, in the chosen order.")
    return strengths or [1.0] * count


def _load_model(workspace: Workspace, name: str | None, in_memory: bool = False) -> StableAudio3 | None:
    """Load the parts of a model that adapters change, or read them as they are needed; None without a name."""
    if not name:
        return None
    device = "cpu" if in_memory else "meta"
    return load_checkpoint(resolve_model_name(workspace, name), device, parts=("dit", "conditioner"))


def _build_command(tool: str, *arguments: str | Path, **flags: object) -> list[str]:
    """Build the `sa3-adapter` command; flags that are None are left out."""
    given = {name: value for name, value in flags.items() if value is not None}
    options = []
    for name, value in given.items():
        options += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return ["sa3-adapter", tool, *map(str, arguments), *options]
