"""`sa3-generate`: text-to-audio, audio-to-audio, inpainting and continuation, with adapters, or again from a sidecar.

sa3-generate -p "warm analog pad" --model nano --duration 5 -o pad.wav
sa3-generate -p "solo cello" --model nano-base --lora cello.safetensors=0.8 -o cello.wav
sa3-generate --prompt-file prompts.txt --at-a-time 4 -o out.wav
sa3-generate --from cello.wav.json
sa3-generate --from cello.wav.json --seed 7 --lora cello.safetensors=0.5 -o cello-7.wav

With --at-a-time, the files of one batch are written while the next is generated.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3train.adapters.formats.run_dir import locate_adapter
from sa3train.cli.generate_args import (
    DEFAULT_MODEL,
    FLAGS,
    build_parser,
    check_paths,
    parse_adapters,
    parse_changes,
    parse_output,
    parse_settings,
)
from sa3train.cli.hydra_app import run_job
from sa3train.core.errors import DataError, GenerationError, SA3Error
from sa3train.core.files import check_exists, hash_file, write_bytes
from sa3train.core.log import get_logger
from sa3train.core.text import format_command, list_few
from sa3train.core.user_files import read_file
from sa3train.data.sources.text import decode_text
from sa3train.inference.settings import PER_ITEM_SETTINGS, SETTING_NAMES, GenerationSettings, count_items, is_list
from sa3train.models.hub import check_checkpoint, choose_weights, list_checkpoints

if TYPE_CHECKING:
    import torch

    from sa3train.inference.generator import Generator
    from sa3train.inference.outputs import GenerationOutput
    from sa3train.inference.resolve import ModelFacts

_logger = get_logger(__name__)

OFFERED_PROMPTS = 6
MANY_ITEMS = 32
MAX_PROMPT_FILE = 1 << 24
"""Bytes."""
SAME_WITH_FROM = {"sidecar", "output", "overwrite", "model", "device"}
"""Flags beside --from with which the audio is still that of the sidecar; --model where it is the recorded one."""
REFUSED_WITH_FROM = {"prompt_file", "at_a_time", "batch_size"}
"""Flags of many items: a sidecar is that of one."""


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
    saved += (_save(result, item, path, subtype, overwrite) for item, path in enumerate(paths))


def _save(result: "GenerationOutput", item: int, asked: Path, subtype: str, overwrite: bool) -> Path:
    from sa3train.inference.outputs import describe_measured, get_work_dir
    from sa3train.inference.windows import remove_work_dir

    path = result.save_at([asked], subtype, [item], overwrite)[0]
    remove_work_dir(get_work_dir(asked), result.record)
    seconds = result.audio[item].shape[1] / result.sample_rate
    facts = "".join(f"{fact}, " for fact in describe_measured(result.measured[item] if result.measured else {}))
    print(f"{path}: {seconds:.2f} s, seed {result.seeds[item]}, {facts}sidecar {path}.json", flush=True)
    return path


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments; None for those of the process.

    Returns:
        0 when the audio was written, 1 after an error message; misused flags exit with 2.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    given = {name for name, value in vars(arguments).items() if value != parser.get_default(name)}
    return run_job(lambda: _run(arguments, given), FLAGS)


def _run(arguments: argparse.Namespace, given: set[str]) -> int:
    if arguments.list_models and given != {"list_models"}:
        raise GenerationError("--list-models stands alone. Remove it, or the other flags.")
    if arguments.list_models:
        return _list_models()
    check_paths(arguments)
    if arguments.no_half and arguments.precision not in ("auto", "fp32"):
        raise GenerationError(f"--no-half means --precision fp32, but --precision {arguments.precision} was given.")
    if arguments.weights is not None:
        if arguments.sidecar is not None and arguments.model is None:
            raise GenerationError("--weights with --from needs --model. Name the model.")
        arguments.model = choose_weights(arguments.model or DEFAULT_MODEL, arguments.weights)
    return _generate(arguments) if arguments.sidecar is None else _replay(arguments, given)


def _generate(arguments: argparse.Namespace) -> int:
    prompts = _read_prompts(arguments)
    output, subtype = parse_output(arguments)
    adapters = parse_adapters(arguments)
    batches = split_batches(parse_settings(arguments, prompts), arguments.at_a_time)
    model = arguments.model or DEFAULT_MODEL
    check_checkpoint(model)  # before torch is imported, which takes longer
    _check_inputs(arguments, adapters)
    from sa3train.inference.checks import check_files
    from sa3train.inference.outputs import check_output, choose_output_paths, get_work_dir, list_output_paths

    count = sum(map(count_items, batches))
    inputs = _list_inputs(arguments, adapters)
    for path in list_output_paths(output, count):
        check_output(path, subtype, inputs, arguments.overwrite)
    paths = choose_output_paths(output, count, arguments.overwrite)
    given = [name for name in SETTING_NAMES if getattr(arguments, name) is not None]
    check_files(batches, _describe_model(model), adapters, given)
    if (largest := max(map(count_items, batches))) > MANY_ITEMS:
        _logger.warning(
            "%d items at once: files are written when the last one is done. --at-a-time 8 writes them in turn.", largest
        )
    generator = _load_model(arguments, model, "auto", {})
    for adapter in adapters:
        generator.load_adapter(**adapter)
    with write_in_background(subtype, arguments.overwrite) as write:
        for batch in batches:
            result = generator.generate_from(batch, work_dir=get_work_dir(paths[0]))
            write(result, paths[: len(result.audio)])
            paths = paths[len(result.audio) :]
    return 0


def _describe_model(source: str) -> "ModelFacts":
    from sa3train.inference.resolve import ModelFacts
    from sa3train.models.checkpoint import describe_checkpoint

    name, config = describe_checkpoint(source)
    return ModelFacts.from_config(config, name)


def _list_models() -> int:
    for name, state in list_checkpoints().items():
        print(f"{name:<20} {state}{' (default)' if name == DEFAULT_MODEL else ''}")
    return 0


def _check_inputs(arguments: argparse.Namespace, adapters: Sequence[Mapping[str, Any]]) -> None:
    for entry in adapters:
        locate_adapter(entry["adapter"])
    for path in filter(None, (arguments.init_audio, arguments.inpaint_audio)):
        check_exists(path, "an audio file")


def _list_inputs(arguments: argparse.Namespace, adapters: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the files that the command reads."""
    given = [arguments.init_audio, arguments.inpaint_audio, arguments.prompt_file, arguments.model]
    return [path for path in (*given, *(adapter["adapter"] for adapter in adapters)) if path]


def _replay(arguments: argparse.Namespace, given: set[str]) -> int:
    """Generate the file of a sidecar again and compare it with what was recorded; or the same with changes."""
    if given & REFUSED_WITH_FROM:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(given & REFUSED_WITH_FROM))
        raise GenerationError(f"{names} cannot change a sidecar, which is that of one file. Remove it.")
    changes, adapters = parse_changes(arguments), parse_adapters(arguments)
    _check_inputs(arguments, adapters)
    from sa3train.inference.outputs import check_output
    from sa3train.inference.replay import check_model, locate_model, prepare_replay, replay
    from sa3train.inference.sidecar import list_inputs, read_sidecar

    sidecar = Path(arguments.sidecar)
    record = read_sidecar(sidecar)
    recorded, subtype, is_same = sidecar.with_name(record["file"]), record["subtype"], given <= SAME_WITH_FROM
    output = Path(arguments.output) if arguments.output else recorded
    if is_same and output.suffix != recorded.suffix:
        raise GenerationError(f"the sidecar records a {recorded.suffix} file. Give -o that suffix, or remove -o.")
    if arguments.format or output.suffix != recorded.suffix:
        output, subtype = parse_output(arguments, str(recorded.with_suffix("")))
    try:
        check_output(output, subtype, list_inputs(record, sidecar.parent), arguments.overwrite)
        used = locate_model(record, sidecar.parent)
        source, objective = arguments.model or used, None
        with contextlib.suppress(SA3Error):  # the recorded model may be gone
            objective = _describe_model(used).objective if arguments.model else None
        prepared = prepare_replay(record, sidecar.parent, _describe_model(source), changes, adapters, objective)
        generator = _load_model(arguments, source, record["precision"], record["environment"])
        is_same = check_model(generator, record, arguments.model is not None) and is_same
        result = replay(generator, prepared)
    except SA3Error as error:
        raise type(error)(f"{sidecar}: {error}") from error
    if is_same:
        _save_again(result, record, recorded, arguments, generator.device)
    else:
        _save(result, record["item"], output, subtype, arguments.overwrite)
    return 0


def _load_model(arguments: argparse.Namespace, source: str, precision: str, recorded: Mapping[str, Any]) -> "Generator":
    """Load the model as the flags say, and else as it was recorded."""
    from sa3train.inference.generator import Generator

    if "threads" in recorded:
        import torch

        torch.set_num_threads(recorded["threads"])
    return Generator.from_pretrained(
        source,
        arguments.device,
        "fp32" if arguments.no_half else precision if arguments.precision == "auto" else arguments.precision,
        compiled=arguments.compile or bool(recorded.get("compiled")),
        cuda_graphs=arguments.cuda_graphs or bool(recorded.get("cuda_graphs")),
        backend=arguments.backend or recorded.get("backend", "torch"),
    )


def _save_again(
    result: "GenerationOutput",
    record: Mapping[str, Any],
    recorded: Path,
    arguments: argparse.Namespace,
    device: "torch.device",
) -> None:
    """Write what was generated again, and say whether it is what was recorded."""
    from sa3train.inference.replay import compare_with_record

    changed, subtype, item = compare_with_record(record, result, device), record["subtype"], record["item"]
    if arguments.output is None and not changed and _may_write(recorded, record["sha256"], arguments.overwrite):
        write_bytes(recorded, result.encode_item(item, recorded.suffix, subtype))
        saved = recorded  # its sidecar stays
    elif arguments.output is None and changed and recorded.exists() and not arguments.overwrite:
        raise GenerationError(f"{changed} {recorded} was not overwritten. Give -o to write the new audio.")
    else:
        saved = result.save(arguments.output or recorded, subtype, item, arguments.overwrite)[0]
    print(f"{saved}: {changed or 'identical to the recorded file.'}")


def _may_write(path: Path, sha256: str, overwrite: bool) -> bool:
    return overwrite or not path.exists() or hash_file(path) == sha256


def _offer_prompts(arguments: argparse.Namespace) -> str:
    """Name prompts of the training set that the adapters of the command line carry."""
    from sa3train.adapters.formats.io import load_adapter

    prompts = [prompt for entry in parse_adapters(arguments) for prompt in load_adapter(entry["adapter"]).prompts]
    lines = "".join(f"\n  -p {format_command([prompt])}" for prompt in prompts[:OFFERED_PROMPTS])
    return f" Prompts that the adapter was trained with:{lines}" if lines else ""


def _read_prompts(arguments: argparse.Namespace) -> list[str]:
    if (arguments.prompt is None) == (arguments.prompt_file is None):
        offered = "" if arguments.prompt else _offer_prompts(arguments)
        raise GenerationError(f"give exactly one of -p TEXT, --prompt-file FILE and --from FILE.json.{offered}")
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
