"""What the Adapters page does: the library calls behind `sa3-adapter`, inside the studio's folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sa3train.adapters.adapter import Adapter, architecture_of
from sa3train.adapters.apply.load_report import match, refuse_unfit
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.adapters.layer_filter import adaptable_layers
from sa3train.adapters.tools.convert import convert, read_any
from sa3train.adapters.tools.edit import Weights, merged, resized
from sa3train.adapters.tools.inspect import compared, examined, inspected, plot_layers
from sa3train.adapters.tools.low_rank import Cut, Loss
from sa3train.adapters.tools.merge_checkpoint import Ingredient, merge_into_checkpoint
from sa3train.core.errors import AdapterError
from sa3train.models.checkpoint import StableAudio3, load_checkpoint
from sa3train.studio.server.commands import adapter_command
from sa3train.studio.server.workspace import StudioError, Workspace, resolve_model_name

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
FORMATS = {"native (.safetensors)": "native", "ComfyUI (.safetensors)": "comfy", "PEFT (a folder)": "peft"}


@dataclass(frozen=True)
class Made:
    """What a tool did: the file or folder it wrote, facts about it, what was lost, and the command for the same."""

    target: Path
    facts: dict[str, str]
    notes: list[str]
    command: list[str]


@dataclass(frozen=True)
class Examination:
    """An adapter looked into: what it holds, and on a model (if one was given) how it fits and why it is refused."""

    found: dict[str, Any]
    report: dict[str, Any] | None
    summary: str
    refused: str | None
    plot: Path | None
    command: list[str]


@dataclass(frozen=True)
class Size:
    """How far to cut: to a rank, or to the rank that keeps a share of the energy; empty: not at all."""

    rank: int | None = None
    energy: float | None = None

    def cut(self) -> Cut | None:
        """As the library takes it. Raises `AdapterError` when both are given."""
        return None if self.rank is None and self.energy is None else Cut(self.rank, self.energy)

    def flags(self) -> dict[str, Any]:
        """As flags of the command."""
        return {"rank": self.rank, "energy": self.energy}


def inspect(workspace: Workspace, path: str, model: str | None = None) -> Examination:
    """Look into the adapter at `path`. Raises `AdapterError` for a file that holds none."""
    source = adapter_path(workspace, path)
    adapter = load_adapter(source)
    found = inspected(adapter)
    report, summary, refused = None, "", None
    if model:
        loaded = _model(workspace, model)
        examination, refused = examined(adapter, loaded.adaptable(), loaded)
        report, summary = examination.to_dict(), examination.summary()
    effects = report["layer_effect"] if report else {}
    norms = {layer: entry["norm"] for layer, entry in found["layers"].items() if entry["norm"] is not None}
    plot = None
    if effects or norms:
        plot = workspace.home / "plots" / f"{adapter.fingerprint[:16]}{'-on-model' if effects else ''}.png"
        what = "‖W' − W‖ / ‖W‖" if effects else "norm of the scaled low-rank product"
        plot_layers(effects or norms, what, f"{source.name}: {found['kind']}", plot)
    return Examination(found, report, summary, refused, plot, adapter_command("inspect", source, model=model))


def diff(workspace: Workspace, first: str, second: str, model: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """Where two adapters differ, and the command. With a model whole changes of its weights are compared."""
    paths = [adapter_path(workspace, first), adapter_path(workspace, second)]
    one, other = (load_adapter(path) for path in paths)
    found = compared(one, other, _weights_for([one, other], workspace, model))
    return found, adapter_command("diff", *paths, model=model)


def convert_file(
    workspace: Workspace, path: str, target: str, to: str, model: str | None, size: Size, dtype: str, overwrite: bool
) -> Made:
    """Write the adapter at `path` in another format, and say what was lost on the way."""
    source, out = adapter_path(workspace, path), output_path(workspace, target, overwrite, path)
    weights = _weights_for([read_any(source)[0]], workspace, model)
    done = convert(source, out, to, weights, size.cut(), DTYPES[dtype])
    command = adapter_command("convert", source, out, to=to, model=model, **size.flags(), dtype=_dtype(dtype))
    return _made(out, done.adapter, done.notes, done.loss, command, "measured error of the written file")


def merge_files(
    workspace: Workspace, items: Sequence[tuple[str, float]], target: str, model: str | None, size: Size, dtype: str,
    overwrite: bool,
) -> Made:  # fmt: skip
    """Adapters into one of low rank (with `size`), or into a whole checkpoint of `model`."""
    if not items:
        raise StudioError("choose the adapters to merge.")
    paths = [adapter_path(workspace, path) for path, _ in items]
    strengths = [strength for _, strength in items]
    out = output_path(workspace, target, overwrite, *(path for path, _ in items))
    adapters = [load_adapter(path) for path in paths]
    named = [f"{path}={strength:g}" for path, strength in zip(paths, strengths, strict=True)]
    command = adapter_command("merge", *named, output=out, model=model, **size.flags(), dtype=_dtype(dtype))
    cut = size.cut()
    if cut is None:
        return _merge_whole(workspace, adapters, strengths, out, model, command)
    adapter, loss = merged(adapters, strengths, cut, _weights_for(adapters, workspace, model))
    save_adapter(out, adapter, DTYPES[dtype])
    return _made(out, adapter, [], loss, command, "lost by the cut")


def resize_file(
    workspace: Workspace, path: str, target: str, model: str | None, size: Size, dtype: str, overwrite: bool
) -> Made:
    """The adapter at `path` at another rank, with the error of it."""
    cut = size.cut()
    if cut is None:
        raise StudioError("say how far to cut: a rank, or a share of the energy such as 0.95.")
    source, out = adapter_path(workspace, path), output_path(workspace, target, overwrite, path)
    original = load_adapter(source)
    adapter, loss = resized(original, cut, _weights_for([original], workspace, model))
    save_adapter(out, adapter, DTYPES[dtype])
    became = f"{original.spec.kind} became {adapter.spec.kind}"
    notes = [] if adapter.spec.kind == original.spec.kind else [became]
    command = adapter_command("resize", source, out, model=model, **size.flags(), dtype=_dtype(dtype))
    return _made(out, adapter, notes, loss, command, "lost by the cut")


def adapter_path(workspace: Workspace, path: str | None) -> Path:
    """Where an adapter lies: a file, or a PEFT folder. Raises `StudioError`."""
    if not (path or "").strip():
        raise StudioError("choose an adapter: a file from the list, or its path.")
    found = workspace.inside(path or "")
    if not found.exists():
        raise StudioError(f"there is no adapter {found}.")
    return found


def output_path(workspace: Workspace, target: str | None, overwrite: bool, *sources: str) -> Path:
    """Where to write. Raises `StudioError` for a place outside, one that is taken, and for a source itself."""
    if not (target or "").strip():
        raise StudioError("say where to write: a path inside the studio's folders.")
    found = workspace.inside(target or "")
    if found in workspace.roots or found == workspace.home:
        raise StudioError(f"{found} is a folder of the studio itself: give a path inside it.")
    if found in [workspace.inside(source) for source in sources]:
        raise StudioError(f"{found} is the adapter itself: give another name, and the original stays.")
    if found.exists() and not overwrite:
        raise StudioError(f"{found} exists already: tick Overwrite, or give another name.")
    return found


def strengths_of(text: str, count: int) -> list[float]:
    """Strengths written with commas, one per adapter; empty: 1 each. Raises `StudioError`."""
    try:
        found = [float(part) for part in (text or "").split(",") if part.strip()]
    except ValueError as error:
        raise StudioError(f"{text!r} is no list of strengths: write numbers with commas, such as 1, 0.5.") from error
    if found and len(found) != count:
        raise StudioError(f"{len(found)} strengths for {count} adapters: give one each, in the order they were chosen.")
    return found or [1.0] * count


def _merge_whole(
    workspace: Workspace, adapters: Sequence[Adapter], strengths: Sequence[float], out: Path, model: str | None,
    command: list[str],
) -> Made:  # fmt: skip
    if not model:
        raise AdapterError(
            "say what to merge into: a model for a whole checkpoint, or a rank (or energy) for one adapter."
        )
    base = _model(workspace, model)
    ingredients = [Ingredient(adapter, strength) for adapter, strength in zip(adapters, strengths, strict=True)]
    reports = merge_into_checkpoint(base.path, out, base.adaptable(), ingredients, base)
    notes = [f"{Path(report.source).name}: {report.summary()}" for report in reports]
    return Made(out, {"checkpoint": base.name, "adapters in its weights": str(len(reports))}, notes, command)


def _made(out: Path, adapter: Adapter, notes: Sequence[str], loss: Loss | None, command: list[str], what: str) -> Made:
    ranks = [adapter.spec.rank_of(path) for path in adapter.tensors]
    span = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    facts = {"kind": adapter.spec.kind, "rank": "full" if adapter.spec.kind == "diff" else span}
    facts["layers"] = str(len(adapter.tensors))
    if loss is not None:
        path, worst = loss.worst
        facts[what] = (
            f"{loss.relative:.4%} of the change over all layers; most in {path}, {worst:.4%}" if worst else "none"
        )
        notes = [*notes, *(f"not carried: {left}" for left in loss.left_out)]
    return Made(out, facts, list(notes), command)


def _model(workspace: Workspace, name: str) -> StableAudio3:
    return load_checkpoint(resolve_model_name(workspace, name), parts=("dit", "conditioner"))


def _weights_for(adapters: Sequence[Adapter], workspace: Workspace, model: str | None) -> Weights | None:
    """The weights of `model`, once every adapter is known to fit it; None without a model."""
    if not model:
        return None
    loaded = _model(workspace, model)
    root = loaded.adaptable()
    layers, architecture = adaptable_layers(root), architecture_of(root)
    for adapter in adapters:
        refuse_unfit(match(adapter, layers, architecture, loaded), allow_partial=False)
    weights: Any = {path: layer.weight for path, layer in layers.items()}
    return dict(weights)


def _dtype(name: str) -> str | None:
    return None if name == "f16" else name
