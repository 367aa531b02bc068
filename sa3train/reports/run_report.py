"""The run report: `report.html`, made from the files of a run folder alone, to be opened anywhere, with no network."""

import json
import math
from collections.abc import Mapping
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from sa3train.core.files import write_text
from sa3train.reports.html import Section, facts, folded, page, table, tile
from sa3train.reports.run_files import RunFiles, change, read_run, reading

REPORT = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into `run_dir` from its files, whole or not at all, and give its path."""
    write_text(run_dir / REPORT, render(read_run(run_dir)))
    return run_dir / REPORT


def render(run: RunFiles) -> str:
    """The page for what was read."""
    from sa3train.reports.audio import Budget, listening
    from sa3train.reports.curves import by_level, clips, learning, machine, memorised

    name = run.path.resolve().name
    return page(
        f"{name} · sa3train",
        _head(run, name),
        [
            Section(
                "Listen",
                "Same prompt, same seed, one row: only the adapter differs. Switch players while one plays and the "
                "next goes on at the same place. Levels are untouched; click a picture to play from there.",
                listening(run.path, run.played, Budget()),
            ),
            Section(
                "Learning",
                "Loss on fixed clips, fixed noise and fixed noise levels, as a change from the base model's own: below "
                "the dashed line the adapter predicts better than the base.",
                learning(run),
            ),
            Section(
                "By noise level",
                "The same, for each of ten noise levels: 0.05 is nearly clean audio and decides texture, 0.95 is "
                "nearly noise and decides structure.",
                by_level(run),
            ),
            Section("Clips", "Which clips the adapter fits best and worst.", clips(run)),
            Section(
                "Memorisation",
                "How close generations come to training clips in latent space, measured by how close unseen clips are.",
                memorised(run.generated),
            ),
            Section("Adapter", "What it changes: size of W′ − W against W, by group of layers.", _adapter(run)),
            Section("Data", "What it was trained on.", _data(run)),
            Section("Time and memory", "How fast it went, and the most memory held.", machine(run)),
            Section("Settings", "Everything that was set. Start it again from this file.", _settings(run)),
        ],
    )


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _head(run: RunFiles, name: str) -> str:
    record = run.record
    state = {"running": "in progress", "finished": "finished", "interrupted": "interrupted"}.get(
        str(record.get("status")), "unknown"
    )
    about = [f"run {record.get('id', '?')}", state, f"sa3train {record.get('version', '?')}"]
    if "started" in record:
        about.append(f"started {datetime.fromisoformat(record['started']):%d %b %Y %H:%M} UTC")
    if record.get("resumed"):
        about.append(f"resumed {len(record['resumed'])} times")
    lead = "".join(f'<p class="lead">{escape(sentence)}</p>' for sentence in reading(run))
    return (
        f'<h1>{escape(name)}</h1><p class="soft">{escape(" · ".join(about))}</p>{lead}'
        f'<div class="tiles">{"".join(_tiles(run))}</div>'
    )


def _tiles(run: RunFiles) -> list[str]:
    found = [tile(f"{run.step:,}", "steps")]
    for part, label in (("heldout", "held-out loss against base"), ("train", "training clips against base")):
        value = change(run, part)
        if value is not None:
            found.append(tile(f"{value:+.1%}", label, "good" if value < 0 else "bad"))
    if run.heldout.get("best_step", -1) >= 0:
        found.append(tile(f"{run.heldout['best_step']:,}", "best step by held-out loss"))
    if run.inspection:
        found.append(tile(f"{100 * run.inspection['effect'].get('all', 0.0):.3g} %", "change of the adapted weights"))
    if run.seconds:
        found.append(tile(duration(run.seconds), "in the training loop"))
    memory = max((value for _, value in run.curve("time/peak_memory_gib")), default=math.nan)
    if math.isfinite(memory):
        found.append(tile(f"{memory:.1f} GiB", "peak memory"))
    return found


def _adapter(run: RunFiles) -> str:
    from sa3train.reports.charts import bars

    found = run.inspection
    if not found:
        return ""
    groups = [(group, value, f"{100 * value:.3g} %") for group, value in found["effect"].items()]
    layers = sorted(found["layers"].items(), key=lambda pair: -pair[1])
    most = [(path, value, f"{100 * value:.3g} %") for path, value in layers[:12]]
    about = facts(
        [
            ("kind", f"{found['kind']}, rank {found['rank']}, alpha {found['alpha']}"),
            ("layers", f"{len(layers)}"),
            ("numbers trained", f"{found['parameters']:,}"),
            ("at step", f"{found['step']:,}"),
        ]
    )
    return (
        f'<div class="two"><div>{about}</div><div>{bars(groups)}</div></div>'
        f"<h3>The layers that change most</h3>{bars(most, 'c-third')}"
    )


def _data(run: RunFiles) -> str:
    if not run.data:
        return ""
    rows = [
        [escape(str(source["path"])), escape(source["role"]), *_share(source, "train"), *_share(source, "heldout"),
         escape(str(source["model"]))]
        for source in run.data["sources"]
    ]  # fmt: skip
    head = ("source", "role", "clips", "length", "held out", "length", "encoded by")
    prompts = "".join(f"<li>{escape(prompt) or '(empty)'}" for prompt in run.data.get("prompts", []))
    cards = "".join(
        folded(f"Card of {source['path']}", f"<pre>{escape(source['card'])}</pre>")
        for source in run.data["sources"]
        if source.get("card")
    )
    manifest = f'<p class="soft">manifest <code>{escape(str(run.data["manifest"])[:32])}</code></p>'
    shown = f"<h3>Some of its prompts</h3><ul>{prompts}</ul>" if prompts else ""
    return table(head, rows, numbers=(2, 3, 4, 5)) + manifest + shown + cards


def _share(source: Mapping[str, Any], split: str) -> list[str]:
    found = source["splits"].get(split)
    return ["–", "–"] if not found else [f"{found['clips']:.0f}", duration(found["seconds"])]


def _settings(run: RunFiles) -> str:
    if not run.config:
        return ""
    resumed = [
        [escape(str(part.get("at", ""))), f"{part.get('step', 0):,}", escape(json.dumps(part.get("changes", {})))]
        for part in run.record.get("resumed", [])
    ]
    parts = table(("resumed at", "from step", "what was changed"), resumed, numbers=(1,)) if resumed else ""
    return folded("config.yaml", f"<pre>{escape(run.config)}</pre>") + parts
