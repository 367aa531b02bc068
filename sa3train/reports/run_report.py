"""The run report: `report.html`, made from the files of a run folder alone, to open anywhere without a network.

Its text and layout are in `reports/assets/report.html`.
"""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from sa3train.core.files import write_text
from sa3train.core.text import format_share
from sa3train.reports.charts import render_bars
from sa3train.reports.curves import (
    is_decoder_run,
    render_clips,
    render_learning,
    render_memorization,
    render_noise_levels,
    render_system,
)
from sa3train.reports.html import format_duration, render_change_tile, render_template, render_tile
from sa3train.reports.loss_change import compute_loss_change
from sa3train.reports.run_files import REPORT_FILE, RunFiles, read_run
from sa3train.reports.verdict import describe_verdict

POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The page may load nothing: all it shows is inside it."""
CHANGED_LAYERS = 12


def write_report(run_dir: Path) -> Path:
    """Write the report of a run, atomically.

    Args:
        run_dir: The run folder.

    Returns:
        Path of the report.
    """
    write_text(run_dir / REPORT_FILE, render_report(read_run(run_dir)))
    return run_dir / REPORT_FILE


def render_report(run: RunFiles) -> str:
    """Render the report of a run.

    Args:
        run: The run.

    Returns:
        A whole HTML document.
    """
    from sa3train.reports.audio import embed_demos  # needs NumPy and more

    started = run.record.get("started")
    layers = sorted(run.adapter_stats.get("layers", {}).items(), key=lambda pair: -pair[1])
    return render_template(
        "report.html",
        run=run,
        name=run.path.resolve().name,
        policy=POLICY,
        started=f"{datetime.fromisoformat(started):%d %b %Y %H:%M}" if started else "",
        verdict=describe_verdict(run),
        tiles=_render_tiles(run),
        demos=embed_demos(run.path, run.demos),
        learning=render_learning(run),
        noise_levels=render_noise_levels(run),
        is_decoder=is_decoder_run(run),
        clips=render_clips(run),
        memorization=render_memorization(run),
        system=render_system(run),
        group_bars=_render_changes(run.adapter_stats.get("effect", {})),
        layer_bars=_render_changes(dict(layers[:CHANGED_LAYERS]), "c-third"),
    )


def _render_tiles(run: RunFiles) -> str:
    found = [
        render_tile(f"{run.step:,}", "steps"),
        render_change_tile(compute_loss_change(run.validation, "val"), "validation loss vs. base"),
        render_change_tile(compute_loss_change(run.validation, "train_eval"), "loss on training clips vs. base"),
    ]
    if run.validation.get("best_step", -1) >= 0:
        found.append(render_tile(f"{run.validation['best_step']:,}", "step of the best validation loss"))
    if run.adapter_stats:
        effect = run.adapter_stats["effect"].get("all", 0.0)
        found.append(render_tile(format_share(effect), "change of the adapted weights"))
    if run.seconds:
        found.append(render_tile(format_duration(run.seconds), "of training"))
    if run.peak_memory_gib is not None:
        found.append(render_tile(f"{run.peak_memory_gib:.1f} GiB", "peak memory"))
    return "".join(found)


def _render_changes(changes: Mapping[str, float], color: str = "c-heldout") -> str:
    return render_bars([(name, value, format_share(value)) for name, value in changes.items()], color)
