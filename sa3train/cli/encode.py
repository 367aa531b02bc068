"""`sa3-encode`: a folder of audio to latent shards. The configuration is `conf/encode.yaml`.

Several processes: `torchrun --standalone --nproc_per_node N -m sa3train.cli.encode …`, or `accelerate launch -m
sa3train.cli.encode …`.
"""

import dataclasses
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from sa3train.cli.hydra_app import hydra_job
from sa3train.core.errors import ConfigError
from sa3train.core.log import rank

if TYPE_CHECKING:
    import torch

    from sa3train.data.audit.audit import Rules
    from sa3train.data.encode.encode import EncodeReport
    from sa3train.data.encode.encoder import Encoder
    from sa3train.data.encode.workers import Workers

LISTS = ("fix", "views")
PATHS = ("source", "out", "reuse")


@dataclasses.dataclass(frozen=True)
class EncodeModel:
    """Whose autoencoder, and in which precision it runs; auto is fp32."""

    name: str
    dtype: Literal["auto", "fp32", "bf16", "fp16"]


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """Everything `sa3-encode` can be told."""

    source: str
    out: str
    model: EncodeModel
    device: str
    fix: list[str]
    views: list[str]
    split: float | str
    duplicates: Literal["keep", "drop"]
    captions: Literal["required", "optional"]
    max_rejected: float
    chunked: bool
    batch_seconds: float | None
    shard_mb: int
    threads: int | None
    reuse: str | None
    overwrite: bool


def main(argv: list[str] | None = None) -> int:
    """The console command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not {"-m", "--multirun"}.intersection(arguments):
        arguments = [without_sweep(argument) for argument in arguments]
    return hydra_job(
        "encode",
        EncodeConfig,
        encode,
        shorthand={"model": "model.name"},
        paths=PATHS,
        argv=arguments,
    )


def without_sweep(argument: str) -> str:
    """What Hydra would take for a sweep as it is meant: `fix=a,b` is a list, a path may contain commas."""
    key, _, value = argument.partition("=")
    if key in LISTS and value and not value.startswith("["):
        return f"{key}=[{value}]"
    if key in PATHS and "," in value and value[0] not in "\"'":
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'{key}="{escaped}"'
    return argument


def encode(config: EncodeConfig) -> int:
    """Encode as `config` says; prints what was found and made."""
    from sa3train.data.encode.encode import encode_source
    from sa3train.data.encode.plan import EncodeSettings

    settings = EncodeSettings(
        fix=tuple(config.fix),
        views=tuple(config.views),
        split=config.split,
        duplicates=config.duplicates,
        captions=config.captions,
        max_rejected=config.max_rejected,
        batch_seconds=config.batch_seconds,
        reuse=config.reuse,
        overwrite=config.overwrite,
        shard_bytes=config.shard_mb * 1_000_000,
        threads=min(os.cpu_count() or 1, 8) if config.threads is None else config.threads,
    )
    workers = join_workers()
    encoder = load_encoder(config.model.name, config.model.dtype, config.device, config.chunked)
    rules = load_rules(config.model.name, config.captions)
    report = encode_source(config.source, config.out, encoder, settings, rules, workers)
    if rank() == 0:
        print_report(report, workers.world)
    return 0


def join_workers() -> "Workers":
    """This process among those that torchrun or accelerate started."""
    from sa3train.data.encode.workers import Workers

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Workers()
    from datetime import timedelta

    from accelerate import PartialState

    # On the CPU even where there are GPUs: processes only wait for one another, and may have to wait for days.
    state = PartialState(cpu=True, timeout=timedelta(days=7))
    return Workers(state.process_index, state.num_processes, state.wait_for_everyone)


def load_encoder(name: str, dtype: str, device: str, chunked: bool = True) -> "Encoder":
    """The autoencoder of a model, or a SAME alone, on its device; in fp16 only if it is good enough in it."""
    import torch

    from sa3train.core.device import memory_named
    from sa3train.data.encode.encoder import Encoder
    from sa3train.models.checkpoint import load_autoencoder
    from sa3train.models.fp16_check import settle_autoencoder

    place = torch_device(device)
    with memory_named(place, f"loading the autoencoder of {name}", ["model.dtype=bf16", "another device"]):
        if dtype == "fp16":
            autoencoder = load_autoencoder(name)  # on the CPU: it comes to its place when it is tried
            settle_autoencoder(autoencoder, place)
        else:
            autoencoder = load_autoencoder(name, place, torch.bfloat16 if dtype == "bf16" else torch.float32)
    return Encoder(autoencoder, name, chunked)


def load_rules(name: str, captions: str) -> "Rules":
    """What the audit has to know of a model; a SAME alone limits neither captions nor length."""
    from sa3train.data.audit.audit import Rules
    from sa3train.models.checkpoint import load_checkpoint

    if only_autoencoder(name):
        return Rules(captions)
    model = load_checkpoint(name, parts=("conditioner",))
    return Rules(
        captions,
        longest_seconds=model.max_frames * model.downsampling_ratio / model.sample_rate,
        count_tokens=one_at_a_time(model.conditioner.token_counts),
        max_tokens=model.conditioner.max_length,
    )


def only_autoencoder(name: str) -> bool:
    """Whether `name` is a SAME alone, which reads no captions."""
    from sa3train.models.hub import locate
    from sa3train.models.parse import is_autoencoder, read_config

    return is_autoencoder(read_config(locate(name).config))


def torch_device(name: str) -> "torch.device":
    """`auto`, `cpu`, `cuda` or `cuda:N`; several processes on one machine take a GPU each."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}; choose auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU here: use device=cpu, or check the driver.")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return device


def one_at_a_time(function: Callable[[Sequence[str]], list[int]]) -> Callable[[Sequence[str]], list[int]]:
    """`function` behind a lock: fast tokenizers may not be called by two threads at once."""
    lock = threading.Lock()

    def locked(texts: Sequence[str]) -> list[int]:
        with lock:
            return function(texts)

    return locked


def print_report(report: "EncodeReport", processes: int = 1) -> None:
    """What was found and made, for a person."""
    index: dict[str, Any] = report.index
    if report.audit is not None:
        print(report.audit.table())
    splits = ", ".join(f"{name} {split['clips']:.0f}" for name, split in sorted(index["splits"].items()))
    print(f"\n{report.folder}: {index['clips']:.0f} takes ({splits}), {index['seconds']:.1f} s of audio, ", end="")
    print(f"{len(index['shards'])} shard(s), {index['rejected']} rejected")
    share = "" if processes == 1 else " by this process"
    if report.encoded:
        speed = report.seconds / max(report.elapsed, 1e-9)
        print(f"encoded{share} {report.encoded} takes at {speed:.1f} × real time, {report.padding:.1%} padding", end="")
        print(f"; {report.reused} taken over" if report.reused else "")
    elif report.reused:
        print(f"nothing to encode, {report.reused} taken over{share}")
    else:
        print(f"nothing to encode{share}: all was done before")


if __name__ == "__main__":
    sys.exit(main())
