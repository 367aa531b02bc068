"""`sa3-data`: check audio before it is encoded, and prompts and shards afterwards.

sa3-data audit SOURCE                  what is wrong with the files, and what to do about it
sa3-data caption FOLDER                captions for clips that have none, from tags, names and sound; --undo
sa3-data preview SHARDS -n 20          prompts as training will build them
sa3-data preview --run RUN_DIR         prompts as a run has built them
sa3-data inspect SHARDS --verify       what is in the shards, and whether they are intact
"""

import argparse
import dataclasses
import itertools
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3train.cli.hydra_app import run_job
from sa3train.cli.parser import CommandParser
from sa3train.cli.version import add_version
from sa3train.core.config import list_settings
from sa3train.core.errors import ConfigError, DataError
from sa3train.core.files import check_exists, relate_path
from sa3train.core.log import write_json_line, write_json_progress
from sa3train.core.text import format_command
from sa3train.data.captioning.template import CAPTION_VALUES, DEFAULT_TEMPLATE
from sa3train.data.encode.settings import EncodeSettings
from sa3train.data.loading.prompts import PromptSettings, Template
from sa3train.data.loading.settings import DataSettings

if TYPE_CHECKING:
    from sa3train.data.loading.datamodule import LatentDataModule
    from sa3train.data.shards.reader import LatentStore


def main(argv: list[str] | None = None) -> int:
    """Run the console command.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        The exit code.
    """
    arguments = build_parser().parse_args(argv)
    return run_job(lambda: int(arguments.run(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line.

    Returns:
        The parser; `run` of its result is the function of the subcommand.
    """
    top = CommandParser(prog="sa3-data", description="Check audio, prompts and latent shards.")
    add_version(top)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_audit_flags(commands.add_parser("audit", help="measure and check every clip of a source"))
    _add_caption_flags(commands.add_parser("caption", help="caption the clips of a folder that have no caption"))
    _add_preview_flags(commands.add_parser("preview", help="print prompts as training will build them"))
    _add_inspect_flags(commands.add_parser("inspect", help="list, verify and play latent shards"))
    return top


def _add_audit_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("source", help="folder, audio file, metadata.jsonl or .csv, .tar, or a URL of one of these")
    flags.add_argument(
        "--out",
        help="folder for audit.json and audit.html, which replace earlier ones (default: audit-NAME "
        "here, or beside the source when this is the source)",
    )
    flags.add_argument("--model", help="model whose longest audio and longest caption are the limits")
    captions = list_settings(EncodeSettings)["captions"]
    flags.add_argument("--captions", choices=captions.choices, default="required", help=captions.help)
    text = "show what remains for an encode with fixes=…: findings that these mend become notes (comma-separated)"
    flags.add_argument("--fixes", type=_parse_fixes, default=(), metavar="A,B", help=text)
    flags.add_argument("--allow-promotional", action="store_true", help="use tags that read like an advertisement")
    flags.add_argument("--threads", type=int, help="default: the number of cores, up to 8")
    flags.add_argument("-n", type=int, default=20, help="number of clips to list, worst first (default: 20)")
    flags.add_argument("--progress-json", action="store_true", help="JSON lines on stdout; the last has the result")
    flags.set_defaults(run=run_audit_command)


def _parse_fixes(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    try:
        return EncodeSettings(fixes=names).fixes
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _add_caption_flags(flags: argparse.ArgumentParser) -> None:
    fields = ", ".join(f"{{{name}}}" for name in CAPTION_VALUES)
    flags.add_argument("folder", help="folder of audio, beside which captions are written; existing ones stay")
    flags.add_argument(
        "--template",
        default=DEFAULT_TEMPLATE,
        help=f"how captions are composed (default: %(default)r), of {fields}; what stands between commas is dropped "
        "where none of its fields has a value",
    )
    flags.add_argument("--captioner", metavar="MODEL", help="audio-text model for {description}: hub name or folder")
    flags.add_argument("--dry-run", action="store_true", help="print captions, write nothing")
    flags.add_argument("--undo", action="store_true", help="take back the last captions that were written")
    flags.add_argument("--threads", type=int, help="default: the number of cores, up to 8")
    flags.add_argument("-n", type=int, default=20, help="number of captions to print (default: 20)")
    flags.add_argument("--progress-json", action="store_true", help="JSON lines on stdout; the last has the result")
    flags.set_defaults(run=run_caption_command)


def _add_preview_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("shards", nargs="?", help="folder or URL of latent shards")
    flags.add_argument("--run", dest="run_dir", metavar="RUN_DIR", help="settings and shards of a training run")
    flags.add_argument("-n", type=int, default=20, help="number of clips (default: 20)")
    flags.add_argument("--seed", type=int, default=0, help="the training run's seed: then these are its first clips")
    flags.add_argument("--batch-size", type=int, default=4, help="the training run's")
    data = list_settings(DataSettings)
    flags.add_argument("--crop-seconds", type=float, help="the training run's (default: whole clips)")
    flags.add_argument("--seconds", choices=data["seconds"].choices, default="crop", help=data["seconds"].help)
    flags.add_argument("--template", action="append", default=[], metavar="TEXT[=WEIGHT]", help="repeatable")
    for name, declared in list_settings(PromptSettings).items():
        default = getattr(PromptSettings(), name)
        flag = f"--{name.replace('_', '-')}"
        if isinstance(default, bool):
            flags.add_argument(flag, action="store_true", help=declared.help)
        elif name != "templates":
            choices = declared.choices or None
            flags.add_argument(flag, type=type(default), default=default, choices=choices, help=declared.help)
    flags.set_defaults(run=run_preview_command)


def _add_inspect_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("shards", help="folder or URL of latent shards")
    flags.add_argument("-n", type=int, default=10, help="number of clips to list (default: 10)")
    flags.add_argument("--verify", action="store_true", help="check every byte against index.json, and the listings")
    flags.add_argument("--allow-damaged", action="store_true", help="leave damaged shards out instead of failing")
    flags.add_argument("--play", action="append", default=[], metavar="KEY", help="decode a clip to a wav; repeatable")
    flags.add_argument("--out", default=".", help="folder for the wavs (default: .); existing ones stay, KEY-2.wav")
    flags.add_argument("--model", help="model to decode with (default: the one named in the shards)")
    flags.set_defaults(run=run_inspect_command)


def run_audit_command(arguments: argparse.Namespace) -> int:
    """Run `audit`: audit a source as an encode does; a second run only adds what is new.

    Args:
        arguments: Parsed flags.

    Returns:
        The exit code.
    """
    check_exists(arguments.source, "a folder of audio, a caption list, a .tar, or a URL of one")
    from sa3train.cli.encode import load_rules
    from sa3train.data.audit.audit import AuditRules
    from sa3train.data.audit.checks import FINDING_TYPES, rank_clip
    from sa3train.data.audit.report import format_clip, write_audit_report
    from sa3train.data.encode.encode import audit_clips, list_clips
    from sa3train.data.encode.workers import Workers, get_work_dir, lock_output_dir

    chosen = arguments.captions, arguments.allow_promotional
    rules = load_rules(arguments.model, *chosen) if arguments.model else AuditRules(*chosen)
    folder = Path(arguments.out or choose_audit_folder(arguments.source))
    threads = EncodeSettings(threads=arguments.threads).count_threads()
    listing = list_clips(arguments.source)
    with write_json_progress(arguments.progress_json), lock_output_dir(folder, Workers()):
        index = audit_clips(listing, rules, get_work_dir(folder), Workers(), threads)
        applied = [f"fixes={name}" for name in arguments.fixes]
        summary = write_audit_report(folder, arguments.source, index.iterate_rows(), applied)
    if arguments.progress_json:
        write_json_line(result={"out": str(folder), **summary.as_json()})
        return 0

    def keep_remaining(row: dict[str, Any]) -> dict[str, Any]:
        kinds = [(finding, FINDING_TYPES[finding["code"]]) for finding in row["findings"]]
        return row | {"findings": [finding for finding, kind in kinds if kind.after(applied) is kind]}

    remaining = enumerate(map(keep_remaining, index.iterate_rows()))
    ranked = sorted((rank_clip(row), number) for number, row in remaining if row["findings"])
    for _, number in ranked[: arguments.n]:
        print(format_clip(keep_remaining(index.row(number))))
    if len(ranked) > arguments.n:
        print(f"… and {len(ranked) - arguments.n} more clips with findings")
    print(("\n" if ranked[: arguments.n] else "") + summary.format_table())
    allowed = EncodeSettings().max_rejected
    if summary.rejected > allowed * summary.clips:
        print(
            f"\nsa3-encode would stop here: more than max_rejected={allowed:g} of the clips are rejected. Fix them, or "
            "encode with a higher max_rejected."
        )
    fixes = {kind.fix.partition("encode with fixes=")[2] for _, _, kind in summary.sort_findings()} - {""}
    if fixes:
        print(f"\n--fixes {','.join([*arguments.fixes, *sorted(fixes)])} shows what an encode with these fixes leaves.")
    print(f"\nreport: {folder / 'audit.html'}, all clips: {folder / 'audit.json'}")
    return 0


def choose_audit_folder(source: str) -> str:
    """Choose the folder for the files of an audit: below the working directory, but never inside the source.

    Args:
        source: Folder, file or URL.

    Returns:
        The folder.
    """
    root = Path(source).resolve()
    if "://" not in source and Path.cwd().is_relative_to(root):
        return relate_path(root.with_name(f"audit-{root.name or 'source'}"))
    return f"audit-{Path(source.rstrip('/')).stem}"


def run_caption_command(arguments: argparse.Namespace) -> int:
    """Run `caption`: caption the clips of a folder that have no caption, or undo that.

    Args:
        arguments: Parsed flags.

    Returns:
        The exit code.

    Raises:
        ConfigError: When other flags are set beside `--undo`.
    """
    from sa3train.data.captioning.captioner import Captioner
    from sa3train.data.captioning.files import undo_save
    from sa3train.data.captioning.service import caption_folder, describe_proposals

    if arguments.undo:
        unset = vars(build_parser().parse_args(["caption", arguments.folder, "--undo"]))
        if ignored := [name for name, value in vars(arguments).items() if value != unset[name]]:
            raise ConfigError(f"{', '.join(ignored)} has no effect with --undo.")
        print(undo_save(arguments.folder).describe(arguments.folder))
        return 0
    captioner = Captioner.load(arguments.captioner) if arguments.captioner else None
    threads = EncodeSettings(threads=arguments.threads).count_threads()
    with write_json_progress(arguments.progress_json):
        done = caption_folder(arguments.folder, arguments.template, captioner, threads, arguments.dry_run)
    if arguments.progress_json:
        write_json_line(result={"written": len(done.changes), "kept": done.kept, "captions": done.list_captions()})
        return 0
    composed = [one for one in done.proposals if not one.problem]
    for one in composed[: arguments.n]:
        print(f"{one.source}: {one.composed.caption}  [{one.composed.describe()}]")
    if len(composed) > arguments.n:
        print(f"… and {len(composed) - arguments.n} more")
    print(describe_proposals(done))
    if done.changes:
        undo = format_command(["sa3-data", "caption", arguments.folder, "--undo"])
        print(f"files written: {len(done.changes)}; to undo: {undo}")
    return 0


def run_preview_command(arguments: argparse.Namespace) -> int:
    """Run `preview`: print the prompts of the first clips that training loads.

    Args:
        arguments: Parsed flags.

    Returns:
        The exit code.

    Raises:
        ConfigError: When neither shards nor a run are given.
    """
    if arguments.run_dir is None and arguments.shards is not None:
        check_exists(arguments.shards, "a folder of latent shards, or a URL of one")
    from sa3train.data.loading.datamodule import LatentDataModule

    if arguments.run_dir is not None:
        data = load_run_data(arguments)
    elif arguments.shards is None:
        raise ConfigError("name a folder of latent shards, or a training run: --run RUN_DIR.")
    else:
        settings = DataSettings(
            arguments.shards,
            batch_size=arguments.batch_size,
            crop_seconds=arguments.crop_seconds,
            seconds=arguments.seconds,
            num_workers=0,
            prompts=build_prompt_settings(arguments),
        )
        data = LatentDataModule(settings, seed=arguments.seed)
    with closing(data.train_dataloader()) as loader:
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        clips = (
            clip
            for batch in batches
            for clip in zip(batch["keys"], batch["seconds_total_S"].tolist(), batch["prompts"], strict=True)
        )
        for key, seconds, prompt in itertools.islice(clips, arguments.n):
            print(f"{key}  [{seconds:.0f} s]  {prompt or '(empty prompt)'}")
    prompts = data.list_prompts()
    count = "too many to list" if prompts is None else str(len(prompts))
    print(f"\n{sum(map(len, data.train_clips))} training clips; with the held-out ones, distinct prompts: {count}")
    return 0


def load_run_data(arguments: argparse.Namespace) -> "LatentDataModule":
    """Load the data of a training run with the run's settings.

    Args:
        arguments: Parsed flags of `preview`.

    Returns:
        The data.

    Raises:
        ConfigError: When other flags are set, or there is no run.
        DataError: When its shards are gone.
    """
    from sa3train.cli.train_config import TrainConfig
    from sa3train.cli.train_setup import locate_inputs, make_data_module
    from sa3train.core.config import build
    from sa3train.reports.run_files import CONFIG_FILE, RECORD_FILE, holds_run, load_settings

    unset = vars(build_parser().parse_args(["preview"]))
    free = {"run_dir", "shards", "n"}
    ignored = [name for name, value in vars(arguments).items() if name not in free and value != unset[name]]
    if ignored:
        names = ", ".join(name.replace("_", "-") for name in ignored)
        raise ConfigError(f"{names} has no effect with --run, which uses every setting of the run.")
    run_dir = Path(arguments.run_dir)
    if not holds_run(run_dir):
        raise ConfigError(f"{run_dir} is not a training run: it has no {CONFIG_FILE} and {RECORD_FILE}.")
    config = build(TrainConfig, load_settings(run_dir / CONFIG_FILE))
    if arguments.shards is not None:
        check_exists(arguments.shards, "a folder or URL of latent shards")
        # paths of the run are relative to where it started
        shards = arguments.shards if "://" in arguments.shards else str(Path(arguments.shards).absolute())
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=shards))
    try:
        config = locate_inputs(config, run_dir)
    except DataError as error:
        raise DataError(str(error).replace("set data=FOLDER", "give its folder before --run")) from error
    return make_data_module(dataclasses.replace(config.data, num_workers=0), config.seed)


def build_prompt_settings(arguments: argparse.Namespace) -> PromptSettings:
    """Build prompt settings from flags.

    Args:
        arguments: Parsed flags of `preview`; a template may end in `=WEIGHT`.

    Returns:
        The settings.
    """
    names = [field.name for field in dataclasses.fields(PromptSettings) if field.name != "templates"]
    values = {name: getattr(arguments, name) for name in names}
    return PromptSettings(tuple(map(Template.parse, arguments.template or ["{caption}"])), **values)


def run_inspect_command(arguments: argparse.Namespace) -> int:
    """Run `inspect`: list what shards contain; verify them and decode clips when asked.

    Args:
        arguments: Parsed flags.

    Returns:
        The exit code: 1 when any shard is damaged.
    """
    from sa3train.data.shards.reader import LatentStore

    verify = "none" if arguments.verify else "size"  # with --verify every fault is listed below, not only the first
    store = LatentStore(arguments.shards, verify=verify, allow_damaged=arguments.allow_damaged or arguments.verify)
    index, model = store.index, store.index["model"]
    print(
        f"{arguments.shards}: {index['clips']:.0f} latents, {index['seconds']:.1f} s, autoencoder of '{model['name']}'"
    )
    print(f"manifest {index['manifest']}")
    for shard in index["shards"]:
        left_out = "  damaged, left out" if shard["file"] in store.damaged else ""
        size = f"{shard['seconds']:.1f} s  {shard['bytes'] / 1e6:.1f} MB"
        print(f"  {shard['file']}  {shard['clips']} latents  {size}{left_out}")
    for _, (_, record) in zip(range(arguments.n), store.iterate_records(), strict=False):
        print(f"  {record['key']}  {record.get('split', '-')}  {record['seconds']:.2f} s  {record.get('caption', '')}")
    damaged = dict(store.damaged)
    if arguments.verify:
        damaged |= store.verify_shards()
        for name, fault in damaged.items():
            print(f"damaged: {name} {fault}", file=sys.stderr)
        print(f"{len(damaged)} damaged file(s): delete them and encode again" if damaged else "verified")
    if arguments.play:
        _play(store, arguments.play, Path(arguments.out), arguments.model)
    return 1 if damaged and not arguments.allow_damaged else 0


def _play(store: "LatentStore", keys: list[str], folder: Path, model: str | None) -> None:
    import torch

    from sa3train.audio.io import encode_audio
    from sa3train.core.files import write_new
    from sa3train.data.shards.index import check_autoencoder
    from sa3train.models.checkpoint import load_autoencoder

    rows = {key: row for row, key in enumerate(store.keys)}
    unknown = [key for key in keys if key not in rows]
    if unknown:
        raise DataError(f"no clip {', '.join(unknown)} in {store.path}; list keys with: sa3-data inspect DIR -n 1000")
    name = model or store.index["model"]["name"]
    autoencoder = load_autoencoder(name)
    check_autoencoder(store.index, name, autoencoder.fingerprint(), store.path)
    for key in keys:
        latents_CF, record = store.read(rows[key])
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            audio_BCN = autoencoder.decode(torch.from_numpy(latents_CF).float()[None], generator=generator)
        samples = round(float(record["seconds"]) * autoencoder.sample_rate)
        content = encode_audio(audio_BCN[0, :, :samples], autoencoder.sample_rate)
        print(write_new(folder / f"{key}.wav", content))


if __name__ == "__main__":
    sys.exit(main())
