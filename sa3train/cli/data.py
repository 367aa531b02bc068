"""`sa3-data`: look at audio before it is encoded, and at prompts and shards afterwards.

sa3-data audit SOURCE                  what is wrong with the files, and what to do about it
sa3-data preview SHARDS -n 20          what the model will be told
sa3-data preview --run RUN_DIR         what the model of a run was told
sa3-data inspect SHARDS --verify       what is in the shards, and whether they are whole
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sa3train.cli.hydra_app import run_job
from sa3train.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sa3train.data.loading.datamodule import LatentDataModule
    from sa3train.data.loading.prompts import PromptSettings
    from sa3train.data.shards.reader import LatentStore


def main(argv: list[str] | None = None) -> int:
    """The console command."""
    arguments = build_parser().parse_args(argv)
    return run_job(lambda: int(arguments.run(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="sa3-data", description="Look at audio, prompts and latent shards.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _audit_flags(commands.add_parser("audit", help="measure and judge every clip of a source"))
    _preview_flags(commands.add_parser("preview", help="print prompts as training will make them"))
    _inspect_flags(commands.add_parser("inspect", help="list, verify and play latent shards"))
    return top


def _audit_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("source", help="folder, audio file, metadata.jsonl or .csv, .tar, or a URL of one of these")
    flags.add_argument("--out", help="folder for audit.json and audit.html (default: audit-NAME here)")
    flags.add_argument("--model", help="model whose longest clip and longest caption count")
    flags.add_argument("--captions", choices=("required", "optional"), default="required")
    flags.add_argument("--threads", type=int, default=None, help="default: the number of cores, up to 8")
    flags.add_argument("-n", type=int, default=20, help="clips to list on the screen, the gravest first (default 20)")
    flags.set_defaults(run=audit)


def _preview_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("shards", nargs="?", help="folder or URL of latent shards")
    flags.add_argument("--run", dest="run_dir", metavar="RUN_DIR", help="shards and all settings of a training run")
    flags.add_argument("-n", type=int, default=20, help="how many clips (default 20)")
    flags.add_argument("--seed", type=int, default=0, help="the training run's seed: then these are its first clips")
    flags.add_argument("--batch-size", type=int, default=4, help="the training run's")
    flags.add_argument("--crop-seconds", type=float)
    flags.add_argument("--seconds", choices=("crop", "file"), default="crop")
    flags.add_argument("--template", action="append", default=[], metavar="TEXT[=WEIGHT]", help="repeatable")
    flags.add_argument("--trigger", default="")
    flags.add_argument("--trigger-probability", type=float, default=1.0)
    flags.add_argument("--trigger-position", choices=("front", "back"), default="front")
    flags.add_argument("--separator", default=",")
    flags.add_argument("--shuffle-tags", action="store_true")
    flags.add_argument("--tag-dropout", type=float, default=0.0)
    flags.add_argument("--keep-tags", type=int, default=0)
    flags.add_argument("--caption-dropout", type=float, default=0.0)
    flags.set_defaults(run=preview)


def _inspect_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("shards", help="folder or URL of latent shards")
    flags.add_argument("-n", type=int, default=10, help="clips to list (default 10)")
    flags.add_argument("--verify", action="store_true", help="check every byte against index.json, and the listings")
    flags.add_argument("--allow-damaged", action="store_true", help="leave damaged shards out instead of stopping")
    flags.add_argument("--play", action="append", default=[], metavar="KEY", help="decode a clip to a wav; repeatable")
    flags.add_argument("--out", default=".", help="folder for the wavs (default: here)")
    flags.add_argument("--model", help="model to decode with (default: the one the shards name)")
    flags.set_defaults(run=inspect)


def audit(arguments: argparse.Namespace) -> int:
    """Audit a source; the same rows as an encode makes, kept beside the report so that a second run only adds."""
    import os

    from sa3train.cli.encode import load_rules
    from sa3train.data.audit.audit import Rules
    from sa3train.data.audit.checks import worst
    from sa3train.data.audit.report import clip_line, write_audit
    from sa3train.data.encode.encode import audit_clips, list_clips
    from sa3train.data.encode.workers import Workers, claim, work_folder

    rules = load_rules(arguments.model, arguments.captions) if arguments.model else Rules(arguments.captions)
    folder = Path(arguments.out or f"audit-{Path(arguments.source.rstrip('/')).stem or 'source'}")
    threads = min(os.cpu_count() or 1, 8) if arguments.threads is None else arguments.threads
    if threads < 1:
        raise ConfigError(f"--threads is {threads}; give 1 or more.")
    listing = list_clips(arguments.source)
    with claim(folder, Workers()):
        index = audit_clips(listing, rules, work_folder(folder), Workers(), threads)
        summary = write_audit(folder, arguments.source, index.rows())
    grave = sorted((worst(row), number) for number, row in enumerate(index.rows()) if row["findings"])
    for _, number in grave[: arguments.n]:
        print(clip_line(index.row(number)))
    if len(grave) > arguments.n:
        print(f"… and {len(grave) - arguments.n} more clips with findings")
    print(("\n" if grave[: arguments.n] else "") + summary.table())
    print(f"\nreport: {folder / 'audit.html'}, all rows: {folder / 'audit.json'}")
    return 0


def preview(arguments: argparse.Namespace) -> int:
    """Print the prompts of the first clips that training would show."""
    from sa3train.data.loading.datamodule import LatentDataModule

    if arguments.run_dir is not None:
        data = data_of_run(arguments)
    elif arguments.shards is None:
        raise ConfigError("name a folder of latent shards, or a training run: --run RUN_DIR.")
    else:
        data = LatentDataModule(
            arguments.shards,
            arguments.batch_size,
            crop_seconds=arguments.crop_seconds,
            seconds=arguments.seconds,
            prompts=prompt_settings(arguments),
            seed=arguments.seed,
        )
    loader = data.train_dataloader()
    shown = window = 0
    while shown < arguments.n:
        for row in (row for batch in loader.planner.plan(window).batches for row in batch):
            for clip in map(loader.dataset.clip, row[: arguments.n - shown]):
                told = f"{clip['seconds_total']:.0f} s"
                print(f"{clip['key']}  [{told}]  {clip['prompt'] or '(empty prompt)'}")
                shown += 1
        window += 1
    prompts = data.distinct_prompts()
    count = "more than can be listed" if prompts is None else str(len(prompts))
    print(f"\n{sum(map(len, data.train_clips))} training clips, distinct prompts: {count}")
    return 0


def data_of_run(arguments: argparse.Namespace) -> "LatentDataModule":
    """The data of a training run, as it is set there. Raises `ConfigError` for other flags, and where there is none."""
    from sa3train.cli.train_config import TrainConfig
    from sa3train.cli.train_setup import data_module
    from sa3train.core.config import build
    from sa3train.reports.run_files import CONFIG, load_settings

    unset = vars(build_parser().parse_args(["preview"]))
    idle = [name for name, value in vars(arguments).items() if name not in ("run_dir", "n") and value != unset[name]]
    if idle:
        names = ", ".join(name.replace("_", "-") for name in idle)
        raise ConfigError(f"{names} would do nothing with --run, which takes every setting from the run.")
    path = Path(arguments.run_dir) / CONFIG
    if not path.is_file():
        raise ConfigError(f"{arguments.run_dir} holds no training run: there is no {path}.")
    config = build(TrainConfig, load_settings(path))
    return data_module(config.data, config.seed)


def prompt_settings(arguments: argparse.Namespace) -> "PromptSettings":
    """Prompt settings from flags. A template may end in `=WEIGHT`."""
    from sa3train.data.loading.prompts import PromptSettings, Template

    templates = []
    for given in arguments.template or ["{caption}"]:
        text, equals, weight = given.rpartition("=")
        try:
            templates.append(Template(text, float(weight)) if equals else Template(given))
        except ValueError:
            templates.append(Template(given))
    names = ("trigger", "trigger_probability", "trigger_position", "separator")
    more = ("shuffle_tags", "tag_dropout", "keep_tags", "caption_dropout")
    return PromptSettings(tuple(templates), **{name: getattr(arguments, name) for name in (*names, *more)})


def inspect(arguments: argparse.Namespace) -> int:
    """List what shards hold; verify them and decode clips when asked. Exit code 1 when any is damaged."""
    from sa3train.data.shards.reader import LatentStore

    verify = "none" if arguments.verify else "size"  # with --verify every fault is named below, not only the first
    store = LatentStore(arguments.shards, verify=verify, allow_damaged=arguments.allow_damaged or arguments.verify)
    index, model = store.index, store.index["model"]
    print(f"{arguments.shards}: {index['clips']:.0f} takes, {index['seconds']:.1f} s, autoencoder of '{model['name']}'")
    print(f"manifest {index['manifest']}")
    for shard in index["shards"]:
        left_out = "  damaged, left out" if shard["file"] in store.damaged else ""
        size = f"{shard['seconds']:.1f} s  {shard['bytes'] / 1e6:.1f} MB"
        print(f"  {shard['file']}  {shard['clips']} takes  {size}{left_out}")
    for row, record in store.records():
        if row >= arguments.n:
            break
        print(f"  {record['key']}  {record['split']}  {record['seconds']:.2f} s  {record['caption']}")
    damaged = dict(store.damaged)
    if arguments.verify:
        damaged |= store.verify_shards()
        for name, fault in damaged.items():
            print(f"damaged: {name} {fault}", file=sys.stderr)
        print(f"{len(damaged)} damaged file(s): delete and encode again" if damaged else "everything is whole")
    if arguments.play:
        _play(store, arguments.play, Path(arguments.out), arguments.model)
    return 1 if damaged and not arguments.allow_damaged else 0


def _play(store: "LatentStore", keys: list[str], folder: Path, model: str | None) -> None:
    import torch

    from sa3train.audio.io import write_audio
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
        latent_CT, record = store.read(rows[key])
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            audio_BCN = autoencoder.decode(torch.from_numpy(latent_CT).float()[None], generator=generator)
        samples = round(float(record["seconds"]) * autoencoder.sample_rate)
        write_audio(folder / f"{key}.wav", audio_BCN[0, :, :samples], autoencoder.sample_rate)
        print(folder / f"{key}.wav")


if __name__ == "__main__":
    sys.exit(main())
