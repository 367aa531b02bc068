"""Pieces beyond the model's length, or whose prompt or adapters change: windows that continue each other.

Each window is generated with the end of the one before it as its beginning (inpainted, as a continuation is), and all
but the last play on behind their end, so that nothing fades out there. The end of what a window repeats is generated
anew, less and less bound to what was there: a frame stays on the way to its old latents down to a noise level that
rises towards the join (as in Levin and Fried 2023, "Differential Diffusion"). The latents of finished windows can
be kept in a folder, from which an interrupted piece is continued; the audio is decoded in blocks to a file that is
mapped into memory. So the memory that is needed does not grow with the length of the piece, where that file is on a
disk.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sa3train.adapters.apply.stack import AdapterStack
from sa3train.core.errors import GenerationError
from sa3train.core.files import path_exists, write_bytes, write_json
from sa3train.core.log import get_logger
from sa3train.core.mapped import map_tensor, release_pages
from sa3train.core.seeds import derive_seed
from sa3train.core.user_files import read_file
from sa3train.diffusion.samplers import Callback
from sa3train.diffusion.schedule import build_schedule
from sa3train.inference.decoding import decode_audio
from sa3train.inference.lengths import Window, plan_windows, to_seconds
from sa3train.inference.resolve import MIN_FRAMES, ModelFacts, ResolvedSettings, count_samples
from sa3train.inference.sampling import Generation, prepare_start, report_part, sample_latents

logger = get_logger(__name__)

OVERLAP_SHARE = 4
"""A quarter of a window repeats what is before it."""
BLOCK_FRAMES, MARGIN_FRAMES, FADE = 512, 16, 1024
"""Latent frames decoded at a time and around them, as the released model decodes in chunks; samples of a crossfade."""
RECORD = "piece.json"
FORMAT = 3  # of the windows in the folder


def list_windows(settings: ResolvedSettings, facts: ModelFacts) -> list[Window]:
    """List the windows of a piece.

    Args:
        settings: Resolved settings with a window.
        facts: The model's.

    Returns:
        The windows in latent frames.
    """
    assert settings.window is not None
    rate = facts.sample_rate / facts.downsampling_ratio
    frames = -(-count_samples(facts, settings.duration[0]) // facts.downsampling_ratio)
    longest = max(MIN_FRAMES, int(settings.window * rate))
    cuts = [round(float(time) * rate) for time, _ in settings.prompt_at or ()]
    return plan_windows(frames, longest, longest // OVERLAP_SHARE, cuts)


def generate_windows(
    generation: Generation,
    stack: AdapterStack,
    folder: Path | None = None,
    callback: Callback | None = None,
    cuda_graphs: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Generate a piece window by window.

    Args:
        generation: The generation, of one item.
        stack: The adapters on the model.
        folder: Where finished windows are kept; those that are there are not generated again. None keeps none.
        callback: Called after each step of each window; may raise to cancel.
        cuda_graphs: Whether to capture the denoiser's step.

    Returns:
        Latents (1, C, T) and the audio (2, N), which may exceed ±1 and is mapped from a temporary file.
    """
    windows = list_windows(generation.settings, generation.facts)
    latents_1CT = map_tensor((1, generation.model.latent_channels, windows[-1].stop), folder)
    try:
        for number, window in enumerate(windows):
            path = None if folder is None else folder / f"window-{number:04d}.safetensors"
            new_1CT = latents_1CT[..., window.release : window.stop]
            if path is not None and path_exists(path):
                new_1CT.copy_(safetensors.torch.load(read_file(path))["latents"])
                continue
            stack.position = window.new / max(1, windows[-1].new)
            ramps = [each["strength"] for each in stack.settings if isinstance(each["strength"], list)]
            strengths = ", ".join(f"{start + stack.position * (end - start):.3g}" for start, end in ramps)
            logger.info("window %d of %d%s", number + 1, len(windows), strengths and f", adapter strength {strengths}")
            repeated_1CT = latents_1CT[..., window.start : window.new]
            report = report_part(callback, number, len(windows))
            new_1CT.copy_(_generate_window(generation, stack, windows, number, repeated_1CT, report, cuda_graphs))
            if path is not None:
                write_bytes(path, safetensors.torch.save({"latents": new_1CT.contiguous()}))
            release_pages(latents_1CT)
    finally:
        stack.position = 0.0
    return latents_1CT, [_decode_in_blocks(generation, latents_1CT, folder)]


def _generate_window(
    generation: Generation,
    stack: AdapterStack,
    windows: list[Window],
    number: int,
    repeated_1CT: Tensor,
    callback: Callback | None,
    cuda_graphs: bool,
) -> Tensor:
    """Latents of a window from where it is no longer what was before it."""
    settings, facts, window = generation.settings, generation.facts, windows[number]
    ratio, is_last = facts.downsampling_ratio, number == len(windows) - 1
    samples = count_samples(facts, settings.duration[0]) - window.start * ratio
    if not is_last:
        played = (window.stop - window.start) * ratio + int(settings.tail * facts.sample_rate)
        samples = min(played, facts.max_frames * ratio)
    rate = facts.sample_rate / ratio
    prompts = [text for time, text in settings.prompt_at or () if round(float(time) * rate) <= window.new]
    own = replace(
        settings,
        prompt=(str(prompts[-1]),) if prompts else settings.prompt,
        prompt_at=None,
        window=None,
        duration=(to_seconds(samples, facts.sample_rate),),
        tail=settings.tail if is_last else 0.0,
        keep_exact=True,
    )
    one = replace(generation, settings=own, rng=_make_rng(settings, number))
    start, overlap, release = prepare_start(one), window.new - window.start, window.release - window.start
    if overlap:
        held_BCT, held_B1T = torch.zeros_like(start.masked_BCT), torch.ones_like(start.kept_B1T)
        held_BCT[..., :overlap] = repeated_1CT.to(held_BCT)
        held_B1T[..., :release] = 0
        held_B1T[..., release:overlap] = build_schedule(overlap - release + 1).flip(0)[1:-1]
        kept_B1T = (held_B1T == 0).to(held_B1T)
        start = replace(start, kept_B1T=kept_B1T, masked_BCT=held_BCT * kept_B1T, held_BCT=held_BCT, held_B1T=held_B1T)
    latents_1CT = sample_latents(one, stack, start, callback, cuda_graphs)
    return latents_1CT[..., release : window.stop - window.start]


def _make_rng(settings: ResolvedSettings, number: int) -> torch.Generator:
    """The draws of a window or block depend on the seed and its number alone, so that a piece can be continued."""
    return torch.Generator().manual_seed(derive_seed("window", settings.seed, number))


def _decode_in_blocks(generation: Generation, latents_1CT: Tensor, folder: Path | None) -> Tensor:
    """Audio (2, N) of a piece: each block is decoded with some of its neighbors and faded into the one before it."""
    settings, facts = generation.settings, generation.facts
    ratio, frames, samples = facts.downsampling_ratio, latents_1CT.shape[-1], count_samples(facts, settings.duration[0])
    audio_CN = map_tensor((2, samples), folder)
    device, rise_N = generation.model.autoencoder.device, torch.linspace(0, 1, FADE + 2)[1:-1]
    for number, first in enumerate(range(0, frames, BLOCK_FRAMES)):
        low, high = max(0, first - MARGIN_FRAMES), min(frames, first + BLOCK_FRAMES + MARGIN_FRAMES)
        own = replace(settings, duration=(to_seconds((high - low) * ratio, facts.sample_rate),), tail=0.0)
        block = replace(generation, settings=own, rng=_make_rng(settings, -1 - number))
        made_CN = decode_audio(block, latents_1CT[..., low:high].to(device))[0][:, (first - low) * ratio :]
        start, stop = first * ratio, min(samples, high * ratio)
        made_CN = made_CN[:, : stop - start]
        if first:
            fade = min(FADE, stop - start)
            made_CN[:, :fade] = audio_CN[:, start : start + fade].lerp(made_CN[:, :fade], rise_N[:fade])
        audio_CN[:, start:stop] = made_CN
        release_pages(audio_CN)
        release_pages(latents_1CT)
    return audio_CN


def open_work_dir(folder: Path, record: Mapping[str, Any], has_seed: bool) -> int:
    """Open the folder of a piece's finished windows, which must be of this piece.

    Args:
        folder: The folder, made where it is missing.
        record: What the sidecar records.
        has_seed: Whether the seed was asked for; else that of the folder is used.

    Returns:
        The seed of the piece.

    Raises:
        GenerationError: When the folder has another piece, or windows of another version.
    """
    path = folder / RECORD
    content = _identify_piece(record)
    if not path_exists(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
        return int(content["settings"]["seed"])
    found = json.loads(read_file(path))
    if not has_seed:
        content["settings"] = content["settings"] | {"seed": found["settings"]["seed"]}
    if found.get("format") != FORMAT:
        raise GenerationError(
            f"{folder} has the finished windows of another version of sa3train. Remove it to begin the piece again."
        )
    if found != content:
        raise GenerationError(
            f"{folder} has the finished windows of another piece. Remove it, or write this one to another file."
        )
    done = len(list(folder.glob("window-*.safetensors")))
    logger.info("continuing the piece of %s, of which %d windows are done", folder, done)
    return int(found["settings"]["seed"])


def _identify_piece(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT} | {name: record[name] for name in ("model", "precision", "settings", "adapters")}


def remove_work_dir(folder: Path, record: Mapping[str, Any]) -> None:
    """Remove the finished windows of a piece that is written, and their folder unless it has something else.

    Args:
        folder: The folder; nothing happens where it does not exist, or has the windows of another piece.
        record: What the sidecar of the piece records.
    """
    path = folder / RECORD
    if not path_exists(path) or json.loads(read_file(path)) != _identify_piece(record):
        return
    with contextlib.suppress(OSError):
        for path in (*folder.glob("window-*.safetensors"), folder / RECORD):
            path.unlink()
        folder.rmdir()
