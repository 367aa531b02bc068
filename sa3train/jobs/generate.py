"""`sa3-generate`: audio from a prompt, from other audio, or into gaps of it; with adapters; again from a sidecar.

sa3-generate -p "warm analog pad" --model nano --duration 5 -o pad.wav
sa3-generate -p "solo cello" --model nano-base --lora cello.safetensors=0.8 -o cello.wav
sa3-generate --prompt-file prompts.txt --at-a-time 4 -o out.wav
sa3-generate --from cello.json
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sa3train.errors import RequestError
from sa3train.jobs.generate_batches import Writer, check_groups, in_groups
from sa3train.jobs.generate_flags import (
    DEFAULT_INIT_NOISE_LEVEL,
    DEFAULT_MODEL,
    build_parser,
    parse_adapters,
    parse_output,
)
from sa3train.jobs.runtime import run_job

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
    from sa3train.inference.outputs import check_output, output_paths
    from sa3train.inference.pipeline import Generator

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

    from sa3train.inference.outputs import check_output
    from sa3train.inference.pipeline import WAYS, Generator
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
