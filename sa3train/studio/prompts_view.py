"""What the model would be told: prompts of some clips, made by the very code that training uses."""

import json
import random
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sa3train.data.captions import describe
from sa3train.data.index import INDEX
from sa3train.data.prompts import PromptBuilder, PromptSettings, Template, distinct_prompts
from sa3train.data.store import LatentStore
from sa3train.errors import DataError
from sa3train.studio.captions_table import clips_of
from sa3train.studio.runs_view import view
from sa3train.studio.workplace import Workplace
from sa3train.training.report_page import table

DRAWS = 3
MOST_READ = 2000
"""Clips that are read for a preview."""


def settings_of(
    templates: str,
    trigger: str = "",
    probability: float = 1.0,
    position: str = "front",
    shuffle: bool = False,
    dropout: float = 0.0,
    keep: float = 0,
    caption_dropout: float = 0.0,
) -> PromptSettings:
    """Prompt settings from the page's fields; templates one a line, each `TEXT` or `TEXT=WEIGHT`.

    Raises `ConfigError` for settings that are wrong or without effect.
    """
    lines = [line.strip() for line in templates.splitlines() if line.strip()] or ["{caption}"]
    return PromptSettings(
        tuple(_template(line) for line in lines),
        trigger=trigger.strip(),
        trigger_probability=float(probability) if trigger.strip() else 1.0,
        trigger_position=position if trigger.strip() else "front",
        shuffle_tags=shuffle,
        tag_dropout=float(dropout),
        keep_tags=int(keep or 0) if shuffle or dropout else 0,
        caption_dropout=float(caption_dropout),
    )


def records_of(place: Workplace, folder: Path) -> list[dict[str, Any]]:
    """What is said of each clip, up to `MOST_READ`, in latents or in a folder of audio. Of the latter, clips without a
    caption are left out, as encoding leaves them out. Raises `SA3Error`.
    """
    if (folder / INDEX).is_file():
        return [record for _, record in zip(range(MOST_READ), _records(folder), strict=False)]
    found = []
    for clip in clips_of(place, folder)[:MOST_READ]:
        said = describe(clip)
        if said.caption:
            found.append({"source": clip.source, "caption": said.caption, "tags": said.tags})
    if not found:
        raise DataError(f"no clip in {folder} has a caption: write some on the Captions tab.")
    return found


def preview(records: Sequence[Mapping[str, Any]], settings: PromptSettings, count: int, seed: int = 0) -> str:
    """HTML: for `count` clips their caption, a few prompts as drawn, and that of held-out evaluation.

    Raises `SA3Error` for settings that give no clip any effect, and for clips that get no prompt.
    """
    builder = PromptBuilder(settings)
    builder.check(records)
    spread = records[:: max(1, len(records) // max(1, count))][:count]
    rows = []
    for number, record in enumerate(spread):
        chance = random.Random(f"{seed} {number}")
        drawn = dict.fromkeys(builder(record, chance) for _ in range(DRAWS))
        shown = "<br>".join(escape(prompt) or "<i>(empty prompt)</i>" for prompt in drawn)
        rows.append([f"<code>{escape(str(record['source']))}</code>", shown, escape(builder.fixed(record))])
    prompts = distinct_prompts(builder, records)
    total = "more than can be listed" if prompts is None else f"{len(prompts):,}"
    return view(
        table(("clip", f"as drawn, {DRAWS} times", "when judged"), rows)
        + f'<p class="soft">{len(records):,} clips read, distinct prompts: {total}</p>'
    )


def preview_command(folder: Path, settings: PromptSettings, count: int) -> list[str]:
    """The command that prints such prompts of latents."""
    argv = ["sa3-data", "preview", str(folder), "-n", str(count)]
    if settings.templates != PromptSettings().templates:
        argv += [part for item in settings.templates for part in ("--template", f"{item.text}={item.weight:g}")]
    for name in ("trigger", "trigger_probability", "trigger_position", "tag_dropout", "keep_tags", "caption_dropout"):
        if getattr(settings, name) != getattr(PromptSettings(), name):
            argv += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    return [*argv, *(["--shuffle-tags"] if settings.shuffle_tags else [])]


def training_settings(settings: PromptSettings) -> list[str]:
    """The settings for `sa3-train` that make such prompts."""
    found = []
    if settings.templates != PromptSettings().templates:
        items = ", ".join(f"{{text: {json.dumps(t.text)}, weight: {t.weight:g}}}" for t in settings.templates)
        found.append(f"data.prompts.templates=[{items}]")
    names = ("trigger_probability", "trigger_position", "shuffle_tags", "tag_dropout", "keep_tags", "caption_dropout")
    if settings.trigger:
        found.append(f"data.prompts.trigger={json.dumps(settings.trigger)}")
    for name in names:
        value = getattr(settings, name)
        if value != getattr(PromptSettings(), name):
            found.append(f"data.prompts.{name}={str(value).lower() if isinstance(value, bool) else value}")
    return found


def _records(folder: Path) -> Any:
    for _, record in LatentStore(folder, verify="size").records():
        yield record


def _template(line: str) -> Template:
    text, equals, weight = line.rpartition("=")
    try:
        return Template(text, float(weight)) if equals else Template(line)
    except ValueError:
        return Template(line)
