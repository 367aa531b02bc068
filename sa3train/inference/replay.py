"""Repeat a recorded generation: generate it again, say what has changed since, or write its command."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sa3train.adapters.formats.io import load_adapter
from sa3train.adapters.formats.run_dir import list_checkpoints, locate_adapter
from sa3train.adapters.lora_argument import LoraArgument, format_lora
from sa3train.core.errors import GenerationError
from sa3train.core.log import get_logger
from sa3train.inference.checks import check_files
from sa3train.inference.generator import Generator
from sa3train.inference.outputs import GenerationOutput
from sa3train.inference.resolve import ModelFacts, compute_longest_window
from sa3train.inference.settings import (
    MODEL_DEFAULTS,
    PER_ITEM_SETTINGS,
    SETTING_NAMES,
    GenerationSettings,
    get_default,
    is_list,
    list_flags,
)
from sa3train.inference.sidecar import describe_environment, hash_path, list_places, locate_input
from sa3train.models.hub import find_checkpoint

_logger = get_logger(__name__)

LENGTH_IN_BARS = ("bars", "bpm", "meter")
"""Settings that set the duration."""
NAMED_SETTINGS = ("duration", "init_noise_level")
"""Settings that a command names even at their defaults."""
ADAPTER_SETTINGS = ("strength", "conditioner_strength", "interval", "exclude_layers", "allow_partial")


@dataclass(frozen=True)
class Replay:
    """A recorded generation, or the same with changes.

    Attributes:
        settings: What to generate.
        adapters: Keyword arguments of `Generator.load_adapter` for each.
    """

    settings: GenerationSettings
    adapters: list[dict[str, Any]]


def prepare_replay(
    record: Mapping[str, Any],
    folder: Path,
    facts: ModelFacts,
    changes: Mapping[str, Any] | None = None,
    adapters: Sequence[Mapping[str, Any]] = (),
    objective: str | None = None,
) -> Replay:
    """Prepare to generate again what a sidecar records, or the same with changes.

    Args:
        record: Content of the sidecar.
        folder: Folder of the sidecar, where adapters and input audio are looked for too.
        facts: The model's.
        changes: Settings to replace, by name; prompt, negative_prompt and duration for the sidecar's item alone.
        adapters: Keyword arguments of `Generator.load_adapter`: of a recorded adapter its new settings; others take
            the place of the recorded ones that are not named.
        objective: The recorded model's, where another one may take its place.

    Returns:
        What to generate, checked.

    Raises:
        GenerationError: When an adapter or an input is not what was used, or the seed is unknown.
    """
    if record["settings"]["seed"] is None:
        raise GenerationError("the audio was drawn from the caller's own generator and cannot be generated again.")
    changes = dict(changes or {})
    combined = _combine_adapters(record, folder, adapters)
    kept = {role: entry for role, entry in record["inputs"].items() if entry and role not in changes}
    inputs = {role: locate_input(entry, record, folder, "input audio") for role, entry in kept.items()}
    recorded_settings = dict(record["settings"])
    if changes and recorded_settings["window"] == compute_longest_window(facts, recorded_settings["tail"]):
        recorded_settings["window"] = None  # chosen for the recorded length, not by the user
    if objective not in (None, facts.objective):  # another kind of model has defaults of its own
        defaults = MODEL_DEFAULTS[objective].items()
        recorded_settings |= {name: None for name, value in defaults if recorded_settings[name] == value}
    for one, other in ((LENGTH_IN_BARS, ("duration",)), (("duration",), LENGTH_IN_BARS)):
        if changes.keys() & set(one):
            recorded_settings |= {name: None for name in other if name not in changes}
    for name in changes.keys() & set(PER_ITEM_SETTINGS):
        values = list(record["settings"][name] or [""] * record["settings"]["batch_size"])
        values[record["item"]] = changes[name]
        changes[name] = values
    settings = GenerationSettings.from_dict(recorded_settings | changes, **inputs)
    check_files([settings], facts, combined, given=changes)
    return Replay(settings, combined)


def check_model(generator: Generator, record: Mapping[str, Any], is_named: bool) -> bool:
    """Check whether a model is the one that a sidecar records.

    Args:
        generator: The model.
        record: Content of the sidecar.
        is_named: Whether the user named it, so that it may be another one.

    Returns:
        Whether it is the recorded one.

    Raises:
        GenerationError: When the recorded model has changed.
    """
    model, recorded = generator.model, record["model"]
    for part, fingerprint in (("fingerprint", model.fingerprint()), ("autoencoder", model.autoencoder.fingerprint())):
        if fingerprint != recorded[part] and not is_named:
            raise GenerationError(
                f"model {recorded['source']} has changed: its {part} is {fingerprint[:12]}…, but "
                f"{recorded[part][:12]}… was used. Give the original model, or name this one to use it in its place."
            )
        if fingerprint != recorded[part]:
            _logger.info("%s in place of the recorded model %s", model.name, recorded["source"])
            return False
    return True


def replay(generator: Generator, prepared: Replay) -> GenerationOutput:
    """Generate again what a sidecar records, or the same with changes.

    Args:
        generator: The model, without adapters.
        prepared: What `prepare_replay` made of the sidecar.

    Returns:
        The audio of the whole batch.
    """
    for adapter in prepared.adapters:
        generator.load_adapter(**adapter)
    return generator.generate_from(prepared.settings)


def locate_model(record: Mapping[str, Any], folder: Path) -> str:
    """Locate the model of a sidecar.

    Args:
        record: Content of the sidecar.
        folder: Its folder.

    Returns:
        Its name; of one that is no registry name, the folder.
    """
    source: str = record["model"]["source"]
    places = [] if find_checkpoint(source) else list_places(source, record, folder)
    return str(places[0]) if places else source


def _combine_adapters(
    record: Mapping[str, Any], folder: Path, given: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Arguments to load the recorded adapters with the settings given for the same files, or others in their place."""
    pending = []
    for each in given:
        path = locate_adapter(each["adapter"])
        pending.append((os.path.realpath(path), hash_path(path), each))
    changes = []
    for entry in record["adapters"]:
        places = list_places(entry["path"], record, folder) if entry["path"] else []
        known = {entry["sha256"], *map(os.path.realpath, places[:1])}  # another file may have the name elsewhere
        changes.append(next((each for each in pending if not known.isdisjoint(each[:2])), None))
        pending = [each for each in pending if each is not changes[-1]]
    combined = []
    for entry, change in zip(record["adapters"], changes, strict=True):
        if change is None and pending:
            names = ", ".join(str(each["adapter"]) for _, _, each in pending)
            _logger.info("%s: in place of the recorded adapter %s; name both to play both", names, entry["path"])
            continue
        settings = {name: entry[name] for name in ADAPTER_SETTINGS} | {"interval": tuple(entry["interval"])}
        if change is None:
            settings["adapter"] = _locate_recorded_adapter(entry, record, folder)
        else:
            settings |= dict(change[2]) | {"allow_partial": change[2]["allow_partial"] or entry["allow_partial"]}
            if change[1] != entry["sha256"]:
                settings["adapter"] = _choose_version(settings["adapter"], entry, record, folder)
        combined.append(settings)
    return combined + [dict(each) for _, _, each in pending]


def _choose_version(
    given: str | os.PathLike[str], entry: Mapping[str, Any], record: Mapping[str, Any], folder: Path
) -> str | os.PathLike[str]:
    """Choose the recorded version of an adapter that is named by its path, or what is there now if that is gone."""
    try:
        return _locate_recorded_adapter(entry, record, folder)
    except GenerationError:
        _logger.warning("%s has changed since it was recorded: it is played as it is now", given)
        return given


def _locate_recorded_adapter(entry: Mapping[str, Any], record: Mapping[str, Any], folder: Path) -> Path:
    """Locate the file of a recorded adapter; of one that its run has replaced since, the checkpoint that has it."""
    try:
        return locate_input(entry, record, folder, "adapter")
    except GenerationError as error:
        for path in list_places(entry["path"], record, folder) if entry["path"] else []:
            for step, state in list_checkpoints(path.parent).items():
                if load_adapter(state).fingerprint == entry["fingerprint"]:
                    _logger.info("%s has changed: using %s@%d, which was recorded", path, path.parent, step)
                    return state
        raise GenerationError(f"{error} Or choose another adapter.") from error


def compare_with_record(record: Mapping[str, Any], result: GenerationOutput, device: torch.device) -> str:
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
    found = result.build_sidecar(item, Path(file), content, subtype)
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
    if settings.get("bars") is not None:
        settings["duration"] = None
    for name in SETTING_NAMES:
        command += _format_setting(name, settings.get(name), settings["batch_size"])
    for adapter in record["adapters"]:
        command += _format_adapter(adapter)
    if any(adapter["allow_partial"] for adapter in record["adapters"]):
        command.append("--allow-partial")
    return [*command, "-o", output]


def _format_setting(name: str, value: Any, batch: int) -> list[str]:
    flag = list_flags(name)[0]
    neutral: Any = get_default(name)
    neutral = list(neutral) if is_list(neutral) else neutral
    if value is None or (value == neutral and name not in NAMED_SETTINGS):
        return []
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-")]
    if name in PER_ITEM_SETTINGS and batch > 1 and len(set(value)) == 1:
        value = value[:1]  # `--batch-size` repeats it
    if name == "prompt_at":
        return [word for time, text in value for word in (flag, _format_value(time), text)]
    texts = [_format_value(each) for each in (value if is_list(value) else [value])]
    if len(texts) > 1 and name in ("duration", "cfg_interval"):
        return [flag, *texts]
    # with "=", or a text that starts with a dash reads as another flag
    return [word for text in texts for word in ([f"{flag}={text}"] if text.startswith("-") else [flag, text])]


def _format_adapter(adapter: Mapping[str, Any]) -> list[str]:
    low, high = adapter["interval"]
    interval = None if (low, high) == (0.0, 1.0) else (low, high)
    strength = tuple(adapter["strength"]) if is_list(adapter["strength"]) else adapter["strength"]
    words = ["--lora", format_lora(LoraArgument(adapter["path"], strength=strength, interval=interval))]
    if adapter["conditioner_strength"] is not None:
        words += ["--conditioner-strength", _format_value(adapter["conditioner_strength"])]
    if adapter["exclude_layers"]:
        words += ["--exclude-layers", ",".join(adapter["exclude_layers"])]
    return words


def _format_value(value: Any) -> str:
    """The shortest text that reads as the same value."""
    short = f"{value:.10g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)
