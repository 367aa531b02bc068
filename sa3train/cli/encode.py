"""`sa3-encode`: encode a folder of audio into latent shards. The configuration is `conf/encode.yaml`.

Several processes: `torchrun --standalone --nproc_per_node N -m sa3train.cli.encode …`, or `accelerate launch -m
sa3train.cli.encode …`.
"""

import dataclasses
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sa3train.cli.hydra_app import run_hydra_job
from sa3train.core.config import DEVICES, setting
from sa3train.core.files import check_exists
from sa3train.core.log import get_logger, get_rank, report_stage, write_json_line, write_json_progress
from sa3train.core.signals import Interrupted
from sa3train.data.captioning.template import DEFAULT_TEMPLATE
from sa3train.data.encode.settings import EncodeSettings
from sa3train.models.hub import check_checkpoint, choose_weights

if TYPE_CHECKING:
    from sa3train.data.audit.audit import AuditRules
    from sa3train.data.encode.encode import EncodeResult
    from sa3train.data.encode.encoder import Encoder
    from sa3train.data.encode.workers import Workers

_logger = get_logger(__name__)
_LISTS = ("fixes", "augmentations")
_SHORTHAND = {"model": "model.name", "weights": "model.weights"}
_PATHS = ("source", "out", "reuse", "caption_template")  # taken as written


@dataclasses.dataclass(frozen=True)
class EncodeModel:
    """Whose autoencoder to use."""

    name: str = setting(help="Name or folder of a model, or of an autoencoder.", text="path")
    weights: Literal["released", "mlx"] = setting(help="Files of a named model: released, or its open fp16 packs.")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = setting(help="Precision it runs in; auto is fp32.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeConfig(EncodeSettings):
    """Every setting of `sa3-encode`."""

    source: str = setting(
        help="Folder of any depth, audio file, metadata.jsonl or .csv, WebDataset .tar, or a URL of one of these; or a "
        "folder of latents (.npy and .json) of the released pre-encoder or Underfit.",
        text="path",
    )
    out: str = setting(
        help="Folder for the shards, which are no part of the source even below it. Running again with the same folder "
        "resumes, and updates what has changed.",
        text="path",
    )
    model: EncodeModel
    device: str = setting("auto", help=f"auto (the best that works), {DEVICES}.", text="filled")
    chunked: bool = setting(
        True,
        help="Encode clips over 11.9 s in chunks, as released models do when they generate; false: whole, however "
        "long.",
    )
    progress: Literal["bar", "json"] = setting(
        "bar", help="Progress: a bar in terminals, or JSON lines on stdout with the result in the last."
    )


def main(argv: list[str] | None = None) -> int:
    """Run the console command.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        The exit code.
    """
    return run_hydra_job("encode", EncodeConfig, encode, shorthand=_SHORTHAND, paths=_PATHS, lists=_LISTS, argv=argv)


def encode(config: EncodeConfig) -> int:
    """Encode a source and print the result.

    Args:
        config: All settings.

    Returns:
        The exit code.
    """
    with write_json_progress(config.progress == "json"):
        source = choose_weights(config.model.name, config.model.weights)
        check_checkpoint(source)  # before anything heavy is imported
        check_exists(config.source, "a folder of audio, a caption list, a .tar, or a URL of one")
        from sa3train.data.encode.encode import encode_dataset
        from sa3train.data.encode.plan import list_encoded_keys

        workers = join_workers()
        with report_stage(f"loading {source}"):
            encoder = load_encoder(source, config.model.dtype, config.device, config.chunked)
        rules = load_rules(source, config.captions, config.allow_promotional, config.caption_template)
        try:
            result = encode_dataset(config.source, config.out, encoder, config, rules, workers)
        except Interrupted:
            done = len(list_encoded_keys(Path(config.out)))
            _logger.warning("%s: %d latents are encoded. Run the same command to continue.", config.out, done)
            raise
    if config.progress == "json":
        write_json_line(result=summarize_result(result))
    elif get_rank() == 0:
        print_result(result, workers.world_size)
    return 0


def join_workers() -> "Workers":
    """Join the processes that torchrun or accelerate started.

    Returns:
        This process among them.
    """
    from sa3train.data.encode.workers import Workers

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Workers()
    from datetime import timedelta

    from accelerate import PartialState

    # On the CPU even where there are GPUs: processes only wait for one another, and may have to wait for days.
    state = PartialState(cpu=True, timeout=timedelta(days=7))
    return Workers(state.process_index, state.num_processes, state.wait_for_everyone)


def load_encoder(name: str, dtype: str, device: str, chunked: bool = True) -> "Encoder":
    """Load the autoencoder of a model, or an autoencoder alone.

    Args:
        name: Name or folder.
        dtype: "auto" (fp32), "fp32", "bf16", or "fp16", which is used only where it is accurate enough.
        device: Name of a device, or "auto".
        chunked: Encode long clips in chunks.

    Returns:
        The encoder on its device.
    """
    import torch

    from sa3train.core.device import choose_device
    from sa3train.core.device_errors import explain_device_errors
    from sa3train.data.encode.encoder import Encoder
    from sa3train.models.checkpoint import load_autoencoder
    from sa3train.models.fp16_check import convert_autoencoder_to_fp16

    chosen = choose_device(device)
    with explain_device_errors(chosen, f"loading the autoencoder of {name}", ["model.dtype=bf16", "another device"]):
        if dtype == "fp16":
            autoencoder = load_autoencoder(name)  # on the CPU: the check moves it
            convert_autoencoder_to_fp16(autoencoder, chosen)
        else:
            autoencoder = load_autoencoder(name, chosen, torch.bfloat16 if dtype == "bf16" else torch.float32)
    return Encoder(autoencoder, name, chunked)


def load_rules(
    name: str, captions: str, allow_promotional: bool = False, template: str = DEFAULT_TEMPLATE
) -> "AuditRules":
    """Load what the audit needs to know of a model.

    Args:
        name: Name or folder of a model; an autoencoder alone limits neither captions nor length.
        captions: "required", "optional" or "auto".
        allow_promotional: Use tags inside audio files that read like an advertisement or a web address.
        template: How captions are composed.

    Returns:
        Rules for the audit.
    """
    from sa3train.data.audit.audit import AuditRules
    from sa3train.models.checkpoint import load_checkpoint, read_model_config
    from sa3train.models.hub import locate_checkpoint
    from sa3train.models.parse import is_autoencoder

    if is_autoencoder(read_model_config(locate_checkpoint(name))):
        return AuditRules(captions, allow_promotional, template=template)
    model = load_checkpoint(name, parts=("conditioner",))
    return AuditRules(
        captions,
        allow_promotional,
        longest_seconds=model.max_frames * model.downsampling_ratio / model.sample_rate,
        count_tokens=lock_calls(model.conditioner.count_tokens),
        max_tokens=model.conditioner.max_length,
        template=template,
    )


def lock_calls(function: Callable[[Sequence[str]], list[int]]) -> Callable[[Sequence[str]], list[int]]:
    """Put a function behind a lock: fast tokenizers must not be called by two threads at once.

    Args:
        function: Counts the tokens of texts.

    Returns:
        The same function, for several threads.
    """
    lock = threading.Lock()

    def call(texts: Sequence[str]) -> list[int]:
        with lock:
            return function(texts)

    return call


def summarize_result(result: "EncodeResult") -> dict[str, Any]:
    """Summarize a result for JSON.

    Args:
        result: What was encoded; the fields of the whole set are empty on other than the main process.

    Returns:
        Counts of the whole set, and of what this process did.
    """
    index = result.index
    whole = {name: index.get(name) for name in ("clips", "seconds", "rejected", "dropped_duplicates", "splits")}
    own = {name: getattr(result, name) for name in ("encoded", "reused", "padding", "elapsed")}
    return {"out": str(result.folder), **whole, "shards": len(index.get("shards", ())), **own}


def print_result(result: "EncodeResult", world_size: int = 1) -> None:
    """Print what was audited and encoded.

    Args:
        result: What was encoded.
        world_size: Number of processes.
    """
    index = result.index
    if result.audit is not None:
        is_new = result.audited or result.encoded or result.reused
        seen = f"{result.audit.source}: {result.audit.count_clips()}, audited before: {result.folder / 'audit.html'}"
        print(result.audit.format_table() if is_new else seen)
    named = {"train": "for training", "heldout": "held out"}.items()
    splits = ", ".join(f"{index['splits'][key]['clips']:.0f} {name}" for key, name in named if key in index["splits"])
    print(f"\n{result.folder}: {index['clips']:.0f} latents ({splits}), {index['seconds']:.1f} s of audio, ", end="")
    dropped = f", {count} dropped as duplicates" if (count := index["dropped_duplicates"]) else ""
    print(f"{len(index['shards'])} shard(s), {index['rejected']} rejected{dropped}")
    share = "" if world_size == 1 else " by this process"
    if result.encoded:
        speed = result.seconds / max(result.elapsed, 1e-9)
        print(f"encoded{share}: {result.encoded} at {speed:.1f} × real time, {result.padding:.1%} padding", end="")
        print(f", {result.reused} reused" if result.reused else "")
    else:
        print(f"encoded{share}: 0, " + (f"{result.reused} reused" if result.reused else "all cached"))


if __name__ == "__main__":
    sys.exit(main())
