"""The left side of the Play page: everything a generation can be told, and back from a result into the form."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from sa3train.audio.io import audio_info
from sa3train.diffusion.samplers import SAMPLERS
from sa3train.studio.play.history import waveform
from sa3train.studio.play.player import rows_of
from sa3train.studio.play.request import DEFAULT_LEVEL, MODES, AdapterWish, Wish, regions_of
from sa3train.studio.server.widgets import number_or_none, optional_number, shown_number, whole_or_none
from sa3train.studio.server.workspace import Workspace, describe_model, list_adapters, list_models

BY_MODEL = "default"
DECODING = {"as the model says": None, "in chunks (less memory)": True, "whole (no seams)": False}
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
MODE_LABELS = {mode: label for label, mode in MODES.items()}
RACK_JS = "sa3.rack(element, props, watch, upload)"
REGIONS_JS = "sa3.regions(element, props, watch)"


@dataclass(frozen=True)
class Form:
    """The form's components; `fields` is their order as inputs and outputs of events."""

    model: gr.Dropdown
    facts: gr.Markdown
    mode: gr.Radio
    prompt: gr.Textbox
    negative: gr.Textbox
    duration: gr.Number
    seed: gr.Number
    batch: gr.Number
    steps: gr.Textbox
    cfg: gr.Textbox
    sampler: gr.Dropdown
    low: gr.Number
    high: gr.Number
    norm: gr.Number
    rescale: gr.Number
    apg: gr.Number
    precision: gr.Dropdown
    decoding: gr.Dropdown
    source_box: gr.Group
    source: gr.Dropdown
    upload: gr.UploadButton
    level: gr.Slider
    exact: gr.Checkbox
    regions: gr.HTML
    rack: gr.HTML

    @property
    def fields(self) -> list[Any]:
        """What `wish_of` takes, in order."""
        return [
            *(self.model, self.mode, self.prompt, self.negative, self.duration, self.seed, self.batch),
            *(self.steps, self.cfg, self.sampler, self.low, self.high, self.norm, self.rescale, self.apg),
            *(self.precision, self.decoding, self.source, self.level, self.exact, self.regions, self.rack),
        ]


def build_form(workspace: Workspace) -> Form:
    """Lay the form out, top to bottom in the order it is filled in."""
    parts: dict[str, Any] = {}
    parts["model"] = gr.Dropdown(
        list_models(workspace), value=workspace.model, label="Model", elem_id="play-model", filterable=False
    )
    parts["facts"] = gr.Markdown(describe_model(workspace, workspace.model), elem_classes="soft")
    parts["mode"] = gr.Radio(list(MODES), value="Text to audio", label="What to make", elem_id="play-mode")
    parts["prompt"] = gr.Textbox(
        label="Prompt", lines=2, placeholder="what is to be heard, such as: koto, slow melody", elem_id="play-prompt"
    )
    parts |= _source()
    with gr.Row():
        parts["duration"] = gr.Number(
            10, label="Duration (s)", minimum=0.1, step=0.5, min_width=90, elem_id="play-duration"
        )
        parts["seed"] = gr.Number(-1, label="Seed (-1: random)", precision=0, min_width=90, elem_id="play-seed")
        parts["batch"] = gr.Number(1, label="Variations", precision=0, minimum=1, min_width=90, elem_id="play-batch")
    gr.HTML(lambda: _files(workspace), apply_default_css=False, elem_id="play-files")
    gr.HTML("<h2>Adapters</h2>", elem_classes="studio-title", apply_default_css=False)
    parts["rack"] = gr.HTML(
        {"rows": []},
        html_template='<div class="rack-box"></div>',
        js_on_load=RACK_JS.replace("element", "element.querySelector('.rack-box')", 1),
        elem_id="play-rack",
        apply_default_css=False,
        padding=False,
    )
    parts |= _more()
    return Form(**parts)


def _files(workspace: Workspace) -> str:
    """The adapters to choose from, where the rack's script looks for them."""
    options = "".join(f'<option value="{escape(path, quote=True)}"></option>' for path in list_adapters(workspace))
    return f'<datalist id="adapter-files">{options}</datalist>'


def _source() -> dict[str, Any]:
    with gr.Group(visible=False, elem_classes="play-source-box") as box:
        source = gr.Dropdown(
            [],
            value=None,
            label="Source audio: a file in the folders, or its path",
            allow_custom_value=True,
            elem_id="play-source",
        )
        upload = gr.UploadButton(
            "Upload audio…", file_types=["audio"], type="filepath", size="sm", elem_id="play-upload"
        )
        level = gr.Slider(
            0, 1, DEFAULT_LEVEL, step=0.01, label="Noise level: 0 keeps the audio, 1 forgets it", elem_id="play-level"
        )
        exact = gr.Checkbox(label="Kept parts exactly from their own latents", visible=False, elem_id="play-exact")
        regions = gr.HTML(
            {"edited": 0},
            html_template='<div class="regions-box nothing"></div>',
            js_on_load=REGIONS_JS.replace("element", "element.querySelector('.regions-box')", 1),
            visible=False,
            elem_id="play-regions",
            apply_default_css=False,
            padding=False,
        )
    return {"source_box": box, "source": source, "upload": upload, "level": level, "exact": exact, "regions": regions}


def _more() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with gr.Accordion("More settings (left empty: the model's own)", open=False, elem_id="play-more"):
        found["negative"] = gr.Textbox(label="Negative prompt (needs guidance)", lines=1, elem_id="play-negative")
        with gr.Row():
            found["steps"] = optional_number("Steps", "play-steps")
            found["cfg"] = optional_number("Guidance (cfg)", "play-cfg")
            found["sampler"] = gr.Dropdown(
                [BY_MODEL, *SAMPLERS], value=BY_MODEL, label="Sampler", min_width=120, filterable=False
            )
        with gr.Row():
            found["low"] = gr.Number(0, label="Guidance from level", minimum=0, maximum=1, step=0.05, min_width=90)
            found["high"] = gr.Number(1, label="to noise level", minimum=0, maximum=1, step=0.05, min_width=90)
            found["apg"] = gr.Number(1, label="Projected (apg)", step=0.1, min_width=90)
        with gr.Row():
            found["norm"] = gr.Number(0, label="Norm cap (0: none)", minimum=0, step=0.5, min_width=90)
            found["rescale"] = gr.Number(0, label="Guidance rescale", minimum=0, maximum=1, step=0.05, min_width=90)
        with gr.Row():
            found["precision"] = gr.Dropdown(
                list(PRECISIONS), value="auto", label="Precision", min_width=120, filterable=False
            )
            found["decoding"] = gr.Dropdown(
                list(DECODING), value=next(iter(DECODING)), label="Decoding", min_width=160, filterable=False
            )
    return found


def wish_of(
    model: str, mode: str, prompt: str, negative: str, duration: float | None, seed: float | None, batch: float | None,
    steps: str | None, cfg: str | None, sampler: str, low: float | None, high: float | None, norm: float | None,
    rescale: float | None, apg: float | None, precision: str, decoding: str, source: str | None, level: float | None,
    exact: bool, regions: dict[str, Any] | None, rack: dict[str, Any] | None,
) -> Wish:  # fmt: skip
    """What the form's values ask for; numbers left empty are the defaults. Raises `SA3Error` for what is no number."""
    return Wish(
        model=model,
        prompt=prompt or "",
        mode=MODES.get(mode, "text"),
        negative_prompt=(negative or "").strip() or None,
        duration=10.0 if duration is None else duration,
        seed=-1 if seed is None else int(seed),
        batch_size=1 if batch is None else int(batch),
        steps=whole_or_none("steps", steps),
        cfg_scale=number_or_none("guidance", cfg),
        sampler_type=None if sampler == BY_MODEL else sampler,
        cfg_interval=(0.0 if low is None else low, 1.0 if high is None else high),
        cfg_norm_threshold=norm or 0.0,
        scale_phi=rescale or 0.0,
        apg_scale=1.0 if apg is None else apg,
        source=source,
        init_noise_level=DEFAULT_LEVEL if level is None else level,
        regions=regions_of((regions or {}).get("regions") or []),
        keep_exact=bool(exact),
        chunked_decode=DECODING.get(decoding),
        precision=precision,
        adapters=tuple(AdapterWish.of_row(row) for row in (rack or {}).get("rows") or []),
    )


def values_of(workspace: Workspace, wish: Wish) -> list[Any]:
    """The form filled in from `wish`: one value per entry of `Form.fields`."""
    decoding = next(label for label, value in DECODING.items() if value == wish.chunked_decode)
    source = None if wish.source is None else workspace.shown(wish.source)
    rows = [row | {"path": workspace.shown(row["path"])} for row in rows_of(wish.adapters)]
    return [
        *(wish.model, MODE_LABELS[wish.mode], wish.prompt, wish.negative_prompt or "", wish.duration, wish.seed),
        *(wish.batch_size, shown_number(wish.steps), shown_number(wish.cfg_scale)),
        *(wish.sampler_type or BY_MODEL, *wish.cfg_interval),
        *(wish.cfg_norm_threshold, wish.scale_phi, wish.apg_scale, wish.precision, decoding, source),
        *(
            wish.init_noise_level,
            wish.keep_exact,
            drawing(workspace, wish.source, wish.mode, wish.duration, wish.regions),
        ),
        {"rows": rows},
    ]


def drawing(
    workspace: Workspace, source: str | None, mode: str, duration: float | None, regions: Sequence[Sequence[float]] = ()
) -> dict[str, Any]:
    """What the waveform shows: for a continuation, what is to be added. Raises `SA3Error` for no usable audio."""
    if not source or mode == "text":
        return {}
    path = workspace.file(source, "audio file")
    if mode == "continue":
        seconds, end = audio_info(path).seconds, duration or 0.0
        regions = [(seconds, end)] if end > seconds else []
    shown = [list(region) for region in regions] if mode in ("inpaint", "continue") else []
    length = 0.0 if mode == "restyle" else duration or 0.0
    fixed = mode != "inpaint"
    return {**waveform(path), "duration": length, "regions": shown, "url": workspace.url(path), "fixed": fixed}
