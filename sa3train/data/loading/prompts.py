"""From a caption and its tags to the prompt a clip is trained with.

A template is text with fields in braces: `{caption}`, any tag (`{genre}`), parts of the source path (`{folder}`,
`{stem}`, `{path[0]}`, `{path[-2]}`), and fixed text. Tags that cannot be filled exclude the template for that clip; a
clip that no template fits is an error. `{{` and `}}` write braces.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from sa3train.core.errors import ConfigError, DataError

FINITE = 200_000
"""More distinct prompts than this are not listed: they are encoded as they come."""

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}\[\]]+)(?:\[(-?\d+)\])?\}|[{}]")


@dataclass(frozen=True)
class Template:
    """Prompt text with fields, chosen in proportion to `weight` among those that fit a clip."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class PromptSettings:
    """How prompts are made. Probabilities are in [0, 1].

    `trigger` is put at the `trigger_position` (front or back) of a prompt with `trigger_probability`. The caption is
    cut at `separator` into tags for `shuffle_tags` and `tag_dropout` (the chance of each tag to be left out); the first
    `keep_tags` stay in place. `caption_dropout` is the chance of an empty prompt, trigger and all.
    """

    templates: tuple[Template, ...] = (Template("{caption}"),)
    trigger: str = ""
    trigger_probability: float = 1.0
    trigger_position: str = "front"
    separator: str = ","
    shuffle_tags: bool = False
    tag_dropout: float = 0.0
    keep_tags: int = 0
    caption_dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.templates:
            raise ConfigError('prompts need at least one template, such as "{caption}".')
        for template in self.templates:
            fields_of(template.text)
            if not template.weight > 0:
                raise ConfigError(f"template {template.text!r} has weight {template.weight}; give it more than 0.")
        for name in ("trigger_probability", "tag_dropout", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is a probability from 0 to 1.")
        if self.trigger_position not in ("front", "back"):
            raise ConfigError(f"trigger_position is {self.trigger_position!r}; choose front or back.")
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        """A setting that could have no effect is an error, whatever the data."""
        if not self.trigger and (self.trigger_probability != 1.0 or self.trigger_position != "front"):
            raise ConfigError("trigger_probability and trigger_position have no effect without a trigger: give one.")
        if self.trigger and self.trigger_probability == 0:
            raise ConfigError("a trigger with trigger_probability=0 has no effect: raise it, or drop the trigger.")
        if self.keep_tags < 0 or (self.keep_tags and not self._changes_tags):
            raise ConfigError("keep_tags needs shuffle_tags=true or tag_dropout above 0, and must not be negative.")
        if self._changes_tags and not self.separator:
            raise ConfigError("shuffle_tags and tag_dropout need a separator between tags, such as ','.")
        if self._changes_tags and not any("caption" in fields_of(t.text) for t in self.templates):
            raise ConfigError("shuffle_tags and tag_dropout have no effect: no template contains {caption}.")

    @property
    def _changes_tags(self) -> bool:
        return self.shuffle_tags or self.tag_dropout > 0


def fields_of(template: str) -> set[str]:
    """Names of the fields in `template`. Raises `ConfigError` for a lone brace."""
    found = set()
    for match in _FIELD.finditer(template):
        if match[0] in "{}":
            raise ConfigError(f"template {template!r} has a lone {match[0]!r}; write {match[0] * 2} for the character.")
        if match[1]:
            found.add(match[1].strip())
    return found


def values_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What templates can name for a clip: tags, the caption, and parts of its source path."""
    path = PurePosixPath(str(record.get("source", "")).replace("\\", "/"))
    values: dict[str, Any] = {"path": path.parts, "folder": path.parent.name, "stem": path.stem, "file": path.name}
    values |= record.get("tags") or {}
    values["caption"] = record.get("caption") or ""
    return {name: value for name, value in values.items() if value not in ("", None)}


def fill(template: str, values: Mapping[str, Any]) -> str | None:
    """`template` with its fields filled, or None when one is absent."""
    missing = False

    def replace(match: re.Match[str]) -> str:
        nonlocal missing
        if match[0] in ("{{", "}}"):
            return match[0][0]
        value = values.get(match[1].strip())
        if isinstance(value, tuple):
            place = int(match[2]) if match[2] else None
            if place is None:
                return "/".join(value)
            value = value[place] if -len(value) <= place < len(value) else None
        elif match[2]:
            value = None
        missing |= value is None
        return f"{value:g}" if isinstance(value, float) else str(value)

    filled = _FIELD.sub(replace, template)
    return None if missing else filled


class PromptBuilder:
    """Makes prompts by `settings`; pure but for the random stream it is given."""

    def __init__(self, settings: PromptSettings) -> None:
        self.settings = settings

    def __call__(self, record: Mapping[str, Any], chance: random.Random) -> str:
        """The prompt for one showing of a clip. Always draws alike, so that equal streams give equal prompts."""
        settings = self.settings
        drop, trigger, order = chance.random(), chance.random(), random.Random(chance.random())
        values = values_of(record)
        if values.get("caption") and settings._changes_tags:
            values["caption"] = self._vary(values["caption"], order)
        texts = self._fitting(record, values)
        text = chance.choices([t for t, _ in texts], [w for _, w in texts])[0]
        if drop < settings.caption_dropout:
            return ""
        return self._triggered(text) if settings.trigger and trigger < settings.trigger_probability else text

    def fixed(self, record: Mapping[str, Any]) -> str:
        """The prompt of a held-out clip: the heaviest fitting template, tags whole and in order, always triggered."""
        texts = self._fitting(record, values_of(record))
        text = max(texts, key=lambda pair: pair[1])[0]
        return self._triggered(text) if self.settings.trigger else text

    def every(self, record: Mapping[str, Any]) -> list[str] | None:
        """All prompts this clip can have, or None when tags are shuffled or dropped."""
        settings = self.settings
        if settings._changes_tags:
            return None
        texts = [text for text, _ in self._fitting(record, values_of(record))]
        plain = [] if settings.trigger and settings.trigger_probability == 1 else texts
        triggered = [self._triggered(text) for text in texts] if settings.trigger else []
        return [*plain, *triggered, *([""] if settings.caption_dropout > 0 else [])]

    def check(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Raise `ConfigError` for a setting that no record gives any effect, `DataError` for clips without a prompt."""
        settings = self.settings
        known: set[str] = set()
        several = droppable = fitless = count = 0
        unfit: list[str] = []
        used = [0] * len(settings.templates)
        for record in records:
            count += 1
            values = values_of(record)
            known |= values.keys()
            free = len(self._tags(str(values.get("caption", "")))) - settings.keep_tags
            several, droppable = several + (free > 1), droppable + (free > 0)
            fits = [fill(template.text, values) is not None for template in settings.templates]
            used = [uses + fit for uses, fit in zip(used, fits, strict=True)]
            if not any(fits):
                fitless += 1
                unfit += [str(record.get("source"))] if len(unfit) < 5 else []
        if not count:
            return
        self._check_templates(used, known)
        if fitless:
            raise DataError(
                f"{fitless} of {count} clips fit no prompt template (such as {', '.join(unfit)}): "
                f"give them the tags, or add a template such as {{caption}} or fixed text."
            )
        if settings.shuffle_tags and not several:
            raise ConfigError(
                f"shuffle_tags has no effect: no caption has tags to shuffle, separated by {settings.separator!r}."
            )
        if settings.tag_dropout and not droppable:
            raise ConfigError(
                f"tag_dropout has no effect: no caption has more than keep_tags={settings.keep_tags} tags."
            )

    def _check_templates(self, used: Sequence[int], known: set[str]) -> None:
        for template, uses in zip(self.settings.templates, used, strict=True):
            if not uses:
                absent = sorted(fields_of(template.text) - known)
                reason = f"no clip has {', '.join(absent)}" if absent else "no clip has all of its fields"
                fields = ", ".join(sorted(known))
                raise ConfigError(f"prompt template {template.text!r} has no effect: {reason}. Known fields: {fields}.")

    def _fitting(self, record: Mapping[str, Any], values: Mapping[str, Any]) -> list[tuple[str, float]]:
        filled = [(fill(template.text, values), template.weight) for template in self.settings.templates]
        texts = [(text.strip(), weight) for text, weight in filled if text is not None]
        if not texts:
            raise DataError(f"no prompt template fits {record.get('source')}: it lacks the fields that they name.")
        return texts

    def _triggered(self, text: str) -> str:
        parts = [part for part in (self.settings.trigger, text) if part]
        return ", ".join(parts if self.settings.trigger_position == "front" else reversed(parts))

    def _tags(self, caption: str) -> list[str]:
        return [tag for part in caption.split(self.settings.separator) if (tag := part.strip())]

    def _vary(self, caption: str, chance: random.Random) -> str:
        settings, tags = self.settings, self._tags(caption)
        kept, rest = tags[: settings.keep_tags], tags[settings.keep_tags :]
        rest = [tag for tag in rest if chance.random() >= settings.tag_dropout]
        if settings.shuffle_tags:
            chance.shuffle(rest)
        joint = settings.separator if settings.separator.endswith(" ") else f"{settings.separator} "
        return joint.join([*kept, *rest])


def distinct_prompts(builder: PromptBuilder, records: Iterable[Mapping[str, Any]]) -> list[str] | None:
    """Every prompt that training and held-out evaluation can ask for, sorted; None when they are not a short list."""
    prompts: set[str] = set()
    for record in records:
        possible = builder.every(record)
        if possible is None or len(prompts) > FINITE:
            return None
        prompts.update(possible)
        prompts.add(builder.fixed(record))
    return sorted(prompts)
