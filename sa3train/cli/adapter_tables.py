"""How `sa3-adapter` shows what it found: tables on the screen."""

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from sa3train.adapters.adapter import Adapter
    from sa3train.adapters.tools.low_rank import Loss

OF_LAYERS = 12


def show_file(found: dict[str, Any], every_layer: bool) -> None:
    """The adapter itself: settings, provenance, groups of layers, and the layers when asked."""
    console = Console(soft_wrap=True)
    console.print(f"[bold]{escape(found['source'])}[/]")
    settings = Table(show_header=False, box=None)
    rows = {
        "kind": found["kind"],
        "rank, alpha": f"{found['rank']}, {found['alpha']}{' (rsLoRA)' if found['rslora'] else ''}",
        "layers": f"{len(found['layers'])}, {found['parameters']:,} numbers in {', '.join(found['dtypes'])}",
        "include": _filters(found["include"]) or "every Linear and Conv1d",
        "exclude": _filters(found["exclude"]) or "nothing",
        "dropout": f"{found['dropout']:g}" if found["dropout"] else "",
        "damage": f"{len(found['not_finite'])} tensors with NaN or infinity" if found["not_finite"] else "",
        "effect": "none: every tensor is zero" if found["all_zero"] else "",
        "fingerprint": found["fingerprint"][:16],
        **{key: _short(value) for key, value in found["metadata"].items() if key != "sa3train_history"},
        **{f"step {number}": _short(str(entry)) for number, entry in enumerate(found["history"], 1)},
    }
    for name, value in rows.items():
        if value:
            settings.add_row(name, escape(value))
    console.print(settings)
    console.print(_table(["group", "layers", "norm of the change"], _norm_rows(found["groups"], "layers")))
    if every_layer:
        console.print(_table(["layer", "rank", "norm of the change"], _norm_rows(found["layers"], "rank")))


def show_report(report: dict[str, Any], refused: str | None, every_layer: bool) -> None:
    """How the adapter fits a model."""
    console = Console(soft_wrap=True)
    loaded = report["base_loaded"]
    console.print(f"\n[bold]on {escape(loaded.get('name', 'the model'))}[/]")
    rows = [
        ["matched", str(len(report["matched"])), ""],
        ["missing", str(len(report["missing"])), _few(report["missing"])],
        ["unexpected", str(len(report["unexpected"])), _few(report["unexpected"])],
        ["shape-wrong", str(len(report["shape_wrong"])), _few(list(report["shape_wrong"]))],
    ]
    console.print(_table(["layers", "count", "such as"], rows))
    bases = [
        [name, report["base"].get(name, "not recorded")[:24], loaded.get(name, "-")[:24]]
        for name in ("name", "architecture", "hash")
    ]
    console.print(_table(["base", "trained on", "loaded"], bases))
    if report["effect"]:
        effects = [[group, f"{value:.3%}"] for group, value in report["effect"].items()]
        console.print(_table(["group", "‖W' − W‖ / ‖W‖"], effects))
    if every_layer and report["layer_effect"]:
        effects = [[path, f"{value:.3%}"] for path, value in report["layer_effect"].items()]
        console.print(_table(["layer", "‖W' − W‖ / ‖W‖"], effects))
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", markup=False)
    if refused is None:
        console.print("it can be loaded")


def show_comparison(found: dict[str, Any], names: tuple[str, str], every_layer: bool) -> None:
    """Two adapters side by side."""
    console = Console(soft_wrap=True)
    if found["identical"]:
        console.print("the two adapters have the same kind, scales and tensors, bit for bit")
    changed = found["settings"] | found["metadata"]
    rows = [[name, _short(str(one)), _short(str(other))] for name, (one, other) in changed.items()]
    if rows:
        console.print(_table(["differs", *names], rows))
    for which, key in zip(names, ("only_in_first", "only_in_second"), strict=True):
        if found[key]:
            console.print(f"only in {which}: {len(found[key])} layers, such as {_few(found[key])}", markup=False)
    layers = sorted(found["layers"].items(), key=lambda item: -(item[1]["relative_difference"] or 0.0))
    shown = layers if every_layer else layers[:OF_LAYERS]
    rows = [[path, _number(row["relative_difference"]), _number(row["cosine"])] for path, row in shown]
    title = f"{found['compared']}, {len(shown)} of {len(layers)} shared layers"
    console.print(_table(["layer", "relative difference", "cosine"], rows, title))


def loss_lines(loss: "Loss | None", what: str) -> list[str]:
    """What was lost, in words."""
    if loss is None:
        return []
    path, worst = loss.worst
    amount = f"{loss.relative:.4%} of the change over all layers; most in {path}, {worst:.4%}"
    return [f"{what}: {amount if worst else 'none'}"] + [f"not carried: {left}" for left in loss.left_out]


def written(target: str, adapter: "Adapter", notes: list[str], loss: "Loss | None") -> dict[str, Any]:
    """What was made, as plain values."""
    ranks = [adapter.spec.rank_of(path) for path in adapter.tensors]
    span = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    return {
        "written": target,
        "kind": adapter.spec.kind,
        "rank": "full" if adapter.spec.kind == "diff" else span,
        "layers": len(adapter.tensors),
        "notes": notes,
        "error": None if loss is None else loss.relative,
        "worst_layer": None if loss is None else dict(zip(("layer", "error"), loss.worst, strict=True)),
        "not_carried": [] if loss is None else loss.left_out,
    }


def _table(heads: list[str], rows: list[list[str]], title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _norm_rows(found: dict[str, dict[str, Any]], count: str) -> list[list[str]]:
    return [[name, str(row[count]), _number(row["norm"])] for name, row in found.items()]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _filters(patterns: list[str] | None) -> str:
    return _few(patterns, 4) if patterns else ""


def _few(names: list[str], count: int = 2) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}…"
