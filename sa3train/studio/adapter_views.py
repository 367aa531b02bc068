"""What the Adapters page shows, as HTML."""

from html import escape
from typing import Any

from sa3train.studio.adapter_work import Examination, Made
from sa3train.studio.cards import load_report, table
from sa3train.studio.messages import command_box, notice
from sa3train.studio.workplace import Workplace

OF_LAYERS = 15


def examination(place: Workplace, seen: Examination) -> str:
    """What an adapter holds, and how it fits."""
    found = seen.found
    settings = {
        "kind": found["kind"],
        "rank, alpha": f"{found['rank']}, {found['alpha']}{' (rsLoRA)' if found['rslora'] else ''}",
        "layers": f"{len(found['layers'])}, {found['parameters']:,} numbers in {', '.join(found['dtypes'])}",
        "include": _few(found["include"]) or "every Linear and Conv1d",
        "exclude": _few(found["exclude"]) or "nothing",
        "dropout": f"{found['dropout']:g}" if found["dropout"] else "",
        "fingerprint": found["fingerprint"][:16],
    }
    known = {key: _short(str(value)) for key, value in found["metadata"].items() if key != "sa3train_history"}
    steps = {f"step {number}": _short(str(entry)) for number, entry in enumerate(found["history"], 1)}
    damage = [f"{len(found['not_finite'])} tensors hold NaN or infinity"] if found["not_finite"] else []
    damage += ["every tensor is zero: it has no effect"] if found["all_zero"] else []
    groups = [[name, str(row["layers"]), _number(row["norm"])] for name, row in found["groups"].items()]
    parts = [
        *(notice(text, "warning") for text in damage),
        _facts(settings, "Settings"),
        _facts(known | steps, "Where it comes from") if known or steps else "",
        table(["group", "layers", "norm of the change"], groups, "Groups of layers"),
        _picture(place, seen),
        command_box(place.command(seen.command)),
    ]
    report = "" if seen.report is None else load_report(seen.report, seen.summary, seen.refused)
    head = f"<h3>{escape(place.shown(found['source']))}</h3>"
    return f'<article class="card">{head}{"".join(parts)}</article>{report}'


def comparison(place: Workplace, found: dict[str, Any], names: tuple[str, str], command: list[str]) -> str:
    """Two adapters side by side."""
    same = "The two have the same kind, scales and tensors, bit for bit."
    changed = found["settings"] | found["metadata"]
    rows = [[name, _short(str(one)), _short(str(other))] for name, (one, other) in changed.items()]
    layers = sorted(found["layers"].items(), key=lambda item: -(item[1]["relative_difference"] or 0.0))
    shown = [[path, _number(row["relative_difference"]), _number(row["cosine"])] for path, row in layers[:OF_LAYERS]]
    only = [
        notice(f"only in {name}: {len(found[key])} layers, such as {_few(found[key])}")
        for name, key in zip(names, ("only_in_first", "only_in_second"), strict=True)
        if found[key]
    ]
    title = f"{found['compared']}: the {len(shown)} most different of {len(layers)} shared layers"
    parts = [
        notice(same) if found["identical"] else "",
        table(["differs", *names], rows, "Settings and provenance") if rows else "",
        *only,
        table(["layer", "relative difference", "cosine"], shown, title) if shown else "",
        command_box(place.command(command)),
    ]
    heads = " and ".join(escape(name) for name in names)
    return f'<article class="card"><h3>{heads}</h3>{"".join(parts)}</article>'


def made(place: Workplace, done: Made) -> str:
    """What a tool wrote, with its error."""
    parts = [
        _facts(done.facts, "What was written"),
        *(notice(text, "warning" if text.startswith(("LEFT OUT", "not carried")) else "note") for text in done.notes),
        command_box(place.command(done.command)),
    ]
    head = f'<h3 role="status">Written: {escape(place.shown(done.target))}</h3>'
    return f'<article class="card">{head}{"".join(parts)}</article>'


def _facts(facts: dict[str, str], caption: str) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in facts.items()
        if value
    )
    return f'<div class="studio-table"><table><caption>{escape(caption)}</caption><tbody>{rows}</tbody></table></div>'


def _picture(place: Workplace, seen: Examination) -> str:
    if seen.plot is None:
        return ""
    url = escape(place.url(seen.plot), quote=True)
    return (
        f'<details><summary>Every layer</summary><img class="plot" alt="change of every layer" src="{url}"></details>'
    )


def _few(names: list[str] | None, count: int = 3) -> str:
    if not names:
        return ""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}…"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
