"""`sa3-generate`: text-to-audio, audio-to-audio, inpainting and continuation, with adapters, or again from a sidecar.

sa3-generate -p "warm analog pad" --model nano --duration 5 -o pad.wav
sa3-generate -p "solo cello" --model nano-base --lora cello.safetensors=0.8 -o cello.wav
sa3-generate --prompt-file prompts.txt --at-a-time 4 -o out.wav
sa3-generate --from cello.json

With --at-a-time, the files of one batch are written while the next is generated.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3train.cli.generate_args import (
    DEFAULT_MODEL,
    build_parser,
    check_paths,
    parse_adapters,
    parse_output,
    parse_settings,
)
from sa3train.cli.hydra_app import run_job
from sa3train.core.errors import DataError, GenerationError, SA3Error
from sa3train.core.files import hash_file, write_bytes
from sa3train.core.log import get_logger
from sa3train.core.text import list_few
from sa3train.core.user_files import read_file
from sa3train.data.sources.text import decode_text
from sa3train.inference.resolve import resolve_settings
from sa3train.inference.settings import PER_ITEM_SETTINGS, GenerationSettings, count_items, is_list

if TYPE_CHECKING:
    from sa3train.inference.outputs import GenerationOutput

_logger = get_logger(__name__)

MAX_PROMPT_FILE = 1 << 24
"""Bytes."""
ALLOWED_WITH_FROM = {"sidecar", "output", "overwrite", "model", "device"}


def split_batches(settings: GenerationSettings, at_a_time: int | None) -> list[GenerationSettings]:
    """Split settings of many items into batches; batch k uses seed + k.

    Args:
        settings: Settings of all items. Lists that do not match stay in one batch, which the generator refuses.
        at_a_time: Items per batch; None for all.

    Returns:
        The settings of each batch.

    Raises:
        GenerationError: When `at_a_time` is below 1.
    """
    if at_a_time is not None and at_a_time < 1:
        raise GenerationError(f"--at-a-time {at_a_time} must be at least 1.")
    lists = {name: getattr(settings, name) for name in PER_ITEM_SETTINGS if is_list(getattr(settings, name))}
    count = count_items(settings)
    size = at_a_time or count
    if size >= count or any(len(values) != count for values in lists.values()):
        return [settings]
    return [
        dataclasses.replace(
            settings,
            **{name: values[first : first + size] for name, values in lists.items()},
            batch_size=min(size, count - first),
            seed=settings.seed if settings.seed == -1 else settings.seed + batch,
        )
        for batch, first in enumerate(range(0, count, size))
    ]


@contextlib.contextmanager
def write_in_background(
    subtype: str, overwrite: bool = False
) -> Iterator[Callable[["GenerationOutput", Sequence[Path]], None]]:
    """Write files in a thread; the block ends once all are written.

    Args:
        subtype: Encoding of the samples.
        overwrite: Whether to replace existing files.

    Yields:
        A function that waits for the previous files, then starts to write each item of a result to its path, with its
        sidecar. An error in writing is raised by the next call, or at the end of the block.
    """
    pending: list[Future[None]] = []
    saved: list[Path] = []

    def finish() -> None:
        while pending:
            pending.pop().result()

    def write(result: "GenerationOutput", paths: Sequence[Path]) -> None:
        finish()
        pending.append(thread.submit(_write, result, paths, subtype, overwrite, saved))

    with ThreadPoolExecutor(max_workers=1) as thread:
        try:
            yield write
        except BaseException:
            try:
                finish()
            except SA3Error as unwritten:
                _logger.error("%s", unwritten)  # next to the error that ended the block
            if saved:
                _logger.warning("complete so far: %s", list_few(list(map(str, saved)), 10))
            raise
        finish()


def _write(result: "GenerationOutput", paths: Sequence[Path], subtype: str, overwrite: bool, saved: list[Path]) -> None:
    for item, asked in enumerate(paths):
        path = result.save_at([asked], subtype, [item], overwrite)[0]
        saved.append(path)
        seconds = result.audio[item].shape[1] / result.sample_rate
        print(f"{path}: {seconds:.2f} s, seed {result.seeds[item]}, sidecar {path.name}.json", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments; None for those of the process.

    Returns:
        0 when the audio was written, 1 after an error message; misused flags exit with 2.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)

    def run() -> int:
        check_paths(arguments)
        return _generate(arguments) if arguments.sidecar is None else _replay(parser, arguments)

    return run_job(run)


def _generate(arguments: argparse.Namespace) -> int:
    prompts = _read_prompts(arguments)
    output, subtype = parse_output(arguments)
    adapters = parse_adapters(arguments)
    if arguments.no_half and arguments.precision not in ("auto", "fp32"):
        raise GenerationError(f"--no-half means --precision fp32, but --precision {arguments.precision} was given.")
    batches = split_batches(parse_settings(arguments, prompts), arguments.at_a_time)
    from sa3train.inference.generator import Generator
    from sa3train.inference.outputs import check_output, choose_output_paths, list_output_paths

    count = sum(map(count_items, batches))
    inputs = _list_inputs(arguments, adapters)
    for path in list_output_paths(output, count):
        check_output(path, subtype, inputs, arguments.overwrite)
    paths = choose_output_paths(output, count, arguments.overwrite)
    generator = Generator.from_pretrained(
        arguments.model or DEFAULT_MODEL,
        arguments.device,
        "fp32" if arguments.no_half else arguments.precision,
        compiled=arguments.compile,
        cuda_graphs=arguments.cuda_graphs,
    )
    for adapter in adapters:
        generator.load_adapter(**adapter)
    for batch in batches:
        resolve_settings(batch, generator.facts)  # refuse a bad batch before the first is generated
    with write_in_background(subtype, arguments.overwrite) as write:
        for batch in batches:
            result = generator.generate_from(batch)
            write(result, paths[: len(result.audio)])
            paths = paths[len(result.audio) :]
    return 0


def _list_inputs(arguments: argparse.Namespace, adapters: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the files that the command reads."""
    given = [arguments.init_audio, arguments.inpaint_audio, arguments.prompt_file, arguments.model]
    return [path for path in (*given, *(adapter["adapter"] for adapter in adapters)) if path]


def _replay(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Generate the file of a sidecar again and compare it with what was recorded."""
    given = {name for name, value in vars(arguments).items() if value != parser.get_default(name)}
    if given - ALLOWED_WITH_FROM:
        names = ", ".join(sorted(given - ALLOWED_WITH_FROM)).replace("_", "-")
        raise GenerationError(f"no effect with --from, which takes all settings from the sidecar: {names}. Remove it.")
    import torch

    from sa3train.inference.generator import EXECUTION_OPTIONS, Generator
    from sa3train.inference.outputs import check_output
    from sa3train.inference.replay import compare_with_record, replay
    from sa3train.inference.sidecar import list_inputs, read_sidecar

    sidecar = Path(arguments.sidecar)
    record = read_sidecar(sidecar)
    recorded = sidecar.with_name(record["file"])
    output = Path(arguments.output) if arguments.output else recorded
    if output.suffix != recorded.suffix:
        raise GenerationError(f"the sidecar records a {recorded.suffix} file. Give -o that suffix, or remove -o.")
    try:
        check_output(output, record["subtype"], list_inputs(record), arguments.overwrite)
        torch.set_num_threads(record["environment"]["threads"])
        source = arguments.model or record["model"]["source"]
        options = {name: bool(record["environment"].get(name)) for name in EXECUTION_OPTIONS}
        generator = Generator.from_pretrained(source, arguments.device, record["precision"], **options)
        result = replay(generator, record, sidecar.parent)
    except SA3Error as error:
        raise type(error)(f"{sidecar}: {error}") from error
    changed = compare_with_record(record, result, generator.device)
    in_place = arguments.output is None
    if (
        in_place
        and not changed
        and (arguments.overwrite or not output.exists() or hash_file(output) == record["sha256"])
    ):
        write_bytes(output, result.encode_item(record["item"], output.suffix, record["subtype"]))
        saved = output  # its sidecar stays
    elif in_place and changed and output.exists() and not arguments.overwrite:
        raise GenerationError(f"{changed} {output} was not overwritten. Give -o to write the new audio.")
    else:
        saved = result.save(output, record["subtype"], record["item"], arguments.overwrite)[0]
    print(f"{saved}: {changed or 'identical to the recorded file.'}")
    return 0


def _read_prompts(arguments: argparse.Namespace) -> list[str]:
    if (arguments.prompt is None) == (arguments.prompt_file is None):
        raise GenerationError("give exactly one of -p TEXT, --prompt-file FILE and --from FILE.json.")
    if arguments.prompt is not None:
        return list(arguments.prompt)
    try:
        text, encoding = decode_text(read_file(arguments.prompt_file, limit=MAX_PROMPT_FILE))
    except OSError as error:
        raise GenerationError(f"cannot read prompts from {arguments.prompt_file}: {error.strerror}.") from error
    except DataError as error:
        raise GenerationError(f"cannot read prompts from {arguments.prompt_file}: it {error}") from error
    if encoding:
        _logger.warning("%s is read as %s", arguments.prompt_file, encoding)
    prompts = [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]
    if not prompts:
        raise GenerationError(f"{arguments.prompt_file} contains no prompt. Write one per line.")
    return prompts


if __name__ == "__main__":
    raise SystemExit(main())
