"""Write the `base.yaml` of each group and the settings of `encode.yaml`: `python tests/helpers/base_yaml.py`.

Hydra needs every key in YAML. The dataclasses hold each setting once; this writes them out, and a test compares.
"""

import dataclasses
import textwrap
import typing
from pathlib import Path
from typing import Any

import yaml

from sa3train.cli.encode import EncodeConfig
from sa3train.cli.train_config import DecoderTrainConfig, TrainConfig
from sa3train.core.config import MAX_COUNT, MISSING, Setting, list_settings
from sa3train.data.encode.settings import EncodeSettings

CONF = Path(__file__).parents[2] / "conf"
WIDTH = 118
DECODER_SECTIONS = ("data", "loss", "callbacks")
HEADERS = {
    "adapter": "The adapter; the other options of this group change the method.",
    "callbacks": "Checkpoints, validation, demos and report.",
    "data": "Latent shards, as sa3-encode makes them.",
    "logger": "metrics.csv in the run folder, and nothing else.",
    "loss": "Rectified flow, with noise levels by which adapters learn more (docs/model.md, section 6).",
    "model": "A model by name or folder.",
    "optimizer": "The optimizer; the other options of this group set its usual values.",
    "paths": "Folders.",
    "scheduler": "The learning-rate schedule.",
    "trainer": "One machine, whatever it has.",
}


def list_groups() -> dict[str, type]:
    """List the groups of `conf/train.yaml`: name and dataclass."""
    hints = typing.get_type_hints(TrainConfig)
    return {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}


def make_default_values(schema: Any) -> dict[str, Any]:
    """Make the plain values of a dataclass's defaults; `???` where a value must be given."""
    values = {}
    for field in dataclasses.fields(schema):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        values[field.name] = MISSING if default is dataclasses.MISSING else _make_plain(default)
    return values


def render_group(name: str, schema: Any) -> str:
    """Render the text of a group's `base.yaml`."""
    return "".join(f"{line}\n" for line in [f"# {HEADERS[name]}", *_render(schema, make_default_values(schema))])


def render_encode() -> str:
    """Render the settings of `conf/encode.yaml`, the command's own first."""
    lines = _render(EncodeConfig, make_default_values(EncodeConfig))
    inherited = len(_render(EncodeSettings, make_default_values(EncodeSettings)))
    return "".join(f"{line}\n" for line in [*lines[inherited:], *lines[:inherited]])


def render_decoder() -> str:
    """Render the sections of `conf/decoder.yaml` that are no groups."""
    lines, hints = [], typing.get_type_hints(DecoderTrainConfig)
    for name in DECODER_SECTIONS:
        section = _render(hints[name], make_default_values(hints[name]))
        lines += [f"# {hints[name].__doc__.splitlines()[0]}", f"{name}:", *(f"  {line}" for line in section)]
    return "".join(f"{line}\n" for line in lines)


def _render(schema: Any, values: dict[str, Any]) -> list[str]:
    hints, lines = typing.get_type_hints(schema), []
    for name, declared in list_settings(schema).items():
        lines += textwrap.wrap(_describe(declared), WIDTH, initial_indent="# ", subsequent_indent="# ")
        if dataclasses.is_dataclass(hints[name]):
            lines += [f"{name}:", *(f"  {line}" for line in _render(hints[name], values[name]))]
        else:
            flow = yaml.safe_dump(values[name], default_flow_style=True, sort_keys=False, width=1000)
            lines.append(f"{name}: {flow.removesuffix('...' + chr(10)).strip()}")
    return lines


def _describe(declared: Setting) -> str:
    notes = " | ".join("null" if choice is None else str(choice) for choice in declared.choices)
    limits = {"min": declared.min, "max": declared.max}
    beyond_use = {name: None for name, limit in limits.items() if limit is not None and abs(limit) >= MAX_COUNT / 2}
    notes = notes or dataclasses.replace(declared, **beyond_use).describe_range() or declared.unit
    return f"{declared.help} ({notes})" if notes else declared.help


def _make_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _make_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [_make_plain(item) for item in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    for group, schema in list_groups().items():
        (CONF / group / "base.yaml").write_text(render_group(group, schema), encoding="utf-8")
    encode = (CONF / "encode.yaml").read_text(encoding="utf-8")
    start, end = encode.index("\n# Folder of any depth") + 1, encode.index("\nhydra:\n")
    (CONF / "encode.yaml").write_text(encode[:start] + render_encode() + encode[end:], encoding="utf-8")
    decoder = (CONF / "decoder.yaml").read_text(encoding="utf-8")
    start, end = decoder.index("allow_resume_changes: []\n") + 25, decoder.index("\nhydra:\n")
    (CONF / "decoder.yaml").write_text(decoder[:start] + render_decoder() + decoder[end:], encoding="utf-8")
