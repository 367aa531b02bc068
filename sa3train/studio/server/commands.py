"""The commands that do what the page did."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORM = "{:.10g}"


def generate_command(record: Mapping[str, Any], output: str) -> list[str]:
    """The `sa3-generate` line that makes the result of a sidecar again, as `output`.

    It names every setting, so that other defaults later on change nothing. A batch is made whole, as it was.
    """
    settings = record["settings"]
    argv = ["sa3-generate", "--model", str(record["model"]["source"]), "--precision", record["precision"]]
    argv += ["-p", *_each(settings["prompt"], settings["batch_size"])]
    if settings["negative_prompt"] is not None:
        argv += ["--negative-prompt", *_each(settings["negative_prompt"], settings["batch_size"])]
    argv += ["--duration", *(_text(value) for value in _each(settings["duration"], settings["batch_size"]))]
    if settings["batch_size"] > 1:
        argv += ["--batch-size", str(settings["batch_size"])]
    if settings["seed"] is not None:
        argv += ["--seed", str(settings["seed"])]
    argv += ["--steps", str(settings["steps"]), "--sampler", settings["sampler_type"]]
    argv += ["--cfg-scale", _text(settings["cfg_scale"]), *_guidance(settings)]
    argv += [*_audio(settings, record["inputs"])]
    for adapter in record["adapters"]:
        argv += _adapter(adapter)
    if any(adapter["allow_partial"] for adapter in record["adapters"]):
        argv.append("--allow-partial")
    if settings["chunked_decode"] is not None:
        argv.append("--chunked-decode" if settings["chunked_decode"] else "--no-chunked-decode")
    return [*argv, "-o", output]


def _each(values: list[Any], batch: int) -> list[Any]:
    """One value for all where they are equal: a list of equal prompts and a batch size say the same."""
    return values[:1] if batch > 1 and all(value == values[0] for value in values) else list(values)


def _guidance(settings: Mapping[str, Any]) -> list[str]:
    """Settings of the guidance that are not at rest: with guidance off, naming one would be refused."""
    found = []
    if settings["cfg_interval"] != [0.0, 1.0]:
        found += ["--cfg-interval", *(_text(value) for value in settings["cfg_interval"])]
    for name, flag, rest in (
        ("cfg_norm_threshold", "--cfg-norm-threshold", 0.0),
        ("scale_phi", "--cfg-rescale", 0.0),
        ("apg_scale", "--apg-scale", 1.0),
    ):
        if settings[name] != rest:
            found += [flag, _text(settings[name])]
    return found


def _audio(settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
    found = []
    if inputs["init_audio"]:
        found += ["--init-audio", inputs["init_audio"]["path"]]
        found += ["--init-noise-level", _text(settings["init_noise_level"])]
    if inputs["inpaint_audio"]:
        found += ["--inpaint-audio", inputs["inpaint_audio"]["path"]]
        starts, ends = settings["inpaint_mask_start_seconds"], settings["inpaint_mask_end_seconds"]
        for start, end in zip(starts, ends, strict=True):
            found += ["--inpaint-start", _exact(start), "--inpaint-end", _exact(end)]
        if settings["keep_exact"]:
            found.append("--keep-exact")
    return found


def _adapter(adapter: Mapping[str, Any]) -> list[str]:
    interval = "" if adapter["interval"] == [0.0, 1.0] else "@{}-{}".format(*map(_text, adapter["interval"]))
    found = ["--lora", f"{adapter['path']}={_text(adapter['strength'])}{interval}"]
    if adapter["conditioner_strength"] is not None:
        found += ["--conditioner-strength", _text(adapter["conditioner_strength"])]
    if adapter["exclude_layers"]:
        found += ["--exclude-layers", ",".join(adapter["exclude_layers"])]
    return found


def adapter_command(tool: str, *arguments: str | Path | float | None, **flags: Any) -> list[str]:
    """An `sa3-adapter` line; None leaves an argument or flag out, True gives the bare flag."""
    argv = ["sa3-adapter", tool, *(str(value) for value in arguments if value is not None)]
    for name, value in flags.items():
        if value is None or value is False or value == "":
            continue
        argv += [f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)]
    return argv


def _text(value: float) -> str:
    return FORM.format(value)


def _exact(value: float) -> str:
    return repr(float(value))
