"""Repeat a recorded generation: generate it again, say what has changed since, or write its command."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sa3train.adapters.lora_argument import LoraArgument, format_lora
from sa3train.core.config import list_settings
from sa3train.core.errors import GenerationError
from sa3train.inference.generator import Generator
from sa3train.inference.outputs import GenerationOutput
from sa3train.inference.settings import PER_ITEM_SETTINGS, SETTING_NAMES, GenerationSettings, get_default, is_list
from sa3train.inference.sidecar import describe_environment, locate_input

NAMED_SETTINGS = ("duration", "init_noise_level")
"""Settings that a command names even at their defaults."""


def replay(generator: Generator, record: dict[str, Any], folder: Path) -> GenerationOutput:
    """Generate again what a sidecar records.

    Args:
        generator: The model, without adapters.
        record: Content of the sidecar.
        folder: Folder of the sidecar, where adapters and input audio are looked for too.

    Returns:
        The audio of the whole batch.

    Raises:
        GenerationError: When the model, an adapter or an input is not what was used, or the seed is unknown.
    """
    model, recorded = generator.model, record["model"]
    for part, fingerprint in (("fingerprint", model.fingerprint()), ("autoencoder", model.autoencoder.fingerprint())):
        if fingerprint != recorded[part]:
            raise GenerationError(
                f"model {recorded['source']} has changed: its {part} is {fingerprint[:12]}…, but "
                f"{recorded[part][:12]}… was used. Give the original model with --model."
            )
    if record["settings"]["seed"] is None:
        raise GenerationError("the audio was drawn from the caller's own generator and cannot be generated again.")
    for entry in record["adapters"]:
        generator.load_adapter(
            locate_input(entry, folder, "adapter"),
            entry["strength"],
            conditioner_strength=entry["conditioner_strength"],
            interval=tuple(entry["interval"]),
            exclude_layers=entry["exclude_layers"],
            allow_partial=entry["allow_partial"],
        )
    inputs = {role: locate_input(entry, folder, role) for role, entry in record["inputs"].items() if entry}
    return generator.generate_from(GenerationSettings.from_dict(record["settings"], **inputs))


def compare_with_record(record: dict[str, Any], result: GenerationOutput, device: torch.device) -> str:
    """Compare a repeated generation with its sidecar.

    Args:
        record: Content of the sidecar.
        result: What `replay` returned.
        device: The device it was generated on.

    Returns:
        Empty when the file's bytes are the same; else what differs, and what has changed in the environment.
    """
    item, subtype, file = record["item"], record["subtype"], record["file"]
    content = result.encode_item(item, Path(file).suffix, subtype)
    found = result.build_sidecar(item, file, content, subtype)
    if found["sha256"] == record["sha256"]:
        return ""
    if found["audio_sha256"] == record["audio_sha256"]:
        return "same audio, different bytes: Ogg files contain a random number, and encoders change between versions."
    then, now = record["environment"], describe_environment(device)
    changes = [f"{name} {then.get(name)} is now {value}" for name, value in now.items() if then.get(name) != value]
    return f"the audio differs from the recorded one ({'; '.join(changes) or 'in the same environment'})."


def build_command(record: Mapping[str, Any], output: str) -> list[str]:
    """Build the `sa3-generate` command that generates the audio of a sidecar.

    Settings that have an effect are named, so that the command still does the same when defaults have changed. A batch
    is generated whole, as it was.

    Args:
        record: Content of the sidecar.
        output: The audio file to write.

    Returns:
        The arguments, the command first.
    """
    command = ["sa3-generate", "--model", str(record["model"]["source"]), "--precision", record["precision"]]
    inputs = {role: entry["path"] for role, entry in record["inputs"].items() if entry}
    settings = record["settings"] | inputs
    for name in SETTING_NAMES:
        command += _format_setting(name, settings.get(name), settings["batch_size"])
    for adapter in record["adapters"]:
        command += _format_adapter(adapter)
    if any(adapter["allow_partial"] for adapter in record["adapters"]):
        command.append("--allow-partial")
    return [*command, "-o", output]


def _format_setting(name: str, value: Any, batch: int) -> list[str]:
    flag = [*list_settings(GenerationSettings)[name].flags, f"--{name.replace('_', '-')}"][0]
    neutral: Any = get_default(name)
    neutral = list(neutral) if is_list(neutral) else neutral
    if value is None or (value == neutral and name not in NAMED_SETTINGS):
        return []
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-")]
    if name in PER_ITEM_SETTINGS and batch > 1 and len(set(value)) == 1:
        value = value[:1]  # `--batch-size` repeats it
    texts = [_format_value(each) for each in (value if is_list(value) else [value])]
    if name.startswith("inpaint_mask"):
        return [word for text in texts for word in (flag, text)]
    if len(texts) == 1 and texts[0].startswith("-"):  # or it reads as another flag
        return [f"{flag}={texts[0]}"]
    return [flag, *texts]


def _format_adapter(adapter: Mapping[str, Any]) -> list[str]:
    low, high = adapter["interval"]
    interval = None if (low, high) == (0.0, 1.0) else (low, high)
    words = ["--lora", format_lora(LoraArgument(adapter["path"], strength=adapter["strength"], interval=interval))]
    if adapter["conditioner_strength"] is not None:
        words += ["--conditioner-strength", _format_value(adapter["conditioner_strength"])]
    if adapter["exclude_layers"]:
        words += ["--exclude-layers", ",".join(adapter["exclude_layers"])]
    return words


def _format_value(value: Any) -> str:
    """The shortest text that reads as the same value."""
    short = f"{value:.10g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)
