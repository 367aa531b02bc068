"""HTML of the Runs page: a run's state, curves, demos, data and settings. The charts are the report's."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from sa3train.adapters.formats.run_dir import ADAPTER_FILE, list_checkpoints
from sa3train.reports import audio, curves, html
from sa3train.reports.audio import Media
from sa3train.reports.loss_change import compute_loss_change
from sa3train.reports.run_files import CONFIG_FILE, DemoFile, RunFiles
from sa3train.reports.runs import STATES, Run
from sa3train.reports.verdict import summarize_run
from sa3train.studio.server.widgets import render_notice, render_panel, render_placeholder
from sa3train.studio.server.workspace import Workspace

MARKS = {"finished": "done", "crashed": "bad", "failed": "bad", "stopped": "rest"}
"""CSS classes of states; all others are `work`."""
NOTHING_CHOSEN = "Choose a run, or start one. Runs continue when this page or its server is closed."
KILLED = "The process was killed, possibly out of memory. Resume continues from the last checkpoint."


def format_label(workspace: Workspace, run: Run) -> str:
    """Format a run's lines in the list of runs.

    Args:
        workspace: The workspace.
        run: The run.

    Returns:
        Two lines of text.
    """
    total = f" of {run.total:,}" if run.total else ""
    steps = f" · {run.step:,}{total} steps" if run.step or run.total else ""
    left = f", {html.format_duration(run.seconds_left)} left" if run.seconds_left is not None else ""
    return f"{workspace.shorten(run.path)}\n{describe_state(run)}{steps}{left}"


def describe_state(run: Run) -> str:
    """Describe the state of a run, and what it does beside training steps.

    Args:
        run: The run.

    Returns:
        Text such as "running: validating", or "running: all steps done, generating demos".
    """
    stage = run.stage
    if run.is_alive and run.total and run.step >= run.total:
        stage = f"all steps done, {stage or 'ending the run'}"
    return f"{STATES[run.state]}{stage and f': {stage}'}"


def render_head(workspace: Workspace, run: Run | None, files: RunFiles) -> str:
    """Render a run's name, state, progress, key figures and what they say.

    Args:
        workspace: The workspace.
        run: The run, or None when none is chosen.
        files: Content of its folder.

    Returns:
        HTML.
    """
    if run is None:
        return render_panel(render_placeholder(NOTHING_CHOSEN))
    share = min(1.0, run.step / run.total) if run.total else 0.0
    bar = f'<progress max="1" value="{share:.4f}" aria-label="steps done">{share:.0%}</progress>' if run.total else ""
    summary = "".join(f"<p>{escape(sentence)}</p>" for sentence in summarize_run(files))
    problem = render_notice(f"The run failed: {run.error}", "error") if run.error else ""
    if run.state == "crashed" and not run.error:
        problem = render_notice(KILLED, "warning")
    return render_panel(
        f'<h2>{escape(workspace.shorten(run.path))} <span class="state {MARKS.get(run.state, "work")}" role="status">'
        f"{escape(describe_state(run))}</span></h2>{problem}{bar}"
        f'<div class="tiles">{"".join(_render_tiles(run, files))}</div>{summary}{_render_play(workspace, run)}'
    )


def render_play(name: str, strength: float = 1.0) -> str:
    """Render a button that opens the Play page with an adapter (see `assets/rack.js`).

    Args:
        name: Short path of the adapter, or RUN_FOLDER@STEP.
        strength: Its strength.

    Returns:
        HTML.
    """
    return (
        f'<p><button type="button" class="small" data-play="{escape(name)}" data-strength="{strength:g}">'
        f"Play {escape(name)}</button></p>"
    )


def _render_play(workspace: Workspace, run: Run) -> str:
    """Render the button that plays the run's adapter, or its last checkpoint; empty where there is none yet."""
    name, steps = workspace.shorten(run.path), list_checkpoints(run.path)
    if not (run.path / ADAPTER_FILE).is_file():
        return render_play(f"{name}@{max(steps)}") if steps else ""
    return render_play(name)


def _render_tiles(run: Run, files: RunFiles) -> list[str]:
    found = [html.render_tile(f"{run.step:,} / {run.total:,}", "steps")] if run.total else []
    if run.loss is not None:
        found.append(html.render_tile(f"{run.loss:.4f}", "training loss"))
    for part, label in (("val", "validation loss vs. base"), ("train_eval", "loss on training clips vs. base")):
        found.append(html.render_change_tile(compute_loss_change(files.validation, part), label))
    if run.is_alive and run.speed:
        found.append(html.render_tile(f"{run.speed:.3g}", "steps per second"))
    if run.seconds_left is not None:
        found.append(html.render_tile(html.format_duration(run.seconds_left), "left"))
    elif files.seconds:
        found.append(html.render_tile(html.format_duration(files.seconds), "of training"))
    if files.peak_memory_gib:
        found.append(html.render_tile(html.format_bytes(int(files.peak_memory_gib * html.GIB)), "peak memory"))
    return found


def render_curves(files: RunFiles) -> str:
    """Render the charts and tables of the report.

    Args:
        files: Content of the run folder.

    Returns:
        HTML.
    """
    parts = [
        ("Learning curves", curves.render_learning),
        ("Round trips" if curves.is_decoder_run(files) else "Noise levels", curves.render_noise_levels),
        ("Clips", curves.render_clips),
        ("Memorization", curves.render_memorization),
        ("Speed and memory", curves.render_system),
    ]
    body = "".join(f"<h3>{title}</h3>{part}" for title, render in parts if (part := render(files)))
    return render_panel(body or render_placeholder("Curves appear with the first logged metrics."))


def render_demos(workspace: Workspace, files: RunFiles) -> str:
    """Render players of all demos.

    Args:
        workspace: The workspace.
        files: Content of the run folder.

    Returns:
        HTML.
    """
    if not files.demos:
        hint = "No demos. A run generates them at step 0 and every callbacks.demos.every steps."
        return render_panel(render_placeholder(hint))

    def link_row(row: Sequence[DemoFile]) -> list[Media]:
        urls = [[workspace.get_url(files.path / path) for path in (demo.file, demo.picture)] for demo in row]
        return [Media(*pair) for pair in urls]

    lead = '<p class="soft">Same prompt and seed: only the adapter differs. Levels are unchanged.</p>'
    return render_panel(lead + audio.render_demos(files.demos, link_row, is_embedded=False))


def render_data(files: RunFiles) -> str:
    """Render what the run was trained on.

    Args:
        files: Content of the run folder.

    Returns:
        HTML.
    """
    if not files.data:
        hint = "The data is listed here once training has started (callbacks.report=true)."
        return render_panel(render_placeholder(hint))
    return render_panel(html.render_template("data.html", data=files.data))


def render_differences(rows: Sequence[tuple[str, str, str]], one: str, other: str) -> str:
    """Render the settings in which two runs differ.

    Args:
        rows: (key, value in one, value in the other) of each.
        one: Name of the one run.
        other: Name of the other.

    Returns:
        HTML.
    """
    if not rows:
        return render_panel(render_notice("All settings are the same."))
    cells = [[f"<code>{escape(key)}</code>", escape(a), escape(b)] for key, a, b in rows]
    return render_panel(html.render_table(("setting", one, other), cells))


def render_config(folder: Path) -> str:
    """Render the settings of a run.

    Args:
        folder: The run folder.

    Returns:
        HTML.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return render_panel(render_placeholder("Settings are shown once the run has started."))
    text = path.read_text(encoding="utf-8", errors="replace")
    return render_panel(f'<h3>{CONFIG_FILE}</h3><pre tabindex="0" aria-label="settings">{escape(text)}</pre>')


def render_log(text: str) -> str:
    """Render the end of a run's log.

    Args:
        text: The log.

    Returns:
        HTML.
    """
    if not text:
        return render_panel(render_placeholder("No log: this run was started elsewhere."))
    return render_panel(f'<pre tabindex="0" aria-label="log">{escape(text)}</pre>')


def render_report_frame(url: str, name: str) -> str:
    """Render a run's report inside the page; it is one file, so it can also be saved and sent.

    Args:
        url: Its address.
        name: Its short path.

    Returns:
        HTML.
    """
    return render_panel(
        f'<p><a href="{escape(url)}" download>Save {escape(name)}</a></p>'
        f'<iframe src="{escape(url)}" title="Report {escape(name)}" sandbox="allow-scripts"></iframe>'
    )
