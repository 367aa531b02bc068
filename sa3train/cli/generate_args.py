"""The flags of `sa3-generate`: those of `GenerationSettings`, of adapters and of output files."""

import argparse
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sa3train.adapters.layer_filter import split_patterns
from sa3train.adapters.lora_argument import parse_lora
from sa3train.cli.parser import CommandParser, PromptAction
from sa3train.cli.version import add_version
from sa3train.core.config import DEVICES, Setting
from sa3train.core.dtypes import PRECISIONS
from sa3train.core.errors import GenerationError
from sa3train.inference.settings import (
    PER_ITEM_SETTINGS,
    SETTING_NAMES,
    VALUE_TYPES,
    GenerationSettings,
    describe_setting,
    get_default,
    list_flags,
)

DEFAULT_MODEL = "medium"
DEFAULT_OUTPUT = "output.wav"
FORMATS = {
    "wav": (".wav", "PCM_16"),
    "wav24": (".wav", "PCM_24"),
    "wav32f": (".wav", "FLOAT"),
    "flac": (".flac", "PCM_24"),
}
_EDIT, _OUTPUT = map(SETTING_NAMES.index, ("init_audio", "chunked_decode"))  # first of their groups
TEXT_GROUP, EDIT_GROUP, OUTPUT_GROUP = SETTING_NAMES[:_EDIT], SETTING_NAMES[_EDIT:_OUTPUT], SETTING_NAMES[_OUTPUT:]
METAVARS: dict[type | None, str | None] = {None: "FILE", bool: None, int: "N", float: "X", str: "TEXT"}
FLAGS = {name: next(flag for flag in list_flags(name) if flag.startswith("--")) for name in SETTING_NAMES} | {
    "allow_partial": "--allow-partial", "interval": "noise levels", "conditioner_strength": "--conditioner-strength",
    "exclude_layers": "--exclude-layers", "overwrite": "--overwrite",
}  # fmt: skip
"""How messages name settings and the keywords of `Generator.load_adapter`."""
_PATH = Setting("A path.", text="path")
EPILOG = """\
Each audio file gets a sidecar, FILE.wav.json, with everything that reproduces it; `sa3-generate --from FILE.wav.json`
writes the same bytes again, or says which input, adapter or model has changed.
"""


class _PromptAtAction(argparse.Action):
    """Collects later prompts, each with its time; the one at 0 is that of `-p`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            time = float(values[0])
        except ValueError:
            parser.error(f"{option_string} {values[0]!r} is not a number of seconds; write {option_string} 60 TEXT")
        if time == 0:
            namespace.prompt = [*(namespace.prompt or []), values[1]]
        else:
            namespace.prompt_at = [*(namespace.prompt_at or []), (time, values[1])]


class _AdapterAction(argparse.Action):
    """Collects adapters in order, each a dict of raw text by flag; options of an adapter follow it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        entries = [dict(entry) for entry in getattr(namespace, self.dest, None) or []]
        flag = str(option_string)
        if flag in ("--lora", "--lora-ckpt-path"):
            entries.append({flag: values})
        elif not entries:
            parser.error(f"{flag} applies to the --lora before it, but there is none")
        else:
            entries[-1][flag] = values
        setattr(namespace, self.dest, entries)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; the flags of the public `stable-audio` tool are a subset.

    Returns:
        The parser. A setting that is not given is None.
    """
    parser = CommandParser(
        prog="sa3-generate", description="Generate audio with Stable Audio 3 and adapters.", epilog=EPILOG
    )
    parser.add_argument(
        "--from",
        dest="sidecar",
        metavar="FILE.wav.json",
        help="generate again what this sidecar (or that of this audio) records, or the same with what other flags "
        "change, such as --seed; --lora of a recorded adapter changes its strength, another one takes its place",
    )
    add_version(parser)
    parser.add_argument("--list-models", action="store_true", help="list the models by name, and which are at hand")
    _add_model(parser.add_argument_group("model"))
    group = parser.add_argument_group("settings")
    _add_settings(group, TEXT_GROUP)
    group.add_argument(
        "--prompt-file", metavar="FILE", help="read prompts from FILE, one per line, except lines that start with #"
    )
    group.add_argument(
        "--at-a-time",
        type=int,
        metavar="N",
        help="batch size for long prompt lists, default all; batch k uses seed + k",
    )
    _add_settings(parser.add_argument_group("audio-to-audio, inpainting, continuation"), EDIT_GROUP)
    _add_adapters(parser.add_argument_group("adapters"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_settings(group: Any, names: Iterable[str]) -> None:
    for name in names:
        flags = list_flags(name)
        kind, text = VALUE_TYPES.get(name), describe_setting(name)
        if kind is bool and get_default(name) is None:
            pair = group.add_mutually_exclusive_group()
            pair.add_argument(*flags, dest=name, action="store_const", const=True, help=text)
            negated = f"--no-{name.replace('_', '-')}"
            pair.add_argument(negated, dest=name, action="store_const", const=False, help=f"not {flags[-1]}")
            continue
        options: dict[str, Any] = {"type": kind, "metavar": METAVARS[kind]}
        if kind is bool:
            options = {"action": "store_const", "const": True}
        elif name in PER_ITEM_SETTINGS:
            options |= {"nargs": "+", "action": "store" if name == "duration" else PromptAction}
            text += " Repeat it for a batch." if name == "prompt" else " One for all prompts or one each."
        elif name == "prompt_at":
            options = {"nargs": 2, "action": _PromptAtAction, "metavar": ("SECONDS", "TEXT")}
            text += " Repeatable; the one at 0 takes the place of -p."
        elif name == "cfg_interval":
            options |= {"nargs": 2, "metavar": ("MIN", "MAX")}
        elif name.startswith("inpaint_mask"):
            options["action"] = "append"
            text += " Repeatable."
        group.add_argument(*flags, dest=name, help=text, **options)


def check_paths(arguments: argparse.Namespace) -> None:
    """Check that every path given can be one.

    Args:
        arguments: The parsed command line.

    Raises:
        GenerationError: When one is empty or too long.
    """
    given = {"--from": arguments.sidecar, "-o": arguments.output, "--prompt-file": arguments.prompt_file}
    for flag, path in (given | {"--model": arguments.model, "--device": arguments.device}).items():
        if path is not None and (problem := _PATH.find_problem(path)):
            raise GenerationError(f"{flag} {path[:80]!r} must {problem}.")


def parse_settings(arguments: argparse.Namespace, prompts: list[str]) -> GenerationSettings:
    """Collect the settings that were given.

    Args:
        arguments: The parsed command line.
        prompts: Prompts of `-p` or of the prompt file.

    Returns:
        The settings, with defaults for the rest.
    """
    given = {name: getattr(arguments, name) for name in SETTING_NAMES} | {"prompt": prompts}
    single = {name: given[name][0] for name in PER_ITEM_SETTINGS if given[name] is not None and len(given[name]) == 1}
    return GenerationSettings(**{name: value for name, value in (given | single).items() if value is not None})


def parse_changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Collect the settings that change those of a sidecar.

    Args:
        arguments: The parsed command line.

    Returns:
        Values by setting.

    Raises:
        GenerationError: When there are several values for the one file.
    """
    changes = {name: value for name in SETTING_NAMES if (value := getattr(arguments, name)) is not None}
    for name in changes.keys() & set(PER_ITEM_SETTINGS):
        if len(changes[name]) != 1:
            raise GenerationError(f"{name} has {len(changes[name])} values, but --from is for one file. Give one.")
        changes[name] = changes[name][0]
    return changes


def parse_adapters(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Collect the adapters to load, in the order of the command line.

    Args:
        arguments: The parsed command line.

    Returns:
        Keyword arguments of `Generator.load_adapter` for each.

    Raises:
        GenerationError: When a strength or noise level is not a number, or a flag has no adapter to apply to.
    """
    entries = [_parse_entry(raw) for raw in arguments.adapters or []]
    if arguments.sidecar is None and any(not entry.get("exclude_layers", True) for entry in entries):
        raise GenerationError("--exclude-layers has no effect without a layer. Name one, or remove it.")
    public = [entry for entry, raw in zip(entries, arguments.adapters or [], strict=True) if "--lora-ckpt-path" in raw]
    if arguments.lora_strength is None and arguments.lora_index is not None:
        raise GenerationError("--lora-index has no effect without --lora-strength.")
    if arguments.lora_strength is not None:
        if not public:
            raise GenerationError(
                "--lora-strength applies to --lora-ckpt-path, but there is none. Write --lora PATH=STRENGTH."
            )
        index = arguments.lora_index
        if index is not None and not 0 <= index < len(public):
            raise GenerationError(f"--lora-index {index}: there are {len(public)} --lora-ckpt-path, counted from 0.")
        for entry in public if index is None else [public[index]]:
            entry["strength"] = _parse_strength(arguments.lora_strength, f"--lora-strength {arguments.lora_strength}")
    if arguments.allow_partial and not entries:
        raise GenerationError("--allow-partial has no effect without an adapter. Give --lora.")
    return [{**entry, "allow_partial": arguments.allow_partial} for entry in entries]


def parse_output(arguments: argparse.Namespace, default: str = DEFAULT_OUTPUT) -> tuple[Path, str]:
    """Choose the file to write and the encoding of its samples.

    Args:
        arguments: The parsed command line.
        default: The file without -o.

    Returns:
        The audio file and its subtype.

    Raises:
        GenerationError: When -o is a folder or contradicts --format.
    """
    output = default if arguments.output is None else arguments.output
    path = Path(output)
    if output.endswith(("/", os.sep)):
        raise GenerationError(f"cannot write {output}: it is a folder. Give a file name, such as {path}/out.wav.")
    if arguments.format is None:
        return path, FORMATS["flac" if path.suffix.lower() == ".flac" else "wav"][1]
    suffix, subtype = FORMATS[arguments.format]
    if arguments.output is None or not path.suffix:
        path = path.with_suffix(suffix)
    if path.suffix.lower() != suffix:
        raise GenerationError(f"--format {arguments.format} writes {suffix} files, but -o names {path.name}.")
    return path, subtype


def _parse_entry(raw: Mapping[str, str]) -> dict[str, Any]:
    entry: dict[str, Any] = (
        {"adapter": raw["--lora-ckpt-path"]} if "--lora-ckpt-path" in raw else parse_lora(raw["--lora"]).to_settings()
    )
    if "--conditioner-strength" in raw:
        given = raw["--conditioner-strength"]
        entry["conditioner_strength"] = _parse_strength(given, f"--conditioner-strength {given}")
    if "--exclude-layers" in raw:
        entry["exclude_layers"] = split_patterns(raw["--exclude-layers"])
    return entry


def _parse_strength(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise GenerationError(f"strength {text!r} in {where} is not a number. Write one such as 0.8.")
    return value


def _add_model(group: Any) -> None:
    add = group.add_argument
    add("--model", help=f"name or folder (default {DEFAULT_MODEL}); nano needs no download")
    add("--weights", choices=("released", "mlx"), help="mlx: open fp16 packs of a named model, without an account")
    add("--device", help=f"{DEVICES} (default: the best that works)")
    add("--precision", choices=PRECISIONS, default="auto", help="default: auto; int8: products, on a CPU")
    add(
        "--compile", action="store_true", help="compile the denoiser with torch.compile: slow once, then faster; cached"
    )
    add("--cuda-graphs", action="store_true", help="launch each step of the denoiser as one CUDA graph (NVIDIA only)")
    text = "what computes the denoiser: openvino is for CPUs and needs the extra openvino (default: torch)"
    add("--backend", choices=("torch", "openvino"), help=text)
    add("--no-half", action="store_true", help="same as --precision fp32, as the public tool calls it")


def _add_adapters(group: Any) -> None:
    for flag, metavar, text in (
        (
            "--lora",
            "PATH[=STRENGTH][@MIN-MAX]",
            "adapter, strength (default 1; START..END changes it over a piece), noise levels where it acts; repeatable",
        ),
        ("--conditioner-strength", "X", "strength in the conditioner of the --lora before it, if different"),
        (
            "--exclude-layers",
            "LAYERS",
            "layers that the --lora before it leaves untouched: comma-separated substrings, ranges as layers.[0-5]",
        ),
        ("--lora-ckpt-path", "PATH", "adapter; repeatable"),
    ):
        group.add_argument(flag, dest="adapters", action=_AdapterAction, metavar=metavar, help=text)
    add = group.add_argument
    add("--allow-partial", action="store_true", help="load adapters of which only some layers match")
    add("--lora-strength", metavar="X", help="strength of all --lora-ckpt-path, or of --lora-index")
    add("--lora-index", type=int, metavar="I", help="index of the --lora-ckpt-path that --lora-strength sets, from 0")


def _add_output(group: Any) -> None:
    text = (
        f".wav, .flac, .mp3, .ogg, .opus or .aiff; default {DEFAULT_OUTPUT}; a batch adds _0, _1 …; a name that is "
        "taken gets the next free number, FILE-2.wav"
    )
    group.add_argument("-o", "--output", metavar="FILE", help=text)
    group.add_argument("--overwrite", action="store_true", help="replace existing output files, but never an input")
    group.add_argument("--format", choices=FORMATS, help="wav (16-bit), wav24, wav32f, flac (default: by -o)")
    _add_settings(group, OUTPUT_GROUP)
