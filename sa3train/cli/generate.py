"""`sa3-generate`: audio from a prompt, from other audio, or into gaps of it; with adapters; again from a sidecar.

sa3-generate -p "warm analog pad" --model nano --duration 5 -o pad.wav
sa3-generate -p "solo cello" --model nano-base --lora cello.safetensors=0.8 -o cello.wav
sa3-generate --prompt-file prompts.txt --at-a-time 4 -o out.wav
sa3-generate --from cello.json

Many items, some at a time: each group is generated while the files of the one before are written.
"""

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sa3train.cli.generate_args import (
    DEFAULT_INIT_NOISE_LEVEL,
    DEFAULT_MODEL,
    build_parser,
    parse_adapters,
    parse_output,
)
from sa3train.cli.hydra_app import run_job
from sa3train.core.errors import RequestError, SA3Error
from sa3train.core.log import get_logger

if TYPE_CHECKING:
    from sa3train.inference.outputs import GenerationOutput
    from sa3train.inference.request import ModelFacts

_logger = get_logger(__name__)

AUDIO = ("init_audio", "inpaint_audio")
PER_ITEM = ("prompt", "negative_prompt", "duration")


def in_groups(settings: Mapping[str, Any], count: int, at_a_time: int | None) -> list[dict[str, Any]]:
    """Keyword arguments of `Generator.generate` for `count` items, `at_a_time` of them in each group.

    Every group is a batch of its own, with the seed after that of the one before. Lists that do not go together stay
    as they are: to refuse them is the generator's business. Raises `RequestError` for less than one at a time.
    """
    if at_a_time is not None and at_a_time < 1:
        raise RequestError(f"--at-a-time {at_a_time}: at least one item is made at a time.")
    lists = {name for name in PER_ITEM if isinstance(settings.get(name), list)}
    size = at_a_time or count
    if size >= count or any(len(settings[name]) != count for name in lists):
        return [dict(settings)]
    groups = []
    for number, first in enumerate(range(0, count, size)):
        group = dict(settings)
        for name in lists:
            part = settings[name][first : first + size]
            group[name] = part[0] if len(part) == 1 else part
        if "batch_size" in settings:
            group["batch_size"] = min(size, count - first)
        if settings.get("seed", -1) >= 0:
            group["seed"] = settings["seed"] + number
        groups.append(group)
    return groups


def check_groups(groups: Sequence[Mapping[str, Any]], facts: "ModelFacts") -> None:
    """Raise `RequestError` for what the generator would refuse in any group, before the first is made."""
    from sa3train.inference.request import build_request

    for group in groups:
        given: dict[str, Any] = {f"with_{name}": name in group for name in AUDIO}
        build_request(facts, **given, **{name: value for name, value in group.items() if name not in AUDIO})


class Writer:
    """Writes files beside what goes on, in a thread; use as a context manager, which ends once all are written.

    An error in writing is raised at the next `write`, or at the end.
    """

    def __init__(self, subtype: str) -> None:
        self.subtype = subtype
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if self._last is None:
            return
        try:
            self._last.result()
        except SA3Error as unwritten:
            if kind is None:
                raise
            _logger.error("%s", unwritten)  # beside the error that ended it all

    def write(self, result: "GenerationOutput", places: Sequence[Path]) -> None:
        """Keep each item of `result` at its place, with its sidecar, and say so; first comes what was given before."""
        if self._last is not None:
            self._last.result()
        self._last = self._thread.submit(self._write, result, list(places))

    def _write(self, result: "GenerationOutput", places: Sequence[Path]) -> None:
        for path in result.save_at(places, self.subtype):
            item = places.index(path)
            seconds = result.audio[item].shape[1] / result.sample_rate
            print(f"{path}: {seconds:.2f} s, seed {result.seeds[item]}, sidecar {path.stem}.json", flush=True)


WITH_FROM = {"sidecar", "output", "model", "device"}


def main(argv: list[str] | None = None) -> int:
    """The command's entry point: 0 when the audio was written, 1 with a line on what was wrong, 2 for misused flags."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    return run_job(lambda: replay(parser, arguments) if arguments.sidecar else generate(arguments))


def generate(arguments: argparse.Namespace) -> int:
    """Carry out the command line. Raises `SA3Error` for what cannot be."""
    prompts = _prompts(arguments)
    output, subtype = parse_output(arguments)
    adapters = parse_adapters(arguments)
    settings = _settings(arguments)
    from sa3train.inference.generator import Generator
    from sa3train.inference.outputs import check_output, output_paths

    lists = (prompts, arguments.negative_prompt or [], arguments.duration or [])
    count = max(arguments.batch_size or 1, *(len(values) for values in lists))
    groups = in_groups({"prompt": _one_or_list(prompts), **settings}, count, arguments.at_a_time)
    places = output_paths(output, count)
    for place in places:
        check_output(place, subtype)
    if arguments.no_half and arguments.precision not in ("auto", "fp32"):
        raise RequestError(f"--no-half means --precision fp32, and --precision {arguments.precision} was given too.")
    precision = "fp32" if arguments.no_half else arguments.precision
    model = arguments.model or DEFAULT_MODEL
    ways = {"compiled": arguments.compile, "cuda_graphs": arguments.cuda_graphs}
    generator = Generator.from_pretrained(model, arguments.device, precision, **ways)
    for adapter in adapters:
        generator.load_adapter(**adapter)
    check_groups(groups, generator.facts)
    with Writer(subtype) as writer:
        for group in groups:
            result = generator.generate(**group)
            writer.write(result, places[: len(result.audio)])
            places = places[len(result.audio) :]
    return 0


def replay(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Make the file of a sidecar again and compare it with what was recorded."""
    given = {name for name, value in vars(arguments).items() if value != parser.get_default(name)}
    if given - WITH_FROM:
        names = ", ".join(sorted(given - WITH_FROM)).replace("_", "-")
        raise RequestError(f"{names} would do nothing with --from, which takes every setting from the sidecar.")
    import torch

    from sa3train.inference.generator import WAYS, Generator
    from sa3train.inference.outputs import check_output
    from sa3train.inference.replay import again, difference
    from sa3train.inference.sidecar import read_record

    sidecar = Path(arguments.sidecar)
    record = read_record(sidecar)
    recorded = Path(record["file"])
    output = Path(arguments.output) if arguments.output else sidecar.with_name(recorded.name)
    if output.suffix != recorded.suffix:
        raise RequestError(f"the sidecar records a {recorded.suffix} file: give -o that suffix, or leave it out.")
    check_output(output, record["subtype"])
    torch.set_num_threads(int(record["environment"]["threads"]))
    source = arguments.model or record["model"]["source"]
    ways = {way: bool(record["environment"].get(way)) for way in WAYS}
    generator = Generator.from_pretrained(source, arguments.device, record["precision"], **ways)
    result = again(generator, record, sidecar.parent)
    changed = difference(record, result, generator.device)
    if changed and arguments.output is None and output.exists():
        raise RequestError(f"{changed} {output} was left as it is; give -o to keep the new one.")
    result.save(output, record["subtype"], item=record["item"])
    print(f"{output}: {changed or 'identical to the recorded file.'}")
    return 0


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if (arguments.prompt is None) == (arguments.prompt_file is None):
        raise RequestError("say what to generate, in one way: -p TEXT, --prompt-file FILE, or --from FILE.json.")
    if arguments.prompt is not None:
        return list(arguments.prompt)
    try:
        lines = Path(arguments.prompt_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read prompts from {arguments.prompt_file}: {error}.") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise RequestError(f"{arguments.prompt_file} has no prompt in it: write one per line.")
    return prompts


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `Generator.generate` that were given; the rest is left to its defaults."""
    level = arguments.init_noise_level
    if arguments.init_audio is not None and level is None:
        level = DEFAULT_INIT_NOISE_LEVEL
    given = {
        "negative_prompt": _one_or_list(arguments.negative_prompt),
        "duration": _one_or_list(arguments.duration),
        "steps": arguments.steps,
        "cfg_scale": arguments.cfg_scale,
        "cfg_interval": arguments.cfg_interval,
        "cfg_norm_threshold": arguments.cfg_norm_threshold,
        "scale_phi": arguments.cfg_rescale,
        "apg_scale": arguments.apg_scale,
        "sampler_type": arguments.sampler,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "init_audio": arguments.init_audio,
        "init_noise_level": level,
        "inpaint_audio": arguments.inpaint_audio,
        "inpaint_mask_start_seconds": arguments.inpaint_start,
        "inpaint_mask_end_seconds": arguments.inpaint_end,
        "keep_exact": arguments.keep_exact,
        "chunked_decode": arguments.chunked_decode,
    }
    return {name: value for name, value in given.items() if value is not None}


def _one_or_list(values: Sequence[Any] | None) -> Any:
    return values[0] if values is not None and len(values) == 1 else values


if __name__ == "__main__":
    raise SystemExit(main())
