"""Caption templates: text with fields, of which the parts without a value are dropped."""

from sa3train.core.errors import ConfigError
from sa3train.data.loading.prompts import fill_template, list_template_fields
from sa3train.data.sources.text import tidy

DEFAULT_TEMPLATE = "{description}, {genre} {name} {kind}, {bpm} BPM, {key}"
"""Fields between commas stand or fall together: a part of which no field has a value is dropped."""

CAPTION_VALUES = {
    "description": "what a captioning model says",
    "genre": "genre of tags or folders",
    "name": "words of the file's name that describe",
    "kind": "instrument and form, such as kick one-shot",
    "bpm": "tempo in beats per minute",
    "key": "key, such as A minor",
    "brightness": "dark, bright, or nothing between",
    "density": "sparse, busy, or nothing between",
    "sound": "percussive or tonal",
    "loudness": "loud, quiet, or nothing between",
    "title": "title in the tags", "mood": "mood in the tags", "instrument": "instrument in the tags",
    "meter": "meter in the tags, unless it is 4/4",
}  # fmt: skip
"""Fields of a caption template, and what each is."""


def check_template(template: str) -> None:
    """Check the fields of a caption template.

    Args:
        template: Text with fields in braces.

    Raises:
        ConfigError: For a single brace, a field that does not exist, or no field at all.
    """
    fields = list_template_fields(template)
    unknown = sorted(fields - CAPTION_VALUES.keys())
    if unknown or not fields:
        problem = f"has no field {unknown[0]!r}" if unknown else "has no field in braces"
        raise ConfigError(f"caption template {template!r}: it {problem}. Fields: {', '.join(CAPTION_VALUES)}.")


def fill_parts(template: str, values: dict[str, str]) -> str:
    """Fill a template, part by part between commas: a part of which no field has a value is dropped.

    Args:
        template: Text with fields in braces.
        values: Values of fields.

    Returns:
        The text on one line.
    """
    parts = []
    for part in template.split(","):
        fields = list_template_fields(part)
        if not fields or any(values.get(name) for name in fields):
            parts.append(tidy(fill_template(part, {name: values.get(name, "") for name in fields}) or ""))
    has_values = any(values.get(name) for name in list_template_fields(template))
    return ", ".join(filter(None, parts)) if has_values else ""
