"""The flags of `sa3-generate`, and what they say about adapters and output files."""

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa3train.core.errors import RequestError

DEFAULT_MODEL = "medium"
DEFAULT_OUTPUT = "output.wav"
DEFAULT_INIT_NOISE_LEVEL = 0.9
FORMATS = {
    "wav": (".wav", "PCM_16"),
    "wav24": (".wav", "PCM_24"),
    "wav32f": (".wav", "FLOAT"),
    "flac": (".flac", "PCM_24"),
}
INTERVAL = re.compile(r"(?P<rest>.+)@(?P<low>[^@=/-]+)-(?P<high>[^@=/-]+)")
HELP = """\
Each audio file gets a sidecar .json that says all that made it; `sa3-generate --from FILE.json` makes the same bytes
again, or says which input, adapter or model has changed since.
"""


class _Adapter(argparse.Action):
    """Collects adapters in order, each a dict of raw text by flag; options of an adapter follow it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        entries = [dict(entry) for entry in getattr(namespace, self.dest, None) or []]
        flag = str(option_string)
        if flag in ("--lora", "--lora-ckpt-path"):
            entries.append({flag: values})
        elif not entries:
            parser.error(f"{flag} acts on the --lora before it, and there is none")
        else:
            entries[-1][flag] = values
        setattr(namespace, self.dest, entries)


def build_parser() -> argparse.ArgumentParser:
    """The command line; the public `stable-audio` tool's flags are a part of it."""
    parser = argparse.ArgumentParser(
        prog="sa3-generate", description="Generate audio with Stable Audio 3 and adapters.", epilog=HELP
    )
    parser.add_argument("--from", dest="sidecar", metavar="FILE.json", help="make again what this sidecar records")
    _add_model(parser.add_argument_group("model"))
    _add_settings(parser.add_argument_group("what to generate"))
    _add_audio(parser.add_argument_group("from audio, or into it"))
    _add_adapters(parser.add_argument_group("adapters"))
    _add_output(parser.add_argument_group("output"))
    return parser


def parse_adapters(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What to load, in order of the command line, as arguments of `Generator.load_adapter`.

    Raises `RequestError` for a strength or noise level that is not a number, or flags without an adapter to act on.
    """
    entries = [_entry(raw) for raw in arguments.adapters or []]
    public = [entry for entry, raw in zip(entries, arguments.adapters or [], strict=True) if "--lora-ckpt-path" in raw]
    if arguments.lora_strength is None and arguments.lora_index is not None:
        raise RequestError("--lora-index would do nothing without --lora-strength.")
    if arguments.lora_strength is not None:
        if not public:
            raise RequestError(
                "--lora-strength acts on --lora-ckpt-path, and there is none; write --lora PATH=STRENGTH."
            )
        index = arguments.lora_index
        if index is not None and not 0 <= index < len(public):
            raise RequestError(f"--lora-index {index}: {len(public)} --lora-ckpt-path were given, counted from 0.")
        for entry in public if index is None else [public[index]]:
            entry["strength"] = _strength(arguments.lora_strength, f"--lora-strength {arguments.lora_strength}")
    if arguments.allow_partial and not entries:
        raise RequestError("--allow-partial would do nothing without an adapter: give --lora.")
    return [{**entry, "allow_partial": arguments.allow_partial} for entry in entries]


def parse_lora(text: str) -> dict[str, Any]:
    """`PATH[=STRENGTH][@MIN-MAX]` as arguments of `Generator.load_adapter`; a path that exists is taken as it is."""
    found: dict[str, Any] = {}
    rest = text
    if not Path(text).exists():
        match = INTERVAL.fullmatch(text)
        if match:
            rest = match["rest"]
            found["interval"] = tuple(_level(match[end], text) for end in ("low", "high"))
        if not Path(rest).exists() and "=" in rest:
            rest, _, strength = rest.rpartition("=")
            found["strength"] = _strength(strength, f"--lora {text}")
    return {"adapter": rest, **found}


def parse_output(arguments: argparse.Namespace) -> tuple[Path, str]:
    """The file to write and its encoding. Raises `RequestError` where -o and --format contradict each other."""
    path = Path(arguments.output or DEFAULT_OUTPUT)
    if path.is_dir() or (arguments.output or "").endswith("/"):
        raise RequestError(f"-o {arguments.output} is a folder: give the name of a file in it, such as {path}/out.wav.")
    if arguments.format is None:
        return path, FORMATS["flac" if path.suffix.lower() == ".flac" else "wav"][1]
    suffix, subtype = FORMATS[arguments.format]
    if arguments.output is None or not path.suffix:
        path = path.with_suffix(suffix)
    if path.suffix.lower() != suffix:
        raise RequestError(f"--format {arguments.format} makes {suffix} files, but -o names {path.name}.")
    return path, subtype


def _entry(raw: Mapping[str, str]) -> dict[str, Any]:
    entry: dict[str, Any] = (
        {"adapter": raw["--lora-ckpt-path"]} if "--lora-ckpt-path" in raw else parse_lora(raw["--lora"])
    )
    if "--conditioner-strength" in raw:
        given = raw["--conditioner-strength"]
        entry["conditioner_strength"] = _strength(given, f"--conditioner-strength {given}")
    if "--exclude-layers" in raw:
        entry["exclude_layers"] = raw["--exclude-layers"]
    return entry


def _strength(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(f"strength {text!r} in {where} is not a number: write one such as 0.8.")
    return value


def _level(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise RequestError(
            f"noise level {text!r} in --lora {where} is not a number: write @MIN-MAX, as @0.2-0.8."
        ) from error


def _add_model(group: Any) -> None:
    group.add_argument("--model", help=f"name or folder (default {DEFAULT_MODEL}); nano needs no download")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="default: auto")
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the denoiser: slow the first time, then faster steps; kept in the cache",
    )
    group.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="NVIDIA only: send each step of the denoiser to the GPU as one (not tried on a card yet)",
    )
    group.add_argument("--no-half", action="store_true", help="the public tool's name for --precision fp32")


def _add_settings(group: Any) -> None:
    group.add_argument("-p", "--prompt", nargs="+", metavar="TEXT", help="several make a batch")
    group.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="a batch with one prompt per line of FILE, those that begin with # left out",
    )
    group.add_argument("--negative-prompt", nargs="+", metavar="TEXT", help="what to stay away from (needs guidance)")
    group.add_argument(
        "--duration", nargs="+", type=float, metavar="S", help="seconds, one or one per prompt (default 30)"
    )
    group.add_argument("--batch-size", type=int, metavar="N", help="variations of one prompt")
    group.add_argument(
        "--at-a-time",
        type=int,
        metavar="N",
        help="items in memory at once; files appear as they are done, and each N have the next seed (default: all)",
    )
    group.add_argument("--seed", type=int, default=-1, help="default -1: a random one, which is printed")
    group.add_argument("--steps", type=int, help="default 50 on base models, 8 on post-trained")
    group.add_argument("--sampler", metavar="NAME", help="euler, dpmpp, rk4, pingpong (default by model)")
    group.add_argument("--cfg-scale", type=float, help="guidance; default 7 on base models, 1 (off) on post-trained")
    group.add_argument("--cfg-interval", nargs=2, type=float, metavar=("MIN", "MAX"), help="noise levels with guidance")
    group.add_argument("--cfg-norm-threshold", type=float, metavar="X", help="cap on the norm of the guidance")
    group.add_argument("--cfg-rescale", type=float, metavar="X", help="0 to 1: restore the velocity's spread")
    group.add_argument("--apg-scale", type=float, metavar="X", help="1: projected guidance (default), 0: plain")


def _add_audio(group: Any) -> None:
    group.add_argument("--init-audio", metavar="FILE", help="start from this audio")
    level = f"0 keeps it, 1 forgets it (default {DEFAULT_INIT_NOISE_LEVEL})"
    group.add_argument("--init-noise-level", type=float, metavar="X", help=level)
    group.add_argument("--inpaint-audio", metavar="FILE", help="generate parts of this audio anew, or continue it")
    group.add_argument("--inpaint-start", action="append", type=float, metavar="S", help="start of a part; repeatable")
    group.add_argument("--inpaint-end", action="append", type=float, metavar="S", help="end of a part; repeatable")
    group.add_argument("--keep-exact", action="store_true", help="decode kept parts from their own latents")


def _add_adapters(group: Any) -> None:
    form = "PATH[=STRENGTH][@MIN-MAX]"
    lora = "an adapter, its strength (default 1), the noise levels at which it acts; repeatable"
    conditioner = "strength of the --lora before it in the conditioner, where it is to differ"
    exclude = "layers that the --lora before it leaves alone: substrings, commas between, ranges as layers.[0-5]"
    group.add_argument("--lora", dest="adapters", action=_Adapter, metavar=form, help=lora)
    group.add_argument("--conditioner-strength", dest="adapters", action=_Adapter, metavar="X", help=conditioner)
    group.add_argument("--exclude-layers", dest="adapters", action=_Adapter, metavar="LAYERS", help=exclude)
    group.add_argument("--allow-partial", action="store_true", help="load adapters of which only a part fits")
    group.add_argument(
        "--lora-ckpt-path", dest="adapters", action=_Adapter, metavar="PATH", help="an adapter; repeatable"
    )
    group.add_argument("--lora-strength", metavar="X", help="strength of every --lora-ckpt-path, or of --lora-index")
    group.add_argument(
        "--lora-index", type=int, metavar="I", help="which --lora-ckpt-path --lora-strength is for, from 0"
    )


def _add_output(group: Any) -> None:
    group.add_argument("-o", "--output", metavar="FILE", help=f"default {DEFAULT_OUTPUT}; a batch adds _0, _1 …")
    group.add_argument("--format", choices=FORMATS, help="wav (16 bit), wav24, wav32f, flac (default: by the suffix)")
    decoding = group.add_mutually_exclusive_group()
    decoding.add_argument(
        "--chunked-decode", dest="chunked_decode", action="store_const", const=True, help="less memory"
    )
    decoding.add_argument(
        "--no-chunked-decode", dest="chunked_decode", action="store_const", const=False, help="no seams"
    )
