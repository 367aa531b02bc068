"""`sa3-adapter card`: an adapter, its model card and audio examples as a folder for the Hugging Face hub."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3train.cli.parser import PromptAction
from sa3train.core.errors import AdapterError
from sa3train.core.files import check_target
from sa3train.core.user_files import find_name_problem

if TYPE_CHECKING:
    from sa3train.adapters.adapter import Adapter
    from sa3train.reports.card import Sample

EXAMPLES = 3
"""Audio examples that are generated where no prompts are given."""

DURATION, SEED, SUFFIX = 10.0, 0, ".flac"


def add_card_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of the command.

    Args:
        flags: Its parser.
    """
    add = flags.add_argument
    add("source", metavar="file", help="a run folder or adapter file")
    add("-o", "--output", dest="target", metavar="FOLDER", help="the folder to write (default: NAME-hub)")
    add("--name", help="name of the adapter (default: that of the run folder or file)")
    add("--license", help="your license for it, such as cc-by-4.0; without it the card says that none is stated")
    add("--strength", type=float, default=1.0, help="strength to recommend, and of the examples (default 1)")
    add("--no-prompts", action="store_true", help="leave prompts of the training set out of card and adapter")
    add("--model", help="generate audio examples with this model; without it, those of a run folder are taken")
    text = f"prompt of an example; repeatable (default: the first {EXAMPLES} that it carries)"
    add("-p", "--prompt", nargs="+", action=PromptAction, help=text)
    add("--duration", type=float, help=f"duration of the examples in seconds (default {DURATION:g})")
    add("--overwrite", action="store_true", help="replace such a folder, but never an input")


def write_card(arguments: argparse.Namespace) -> int:
    """Write the folder that the command line asks for, and print what is in it.

    Args:
        arguments: The parsed command line.

    Returns:
        0.

    Raises:
        AdapterError: If the name is none of a file, or a flag has no effect.
    """
    from sa3train.adapters.formats.io import load_adapter
    from sa3train.adapters.spec import is_finite_number
    from sa3train.reports.card import CardOptions, find_run, pack_card

    path = Path(arguments.source)
    run = find_run(path)
    name = arguments.name or (run.path.resolve().name if run else path.resolve().stem)
    if problem := find_name_problem(name):
        raise AdapterError(f"--name {name!r} names no file: {problem}. Choose one without slashes.")
    target = Path(arguments.target or f"{name}-hub")
    check_target(target, [path], arguments.overwrite)
    if not is_finite_number(arguments.strength):
        raise AdapterError(f"--strength {arguments.strength} is no number to play an adapter at. Give one such as 0.8.")
    if not arguments.model and (idle := [name for name in ("prompt", "duration") if getattr(arguments, name)]):
        raise AdapterError(f"--{idle[0]} has no effect without --model, which generates the audio examples.")
    adapter = load_adapter(path)
    options = CardOptions(name, arguments.license, arguments.strength, not arguments.no_prompts)
    samples = _generate_samples(arguments, adapter) if arguments.model else []
    pack_card(target, adapter, options, samples, run, arguments.overwrite)
    files = sorted(str(file.relative_to(target)) for file in target.rglob("*") if file.is_file())
    if arguments.json:
        print(json.dumps({"written": str(target), "files": files}, indent=2))
        return 0
    print(f"Wrote {target}: {', '.join(files)}")
    if len(files) == 2:
        print("  no audio examples: give --model NAME, or a run folder that has demos")
    if not arguments.license:
        print("  no license stated: give --license, such as cc-by-4.0, if others may use it")
    if adapter.prompts and not arguments.no_prompts:
        print(f"  it shows {len(adapter.prompts)} prompts of the training set; --no-prompts leaves them out")
    return 0


def _generate_samples(arguments: argparse.Namespace, adapter: "Adapter") -> "list[tuple[Sample, bytes]]":
    from sa3train.inference.generator import Generator
    from sa3train.reports.card import Sample

    carried: list[str] = [] if arguments.no_prompts else adapter.prompts[:EXAMPLES]
    prompts = arguments.prompt or carried
    if not prompts:
        raise AdapterError("The adapter carries no prompts to generate examples of. Give some: -p TEXT.")
    generator = Generator.from_pretrained(arguments.model)
    generator.load_adapter(arguments.source, strength=arguments.strength)
    result: Any = generator.generate(prompts, duration=arguments.duration or DURATION, seed=SEED)
    note = f"on {arguments.model}, seed {SEED}, strength {arguments.strength:g}"
    return [
        (Sample(f"{number}{SUFFIX}", prompt, note), result.encode_item(number - 1, SUFFIX))
        for number, prompt in enumerate(prompts, 1)
    ]
