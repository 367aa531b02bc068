"""What the Runs page shows of a run, as HTML: its state, curves, demos and data. The charts are the report's."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from sa3train.reports.curves import by_level, clips, learning, machine, memorised
from sa3train.reports.html import folded, table, tile
from sa3train.reports.run_files import CONFIG, RunFiles, change, reading
from sa3train.reports.run_report import duration
from sa3train.studio.runs.estimate import size_of
from sa3train.studio.runs.runs import STATES, Run
from sa3train.studio.server.widgets import empty, notice, view
from sa3train.studio.server.workspace import Workspace

if TYPE_CHECKING:
    from sa3train.reports.run_files import Played

MARKS = {"finished": "done", "crashed": "bad", "failed": "bad", "stopped": "rest"}
NOTHING_CHOSEN = "Choose a run on the left, or start one. Runs go on when this page or its server is closed."
PROMPTS_SHOWN = 12


def label(workspace: Workspace, run: Run) -> str:
    """A run's line in the list."""
    steps = f"{run.step:,} of {run.total:,} steps" if run.total else f"{run.step:,} steps"
    left = f", {duration(run.seconds_left)} left" if run.seconds_left is not None else ""
    return f"{workspace.shown(run.path)}\n{STATES[run.state]} · {steps}{left}"


def head(workspace: Workspace, run: Run | None, files: RunFiles) -> str:
    """Name, state, progress, key figures and what they say."""
    if run is None:
        return view(empty(NOTHING_CHOSEN))
    mark = MARKS.get(run.state, "work")
    share = min(1.0, run.step / run.total) if run.total else 0.0
    name = escape(workspace.shown(run.path))
    bar = f'<progress max="1" value="{share:.4f}" aria-label="steps done">{share:.0%}</progress>' if run.total else ""
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in reading(files))
    wrong = notice(f"It ended with an error: {run.error}", "error") if run.error else ""
    if run.state == "crashed" and not wrong:
        wrong = notice("It ended without a word: killed, or out of memory. Resume goes on from its last saved state.",
                       "warning")  # fmt: skip
    tiles = "".join(_tiles(run, files))
    return view(
        f'<h2>{name} <span class="state {mark}" role="status">{escape(STATES[run.state])}</span></h2>{wrong}{bar}'
        f'<div class="tiles">{tiles}</div>{said}'
    )


def _tiles(run: Run, files: RunFiles) -> list[str]:
    found = [tile(f"{run.step:,}" + (f" / {run.total:,}" if run.total else ""), "steps")]
    if run.loss is not None:
        found.append(tile(f"{run.loss:.4f}", "training loss"))
    for part, said in (("heldout", "held-out loss against base"), ("train", "training clips against base")):
        value = change(files, part)
        if value is not None:
            found.append(tile(f"{value:+.1%}", said, "good" if value < 0 else "bad"))
    if run.alive and run.speed:
        found.append(tile(f"{run.speed:.3g}", "steps per second"))
    if run.seconds_left is not None:
        found.append(tile(duration(run.seconds_left), "of steps left"))
    elif files.seconds:
        found.append(tile(duration(files.seconds), "in the training loop"))
    peak = max((value for _, value in files.curve("time/peak_memory_gib")), default=0.0)
    if peak:
        found.append(tile(size_of(int(peak * 2**30)), "peak memory"))
    return found


def curves(files: RunFiles) -> str:
    """Losses against the base, by noise level, by clip; then time and memory."""
    parts = [
        ("Learning", learning(files)),
        ("By noise level", by_level(files)),
        ("Clips", clips(files)),
        ("Memorisation", memorised(files.generated)),
        ("Time and memory", machine(files)),
    ]
    body = "".join(f"<h3>{title}</h3>{part}" for title, part in parts if part)
    return view(body or empty("Curves appear with the first line of metrics."))


def listening(workspace: Workspace, files: RunFiles) -> str:
    """Base beside adapter for every demo, the newest step first."""
    played = files.played
    if not played:
        return view(empty("No demos yet. They are played at step 0 and every callbacks.demos.every steps."))
    base = {(entry.model, entry.demo): entry for entry in played if entry.step == 0}
    steps = sorted({entry.step for entry in played if entry.step}, reverse=True) or [0]
    body = []
    for number, step in enumerate(steps):
        rows = _rows(workspace, files.path, [entry for entry in played if entry.step == step], base)
        body.append(f"<h3>Step {step:,}</h3>{rows}" if number == 0 else folded(f"Step {step:,}", rows))
    return view('<p class="soft">Same prompt, same seed: only the adapter differs. Levels are untouched.</p>'
                + "".join(body))  # fmt: skip


def _rows(workspace: Workspace, folder: Path, played: Sequence["Played"], base: dict[tuple[str, str], "Played"]) -> str:
    found = []
    for key in dict.fromkeys((entry.model, entry.demo) for entry in played):
        takes = [entry for entry in played if (entry.model, entry.demo) == key and entry.step]
        shown = [*([base[key]] if key in base else []), *takes]
        what = "the middle made anew" if shown[0].mode == "inpaint" else shown[0].prompt
        found.append(
            f'<div class="card"><h3>{escape(key[0])} · {escape(what)}</h3>'
            f'<div class="takes">{"".join(_take(workspace, folder, entry) for entry in shown)}</div></div>'
        )
    return "".join(found)


def _take(workspace: Workspace, folder: Path, entry: "Played") -> str:
    name = "base" if entry.strength == 0 else f"adapter at {entry.strength:g}"
    about = f"{name}, {entry.prompt}, step {entry.step}"
    loud = entry.measures.get("loudness_lufs")
    level = f"<small>{loud:.1f} LUFS</small>" if loud is not None else ""
    picture, file, label = workspace.url(folder / entry.picture), workspace.url(folder / entry.file), escape(about)
    return (
        f'<div class="take"><b>{escape(name)}</b>'
        f'<img loading="lazy" src="{picture}" alt="Mel spectrogram of {label}">'
        f'<audio controls preload="none" src="{file}" aria-label="{label}"></audio>'
        f"{level}</div>"
    )


def data_card(files: RunFiles) -> str:
    """What it was trained on, with the cards that lie beside the latents."""
    if not files.data:
        return view(empty("The data is noted here once training has begun (callbacks.report=true)."))
    rows = []
    for source in files.data["sources"]:
        splits = [source["splits"].get(split) for split in ("train", "heldout")]
        cells = [f"{s['clips']:.0f} clips, {duration(s['seconds'])}" if s else "–" for s in splits]
        rows.append([f"<code>{escape(str(source['path']))}</code>", *cells, escape(str(source["model"]))])
    prompts = "".join(f"<li>{escape(prompt) or '(empty)'}" for prompt in files.data.get("prompts", [])[:PROMPTS_SHOWN])
    cards = "".join(
        folded(f"Card of {source['path']}", f"<pre>{escape(source['card'])}</pre>")
        for source in files.data["sources"]
        if source.get("card")
    )
    some = f"<h3>Some of its prompts</h3><ul>{prompts}</ul>" if prompts else ""
    return view(table(("source", "trained on", "held out", "encoded by"), rows) + some + cards)


def between(rows: Sequence[tuple[str, str, str]], one: str, other: str) -> str:
    """The settings in which two runs differ."""
    if not rows:
        return view(notice("Every setting is the same."))
    cells = [[f"<code>{escape(key)}</code>", escape(a), escape(b)] for key, a, b in rows]
    return view(table(("setting", escape(one), escape(other)), cells))


def plan_table(rows: Sequence[tuple[str, str]]) -> str:
    """A plan's lines."""
    lines = "".join(f"<tr><th scope=row>{escape(name)}<td>{escape(text)}" for name, text in rows)
    return view(f"<table>{lines}</table>")


def config(folder: Path) -> str:
    """A run's settings as they are kept."""
    path = folder / CONFIG
    if not path.is_file():
        return view(empty("The settings are kept once the run has begun."))
    text = path.read_text(encoding="utf-8", errors="replace")
    return view(f'<h3>{CONFIG}</h3><pre tabindex="0" aria-label="settings">{escape(text)}</pre>')


def log(text: str) -> str:
    """The end of a run's log."""
    return view(
        f'<pre tabindex="0" aria-label="log">{escape(text)}</pre>'
        if text
        else empty("No log: it was not started here.")
    )


def report(url: str, name: str) -> str:
    """A run's report inside the page. It is one file without network, so it may also be saved and sent."""
    return view(
        f'<p><a href="{escape(url)}" download>Save {escape(name)}</a></p>'
        f'<iframe src="{escape(url)}" title="Report {escape(name)}" sandbox="allow-scripts"></iframe>'
    )
