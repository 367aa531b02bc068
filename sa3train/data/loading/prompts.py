"""Build the prompt that a clip is trained with, from its caption and tags.

A template is text with fields in braces: `{caption}`, any tag (`{genre}`), parts of the source path (`{folder}`,
`{stem}`, `{path[0]}`, `{path[-2]}`). A template with a field that a clip lacks is not used for that clip. A clip that
no template fits is an error, unless it has no caption: then its prompt is empty. `{{` and `}}` write braces.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from sa3train.core.config import check_settings, setting
from sa3train.core.errors import ConfigError, ConflictError, DataError
from sa3train.core.log import get_logger
from sa3train.data.sources.text import compose

_logger = get_logger(__name__)

_MAX_LISTED = 200_000
"""More distinct prompts than this are not listed: they are embedded during training."""

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}\[\]]+)(?:\[(-?\d+)\])?\}|[{}]")


@dataclass(frozen=True)
class Template:
    """A prompt template, chosen in proportion to its weight among those that fit a clip.

    Attributes:
        text: Text with fields.
        weight: Relative frequency.
    """

    text: str = setting(help="Text with fields.")
    weight: float = setting(1.0, help="Relative frequency.", above=0, max=1e6)

    def __post_init__(self) -> None:
        check_settings(self, "data.prompts.templates")

    @classmethod
    def parse(cls, line: str) -> "Template":
        """Parse a template as commands and forms give it.

        Args:
            line: `TEXT` or `TEXT=WEIGHT`.

        Returns:
            The template.
        """
        text, equals, weight = line.rpartition("=")
        try:
            return cls(text, float(weight)) if equals else cls(line)
        except ValueError:
            return cls(line)


@dataclass(frozen=True)
class PromptSettings:
    """How a clip's caption and tags become its prompt."""

    templates: tuple[Template, ...] = setting(
        (Template("{caption}"),),
        items=(1, 1000),
        help="Prompt texts with fields ({caption}, any tag, {folder}, {stem}, {path[0]}), chosen by weight among those "
        "a clip can fill.",
    )
    trigger: str = setting("", help="Trigger word added to the prompt, which activates the adapter's style.")
    trigger_probability: float = setting(1.0, help="Probability of adding the trigger.", min=0, max=1)
    trigger_position: Literal["front", "back"] = setting(
        "front", help="End of the prompt that the trigger is added to."
    )
    separator: str = setting(",", help="Separator of the tags in a caption.")
    shuffle_tags: bool = setting(False, help="Shuffle the tags of a caption.")
    tag_dropout: float = setting(0.0, help="Probability of leaving out each tag.", min=0, max=1)
    keep_tags: int = setting(0, help="First tags that are neither shuffled nor left out.", min=0, max=1000)
    caption_dropout: float = setting(
        0.0,
        help="Probability of an empty prompt. For guidance, loss.cfg_dropout zeroes the whole condition already.",
        min=0,
        max=1,
    )

    def __post_init__(self) -> None:
        check_settings(self, "data.prompts")
        for template in self.templates:
            list_template_fields(template.text)
        self._check_effects()

    def _check_effects(self) -> None:
        """Refuse a setting that has no effect whatever the data."""
        if not self.trigger and (self.trigger_probability != 1.0 or self.trigger_position != "front"):
            raise ConflictError(
                "trigger_probability and trigger_position have no effect without a trigger: set one.",
                {"data.prompts.trigger_probability": 1.0, "data.prompts.trigger_position": "front",
                 "data.prompts.trigger": ...},
            )  # fmt: skip
        if self.trigger and self.trigger_probability == 0:
            raise ConfigError("a trigger with trigger_probability=0 has no effect: raise it, or drop the trigger.")
        if self.keep_tags and not self.varies_tags:
            raise ConflictError(
                "keep_tags has no effect without shuffle_tags=true or tag_dropout above 0.",
                {"data.prompts.keep_tags": 0, "data.prompts.shuffle_tags": ..., "data.prompts.tag_dropout": ...},
            )
        if not self.separator:
            raise ConfigError("data.prompts.separator must not be empty. Set the text between tags, such as ','.")
        if self.separator != "," and not self.varies_tags:
            raise ConfigError("separator has no effect without shuffle_tags=true or tag_dropout above 0.")
        if self.tag_dropout == 1 and not self.keep_tags:
            raise ConfigError("data.prompts.tag_dropout=1 leaves no tag. Lower it, or set keep_tags above 0.")
        if self.varies_tags and not any("caption" in list_template_fields(t.text) for t in self.templates):
            raise ConfigError("shuffle_tags and tag_dropout have no effect: no template contains {caption}.")

    @property
    def varies_tags(self) -> bool:
        """Whether tags are shuffled or dropped, so that prompts cannot be listed."""
        return self.shuffle_tags or self.tag_dropout > 0


def list_template_fields(template: str) -> set[str]:
    """List the fields in a template.

    Args:
        template: Text with fields in braces.

    Returns:
        Their names.

    Raises:
        ConfigError: For a single brace.
    """
    found = set()
    for match in _FIELD.finditer(template):
        if match[0] in "{}":
            raise ConfigError(
                f"template {template!r} has a single {match[0]!r}; write {match[0] * 2} for the character."
            )
        if match[1]:
            found.add(match[1].strip())
    return found


def collect_template_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the values that templates can name: tags, the caption, and parts of the source path.

    Args:
        record: Record of a clip.

    Returns:
        Value by name, without empty ones.
    """
    path = PurePosixPath(compose(str(record.get("source", "")).replace("\\", "/")))
    values: dict[str, Any] = {"path": path.parts, "folder": path.parent.name, "stem": path.stem, "file": path.name}
    values |= record.get("tags") or {}
    values["caption"] = record.get("caption") or ""
    return {name: value for name, value in values.items() if value not in ("", None)}


def fill_template(template: str, values: Mapping[str, Any]) -> str | None:
    """Fill the fields of a template.

    Args:
        template: Text with fields in braces.
        values: Value by name.

    Returns:
        The text, or None when a value is missing.
    """
    missing = False

    def replace(match: re.Match[str]) -> str:
        nonlocal missing
        if match[0] in ("{{", "}}"):
            return match[0][0]
        value = values.get(match[1].strip())
        if isinstance(value, tuple):
            if not match[2]:
                return "/".join(value)
            part = int(match[2])
            value = value[part] if -len(value) <= part < len(value) else None
        elif match[2]:
            value = None
        missing |= value is None
        return f"{value:g}" if isinstance(value, float) else str(value)

    filled = _FIELD.sub(replace, template)
    return None if missing else filled


class PromptBuilder:
    """Builds prompts; the only randomness is that of the generator it is given.

    Attributes:
        settings: How prompts are built.
    """

    def __init__(self, settings: PromptSettings) -> None:
        """Define how prompts are built.

        Args:
            settings: The settings.
        """
        self.settings = settings

    def build(self, record: Mapping[str, Any], rng: random.Random) -> str:
        """Build a prompt for training.

        Args:
            record: Record of the clip.
            rng: Source of randomness; equal states give equal prompts.

        Returns:
            The prompt.
        """
        settings = self.settings
        drop, trigger, order = rng.random(), rng.random(), random.Random(rng.random())
        values = collect_template_values(record)
        if values.get("caption") and settings.varies_tags:
            values["caption"] = self._vary_tags(values["caption"], order)
        texts = self._fill_templates(record, values)
        if drop < settings.caption_dropout or not texts:
            return ""
        text = rng.choices([t for t, _ in texts], [w for _, w in texts])[0]
        return self._add_trigger(text) if settings.trigger and trigger < settings.trigger_probability else text

    def build_fixed(self, record: Mapping[str, Any]) -> str:
        """Build the prompt of a held-out clip: heaviest fitting template, all tags in order, always with the trigger.

        Args:
            record: Record of the clip.

        Returns:
            The prompt.
        """
        texts = self._fill_templates(record, collect_template_values(record))
        if not texts:
            return ""
        text = max(texts, key=lambda pair: pair[1])[0]
        return self._add_trigger(text) if self.settings.trigger else text

    def list_prompts(self, record: Mapping[str, Any]) -> list[str] | None:
        """List all prompts that a clip can have.

        Args:
            record: Record of the clip.

        Returns:
            The prompts, or None when tags are shuffled or dropped.
        """
        settings = self.settings
        if settings.varies_tags:
            return None
        texts = [text for text, _ in self._fill_templates(record, collect_template_values(record))]
        plain = [] if settings.trigger and settings.trigger_probability == 1 else texts
        triggered = [self._add_trigger(text) for text in texts] if settings.trigger else []
        return [*plain, *triggered, *([""] if settings.caption_dropout > 0 or not texts else [])]

    def check(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Check that every setting has an effect on some clip, and that every clip with a caption has a prompt.

        Clips without a caption train on the empty prompt, which is logged.

        Args:
            records: Records of all clips.

        Raises:
            ConfigError: For a setting without effect.
            DataError: For clips that no template fits.
        """
        settings = self.settings
        known: set[str] = set()
        shufflable = droppable = uncaptioned = unfit = count = 0
        examples: list[str] = []
        used = [0] * len(settings.templates)
        for record in records:
            count += 1
            values = collect_template_values(record)
            known |= values.keys()
            free = len(self._split_tags(str(values.get("caption", "")))) - settings.keep_tags
            shufflable, droppable = shufflable + (free > 1), droppable + (free > 0)
            fits = [fill_template(template.text, values) is not None for template in settings.templates]
            used = [uses + fit for uses, fit in zip(used, fits, strict=True)]
            if not any(fits) and "caption" not in values:
                uncaptioned += 1
            elif not any(fits):
                unfit += 1
                examples += [str(record.get("source"))] if len(examples) < 5 else []
        if not count:
            return
        if uncaptioned < count:
            self._check_templates(used, known)
        elif settings.trigger:
            raise ConfigError("the trigger has no effect: no clip has a caption. Add a template of fixed text or tags.")
        if unfit:
            raise DataError(
                f"{unfit} of {count} clips fit no prompt template (such as {', '.join(examples)}): "
                f"add the tags to them, or add a template such as {{caption}} or fixed text."
            )
        if uncaptioned:
            _logger.info("%d of %d clips, held out or not, have no caption: their prompt is empty", uncaptioned, count)
        if settings.shuffle_tags and not shufflable:
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
                absent = sorted(list_template_fields(template.text) - known)
                reason = f"no clip has {', '.join(absent)}" if absent else "no clip has all of its fields"
                fields = ", ".join(sorted(known))
                raise ConfigError(f"prompt template {template.text!r} has no effect: {reason}. Known fields: {fields}.")

    def _fill_templates(self, record: Mapping[str, Any], values: Mapping[str, Any]) -> list[tuple[str, float]]:
        """The possible texts with their weights; none for a clip without a caption that fits no template."""
        filled = [(fill_template(template.text, values), template.weight) for template in self.settings.templates]
        texts = [(text.strip(), weight) for text, weight in filled if text is not None]
        if not texts and "caption" in values:
            raise DataError(f"no prompt template fits {record.get('source')}: it lacks their fields.")
        return texts

    def _add_trigger(self, text: str) -> str:
        parts = [part for part in (self.settings.trigger, text) if part]
        return ", ".join(parts if self.settings.trigger_position == "front" else reversed(parts))

    def _split_tags(self, caption: str) -> list[str]:
        return [tag for part in caption.split(self.settings.separator) if (tag := part.strip())]

    def _vary_tags(self, caption: str, rng: random.Random) -> str:
        settings, tags = self.settings, self._split_tags(caption)
        fixed, rest = tags[: settings.keep_tags], tags[settings.keep_tags :]
        rest = [tag for tag in rest if rng.random() >= settings.tag_dropout]
        if settings.shuffle_tags:
            rng.shuffle(rest)
        joint = settings.separator if settings.separator.endswith(" ") else f"{settings.separator} "
        return joint.join([*fixed, *rest])


def list_distinct_prompts(builder: PromptBuilder, records: Iterable[Mapping[str, Any]]) -> list[str] | None:
    """List every prompt that training and validation can use.

    Args:
        builder: Builds the prompts.
        records: Records of all clips.

    Returns:
        The prompts, sorted; None when they cannot be listed.
    """
    prompts: set[str] = set()
    for record in records:
        possible = builder.list_prompts(record)
        if possible is None or len(prompts) > _MAX_LISTED:
            return None
        prompts.update(possible)
        prompts.add(builder.build_fixed(record))
    return sorted(prompts)
