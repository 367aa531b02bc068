"""Loops: audio whose end joins its start.

The first pass plays on behind the loop's end, so that nothing fades out there. Then each item is rotated by half its
length, which puts the join in the middle, the join is inpainted with the rest as context, and the item rotated back.
Outside of the inpainted region and a short crossfade at its edges every sample is that of the first pass.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sa3train.adapters.apply.stack import AdapterStack
from sa3train.audio.edit import blend_region, fit
from sa3train.core.device import move_to_device
from sa3train.diffusion.samplers import Callback
from sa3train.inference.clip import generate_clip
from sa3train.inference.decoding import decode_audio
from sa3train.inference.resolve import count_samples
from sa3train.inference.sampling import Generation, prepare_start, report_part, sample_latents

REGION_SECONDS = 0.5
"""To each side of the join, what is inpainted; at most an eighth of the loop."""


def generate_loops(
    generation: Generation, stack: AdapterStack, callback: Callback | None = None, cuda_graphs: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Generate a batch of loops.

    Args:
        generation: The generation.
        stack: The adapters on the model.
        callback: Called after each step of each pass; may raise to cancel.
        cuda_graphs: Whether to capture the denoiser's step.

    Returns:
        Latents (B, C, T) of the first pass, and the audio (2, N_i) of each loop, which may exceed ±1.
    """
    settings, facts = generation.settings, generation.facts
    played = tuple(min(each + settings.tail, facts.longest) for each in settings.duration)
    first = replace(generation, settings=replace(settings, duration=played, tail=0.0))
    passes = 1 + settings.batch_size
    latents_BCT, audio = generate_clip(first, stack, report_part(callback, 0, passes), cuda_graphs)
    loops = []
    for item, audio_CN in enumerate(audio):
        audio_CN = audio_CN[:, : count_samples(facts, settings.duration[item])]
        report = report_part(callback, 1 + item, passes)
        loops.append(_close_loop(generation, stack, item, audio_CN, report, cuda_graphs))
    return latents_BCT, loops


def _close_loop(
    generation: Generation, stack: AdapterStack, item: int, audio_CN: Tensor, callback: Callback | None, graphs: bool
) -> Tensor:
    """Inpaint the join of one item."""
    settings, ratio, samples = generation.settings, generation.facts.downsampling_ratio, audio_CN.shape[1]
    negative = settings.negative_prompt
    one = replace(
        settings,
        prompt=settings.prompt[item : item + 1],
        negative_prompt=negative and negative[item : item + 1],
        duration=settings.duration[item : item + 1],
        tail=0.0,
        batch_size=1,
        keep_exact=True,
        init_audio=None,
        init_noise_level=None,
    )
    alone = replace(generation, settings=one, inputs={})
    shift = samples // 2
    rotated_CN, join = audio_CN.roll(-shift, dims=1), samples - shift
    reach = min(REGION_SECONDS * generation.facts.sample_rate, samples / 8)
    low, high = int((join - reach) / ratio), -int(-(join + reach) // ratio)
    start = prepare_start(alone)
    frames, autoencoder = start.latents_BCT.shape[-1], generation.model.autoencoder
    padded_1CN = move_to_device(fit(rotated_CN.clamp(-1, 1), frames * ratio)[None], autoencoder.device)
    encoded_1CT = autoencoder.encode(padded_1CN, generator=generation.rng)[..., :frames].float()
    kept_B1T = torch.zeros_like(start.kept_B1T)
    kept_B1T[..., :low] = kept_B1T[..., high : samples // ratio] = 1
    start = replace(start, kept_B1T=kept_B1T, masked_BCT=encoded_1CT * kept_B1T)
    latents_BCT = sample_latents(alone, stack, start, callback, graphs)
    made_CN = decode_audio(alone, latents_BCT)[0]
    return blend_region(rotated_CN, made_CN, low * ratio, high * ratio).roll(shift, dims=1)
