"""The left side of the Play page: a form made from `GenerationSettings`, and from a result back into the form."""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from sa3train.adapters.formats.io import load_adapter
from sa3train.audio.io import read_audio_info
from sa3train.core.config import list_settings
from sa3train.core.dtypes import PRECISIONS
from sa3train.core.errors import SA3Error
from sa3train.inference.settings import VALUE_TYPES, GenerationSettings, check_number, get_default
from sa3train.studio.play.history import compute_waveform
from sa3train.studio.play.settings import (
    MODES,
    SHORTEST_SECONDS,
    AdapterSettings,
    PlaySettings,
    parse_regions,
    select_source,
)
from sa3train.studio.server import widgets as ui
from sa3train.studio.server.folders import describe_model, list_adapters, list_models, name_adapter, resolve_adapter
from sa3train.studio.server.workspace import StudioError, Workspace

DEFAULT_DURATION = 10.0
MAX_VARIATIONS = 16
"""They are generated at once: memory and time grow with their number."""
MODEL_DEFAULT = "model's default"
DECODING: dict[str, bool | None] = {MODEL_DEFAULT: None, "in chunks (less memory)": True, "whole (no seams)": False}
MODE_LABELS = {mode: label for label, mode in MODES.items()}
FORM_SETTINGS = (
    *("prompt", "duration", "seed", "batch_size", "negative_prompt", "steps", "cfg_scale", "sampler_type"),
    *("cfg_norm_threshold", "scale_phi", "apg_scale", "chunked_decode", "init_noise_level", "keep_exact"),
    *("bars", "bpm", "meter", "loop", "tail", "loudness", "peak", "window", "prompt_at"),
)
"""Settings with one field each; `cfg_interval` has two, audio and regions belong to the waveform."""
MODES_OF_SETTING = {"init_noise_level": ("restyle",), "keep_exact": ("inpaint", "continue")}
"""Modes in which a setting applies; all, where it is not listed."""
NOTES = {
    "restyle": "All of the audio is changed.",
    "inpaint": "The marked regions are regenerated. Drag on the waveform to mark them.",
    "continue": "The marked region is generated: from the end of the audio to the duration.",
}
"""What stands below the waveform in each mode."""
RACK_JS = "sa3.rack(element, props, watch, upload)"
REGIONS_JS = "sa3.regions(element, props, watch)"


@dataclass(frozen=True)
class Form:
    """The form's components.

    Attributes:
        inputs: Fields by name, in the order in which events pass their values: settings, `cfg_interval_min` and
            `cfg_interval_max`, `model`, `mode`, `precision`, `source`, `regions`, `rack`.
        facts: Description of the model.
        source_box: Group of the source audio's fields.
        upload: Button that uploads source audio.
        adapters: The adapters to choose from; empty until `render_adapter_files` fills it.
        offered: Prompts that the chosen adapters carry; hidden while there are none.
    """

    inputs: dict[str, Any]
    facts: gr.Markdown
    source_box: gr.Group
    upload: gr.UploadButton
    adapters: gr.HTML
    offered: gr.Dropdown


def build_form(workspace: Workspace) -> Form:
    """Build the form inside the open context.

    Args:
        workspace: The studio's folders.

    Returns:
        The components.
    """
    fields: dict[str, Any] = {
        "model": gr.Dropdown(
            list_models(workspace), value=workspace.model, label="Model", elem_id="play-model", filterable=False
        )
    }
    facts = gr.Markdown(describe_model(workspace, workspace.model), elem_classes="soft")
    fields["mode"] = gr.Radio(list(MODES), value="Text to audio", label="Mode", elem_id="play-mode")
    fields["prompt"] = _build_field("prompt", info=None, lines=2, placeholder="for example: koto, slow melody")
    offered = gr.Dropdown([], value=None, label="Prompts of the adapters", visible=False, elem_id="play-offered")
    source_box, upload = _build_source(fields)
    with gr.Row():
        usual = f"empty: {get_default('duration'):g}"
        fields["duration"] = _build_field("duration", info=None, value=DEFAULT_DURATION, step=0.5, placeholder=usual)
        fields["seed"] = _build_field("seed", info=None)
        label = f"{ui.get_label(GenerationSettings, 'batch_size')} (up to {MAX_VARIATIONS})"
        fields["batch_size"] = _build_field("batch_size", info=None, label=label)
    adapters = gr.HTML(apply_default_css=False, elem_id="play-files")
    gr.HTML("<h2>Adapters</h2>", elem_classes="studio-title", apply_default_css=False)
    fields["rack"] = _build_scripted("play-rack", "rack-box", RACK_JS, {"rows": []})
    _build_length_and_level(fields)
    _build_more(fields)
    return Form(fields, facts, source_box, upload, adapters, offered)


def _build_source(fields: dict[str, Any]) -> tuple[gr.Group, gr.UploadButton]:
    with gr.Group(visible=False, elem_classes="play-source-box") as box:
        fields["source"] = gr.Dropdown(
            [], value=None, label="Source audio", info="A file in the folders, or its path.", allow_custom_value=True,
            elem_id="play-source",
        )  # fmt: skip
        upload = gr.UploadButton(
            "Upload audio…", file_types=["audio"], type="filepath", size="sm", elem_id="play-upload"
        )
        fields["init_noise_level"] = _build_field("init_noise_level", gr.Slider, step=0.01)
        fields["keep_exact"] = _build_field("keep_exact", visible=False)
        fields["regions"] = _build_scripted(
            "play-regions", "regions-box nothing", REGIONS_JS, {"edited": 0}, visible=False
        )
    return box, upload


def _build_length_and_level(fields: dict[str, Any]) -> None:
    with gr.Accordion("Bars, loops, long pieces, level", open=False, elem_id="play-length"):
        for row in (("bars", "bpm", "meter"), ("loop", "tail"), ("loudness", "peak")):
            _build_row(fields, **{name: {} for name in row})
        fields["window"] = _build_field("window")
        fields["prompt_at"] = ui.build_field(
            GenerationSettings, "prompt_at", gr.Textbox, lines=2, value="", placeholder="60: the choir joins in",
            info="Prompts that follow the first one: in each line the seconds, a colon and the prompt.",
            elem_id="play-prompt-at",
        )  # fmt: skip


def _build_more(fields: dict[str, Any]) -> None:
    with gr.Accordion("More settings", open=False, elem_id="play-more"):
        fields["negative_prompt"] = _build_field("negative_prompt", lines=1)
        _build_row(fields, steps={}, cfg_scale={})
        with gr.Row():
            label = ui.get_label(GenerationSettings, "cfg_interval")
            for end, value in zip(("min", "max"), GenerationSettings.cfg_interval, strict=True):
                options = {"label": f"{label}, {end}", "elem_id": f"play-cfg-interval-{end}", "step": 0.05}
                fields[f"cfg_interval_{end}"] = _build_field("cfg_interval", value=value, **options)
        _build_row(fields, cfg_norm_threshold={"step": 0.5}, scale_phi={"step": 0.05})
        _build_row(fields, apg_scale={"step": 0.1}, sampler_type={})
        with gr.Row():
            fields["chunked_decode"] = _build_field("chunked_decode")
            fields["precision"] = gr.Dropdown(
                list(PRECISIONS), value="auto", label="Precision", info="Precision to load the model in.", min_width=90,
                filterable=False,
            )  # fmt: skip


def _build_row(fields: dict[str, Any], **options: dict[str, Any]) -> None:
    """Build fields side by side, each with its options."""
    with gr.Row():
        fields |= {name: _build_field(name, **own) for name, own in options.items()}


def _build_field(name: str, widget: Any = None, **options: Any) -> Any:
    """Build the field of a setting, which may be empty where the model has its own default."""
    options = {"elem_id": f"play-{name.replace('_', '-')}", "min_width": 90} | options
    choices = list(DECODING) if name == "chunked_decode" else list_settings(GenerationSettings)[name].choices
    if choices:
        options |= {
            "choices": list(dict.fromkeys((MODEL_DEFAULT, *choices))),
            "value": MODEL_DEFAULT,
            "filterable": False,
        }
        return ui.build_field(GenerationSettings, name, gr.Dropdown, **options)
    if VALUE_TYPES[name] is str:
        return ui.build_field(GenerationSettings, name, gr.Textbox, **options)
    if get_default(name) is None:
        options = {"value": "", "max_lines": 1} | options  # gr.Number turns an empty field into 0
        field = ui.build_field(GenerationSettings, name, gr.Textbox, **options)
        return ui.explain_value(field, functools.partial(ui.parse_setting, GenerationSettings, name))
    return ui.build_field(GenerationSettings, name, widget, **options)


def _build_scripted(elem_id: str, classes: str, script: str, value: dict[str, Any], visible: bool = True) -> gr.HTML:
    """Build an element whose content a script of the page draws."""
    box = classes.split()[0]
    return gr.HTML(
        value,
        html_template=f'<div class="{classes}"></div>',
        js_on_load=script.replace("element", f"element.querySelector('.{box}')", 1),
        visible=visible,
        elem_id=elem_id,
        apply_default_css=False,
        padding=False,
    )


def render_adapter_files(workspace: Workspace) -> str:
    """Render the adapters to choose from, where `assets/rack.js` looks for them.

    Args:
        workspace: The studio's folders.

    Returns:
        HTML.
    """
    options = "".join(f'<option value="{escape(path)}"></option>' for path in list_adapters(workspace))
    return f'<datalist id="adapter-files">{options}</datalist>'


def list_offered_prompts(workspace: Workspace, rack: Mapping[str, Any] | None) -> list[str]:
    """List the prompts that the chosen adapters carry.

    Args:
        workspace: The studio's folders.
        rack: Value of the list of adapters.

    Returns:
        Distinct prompts. An adapter that cannot be read offers none: generating says why.
    """
    prompts: list[str] = []
    for row in (rack or {}).get("rows") or []:
        with contextlib.suppress(SA3Error):
            prompts += load_adapter(resolve_adapter(workspace, row["path"])).prompts
    return list(dict.fromkeys(prompts))


def read_form(values: Mapping[str, Any]) -> PlaySettings:
    """Read the form.

    Args:
        values: Value of each of `Form.inputs`; an empty number means the default.

    Returns:
        The settings.

    Raises:
        StudioError: There are more variations than the form allows.
    """
    mode = MODES.get(values["mode"], "text")
    applicable = [name for name in FORM_SETTINGS if mode in MODES_OF_SETTING.get(name, (mode,))]
    given = {name: _parse_value(name, values[name]) for name in applicable}
    low, high = values["cfg_interval_min"], values["cfg_interval_max"]
    default_low, default_high = GenerationSettings.cfg_interval
    given["cfg_interval"] = (default_low if low is None else low, default_high if high is None else high)
    regions = parse_regions((values["regions"] or {}).get("regions") or [])
    given |= select_source(mode, values["source"], regions)
    if (given["batch_size"] or 1) > MAX_VARIATIONS:
        raise StudioError(
            f"{ui.get_label(GenerationSettings, 'batch_size')} must be at most {MAX_VARIATIONS}, not "
            f"{given['batch_size']:,}. Generate again for more, or use sa3-generate."
        )
    if given["bars"] is not None:
        del given["duration"]  # bars set it
    settings = GenerationSettings(**{name: value for name, value in given.items() if value is not None})
    rows = enumerate((values["rack"] or {}).get("rows") or [], 1)
    adapters = tuple(AdapterSettings.from_row(row, number) for number, row in rows)
    return PlaySettings(values["model"], settings, mode, values["precision"], adapters)


def _parse_value(name: str, value: Any) -> Any:
    """The value of a field as that of its setting; None leaves the default."""
    if name == "prompt_at":
        return _parse_prompts(value or "")
    kind = VALUE_TYPES[name]
    if name == "chunked_decode":
        return DECODING.get(value)
    if name == "prompt":
        return value or ""
    if kind is str:
        return None if value == MODEL_DEFAULT else (value or "").strip() or None
    if kind is bool:
        return value
    return ui.parse_optional_number(ui.get_label(GenerationSettings, name), value, kind is int)


def _parse_prompts(text: str) -> list[tuple[float, str]]:
    label, found = ui.get_label(GenerationSettings, "prompt_at"), list[tuple[float, str]]()
    for line in filter(str.strip, text.splitlines()):
        time, _, prompt = line.partition(":")
        try:
            found.append((check_number(label, float(time)), prompt.strip()))
        except ValueError:
            prompt = ""
        if not prompt.strip():
            raise StudioError(f"{label}: write {line.strip()!r} as seconds, a colon and a prompt, such as 60: choir.")
    return found


def fill_form(workspace: Workspace, request: PlaySettings) -> dict[str, Any]:
    """Fill the form in.

    Args:
        workspace: The studio's folders.
        request: The settings to show.

    Returns:
        Value of each of `Form.inputs`.
    """
    settings = request.settings
    values = {name: _format_value(name, getattr(settings, name)) for name in FORM_SETTINGS}
    regions = _list_regions(settings)
    return values | {
        "cfg_interval_min": settings.cfg_interval[0],
        "cfg_interval_max": settings.cfg_interval[1],
        "model": request.model,
        "mode": MODE_LABELS[request.mode],
        "precision": request.precision,
        "source": None if request.source is None else workspace.shorten(request.source),
        "regions": describe_waveform(workspace, request.source, request.mode, values["duration"], regions),
        "rack": {
            "rows": [row.to_row() | {"path": name_adapter(workspace.shorten(row.path))} for row in request.adapters]
        },
    }


def _format_value(name: str, value: Any) -> Any:
    if name == "chunked_decode":
        return next(label for label, choice in DECODING.items() if choice is value)
    if name == "prompt_at":
        return "\n".join(f"{time:g}: {text}" for time, text in value or ())
    if VALUE_TYPES[name] is str:
        return value or (MODEL_DEFAULT if name == "sampler_type" else "")
    if get_default(name) is None:
        return "" if value is None else f"{value:.10g}"
    return value


def _list_regions(settings: GenerationSettings) -> list[tuple[float, float]]:
    starts, ends = settings.inpaint_mask_start_seconds, settings.inpaint_mask_end_seconds
    if starts is None or ends is None:
        return []
    pairs = (starts, ends) if isinstance(starts, tuple) else ((starts,), (ends,))
    return list(zip(*pairs, strict=True))


def describe_waveform(
    workspace: Workspace, source: str | None, mode: str, duration: float | None, regions: Sequence[Sequence[float]] = ()
) -> dict[str, Any]:
    """Describe what the waveform of the source audio shows.

    Args:
        workspace: The studio's folders.
        source: The audio file; None for none.
        mode: The mode.
        duration: Duration to generate in seconds.
        regions: (start, end) in seconds of what to regenerate; computed for a continuation.

    Returns:
        Value for `assets/regions.js`; empty without audio.
    """
    if not source or mode == "text":
        return {}
    path, note = workspace.resolve_file(source, "audio file"), NOTES[mode]
    if mode == "continue":
        seconds, end = read_audio_info(path).seconds, duration or 0.0
        regions = [(seconds, end)] if end - seconds >= SHORTEST_SECONDS else []
        note = note if regions else f"Set a duration above {seconds:.2f} s, the length of the audio, to continue it."
    return {
        **compute_waveform(path),
        "mode": mode,
        "note": f"{path.name}: {note}",  # the field cuts the path of an upload
        "duration": 0.0 if mode == "restyle" else duration or 0.0,
        "regions": [list(region) for region in regions] if mode in ("inpaint", "continue") else [],
        "url": workspace.get_url(path),
        "fixed": mode != "inpaint",
    }
